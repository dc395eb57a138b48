-- Gated linear attention.

local core = require "moe.core"
local nn = require "moe.nn"
local base = require "moe.mixer.recurrent"

--- Gated linear attention: each head keeps S = diag(alpha) S + k v^T with a decay for every key,
-- log alpha = logsigmoid(gk_proj x) / gate_logit_normalizer, gk_proj of rank gate_low_rank_dim;
-- y = o_proj (RMSNorm_head(S^T q / sqrt(dk)) silu(g_proj x)).
-- x [batch, time, d_model] -> the same; heads of expand_k d_model / num_heads keys and expand_v d_model / num_heads values.
-- The state: recurrent [batch, heads, dk, dv].
-- Source: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", 2023, arXiv 2312.06635, section 4.4.
local GLA = nn.module("gla", base.Recurrent)

local ROWS <const> = base.rows {
  num_heads = { "integer", 4 }, expand_k = { "number", 0.5 }, expand_v = { "number", 1 }, gate_low_rank_dim = { "integer", 16 },
  gate_logit_normalizer = { "number", 16 }, chunk_size = { "integer", 64 }, norm_eps = { "number", 1e-5 },
}

function GLA:init(given)
  local o = self:options("gla", given, ROWS)
  local h = o.num_heads
  local keys, values = math.tointeger(o.d_model * o.expand_k // 1), math.tointeger(o.d_model * o.expand_v // 1)
  self._dk = self:divided(keys, h, "num_heads = " .. h .. " (expand_k * d_model in heads)")
  self._dv = self:divided(values, h, "num_heads = " .. h .. " (expand_v * d_model in heads)")
  self.q_proj = base.linear(o, o.d_model, keys)
  self.k_proj = base.linear(o, o.d_model, keys)
  self.v_proj = base.linear(o, o.d_model, values)
  self.gk_proj = base.low_rank(o, o.d_model, o.gate_low_rank_dim, keys, true)
  self.g_proj = base.linear(o, o.d_model, values)
  self.g_norm = nn.rmsnorm { size = self._dv, eps = o.norm_eps, dtype = o.dtype, device = o.device }
  self.o_proj = base.linear(o, values, o.d_model)
end

function GLA:sizes() return { recurrent = { self._options.num_heads, self._dk, self._dv } } end

function GLA:mix(x, state, cu)
  local o, after = self._options, {}
  local h = o.num_heads
  local decay = base.through(self.gk_proj, x):logsigmoid() * (1 / o.gate_logit_normalizer)
  local y
  y, after.recurrent = core.linear_attention(base.heads(self.q_proj(x), h), base.heads(self.k_proj(x), h),
    base.heads(self.v_proj(x), h),
    { decay = base.heads(decay, h), initial_state = state.recurrent, cu_seqlens = cu, chunk_size = o.chunk_size })
  return self.o_proj(base.join(self.g_norm(y)) * self.g_proj(x):silu()), after
end

return GLA
