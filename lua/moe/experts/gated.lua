-- Gated networks: down(act(gate x) * up x) (Shazeer 2020, arXiv 2002.05202).

local nn = require "moe.nn"
local base = require "moe.experts.base"
local activation = require "moe.experts.activation"

local M = {}

local GLU_ROWS <const> = activation.rows "silu"
local FIXED_ROWS <const> = base.rows {}

-- A class; with `act`, of that one activation.
local function gated(name, rows, act)
  local Class = nn.module(name, base.Bank)
  Class.fixed_act = act
  function Class:init(given)
    local o = self:setup("experts." .. name, given, rows)
    if not act then activation.check("experts." .. name, self._options, 3) end
    if not o then return end
    local E, d, I = self.num_experts, self.d_model, self.intermediate_size
    self.gate_up_proj = base.parameter(o, { E, 2 * I, d }, o.init, d)
    self.down_proj = base.parameter(o, { E, self.d_out, I }, o.init, I)
    if o.bias then
      self.gate_up_bias = base.parameter(o, { E, 2 * I }, o.init, d)
      self.down_bias = base.parameter(o, { E, self.d_out }, o.init, I)
    end
    activation.attach(self, o)
  end
  function Class:work(x, routing)
    return activation.network(self, x, routing, self.gate_up_proj, self.down_proj, self.gate_up_bias, self.down_bias, true)
  end
  return Class
end

--- SwiGLU networks: down(silu(gate x) * up x). Parameters gate_up_proj [E, 2 I, d] (gate first), down_proj [E, d, I].
-- Options: intermediate_size, bias, init, d_out; d_model and num_experts (one) for a bank of its own.
M.swiglu = gated("swiglu", FIXED_ROWS, "silu")

--- The same with another activation `act` of the gate: "gelu" is GEGLU, "relu" ReGLU, "sigmoid" GLU; polynomials, modules and
-- functions as in mlp.
M.glu = gated("glu", GLU_ROWS)

--- GEGLU networks: down(gelu(gate x) * up x). Parameters and options as in swiglu.
M.geglu = gated("geglu", FIXED_ROWS, "gelu")

return M
