-- Multi-scale retention.

local core = require "moe.core"
local nn = require "moe.nn"
local base = require "moe.mixer.recurrent"

--- Multi-scale retention: q and k turn with their positions (RoPE), each head h = 0, 1, .. keeps S = gamma_h S + k v^T with the
-- constant decay gamma_h = 1 - 2^(-5 - h); y = o_proj (RMSNorm_head(S^T q / sqrt(dk)) silu(g_proj x)).
-- x [batch, time, d_model] -> the same; heads of expand_k d_model / num_heads keys and expand_v d_model / num_heads values.
-- The state: recurrent [batch, heads, dk, dv] and the position reached.
-- Source: Sun et al., "Retentive Network", 2023, arXiv 2307.08621, equations 5 to 8.
local Retention = nn.module("retention", base.Recurrent)

local ROWS <const> = base.rows {
  num_heads = { "integer", 8 }, expand_k = { "number", 1 }, expand_v = { "number", 2 }, rope_base = { "number", 10000 },
  chunk_size = { "integer", 64 }, norm_eps = { "number", 1e-5 },
}

function Retention:init(given)
  local o = self:options("retention", given, ROWS)
  local h = o.num_heads
  local keys, values = math.tointeger(o.d_model * o.expand_k // 1), math.tointeger(o.d_model * o.expand_v // 1)
  self._dk = self:divided(keys, h, "num_heads = " .. h .. " (expand_k * d_model in heads)")
  self._dv = self:divided(values, h, "num_heads = " .. h .. " (expand_v * d_model in heads)")
  if self._dk % 2 ~= 0 then error(("retention: rope turns pairs: a head must have an even width, got %d"):format(self._dk), 3) end
  self._positions = true
  self.q_proj = base.linear(o, o.d_model, keys)
  self.k_proj = base.linear(o, o.d_model, keys)
  self.v_proj = base.linear(o, o.d_model, values)
  self.g_proj = base.linear(o, o.d_model, values)
  self.g_norm = nn.rmsnorm { size = self._dv, eps = o.norm_eps, dtype = o.dtype, device = o.device }
  self.o_proj = base.linear(o, values, o.d_model)
  local decay = {}
  for i = 1, h do decay[i] = math.log(1 - 2 ^ (-4 - i)) end
  self._decay = decay
end

function Retention:sizes() return { recurrent = { self._options.num_heads, self._dk, self._dv } } end

-- Positions of packed times, each sequence from 0.
local function restarting(cu, x)
  local at, list = cu:totable(), {}
  for s = 1, #at - 1 do
    for i = 0, at[s + 1] - at[s] - 1 do list[#list + 1] = i end
  end
  return core.tensor(#list > 0 and list or core.zeros { 0 }, { dtype = "f32", device = x.device })
end

function Retention:mix(x, state, cu)
  local o, after = self._options, {}
  local h = o.num_heads
  local turn = { offset = state.position, base = o.rope_base, positions = cu and restarting(cu, x) or nil }
  local function turned(t) return base.heads(t, h):transpose(2, 3):rope(turn):transpose(2, 3) end
  local q, k, v = turned(self.q_proj(x)), turned(self.k_proj(x)), base.heads(self.v_proj(x), h)
  local y
  y, after.recurrent = core.linear_attention(q, k, v, {
    decay = core.tensor(self._decay, { dtype = self._options.dtype == "f64" and "f64" or "f32", device = x.device }),
    initial_state = state.recurrent, cu_seqlens = cu, chunk_size = o.chunk_size,
  })
  return self.o_proj(base.join(self.g_norm(y)) * self.g_proj(x):silu()), after
end

return Retention
