-- Lightning attention.

local core = require "moe.core"
local nn = require "moe.nn"
local base = require "moe.mixer.recurrent"

--- Lightning attention: [q, k, v] of each head are SiLU of qkv_proj x; the head keeps S = exp(-slope) S + k v^T with the constant
-- slope_h = 2^(-8 h / num_heads) (1 - (layer - 1) / (num_layers - 1)), h = 1 .. num_heads: the later the layer, the longer it
-- remembers; y = out_proj (sigmoid(output_gate x) RMSNorm(S^T q)).
-- x [batch, time, d_model] -> the same; heads of head_dim (d_model / num_heads). The state: recurrent [batch, heads, dk, dk].
-- Sources: Qin et al., "Lightning Attention-2", 2024, arXiv 2401.04658; names and slopes as in MiniMax-01, arXiv 2501.08313.
local Lightning = nn.module("lightning", base.Recurrent)

local ROWS <const> = base.rows {
  num_heads = { "integer", 8 }, head_dim = { "integer" }, layer = { "integer", 1 }, num_layers = { "integer", 1 },
  chunk_size = { "integer", 64 }, norm_eps = { "number", 1e-6 },
}

function Lightning:init(given)
  local o = self:options("lightning", given, ROWS)
  local h = o.num_heads
  if o.layer > o.num_layers then error(("lightning: layer %d of num_layers = %d"):format(o.layer, o.num_layers), 3) end
  self._dim = o.head_dim or self:divided(o.d_model, h, "num_heads = " .. h .. " (d_model in heads)")
  local width = h * self._dim
  self.qkv_proj = base.linear(o, o.d_model, 3 * width)
  self.norm = nn.rmsnorm { size = width, eps = o.norm_eps, dtype = o.dtype, device = o.device }
  self.output_gate = base.linear(o, o.d_model, width)
  self.out_proj = base.linear(o, width, o.d_model)
  self._decay = {}
  local by = 1 - (o.layer - 1) / (o.num_layers - 1 + 1e-5) + 1e-5
  for i = 1, h do self._decay[i] = -2 ^ (-8 * i / h) * by end
end

function Lightning:sizes() return { recurrent = { self._options.num_heads, self._dim, self._dim } } end

function Lightning:mix(x, state, cu)
  local o, after = self._options, {}
  local qkv = base.heads(self.qkv_proj(x):silu(), o.num_heads)
  local q, k, v = core.split(qkv, self._dim, -1)
  local y
  y, after.recurrent = core.linear_attention(q, k, v, {
    decay = core.tensor(self._decay, { dtype = o.dtype == "f64" and "f64" or "f32", device = x.device }), scale = 1,
    initial_state = state.recurrent, cu_seqlens = cu, chunk_size = o.chunk_size,
  })
  return self.out_proj(self.output_gate(x):sigmoid() * self.norm(base.join(y))), after
end

return Lightning
