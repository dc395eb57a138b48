-- Attention heads as experts: a sequence mixer that is a moe.layer whose bank computes, for each token, the heads it chose.

local moe = require "moe"
local core = moe.core
local nn = moe.nn
local base = require "moe.experts.base"
local options = require "moe.nn.options"
local chosen_of = require "moe.sparse.chosen"
local stick_breaking = require("moe.sparse.stick_breaking").attention

local M = {}

-- --- the bank: queries and output projections of E experts of n heads each ---

local Bank = nn.module "heads"

function Bank:init(o)
  self._options = o
  self.d_model, self.num_experts = o.d_model, o.num_experts
  local width = o.heads_per_expert * o.head_dim
  self.q_proj = base.parameter(o, { o.num_experts, width, o.d_model }, o.init, o.d_model)
  self.o_proj = base.parameter(o, { o.num_experts, o.d_model, width }, o.init, o.fan or width)
  if o.keys == "chosen" then self.kv_proj = base.parameter(o, { o.num_experts, 2 * width, o.d_model }, o.init, o.d_model) end
end

local KIND <const> = {
  softmax = function(q, k, v, o) return core.attention(q, k, v, o) end,
  stick_breaking = function(q, k, v, o) return (stick_breaking(q, k, v, o)) end,
}

-- The queries of each (sequence, expert) lie together, in the order of time and padded to the fullest; what was not chosen
-- sees no key and costs nothing. ctx.keys: { k, v [B, kv, S, D], past, mask } of the mixer.
function Bank:forward(x, routing, ctx)
  if routing.dispatch then error("heads: a soft routing cannot choose heads", 0) end
  local o, keys = self._options, ctx.keys
  local B, T = ctx.shape[1], ctx.shape[2]
  local E, n, D, A = o.num_experts, o.heads_per_expert, o.head_dim, routing.num_assignments
  local like = { dtype = x.dtype, device = x.device }
  if A == 0 then return core.zeros({ B * T, o.d_model }, like) end
  local token, expert = routing.token - 1, routing.expert - 1
  local time = token:remainder(T)
  local cell = token:floor_divide(T) * E + expert
  -- assignments are sorted by expert and then by token: the rank within a cell is the distance from the first of its run
  local run = expert * B + token:floor_divide(T)
  local count = core.bincount(run + 1, B * E)
  local most = math.tointeger(count:amax():item())
  local rank = core.arange(0, A - 1):to "i64" - (count:cumsum(1) - count):index_select(1, run + 1)
  local slot = cell * most + rank + 1

  local rows = routing:gather(x)
  local function turned(t) -- [A, n D], by each row's own position
    if not o.rope then return t end
    local positions = keys.position and keys.position:index_select(1, time + 1) or time + keys.past
    return t:reshape { A, n, D }:transpose(1, 2):rope(positions, { base = o.rope_base }):transpose(1, 2):reshape { A, n * D }
  end
  local function by_head(t) -- rows [A, n d] -> [B, n E, most, d]
    t = core.zeros({ B * E * most, t:size(2) }, { dtype = t.dtype, device = t.device }):index_copy(1, slot, t)
    return t:reshape { B, E, most, n, -1 }:permute { 1, 4, 2, 3, 5 }:reshape { B, n * E, most, -1 }
  end
  local q, k, v = by_head(turned(routing:linear(rows, self.q_proj))), keys.k, keys.v
  local seen = o.causal and time + (1 + keys.past) or time * 0 + (k and k:size(3) or 0)
  if self.kv_proj then -- the keys of those that chose the head, in their order
    local kv = routing:linear(rows, self.kv_proj)
    k, v = by_head(turned(kv:narrow(2, 1, n * D))), by_head(kv:narrow(2, n * D + 1, n * D))
    seen = o.causal and rank + 1 or count:index_select(1, run + 1)
  end
  if o.attention == "stick_breaking" then seen = seen - 1 end -- strictly before
  seen = by_head(seen:clamp(0):reshape { A, 1 }:expand { A, n }):reshape { B, n * E, most }
  local mask = keys.mask
  if mask then -- [B, T, S] rows follow their queries
    local S = mask:size(3)
    mask = mask:reshape { B * T, S }:index_select(1, token + 1)
    mask = core.zeros({ B * E * most, S }, { dtype = mask.dtype }):index_copy(1, slot, mask)
    mask = mask:reshape { B, 1, E, most, S }:expand { B, n, E, most, S }:reshape { B, n * E, most, S }
  end
  local y = KIND[o.attention](q, k, v, { seen = seen, mask = mask })
  y = y:reshape { B, n, E, most, D }:permute { 1, 3, 4, 2, 5 }:reshape { B * E * most, n * D }:index_select(1, slot)
  return routing:combine(routing:linear(y, self.o_proj))
