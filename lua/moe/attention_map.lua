-- Attention that hands out its weights, for those who ask: plain operations beside the fused kernel.

local core = require "moe.core"
local nn = require "moe.nn"
local low = core._module

local M = {}

local function fail(text, ...) error("attention_map: " .. text:format(...), 0) end

-- Distance of key j from query i, the last query standing at the last key: [time, keys]
local function distance(time, keys)
  return core.arange(1, keys):to "i64":reshape { 1, keys } - (core.arange(1, time):to "i64" + (keys - time)):reshape { time, 1 }
end

local function masked(scores, mask)
  if mask == nil then return scores end
  if mask.dtype == "bool" then return scores:masked_fill(mask:logical_not(), -1e30) end
  return scores + mask
end

--- The weights with which moe.nn.attention attends: x [B, time, d_model] -> [B, num_heads, time, keys], rows that sum to 1:
-- softmax(Q K^T / sqrt(head_dim)), causal, window, ctx.attn_mask and ctx.relative included, dropout not. With a state (of the
-- attention, before x) the keys are those of the state, then those of x; else keys = time; those of a cross attention are of
-- ctx.memory. Costs the projection of queries and keys once more and
-- B x num_heads x time x keys numbers; differentiable.
function M.weights(attention, x, state, ctx)
  if not (type(attention) == "userdata" and low.is(attention) and attention.num_heads and attention["qkv_proj.weight"]) then
    fail("argument 1 must be a moe.nn.attention, got a %s", type(attention))
  end
  if not core.is_tensor(x) or #x.shape ~= 3 then fail "argument 2 (x) must be a tensor [batch, time, d_model]" end
  if ctx and ctx.cu_seqlens then fail "packed sequences (cu_seqlens) have no common map" end
  local batch, time = x:size(1), x:size(2)
  local heads = attention.num_heads
  local kv = attention.num_kv_heads or heads
  local w, b = attention["qkv_proj.weight"], attention["qkv_proj.bias"]
  local dim = w:size(1) // (heads + 2 * kv)
  local function project(t, first, n) -- heads first .. of the fused projection
    local rows = b and b:narrow(1, (first - 1) * dim + 1, n * dim)
    local y = t:linear(w:narrow(1, (first - 1) * dim + 1, n * dim), rows)
    return y:reshape { batch, t:size(2), n, dim }:transpose(2, 3)
  end
  local past, cross = state and state.k and state.k:size(3) or 0, attention.cross
  local memory = cross and past == 0 and ctx and ctx.memory
  if cross and past == 0 and not core.is_tensor(memory) then fail "a cross attention wants memory in its context" end
  local q, k = project(x, 1, heads), nil
  if not cross or memory then k = project(memory or x, heads + 1, kv) end
  if attention["q_norm.weight"] then
    q, k = q:rms_norm(attention["q_norm.weight"]), k and k:rms_norm(attention["k_norm.weight"])
  end
  if attention.rope then
    local o = { offset = past, base = attention.rope_base, scaling = attention.rope_scaling }
    q, k = q:rope(o), k:rope(o)
  end
  if past > 0 then k = k and core.cat({ state.k, k }, 3) or state.k end
  local keys = k:size(3)
  if kv < heads then k = k:repeat_interleave(heads // kv, 2) end
  local scores = q:matmul(k:transpose(3, 4)) / math.sqrt(dim)
  local window, far = attention.window, distance(time, keys)
  local relative = not cross and ctx and ctx.relative
  if relative then
    local n = (relative:size(-1) + 1) // 2
    local place = (far + n):clamp(1, 2 * n - 1):reshape(-1)
    scores = scores + relative:index_select(-1, place):reshape { -1, time, keys }
  end
  if attention.causal and not cross then scores = masked(scores, far:le(0)) end
  if window then scores = masked(scores, far:abs():lt(window)) end
  return masked(scores, ctx and ctx.attn_mask):softmax(-1)
end

--- An attention that leaves its weights in ctx.attention_map [B, num_heads, time, keys] (moe.mixer.attention_weights), for
-- routers that follow the attention (moe.router.neighbour). Otherwise, and without a ctx, it is the attention that it is
-- given: `moe.mixer.with_map(moe.nn.attention{ d_model = 64, num_heads = 4 })`.
local WithMap = nn.module "with_map"

function WithMap:init(attention)
  if not (type(attention) == "userdata" and low.is(attention) and attention.num_heads) then
    fail("with_map: argument 1 must be a moe.nn.attention, got a %s", type(attention))
  end
  self.attention = attention
end

function WithMap:state(batch) return self.attention:state(batch) end

function WithMap:forward(x, state, ctx)
  if ctx == nil then return self.attention(x, state) end
  ctx.attention_map = M.weights(self.attention, x, state, ctx)
  return self.attention(x, state, ctx)
end

M.with_map = WithMap

return M
