-- Kimi delta attention.

local nn = require "moe.nn"
local base = require "moe.mixer.recurrent"
local Delta = require "moe.mixer.delta_rule"

--- Kimi delta attention: gated DeltaNet with a decay for every key, log alpha = -exp(A_log_h) softplus(f_proj x + dt_bias), f_proj
-- and the output gate g_proj of rank head_dim; y = o_proj (RMSNorm_head(S^T q / sqrt(dk)) sigmoid(g_proj x)).
-- x [batch, time, d_model] -> the same; heads of head_dim (d_model / num_heads unless given) keys and expand_v head_dim values.
-- The state as DeltaNet's. A_log [heads] is the logarithm of U(1, 16), dt_bias [heads head_dim]; neither decays.
-- Source: Kimi Team, "Kimi Linear", 2025, arXiv 2510.26692.
local KDA = nn.module("kda", Delta)

local ROWS <const> = Delta.rows {
  head_dim = { "integer" }, expand_v = { "number", 1 }, dt_min = { "number", 0.001 }, dt_max = { "number", 0.1 },
  dt_init_floor = { "number", 1e-4 },
}

function KDA:init(given)
  local o = self:options("kda", given, ROWS)
  local h = Delta.count(o)
  local dk = self:key_width(o, h)
  self:setup(o, h, dk, math.max(1, math.tointeger(o.expand_v * dk // 1)))
  self.f_proj = base.low_rank(o, o.d_model, self._dv, h * dk)
  self.A_log = base.plain(o, { h }, base.log_uniform(1, 16))
  self.dt_bias = base.plain(o, { h * dk }, base.step_bias(o.dt_min, o.dt_max, o.dt_init_floor))
  self.g_proj = base.low_rank(o, o.d_model, self._dv, h * self._dv, true)
end

function KDA:decay(x)
  local f = (base.through(self.f_proj, x) + self.dt_bias):softplus()
  return base.heads(f, self._heads) * -self.A_log:exp():unsqueeze(2)
end

function KDA:gate(y, x) return y * base.heads(base.through(self.g_proj, x), self._heads):sigmoid() end

return KDA
