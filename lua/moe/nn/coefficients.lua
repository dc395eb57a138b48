-- The coefficients of polynomial activations, for modules and banks.

local core = require "moe.core"
local parameter = require("moe.nn.module").parameter

-- The first ones: a_0 = 0, the others 1 / order, as [order + 1] or a line for each of `rows`. o: dtype, device.
return function(order, rows, o)
  local a = core.full(rows and { rows, order + 1 } or { order + 1 }, 1 / order, { dtype = o.dtype or "f32", device = o.device })
  a:narrow(-1, 1, 1):mul_(0)
  return parameter(a, { decay = false })
end