end

function Bank:extra()
  local o = self._options
  return ("%d x %d x %d of %d"):format(o.num_experts, o.heads_per_expert, o.head_dim, o.d_model)
end

-- --- the mixer ---

local Mixer = nn.module("routed_heads", moe.layer)

-- Options of moe.layer that pass through.
local LAYER <const> = {
  router = { "function|table|userdata" }, balance = { "function|table" }, bias_update_rate = { "number|function" },
  capacity_factor = { "number" }, eval_capacity_factor = { "number" }, min_capacity = { "integer" },
  drop_policy = { "string|function" }, force = { "string|userdata|function" }, dtype = { "string" }, device = { "string" },
}

local HEADS <const> = {
  d_model = { "integer", options.required }, head_dim = { "integer" }, num_kv_heads = { "integer" }, top_k = { "integer" },
  attention = { { "softmax", "stick_breaking" }, "softmax" }, causal = { "boolean", true }, rope = { "boolean", false },
  keys = { { "all", "chosen" }, "all" }, rope_base = { "number", 10000 }, init = { "string|number|function" },
}

local function rows_with(own)
  local rows = {}
  for _, part in ipairs { LAYER, HEADS, own } do
    for k, v in pairs(part) do rows[k] = v end
  end
  return rows
end

-- o: complete options, with num_experts, heads_per_expert, num_kv_heads.
function Mixer:setup(name, o)
  for _, key in ipairs { "d_model", "num_experts", "heads_per_expert", "num_kv_heads", "head_dim" } do
    if o[key] < 1 then error(("%s: %s must be at least 1, got %d"):format(name, key, o[key]), 4) end
  end
  if o.heads_per_expert * o.num_experts % o.num_kv_heads ~= 0 or o.num_kv_heads % o.heads_per_expert ~= 0 then
    error(("%s: num_kv_heads = %d does not divide the %d heads of %d experts"):format(name, o.num_kv_heads,
      o.heads_per_expert * o.num_experts, o.num_experts), 4)
  end
  if o.keys == "chosen" and o.num_kv_heads ~= o.heads_per_expert * o.num_experts then
    error(("%s: keys = \"chosen\" gives every head its own: num_kv_heads must be %d, got %d"):format(name,
      o.heads_per_expert * o.num_experts, o.num_kv_heads), 4)
  end
  if o.rope and o.head_dim % 2 ~= 0 then error(("%s: rope turns pairs: head_dim must be even, got %d"):format(name, o.head_dim), 4) end
  local settings = { d_model = o.d_model, num_experts = o.num_experts, experts = Bank(o) }
  for k in pairs(LAYER) do settings[k] = o[k] end
  moe.layer.init(self, settings)
  self._heads = o
  if o.keys == "chosen" then return end
  local size = { in_features = o.d_model, out_features = 2 * o.num_kv_heads * o.head_dim, bias = false }
  self.kv_proj = nn.linear(size)
  if o.init ~= nil then nn.init.apply(self.kv_proj.weight:detach(), o.init) end
  if o.dtype or o.device then self.kv_proj:to(o.dtype or o.device) end
end

-- The caller's mask as [B, T, S], alike for all heads.
local function given_mask(name, mask, B, T, S)
  local shape = mask.shape
  if #shape == 4 and shape[2] ~= 1 then error(name .. ": attn_mask must be alike for all heads: [batch, 1, time, keys]", 0) end
  if #shape == 4 then mask = mask:squeeze(2) end
  return mask:expand { B, T, S }
end

