-- Mamba: a selective state space, every channel with states and decays of its own.

local core = require "moe.core"
local nn = require "moe.nn"
local base = require "moe.mixer.recurrent"

--- Mamba: [x, z] = in_proj u; x through a causal convolution and SiLU; [dt, B, C] = x_proj x; with
-- d = softplus(dt_proj dt) every channel keeps h = exp(-exp(A_log) d) h + d B x and gives y = <C, h> + D x; out_proj (y silu(z)).
-- x [batch, time, d_model] -> the same; inner width expand * d_model, d_state numbers a channel; dt_rank defaults to
-- d_model / 16, rounded up. The state: conv [batch, d_conv - 1, inner], recurrent [batch, inner, d_state]. A_log starts as
-- log(1 .. d_state), dt_proj's bias where softplus of it is even in its logarithm between dt_min and dt_max, D as 1. Names and
-- first values as in mamba_ssm.
-- Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, arXiv 2312.00752.
local Mamba = nn.module("mamba", base.Recurrent)

local ROWS <const> = {
  d_state = { "integer", 16 }, d_conv = { "integer", 4 }, expand = { "number", 2 }, dt_rank = { "integer" },
  bias = { "boolean", false }, conv_bias = { "boolean", true }, dt_min = { "number", 0.001 }, dt_max = { "number", 0.1 },
  dt_scale = { "number", 1 }, dt_init_floor = { "number", 1e-4 },
}

function Mamba:init(given)
  local o = self:options("mamba", given, ROWS)
  local inner = math.max(1, math.tointeger(o.expand * o.d_model // 1))
  local rank = o.dt_rank or (o.d_model + 15) // 16
  self._inner, self._rank = inner, rank
  self.in_proj = base.linear(o, o.d_model, 2 * inner, o.bias)
  self.conv1d = base.Conv(o, inner, o.d_conv, o.conv_bias)
  self.x_proj = base.linear(o, inner, rank + 2 * o.d_state)
  self.dt_proj = base.linear(o, rank, inner, true)
  local r = o.dt_scale * rank ^ -0.5
  nn.init.uniform_(self.dt_proj.weight:detach(), -r, r)
  base.step_bias(o.dt_min, o.dt_max, o.dt_init_floor)(self.dt_proj.bias:detach())
  self.A_log = base.plain(o, { inner, o.d_state }, function(t)
    t:copy_(core.arange(1, o.d_state):to(t.dtype):log():expand { inner, o.d_state })
  end)
  self.D = base.plain(o, { inner }, 1)
  self.out_proj = base.linear(o, inner, o.d_model, o.bias)
end

function Mamba:sizes()
  return { conv = self.conv1d:size(), recurrent = { self._inner, self._options.d_state } }
end

function Mamba:mix(u, state, cu)
  local after, n = {}, self._options.d_state
  local x, z = core.split(self.in_proj(u), { self._inner, self._inner }, -1)
  x, after.conv = self.conv1d(x, state.conv, cu)
  local dt, B, C = core.split(self.x_proj(x), { self._rank, n, n }, -1)
  local y
  y, after.recurrent = core.selective_scan(x, dt:linear(self.dt_proj.weight), -self.A_log:exp(), B, C, {
    D = self.D, z = z, delta_bias = self.dt_proj.bias, delta_softplus = true, state = state.recurrent, cu_seqlens = cu,
  })
  return self.out_proj(y), after
end

return Mamba
