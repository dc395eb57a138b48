-- Attention whose keys and values come from one latent vector a position.

local moe = require "moe"
local core = moe.core
local nn = moe.nn
local options = require "moe.nn.options"
local rope = require "moe.nn.rope"

--- Multi-head latent attention: keys and values of all heads are made of one latent vector a position, and that is all a state
-- holds: c_t = rmsnorm(W_a x_t) [kv_lora_rank], kr_t = rope(W_r x_t) [qk_rope_head_dim]; head h has keys [W_k^h c_t; kr_t] and
-- values W_v^h c_t, queries [q_nope; rope(q_rope)] of W_q x_t or, with q_lora_rank, of W_b rmsnorm(W_a' x_t); y = W_o
-- softmax(q k^T / sqrt(qk_nope_head_dim + qk_rope_head_dim)) v. Absorbed form: q_nope^T W_k^h is a query of the latents
-- themselves, the weighted latents go through W_v^h; the same numbers, cheaper for few queries of many keys, chosen by counting
-- products (absorb = true or false forces a form). y [, state] = m(x [batch, time, d_model] [, state, ctx]); state.latent
-- [batch, 1, time, kv_lora_rank + qk_rope_head_dim]; ctx.attn_mask, ctx.cu_seqlens (a batch of 1). Options: d_model, num_heads,
-- kv_lora_rank, q_lora_rank (none), qk_nope_head_dim (d_model / num_heads), qk_rope_head_dim (half of it), v_head_dim
-- (qk_nope_head_dim), causal (true), window, bias (false), rope_base (10000), rope_scaling (moe.nn.rope_scaling),
-- rope_interleave (true), norm_eps (1e-6), absorb, init. Parameters as in Hugging Face's DeepseekV3Attention: q_proj or q_a_proj,
-- q_a_layernorm, q_b_proj; kv_a_proj_with_mqa, kv_a_layernorm, kv_b_proj, o_proj.
-- DeepSeek-AI 2024 (arXiv 2405.04434, section 2.1, eq. 9-19).
local MLA = nn.module "mla"

local ROWS <const> = {
  d_model = { "integer", options.required }, num_heads = { "integer", options.required },
  kv_lora_rank = { "integer", options.required }, q_lora_rank = { "integer" }, qk_nope_head_dim = { "integer" },
  qk_rope_head_dim = { "integer" }, v_head_dim = { "integer" }, causal = { "boolean", true }, window = { "integer" },
  bias = { "boolean", false }, rope_base = { "number", 10000 }, rope_scaling = { "string|table" },
  rope_interleave = { "boolean", true }, norm_eps = { "number", 1e-6 }, absorb = { "boolean" },
  init = { "string|number|function" }, dtype = { "string" }, device = { "string" },
}

function MLA:init(given)
  local o = options.read("mla", given, ROWS, 2)
  local H = o.num_heads
  local head = o.d_model // math.max(1, H)
  o.qk_nope_head_dim = o.qk_nope_head_dim or head
  o.qk_rope_head_dim = o.qk_rope_head_dim or math.max(2, o.qk_nope_head_dim // 4 * 2)
  o.v_head_dim = o.v_head_dim or o.qk_nope_head_dim
  for _, name in ipairs { "d_model", "num_heads", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "window" } do
    if o[name] and o[name] < 1 then error(("mla: %s must be at least 1, got %d"):format(name, o[name]), 3) end
  end
  if o.qk_rope_head_dim % 2 ~= 0 then
    error(("mla: rope turns pairs: qk_rope_head_dim must be even, got %d"):format(o.qk_rope_head_dim), 3)
  end
  local scores
  o.rope_scaling, scores = rope.scaling(o.rope_scaling)
  o.scale = scores / math.sqrt(o.qk_nope_head_dim + o.qk_rope_head_dim)
  core.zeros(1, 2):rope { scaling = o.rope_scaling } -- tells at once what is wrong with it
  self._options = o

  local function linear(from, to, bias)
    local part = nn.linear { in_features = from, out_features = to, bias = bias, dtype = o.dtype, device = o.device }
    if o.init ~= nil then nn.init.apply(part.weight:detach(), o.init) end
    if bias then part.bias:detach():zero_() end
    return part
  end
  local function norm(size) return nn.rmsnorm { size = size, eps = o.norm_eps, dtype = o.dtype, device = o.device } end
  local query = H * (o.qk_nope_head_dim + o.qk_rope_head_dim)
  if o.q_lora_rank then
    self.q_a_proj = linear(o.d_model, o.q_lora_rank, o.bias)
    self.q_a_layernorm = norm(o.q_lora_rank)
    self.q_b_proj = linear(o.q_lora_rank, query, false)
  else
    self.q_proj = linear(o.d_model, query, false)
  end
  self.kv_a_proj_with_mqa = linear(o.d_model, o.kv_lora_rank + o.qk_rope_head_dim, o.bias)
  self.kv_a_layernorm = norm(o.kv_lora_rank)
  self.kv_b_proj = linear(o.kv_lora_rank, H * (o.qk_nope_head_dim + o.v_head_dim), false)
  self.o_proj = linear(H * o.v_head_dim, o.d_model, o.bias)
end

-- Where each position of packed sequences lies in its own: [time].
local function restarting(cu, time)
  local at, out = cu:totable(), {}
  for s = 2, #at do
    for i = at[s - 1] + 1, math.min(at[s], time) do out[i] = i - at[s - 1] - 1 end
  end
  return #out == time and core.tensor(out, { dtype = "i64" }) or nil -- what is wrong the operation says
end

-- Products with absorbed weights, and without, for T queries of S keys.
local function cheaper_absorbed(o, T, S)
  local width, rank, r = o.qk_nope_head_dim + o.v_head_dim, o.kv_lora_rank, o.qk_rope_head_dim
  return T * rank * width + T * S * (2 * rank + r) < S * rank * width + T * S * (width + r)
end

function MLA:forward(x, state, ctx)
  local o = self._options
  local H, N, R, V, C = o.num_heads, o.qk_nope_head_dim, o.qk_rope_head_dim, o.v_head_dim, o.kv_lora_rank
  if not core.is_tensor(x) or #x.shape ~= 3 or x:size(3) ~= o.d_model then
    error(("mla: x must be [batch, time, %d], got %s"):format(o.d_model,
      core.is_tensor(x) and "[" .. table.concat(x.shape, ", ") .. "]" or "a " .. type(x)), 3)
  end
  local B, T = x:size(1), x:size(2)
  local cu, mask = ctx and ctx.cu_seqlens, ctx and ctx.attn_mask
  if cu and (state or B ~= 1) then
    error(state and "mla: packed sequences start anew: there can be no state with cu_seqlens"
      or "mla: cu_seqlens packs sequences into a batch of 1", 3)
  end
  local old = state and state.latent
  if state and (not core.is_tensor(old) or #old.shape ~= 4 or old:size(1) ~= B or old:size(2) ~= 1 or old:size(4) ~= C + R) then
    error(("mla: state.latent must be [%d, 1, time, %d], got %s"):format(B, C + R,
      core.is_tensor(old) and "[" .. table.concat(old.shape, ", ") .. "]" or "a " .. type(old)), 3)
  end
  local past = old and old:size(3) or 0
  local turn = { positions = cu and restarting(cu, T), offset = past, base = o.rope_base, interleaved = o.rope_interleave,
    scaling = o.rope_scaling }

  local q = self.q_proj and self.q_proj(x) or self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
  q = q:reshape { B, T, H, N + R }:transpose(2, 3)
  local q_nope, q_rope = q:narrow(4, 1, N), q:narrow(4, N + 1, R):rope(turn)
  local a = self.kv_a_proj_with_mqa(x)
  local latent = core.cat({ self.kv_a_layernorm(a:narrow(3, 1, C)), a:narrow(3, C + 1, R):rope(turn) }, 3):unsqueeze(2)
  if past > 0 then latent = core.cat({ old, latent }, 3) end
  local S = past + T
  local how = { causal = o.causal, window = o.window, scale = o.scale, mask = mask, cu_seqlens = cu }
  local absorb = o.absorb
  if absorb == nil then absorb = cheaper_absorbed(o, T, S) end
  local y
  if absorb then
    local w = self.kv_b_proj.weight:reshape { H, N + V, C }
    q = core.cat({ q_nope:matmul(w:narrow(2, 1, N)), q_rope }, 4)
    y = core.attention(q, latent, latent:narrow(4, 1, C), how):matmul(w:narrow(2, N + 1, V):transpose(2, 3))
  else
    local kv = self.kv_b_proj(latent:narrow(4, 1, C):reshape { B, S, C }):reshape { B, S, H, N + V }:transpose(2, 3)
    local k = core.cat({ kv:narrow(4, 1, N), latent:narrow(4, C + 1, R):expand { B, H, S, R } }, 4)
    y = core.attention(core.cat({ q_nope, q_rope }, 4), k, kv:narrow(4, N + 1, V), how)
  end
  y = self.o_proj(y:transpose(2, 3):reshape { B, T, H * V })
  if state then return y, { latent = latent } end
  return y
end

--- The empty state of a batch: latents and turned keys so far, [batch, 1, time, kv_lora_rank + qk_rope_head_dim].
function MLA:state(batch)
  local o, w = self._options, self.kv_b_proj.weight
  return { latent = core.zeros({ batch or 1, 1, 0, o.kv_lora_rank + o.qk_rope_head_dim }, { dtype = w.dtype, device = w.device }) }
end

function MLA:extra()
  local o = self._options
  return ("%d, %d heads, latent %d + %d"):format(o.d_model, o.num_heads, o.kv_lora_rank, o.qk_rope_head_dim)
end

return MLA
