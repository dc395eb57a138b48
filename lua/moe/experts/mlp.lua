-- Plain two-layer networks.

local nn = require "moe.nn"
local base = require "moe.experts.base"
local activation = require "moe.experts.activation"

--- Plain networks: down(act(up x)). Parameters up_proj [E, I, d], down_proj [E, d, I], with `bias` also up_bias and
-- down_bias. Options as in swiglu, and act: silu, gelu, gelu_tanh, relu, relu2, tanh, sigmoid, identity; poly_relu or poly_norm
-- with `coefficients` [E, order + 1] of every expert (options order, 3, and eps; arXiv 2411.03884); or a module, such as
-- moe.nn.poly_norm() with coefficients that all share, or a function (h [A, I], routing) -> [A, I] of the hidden rows.
local Mlp = nn.module("mlp", base.Bank)
local MLP_ROWS <const> = activation.rows "gelu"

function Mlp:init(given)
  local o = self:setup("experts.mlp", given, MLP_ROWS)
  activation.check("experts.mlp", self._options, 3)
  if not o then return end
  local E, d, I = self.num_experts, self.d_model, self.intermediate_size
  self.up_proj = base.parameter(o, { E, I, d }, o.init, d)
  self.down_proj = base.parameter(o, { E, self.d_out, I }, o.init, I)
  if o.bias then
    self.up_bias = base.parameter(o, { E, I }, o.init, d)
    self.down_bias = base.parameter(o, { E, self.d_out }, o.init, I)
  end
  activation.attach(self, o)
end

function Mlp:work(x, routing)
  return activation.network(self, x, routing, self.up_proj, self.down_proj, self.up_bias, self.down_bias, false)
end

return Mlp
