-- What mixers with the delta rule share (DeltaNet, gated DeltaNet, Kimi delta attention): projections, short convolutions, unit
-- queries and keys, beta. Each adds its decay and its gate.

local core = require "moe.core"
local nn = require "moe.nn"
local base = require "moe.mixer.recurrent"

local Delta = nn.module("delta_rule", base.Recurrent)

local COMMON <const> = {
  num_heads = { "integer" }, conv_size = { "integer", 4 }, chunk_size = { "integer", 64 }, norm_eps = { "number", 1e-5 },
  allow_neg_eigval = { "boolean", false },
}

--- Option rows: those of every mixer of this kind, and one's own.
function Delta.rows(own)
  local rows = base.rows(COMMON)
  for name, row in pairs(own) do rows[name] = row end
  return rows
end

--- Keys of a head: head_dim, else an equal share of d_model.
function Delta:key_width(o, h)
  return o.head_dim or self:divided(o.d_model, h, "num_heads = " .. h .. " (d_model in heads)")
end

--- Heads: num_heads, else one for every 128 of d_model.
function Delta.count(o) return o.num_heads or math.max(1, o.d_model // 128) end

-- dk, dv: of a head; values: heads of v, a multiple of those of q and k, which are shared in groups.
function Delta:setup(o, heads, dk, dv, values)
  values = values or heads
  self:divided(values, heads, "num_heads = " .. heads .. " (num_v_heads in groups)")
  self._heads, self._values, self._dk, self._dv = heads, values, dk, dv
  self.q_proj = base.linear(o, o.d_model, heads * dk)
  self.k_proj = base.linear(o, o.d_model, heads * dk)
  self.v_proj = base.linear(o, o.d_model, values * dv)
  self.q_conv1d = base.Conv(o, heads * dk, o.conv_size)
  self.k_conv1d = base.Conv(o, heads * dk, o.conv_size)
  self.v_conv1d = base.Conv(o, values * dv, o.conv_size)
  self.b_proj = base.linear(o, o.d_model, values)
  self.o_norm = nn.rmsnorm { size = dv, eps = o.norm_eps, dtype = o.dtype, device = o.device }
  self.o_proj = base.linear(o, values * dv, o.d_model)
end

function Delta:sizes()
  return { q_conv = self.q_conv1d:size(), k_conv = self.k_conv1d:size(), v_conv = self.v_conv1d:size(),
    recurrent = { self._values, self._dk, self._dv } }
end

-- The decay of x, if there is one, and what the normed heads [batch, time, heads, dv] are multiplied with.
function Delta.decay() end
function Delta.gate(_, y) return y end

function Delta:mix(x, state, cu)
  local o, h, after = self._options, self._heads, {}
  local q, k, v, y
  q, after.q_conv = self.q_conv1d(self.q_proj(x), state.q_conv, cu)
  k, after.k_conv = self.k_conv1d(self.k_proj(x), state.k_conv, cu)
  v, after.v_conv = self.v_conv1d(self.v_proj(x), state.v_conv, cu)
  local beta = self.b_proj(x):sigmoid()
  if o.allow_neg_eigval then beta = beta * 2 end
  y, after.recurrent = core.linear_attention(base.unit(base.heads(q, h)), base.unit(base.heads(k, h)), base.heads(v, self._values), {
    decay = self:decay(x), beta = beta, delta = true, initial_state = state.recurrent, cu_seqlens = cu, chunk_size = o.chunk_size,
  })
  return self.o_proj(base.join(self:gate(self.o_norm(y), x))), after
end

return Delta
