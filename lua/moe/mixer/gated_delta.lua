-- Gated DeltaNet.

local nn = require "moe.nn"
local base = require "moe.mixer.recurrent"
local Delta = require "moe.mixer.delta_rule"

--- Gated DeltaNet: DeltaNet whose state decays first, S' = alpha S; S = S' + beta k (v - S'^T k)^T, with one decay a head,
-- log alpha = -exp(A_log) softplus(a_proj x + dt_bias); y = o_proj (RMSNorm_head(S^T q / sqrt(dk)) silu(g_proj x)).
-- x [batch, time, d_model] -> the same; num_heads heads of head_dim (d_model / num_heads unless given) queries and keys, shared in
-- groups by num_v_heads heads of expand_v head_dim values.
-- The state as DeltaNet's. A_log is the logarithm of U(0, 16), dt_bias such that the step lies in dt_min .. dt_max; neither decays.
-- Source: Yang, Kautz and Hatamizadeh, "Gated Delta Networks", 2024, arXiv 2412.06464.
local GatedDelta = nn.module("gated_delta", Delta)

local ROWS <const> = Delta.rows {
  head_dim = { "integer" }, num_v_heads = { "integer" }, expand_v = { "number", 2 }, use_gate = { "boolean", true },
  dt_min = { "number", 0.001 }, dt_max = { "number", 0.1 }, dt_init_floor = { "number", 1e-4 },
}

function GatedDelta:init(given)
  local o = self:options("gated_delta", given, ROWS)
  local h = Delta.count(o)
  local dk, values = self:key_width(o, h), o.num_v_heads or h
  self:setup(o, h, dk, math.max(1, math.tointeger(o.expand_v * dk // 1)), values)
  self.a_proj = base.linear(o, o.d_model, values)
  self.A_log = base.plain(o, { values }, base.log_uniform(0, 16))
  self.dt_bias = base.plain(o, { values }, base.step_bias(o.dt_min, o.dt_max, o.dt_init_floor))
  if o.use_gate then self.g_proj = base.linear(o, o.d_model, values * self._dv) end
end

function GatedDelta:decay(x) return (self.a_proj(x) + self.dt_bias):softplus() * -self.A_log:exp() end

function GatedDelta:gate(y, x)
  return self.g_proj and y * base.heads(self.g_proj(x), self._values):silu() or y
end

return GatedDelta
