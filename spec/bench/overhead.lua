-- An addition of two tensors of 8 elements called from Lua, with and without recording: us a call.
local moe = require "moe"
local serve = require "spec.bench.serve"

local a, b = moe.randn(8), moe.randn(8)
local ra = moe.randn(8, { requires_grad = true })
local CALLS <const> = 20000

local function once(x, y)
  local t = moe.clock()
  for _ = 1, CALLS do local _ = x + y end
  return (moe.clock() - t) / CALLS * 1e6
end

local plain, recorded = math.huge, math.huge
serve.blocks(function()
  plain = math.min(plain, once(a, b))
  recorded = math.min(recorded, once(ra, b))
end, function() return ("%.4f %.4f"):format(plain, recorded) end)