--- x [batch, time, d_model] -> y, the state after it (where one was given), the routing.
function Mixer:forward(x, state, ctx)
  local name = getmetatable(self).__name
  local o = self._heads
  local shape = core.is_tensor(x) and x.shape
  if not shape or #shape ~= 3 or shape[3] ~= o.d_model then
    error(("%s: x must be [batch, time, %d], got %s"):format(name, o.d_model,
      shape and "[" .. table.concat(shape, ", ") .. "]" or "a " .. type(x)), 2)
  end
  local B, T, kv, D = shape[1], shape[2], o.num_kv_heads, o.head_dim
  if o.keys == "chosen" then return self:among_chosen(x, state, ctx) end
  local k, v = self.kv_proj(x):reshape { B, T, 2, kv, D }:permute { 3, 1, 4, 2, 5 }:unbind(1)
  local past = state and state.k:size(3) or 0
  local keys = { past = past }
  ctx = ctx or {}
  if ctx.cu_seqlens then
    if state then error(name .. ": packed sequences start anew: there can be no state with cu_seqlens", 2) end
    keys.mask, keys.position = chosen_of.packed_mask(name, ctx.cu_seqlens, B, T)
  end
  if o.rope then k = k:rope(keys.position, { offset = past, base = o.rope_base }) end
  local after
  if state then
    k, v = core.cat({ state.k, k }, 3), core.cat({ state.v, v }, 3)
    after = { k = k, v = v }
  end
  keys.k, keys.v = k, v
  if ctx.attn_mask then keys.mask = given_mask(name, ctx.attn_mask, B, T, past + T) end
  local inner = setmetatable({ keys = keys }, { __index = ctx })
  local y, routing = moe.layer.forward(self, x, inner)
  ctx.routing, ctx.routings = inner.routing, inner.routings
  return y, after, routing
end

-- Each head among the tokens that chose it: sequences start anew, for what a state would hold differs from head to head.
function Mixer:among_chosen(x, state, ctx)
  local name = getmetatable(self).__name
  if state or ctx and (ctx.cu_seqlens or ctx.attn_mask) then
    error(name .. ": keys = \"chosen\" takes neither a state nor cu_seqlens nor attn_mask", 3)
  end
  ctx = ctx or {}
  local inner = setmetatable({ keys = { past = 0 } }, { __index = ctx })
  local y, routing = moe.layer.forward(self, x, inner)
  ctx.routing, ctx.routings = inner.routing, inner.routings
  return y, nil, routing
end

-- After prune and extend.
function Mixer:resized() self._heads = self.experts._options end

--- The empty state of a batch: keys and values so far, [batch, num_kv_heads, time, head_dim].
function Mixer:state(batch)
  if not self.kv_proj then error(getmetatable(self).__name .. ": keys = \"chosen\" has no state", 2) end
  local o, like = self._heads, { dtype = self.kv_proj.weight.dtype, device = self.kv_proj.weight.device }
  local size = { batch or 1, o.num_kv_heads, 0, o.head_dim }
  return { k = core.zeros(size, like), v = core.zeros(size, like) }
end

--- Copies the projections of a moe.nn.attention with as many heads of the same size, biases left aside.
function Mixer:copy_from(attention)
  local o = self._heads
  local qkv, out = attention:state_dict()["qkv_proj.weight"], attention:state_dict()["o_proj.weight"]
  local E, D, kv = o.num_experts, o.head_dim, o.num_kv_heads
  if o.heads_per_expert ~= 1 or qkv:size(1) ~= (E + 2 * kv) * D or out:size(2) ~= E * D then
    error(("%s: copy_from wants an attention of %d heads of %d over %d of keys, got projections [%s] and [%s]"):format(
      getmetatable(self).__name, E, D, kv, table.concat(qkv.shape, ", "), table.concat(out.shape, ", ")), 2)
  end
  core.no_grad(function()
    self.experts.q_proj:copy_(qkv:narrow(1, 1, E * D):reshape { E, D, o.d_model })
    local keys = qkv:narrow(1, E * D + 1, 2 * kv * D)
    if self.kv_proj then
      self.kv_proj.weight:copy_(keys)
    else
      self.experts.kv_proj:copy_(keys:reshape { 2, E, D, o.d_model }:transpose(1, 2):reshape { E, 2 * D, o.d_model })
    end
    self.experts.o_proj:copy_(out:reshape { o.d_model, E, D }:permute { 2, 1, 3 })
  end)
  return self
