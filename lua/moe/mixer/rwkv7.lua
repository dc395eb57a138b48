-- RWKV-7's time mixing.

local core = require "moe.core"
local nn = require "moe.nn"
local base = require "moe.mixer.recurrent"

--- RWKV-7's time mixing. Each input is blended with the one before it, x_i = x + mu_i (x_before - x), for i = r, w, k, v, a, g;
-- r, k, v = projections; w = exp(-e^(-1/2) sigmoid(w_lora x_w)); a = sigmoid(a_lora x_a); g = sigmoid-gated g_lora x_g;
-- kk = k k_k of length 1 a head, k = k (1 + (a - 1) k_a). Each head keeps
--   S = diag(w) S - (a kk) (kk^T S_before) + k v^T:
-- the state forgets what kk holds, by the share a, and takes the new value. y = o_proj (g (GroupNorm_head(S^T r) + (r . r_k k) v)).
-- layer > 1: v moves toward the first layer's by sigmoid(v_lora x_v), v = v + (v_first - v) share; the first layer leaves
-- ctx.v_first for them, so that all layers must get the same ctx.
-- x [batch, time, d_model] -> the same, heads of head_dim. First values as in the paper's code: o_proj is 0.
-- The state: shift [batch, d_model], recurrent [batch, heads, dk, dk].
-- Source: Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution", 2025, arXiv 2503.14456, section 4.
local RWKV7 = nn.module("rwkv7", base.Recurrent)

local ROWS <const> = base.rows {
  head_dim = { "integer", 64 }, num_heads = { "integer" }, layer = { "integer", 1 }, num_layers = { "integer", 1 },
  decay_low_rank_dim = { "integer" }, a_low_rank_dim = { "integer" }, v_low_rank_dim = { "integer" }, gate_low_rank_dim = { "integer" },
  chunk_size = { "integer", 64 },
}

-- A low-rank map x -> B act(A x) + bias, B at first 0 and the bias as given. Kept: "lora.0.weight", "lora.2.weight", "lora.2.bias".
local Lora = nn.module "lora"

function Lora:init(o, rank, act, bias)
  self.lora = { [0] = base.linear(o, o.d_model, rank), [2] = base.linear(o, rank, o.d_model, bias ~= nil) }
  self._act = act
  core.no_grad(function()
    nn.init.orthogonal_(self.lora[2].weight:detach(), 0.1)
    self.lora[0].weight:detach():zero_()
    if bias then self.lora[2].bias:detach():copy_(bias) end
  end)
  if bias then nn.parameter(self.lora[2].bias, { decay = false }) end
end

function Lora:forward(x)
  local y = self.lora[0](x)
  return self.lora[2](self._act and y[self._act](y) or y)
end

-- Default ranks: multiples of 32 that grow with the root of the width.
local function rank(d, factor) return math.max(32, math.floor(factor * d ^ 0.5 / 32 + 0.5) * 32) end

