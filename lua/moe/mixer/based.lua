-- Linear attention with the Taylor feature map.

local core = require "moe.core"
local nn = require "moe.nn"
local base = require "moe.mixer.recurrent"

--- Linear attention whose features approximate the exponential of softmax by its first terms: phi(x) = [1, x / d^(1/4),
-- x (x) x / sqrt(2 d)], so that phi(q) . phi(k) = 1 + s + s^2 / 2, s = q . k / sqrt(d) (above 0); o = sum of phi(q) . phi(k) v over
-- the times so far, divided by the sum of phi(q) . phi(k); y = o_proj o.
-- x [batch, time, d_model] -> the same; queries and keys of feature_dim a head, values of d_model / num_heads.
-- The state: recurrent [batch, heads, 1 + d + d^2, dv + 1], its last column the divisor.
-- Source: Arora et al., "Simple linear attention language models balance the recall-throughput tradeoff", 2024, arXiv 2402.18668.
local Based = nn.module("based", base.Recurrent)

local ROWS <const> = base.rows {
  num_heads = { "integer", 8 }, feature_dim = { "integer", 16 }, chunk_size = { "integer", 64 }, eps = { "number", 1e-12 },
}

function Based:init(given)
  local o = self:options("based", given, ROWS)
  local h = o.num_heads
  self._dv = self:divided(o.d_model, h, "num_heads = " .. h .. " (d_model in heads)")
  self.q_proj = base.linear(o, o.d_model, h * o.feature_dim)
  self.k_proj = base.linear(o, o.d_model, h * o.feature_dim)
  self.v_proj = base.linear(o, o.d_model, o.d_model)
  self.o_proj = base.linear(o, o.d_model, o.d_model)
end

function Based:sizes()
  local d = self._options.feature_dim
  return { recurrent = { self._options.num_heads, 1 + d + d * d, self._dv + 1 } }
end

local function ones_like(x) return core.ones({ x:size(1), x:size(2), x:size(3), 1 }, { dtype = x.dtype, device = x.device }) end

--- The features of x [batch, time, heads, d]: [.., 1 + d + d^2].
local function features(x)
  local d = x:size(4)
  local square = (x:unsqueeze(5) * x:unsqueeze(4)):flatten(-2) * (2 * d) ^ -0.5
  return core.cat({ ones_like(x), x * d ^ -0.25, square }, -1)
end

function Based:mix(x, state, cu)
  local o, after = self._options, {}
  local h = o.num_heads
  local v = base.heads(self.v_proj(x), h)
  local y
  y, after.recurrent = core.linear_attention(features(base.heads(self.q_proj(x), h)), features(base.heads(self.k_proj(x), h)),
    core.cat({ v, ones_like(v) }, -1), { scale = 1, initial_state = state.recurrent, cu_seqlens = cu, chunk_size = o.chunk_size })
  local sum, by = y:narrow(-1, 1, self._dv), y:narrow(-1, self._dv + 1, 1)
  return self.o_proj(base.join(sum / (by + o.eps))), after
end

Based.features = features

return Based
