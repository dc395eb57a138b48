-- Plain two-layer networks.

local core = require "moe.core"
local nn = require "moe.nn"
local base = require "moe.experts.base"
local sparse = core._sparse

--- Plain networks: down(act(up x)). Parameters up_proj [E, I, d], down_proj [E, d, I], with `bias` also up_bias and
-- down_bias. Options as in swiglu, and act: silu, gelu, gelu_tanh, relu, relu2, tanh, sigmoid, identity.
local Mlp = nn.module("mlp", base.Bank)
local MLP_ROWS <const> = base.rows { act = { base.ACTS, "gelu" } }

function Mlp:init(given)
  local o = self:setup("experts.mlp", given, MLP_ROWS)
  if not o then return end
  local E, d, I = self.num_experts, self.d_model, self.intermediate_size
  self.up_proj = base.parameter(o, { E, I, d }, o.init, d)
  self.down_proj = base.parameter(o, { E, self.d_out, I }, o.init, I)
  if o.bias then
    self.up_bias = base.parameter(o, { E, I }, o.init, d)
    self.down_bias = base.parameter(o, { E, self.d_out }, o.init, I)
  end
end

function Mlp:work(x, routing)
  return sparse.ffn(x, self.up_proj, self.down_proj, self.up_bias, self.down_bias, routing, self._options.act, false)
end

return Mlp