end

--- Mixture of heads: every token works with some of an attention's heads, y_t = sum over its heads of g_i H_i(x)_t W_o^i. Keys
-- and values are made of all tokens for all heads; queries, scores and output projections of the chosen ones alone. Heads 1 ..
-- num_shared always work, of the rest top_k by moe.router.two_stage (or a router of one's own over num_heads experts). With
-- every head chosen and weights of 1 it is plain attention. y [, state, routing] = m(x [batch, time, d_model] [, state, ctx]);
-- state k, v [batch, num_kv_heads, time, head_dim]. A moe.layer: its methods, balance losses, capacity and statistics, and
-- ctx.mask, attn_mask, cu_seqlens. copy_from(attention). Options: d_model, num_heads, top_k (num_heads // 2 - num_shared),
-- num_shared (0), num_kv_heads (num_heads), head_dim (d_model / num_heads), causal (true), rope, rope_base, attention
-- ("softmax", "stick_breaking"), init, keys, and those of moe.layer. keys = "chosen" (default "all"): a head attends among the
-- tokens that chose it, and keys and values are made of those alone (experts.kv_proj [H, 2 D, d]; no state). Parameters
-- router.*, experts.q_proj [H, D, d], experts.o_proj [H, d, D], kv_proj.weight [2 kv D, d]. Jin et al. 2024 (arXiv 2410.11842,
-- eq. 2-6); keys of the chosen: Yang et al. 2025 (arXiv 2503.02495).
local MoH = nn.module("mixture_of_heads", Mixer)
local MOH <const> = rows_with { num_heads = { "integer", options.required }, num_shared = { "integer" } }

function MoH:init(given)
  local o = options.read("mixture_of_heads", given, MOH, 2)
  local H = o.num_heads
  if H < 1 then error(("mixture_of_heads: num_heads must be at least 1, got %d"):format(H), 3) end
  if not o.head_dim and o.d_model % H ~= 0 then
    error(("mixture_of_heads: d_model = %d is no multiple of num_heads = %d (or give head_dim)"):format(o.d_model, H), 3)
  elseif o.router and (o.top_k or o.num_shared) then
    error("mixture_of_heads: top_k and num_shared are the router's: give either them or a router", 3)
  end
  o.num_experts, o.heads_per_expert = H, 1
  o.head_dim, o.num_kv_heads = o.head_dim or o.d_model // H, o.num_kv_heads or H
  o.fan = H * o.head_dim -- heads add up to one projection
  local shared = o.num_shared or 0
  o.router = o.router or moe.router.two_stage { top_k = o.top_k or math.max(1, H // 2 - shared), num_shared = shared }
  self:setup("mixture_of_heads", o)
end

M.mixture_of_heads = MoH

--- Mixture of attention heads: each expert has queries and an output projection of its own (for `heads_per_expert` heads), keys
-- and values are shared by all: y_t = sum over a token's experts of g_i softmax(x_t W_q^i K^T / sqrt(D)) V W_o^i. Call, state
-- and the methods of moe.layer as in mixture_of_heads. Options: d_model, num_experts, top_k (2), heads_per_expert (1),
-- num_kv_heads (heads_per_expert), head_dim (d_model / (top_k heads_per_expert)), router (topk), causal, rope, rope_base,
-- attention ("softmax", "stick_breaking"), init, those of moe.layer. Parameters router.*, experts.q_proj [E, n D, d],
-- experts.o_proj [E, d, n D], kv_proj.weight [2 kv D, d]. Zhang et al. 2022 (arXiv 2210.05144, eq. 4-6).
local MoA = nn.module("mixture_of_attention", Mixer)
local MOA <const> = rows_with { num_experts = { "integer", options.required }, heads_per_expert = { "integer", 1 } }

function MoA:init(given)
  local o = options.read("mixture_of_attention", given, MOA, 2)
  if o.router and o.top_k then error("mixture_of_attention: top_k is the router's: give either it or a router", 3) end
  local k = o.top_k or math.min(2, o.num_experts)
  o.router = o.router or moe.router.topk { top_k = k }
  o.head_dim = o.head_dim or math.max(1, o.d_model // math.max(1, k * o.heads_per_expert))
  o.num_kv_heads = o.num_kv_heads or o.heads_per_expert * (o.keys == "chosen" and o.num_experts or 1)
  self:setup("mixture_of_attention", o)
end

M.mixture_of_attention = MoA

--- Stick-breaking attention as a mixer: causal, without position codes; each position shares out its stick over those before it,
-- newest first (see moe.stick_breaking). y [, state] = m(x [batch, time, d_model] [, state, ctx]). Options: d_model, num_heads,
-- num_kv_heads, head_dim, diagonal (false: a position does not see itself), init. Parameters qkv_proj.weight [(H + 2 kv) D, d],
-- o_proj.weight [d, H D]. Shen et al. 2023 (arXiv 2306.04640); Tan et al. 2024 (arXiv 2410.17980).
local Stick = nn.module("stick_breaking")
local STICK <const> = {
  d_model = { "integer", options.required }, num_heads = { "integer", 1 }, num_kv_heads = { "integer" }, head_dim = { "integer" },
  diagonal = { "boolean", false }, init = { "string|number|function" },
}

function Stick:init(given)
  local o = options.read("stick_breaking", given, STICK, 2)
  local H = o.num_heads
  for _, key in ipairs { "d_model", "num_heads", "num_kv_heads", "head_dim" } do
    if o[key] and o[key] < 1 then error(("stick_breaking: %s must be at least 1, got %d"):format(key, o[key]), 3) end
  end
  if not o.head_dim and o.d_model % H ~= 0 then
    error(("stick_breaking: d_model = %d is no multiple of num_heads = %d (or give head_dim)"):format(o.d_model, H), 3)
  end
  o.head_dim, o.num_kv_heads = o.head_dim or o.d_model // H, o.num_kv_heads or H
  if H % o.num_kv_heads ~= 0 then
    error(("stick_breaking: num_heads = %d is no multiple of num_kv_heads = %d"):format(H, o.num_kv_heads), 3)
  end
  self._options = o
  self.qkv_proj = nn.linear { in_features = o.d_model, out_features = (H + 2 * o.num_kv_heads) * o.head_dim, bias = false }
  self.o_proj = nn.linear { in_features = H * o.head_dim, out_features = o.d_model, bias = false }
  for _, part in ipairs { self.qkv_proj, self.o_proj } do
    if o.init ~= nil then nn.init.apply(part.weight:detach(), o.init) end
  end
end

function Stick:forward(x, state, ctx)
  local o = self._options
  local B, T = x:size(1), x:size(2)
  local heads = self.qkv_proj(x):reshape { B, T, o.num_heads + 2 * o.num_kv_heads, o.head_dim }:transpose(2, 3)
  local q, k, v = heads:split({ o.num_heads, o.num_kv_heads, o.num_kv_heads }, 2)
  if state then k, v = core.cat({ state.k, k }, 3), core.cat({ state.v, v }, 3) end
  local mask = ctx and ctx.attn_mask
  if ctx and ctx.cu_seqlens then mask = chosen_of.packed_mask("stick_breaking", ctx.cu_seqlens, B, T) end
  local y = stick_breaking(q, k, v, { diagonal = o.diagonal, mask = mask })
  y = self.o_proj(y:transpose(2, 3):reshape { B, T, o.num_heads * o.head_dim })
  if state then return y, { k = k, v = v } end
  return y
end

function Stick:state(batch)
  local o, like = self._options, { dtype = self.qkv_proj.weight.dtype, device = self.qkv_proj.weight.device }
  local size = { batch or 1, o.num_kv_heads, 0, o.head_dim }
  return { k = core.zeros(size, like), v = core.zeros(size, like) }
end

function Stick:extra() return ("%d, %d heads"):format(self._options.d_model, self._options.num_heads) end

M.stick_breaking = Stick

return M
