-- Mixers with the delta rule: DeltaNet, gated DeltaNet, Kimi delta attention.

local core = require "moe.core"
local nn = require "moe.nn"
local base = require "moe.mixer.recurrent"

-- What the three share: projections, short convolutions, unit queries and keys, beta. Each adds its decay and its gate.
local Delta = nn.module("delta", base.Recurrent)

local COMMON <const> = {
  num_heads = { "integer" }, conv_size = { "integer", 4 }, chunk_size = { "integer", 64 }, norm_eps = { "number", 1e-5 },
  allow_neg_eigval = { "boolean", false },
}

local function rows_with(own)
  local rows = {}
  for _, part in ipairs { COMMON, own } do
    for name, row in pairs(part) do rows[name] = row end
  end
  return rows
end

-- dk, dv: of a head.
function Delta:setup(o, heads, dk, dv)
  self._heads, self._dk, self._dv = heads, dk, dv
  self.q_proj = base.linear(o, o.d_model, heads * dk)
  self.k_proj = base.linear(o, o.d_model, heads * dk)
  self.v_proj = base.linear(o, o.d_model, heads * dv)
  self.q_conv1d = base.Conv(o, heads * dk, o.conv_size)
  self.k_conv1d = base.Conv(o, heads * dk, o.conv_size)
  self.v_conv1d = base.Conv(o, heads * dv, o.conv_size)
  self.b_proj = base.linear(o, o.d_model, heads)
  self.o_norm = nn.rmsnorm { size = dv, eps = o.norm_eps, dtype = o.dtype, device = o.device }
  self.o_proj = base.linear(o, heads * dv, o.d_model)
end

function Delta:sizes()
  return { q_conv = self.q_conv1d:size(), k_conv = self.k_conv1d:size(), v_conv = self.v_conv1d:size(),
    recurrent = { self._heads, self._dk, self._dv } }
end

-- The decay of x, if there is one, and what the normed heads [batch, time, heads, dv] are multiplied with.
function Delta:decay() end
function Delta:gate(y) return y end

function Delta:mix(x, state, cu)
  local o, h, after = self._options, self._heads, {}
  local q, k, v, y
  q, after.q_conv = self.q_conv1d(self.q_proj(x), state.q_conv, cu)
  k, after.k_conv = self.k_conv1d(self.k_proj(x), state.k_conv, cu)
  v, after.v_conv = self.v_conv1d(self.v_proj(x), state.v_conv, cu)
  local beta = self.b_proj(x):sigmoid()
  if o.allow_neg_eigval then beta = beta * 2 end
  y, after.recurrent = core.linear_attention(base.unit(base.heads(q, h)), base.unit(base.heads(k, h)), base.heads(v, h), {
    decay = self:decay(x), beta = beta, delta = true, initial_state = state.recurrent, cu_seqlens = cu, chunk_size = o.chunk_size,
  })
  return self.o_proj(base.join(self:gate(self.o_norm(y), x))), after
end

--- DeltaNet: q, k, v through projections, causal convolutions of conv_size with SiLU; q and k of length 1; with beta =
-- sigmoid(b_proj x) each head replaces what its key holds: S = S + beta k (v - S^T k)^T; y = o_proj RMSNorm_head(S^T q / sqrt(dk)).
-- x [batch, time, d_model] -> the same; heads of expand_k d_model / num_heads keys and expand_v d_model / num_heads values;
-- allow_neg_eigval: beta up to 2. The state: q_conv, k_conv, v_conv [batch, conv_size - 1, width], recurrent [batch, heads, dk, dv].
-- Source: Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", 2024, arXiv 2406.06484.
local DeltaNet = nn.module("delta", Delta)

function DeltaNet:init(given)
  local o = self:options("delta", given, rows_with { expand_k = { "number", 1 }, expand_v = { "number", 1 } })
  local h = o.num_heads or math.max(1, o.d_model // 128)
  self:setup(o, h, self:divided(math.tointeger(o.d_model * o.expand_k // 1), h, "num_heads = " .. h .. " (expand_k * d_model in heads)"),
    self:divided(math.tointeger(o.d_model * o.expand_v // 1), h, "num_heads = " .. h .. " (expand_v * d_model in heads)"))
end

--- Gated DeltaNet: DeltaNet whose state decays first, S' = alpha S; S = S' + beta k (v - S'^T k)^T, with one decay a head,
-- log alpha = -exp(A_log) softplus(a_proj x + dt_bias); y = o_proj (RMSNorm_head(S^T q / sqrt(dk)) silu(g_proj x)).
-- x [batch, time, d_model] -> the same; heads of head_dim (d_model / num_heads unless given) keys and expand_v head_dim values.
-- The state as DeltaNet's. A_log is the logarithm of U(0, 16), dt_bias such that the step lies in dt_min .. dt_max; neither decays.
-- Source: Yang, Kautz and Hatamizadeh, "Gated Delta Networks", 2024, arXiv 2412.06464.
local GatedDelta = nn.module("gated_delta", Delta)

function GatedDelta:init(given)
  local o = self:options("gated_delta", given, rows_with { head_dim = { "integer" }, expand_v = { "number", 2 },
    use_gate = { "boolean", true }, dt_min = { "number", 0.001 }, dt_max = { "number", 0.1 }, dt_init_floor = { "number", 1e-4 } })
  local h = o.num_heads or math.max(1, o.d_model // 128)
  local dk = o.head_dim or self:divided(o.d_model, h, "num_heads = " .. h .. " (d_model in heads)")
  self:setup(o, h, dk, math.max(1, math.tointeger(o.expand_v * dk // 1)))
  self.a_proj = base.linear(o, o.d_model, h)
  self.A_log = base.plain(o, { h }, base.log_uniform(0, 16))
  self.dt_bias = base.plain(o, { h }, base.step_bias(o.dt_min, o.dt_max, o.dt_init_floor))
  if o.use_gate then self.g_proj = base.linear(o, o.d_model, h * self._dv) end
end

function GatedDelta:decay(x) return (self.a_proj(x) + self.dt_bias):softplus() * -self.A_log:exp() end

function GatedDelta:gate(y, x)
  return self.g_proj and y * base.heads(self.g_proj(x), self._heads):silu() or y
end

--- Kimi delta attention: gated DeltaNet with a decay for every key, log alpha = -exp(A_log_h) softplus(f_proj x + dt_bias), f_proj
-- and the output gate g_proj of rank head_dim; y = o_proj (RMSNorm_head(S^T q / sqrt(dk)) sigmoid(g_proj x)).
-- x [batch, time, d_model] -> the same; heads of head_dim (d_model / num_heads unless given) keys and expand_v head_dim values.
-- The state as DeltaNet's. A_log [heads] is the logarithm of U(1, 16), dt_bias [heads head_dim]; neither decays.
-- Source: Kimi Team, "Kimi Linear", 2025, arXiv 2510.26692.
local KDA = nn.module("kda", Delta)

function KDA:init(given)
  local o = self:options("kda", given, rows_with { head_dim = { "integer" }, expand_v = { "number", 1 }, dt_min = { "number", 0.001 },
    dt_max = { "number", 0.1 }, dt_init_floor = { "number", 1e-4 } })
  local h = o.num_heads or math.max(1, o.d_model // 128)
  local dk = o.head_dim or self:divided(o.d_model, h, "num_heads = " .. h .. " (d_model in heads)")
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

return { delta = DeltaNet, gated_delta = GatedDelta, kda = KDA }