function RWKV7:init(given)
  local o = self:options("rwkv7", given, ROWS)
  local d = o.d_model
  if o.num_heads then o.head_dim = self:divided(d, o.num_heads, "num_heads = " .. o.num_heads .. " (d_model in heads)") end
  local h, n = self:divided(d, o.head_dim, "head_dim = " .. o.head_dim .. " (d_model in heads)"), o.head_dim
  if o.layer > o.num_layers then error(("rwkv7: layer %d of num_layers = %d"):format(o.layer, o.num_layers), 3) end
  self._heads, self._dim = h, n
  -- first values as a function of the depth and of the channel's place
  local depth = o.num_layers > 1 and (o.layer - 1) / (o.num_layers - 1) or 0
  local rest = 1 - (o.layer - 1) / o.num_layers
  local channel = core.arange(0, d - 1):to "f64"
  local place, linear = channel / d, channel / math.max(d - 1, 1) - 0.5
  local zigzag = (channel:remainder(n) / math.max(n - 1, 1) - 0.5) * 2 -- -1 .. 1 within a head
  zigzag = zigzag * zigzag:abs()
  local mu = { r = 0.2, w = 0.9, k = 0.7, v = 0.7, a = 0.9, g = 0.2 }
  for _, name in ipairs { "r", "w", "k", "v", "a", "g" } do
    self["x_" .. name] = base.plain(o, { 1, 1, d }, function(t) t:copy_(1 - place:pow(mu[name] * rest)) end)
  end
  self.k_k = base.plain(o, { d }, function(t) t:copy_(0.71 - linear * 0.1) end)
  self.k_a = base.plain(o, { d }, 1.02)
  self.r_k = base.plain(o, { h, n }, -0.04)
  self.r_proj = base.linear(o, d, d)
  self.k_proj = base.linear(o, d, d)
  self.v_proj = base.linear(o, d, d)
  self.o_proj = base.linear(o, d, d)
  nn.init.orthogonal_(self.r_proj.weight:detach())
  nn.init.orthogonal_(self.k_proj.weight:detach(), 0.1)
  nn.init.orthogonal_(self.v_proj.weight:detach())
  self.o_proj.weight:detach():zero_()
  local speed, wide = (linear + 0.5):pow(1 + depth ^ 0.3) * 6 - 5.5 + zigzag * 2.5, n / 64
  self.w_lora = Lora(o, o.decay_low_rank_dim or rank(d, 2.5 * wide), "tanh", speed)
  self.a_lora = Lora(o, o.a_low_rank_dim or rank(d, 2.5 * wide), nil, zigzag * 0.3 + linear * 0.4 - 0.19)
  if o.layer > 1 then self.v_lora = Lora(o, o.v_low_rank_dim or rank(d, 1.7 * wide), nil, 0.73 - linear * 0.4) end
  self.g_lora = Lora(o, o.gate_low_rank_dim or rank(d, 5), "sigmoid")
  self.g_norm = { weight = base.plain(o, { d }, (o.layer / o.num_layers) ^ 0.7), bias = base.plain(o, { d }, 0) }
end

function RWKV7:sizes() return { shift = { self.d_model }, recurrent = { self._heads, self._dim, self._dim } } end

function RWKV7:mix(x, state, cu, ctx)
  local o, h, after = self._options, self._heads, {}
  local before
  before, after.shift = base.shift(x, state.shift, cu)
  local change = before - x
  local function blend(mu) return x + change * mu end
  local r, k, v = self.r_proj(blend(self.x_r)), self.k_proj(blend(self.x_k)), self.v_proj(blend(self.x_v))
  local decay = self.w_lora(blend(self.x_w)):sigmoid() * -math.exp(-0.5)
  local a = self.a_lora(blend(self.x_a)):sigmoid()
  local gate = self.g_lora(blend(self.x_g))
  if self.v_lora then
    local first = ctx and ctx.v_first
    if not first then error("rwkv7: a layer after the first wants ctx.v_first, which the first leaves: call all with one ctx", 0) end
    v = v + (first - v) * self.v_lora(blend(self.x_v)):sigmoid()
  elseif ctx then
    ctx.v_first = v
  end
  local kk = base.unit(base.heads(k * self.k_k, h))
  k = base.heads(k * ((a - 1) * self.k_a + 1), h)
  r, v = base.heads(r, h), base.heads(v, h)
  local y
  y, after.recurrent = core.linear_attention(r, k, v, {
    decay = base.heads(decay, h), a = -kk, b = kk * base.heads(a, h), scale = 1, initial_state = state.recurrent, cu_seqlens = cu,
    chunk_size = o.chunk_size,
  })
  y = core.layer_norm(y, core.ones({ self._dim }, { dtype = y.dtype, device = y.device }), nil, self._dim * 1e-5)
  y = base.join(y) * self.g_norm.weight + self.g_norm.bias
  y = y + base.join((r * k * self.r_k):sum(-1, true) * v)
  return self.o_proj(y * gate), after
end

return RWKV7
