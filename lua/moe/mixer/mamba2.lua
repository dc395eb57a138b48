-- Mamba-2: a selective state space with one decay a head.

local core = require "moe.core"
local nn = require "moe.nn"
local base = require "moe.mixer.recurrent"

--- Mamba-2, state-space duality: [z, x B C, dt] = in_proj u; x B C through a causal convolution and SiLU; with d = softplus(dt +
-- dt_bias) each head h keeps S = exp(-exp(A_log_h) d) S + d B x^T and gives y = S^T C + D_h x; out_proj (RMSNorm(y silu(z))).
-- x [batch, time, d_model] -> the same; inner width expand * d_model in heads of headdim; B and C [d_state] for each of ngroups
-- groups of heads. The state: conv [batch, d_conv - 1, inner + 2 ngroups d_state], recurrent [batch, heads, d_state, headdim].
-- RMSNorm is over the channels of a group. norm_before_gate: RMSNorm(y) silu(z); rmsnorm = false: y silu(z). Names and first
-- values as in mamba_ssm.
-- Source: Dao and Gu, "Transformers are SSMs", 2024, arXiv 2405.21060.
local Mamba2 = nn.module("mamba2", base.Recurrent)

local ROWS <const> = base.rows {
  d_state = { "integer", 128 }, d_conv = { "integer", 4 }, expand = { "number", 2 }, headdim = { "integer", 64 },
  ngroups = { "integer", 1 }, chunk_size = { "integer", 64 }, rmsnorm = { "boolean", true },
  norm_before_gate = { "boolean", false }, D_has_hdim = { "boolean", false }, bias = { "boolean", false },
  conv_bias = { "boolean", true }, dt_min = { "number", 0.001 }, dt_max = { "number", 0.1 },
  dt_init_floor = { "number", 1e-4 }, A_init_range = { "table", { 1, 16 } }, norm_eps = { "number", 1e-5 },
}

function Mamba2:init(given)
  local o = self:options("mamba2", given, ROWS)
  local inner = math.tointeger(o.expand * o.d_model // 1)
  local heads = self:divided(inner, o.headdim, "headdim = " .. o.headdim .. " (expand * d_model in heads)")
  self:divided(heads, o.ngroups, "ngroups = " .. o.ngroups .. " (the heads in groups)")
  self._inner, self._heads, self._mid = inner, heads, inner + 2 * o.ngroups * o.d_state
  self.in_proj = base.linear(o, o.d_model, inner + self._mid + heads, o.bias)
  self.conv1d = base.Conv(o, self._mid, o.d_conv, o.conv_bias)
  self.dt_bias = base.plain(o, { heads }, base.step_bias(o.dt_min, o.dt_max, o.dt_init_floor))
  self.A_log = base.plain(o, { heads }, base.log_uniform(table.unpack(o.A_init_range)))
  self.D = base.plain(o, o.D_has_hdim and { heads, o.headdim } or { heads }, 1)
  if o.rmsnorm then self.norm = nn.rmsnorm { size = inner, eps = o.norm_eps, dtype = o.dtype, device = o.device } end
  self.out_proj = base.linear(o, inner, o.d_model, o.bias)
end

function Mamba2:sizes()
  return { conv = self.conv1d:size(), recurrent = { self._heads, self._options.d_state, self._options.headdim } }
end

function Mamba2:mix(u, state, cu)
  local o = self._options
  local z, mid, dt = core.split(self.in_proj(u), { self._inner, self._mid, self._heads }, -1)
  local after = {}
  mid, after.conv = self.conv1d(mid, state.conv, cu)
  local states = o.ngroups * o.d_state
  local x, B, C = core.split(mid, { self._inner, states, states }, -1)
  local y
  x, B, C = base.heads(x, self._heads), base.heads(B, o.ngroups), base.heads(C, o.ngroups)
  y, after.recurrent = core.ssd(x, dt, -self.A_log:exp(), B, C, {
    D = self.D, dt_bias = self.dt_bias, dt_softplus = true, initial_state = state.recurrent, cu_seqlens = cu,
    chunk_size = o.chunk_size,
  })
  y = base.join(y)
  if not self.norm then
    y = y * z:silu()
  elseif o.norm_before_gate then
    y = self:normed(y) * z:silu()
  else
    y = self:normed(y * z:silu())
  end
  return self.out_proj(y), after
end

-- The norm is of each group by itself.
function Mamba2:normed(y)
  local o = self._options
  if o.ngroups == 1 then return self.norm(y) end
  return base.join(core.rms_norm(base.heads(y, o.ngroups), nil, o.norm_eps)) * self.norm.weight
end

return Mamba2
