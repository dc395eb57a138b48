-- Weights by modality: whole modules chosen by an id that comes with the tokens.

local moe = require "moe"
local core = moe.core
local nn = moe.nn
local low = core._module
local options = require "moe.nn.options"
local chosen_of = require "moe.sparse.chosen"
require "moe.routing" -- the methods of routings
local sparse = core._sparse

local M = {}

--- Modules by modality: rows of x with id m go through modules[m], y_t = f_{m(t)}(x_t), and id 0 gives zeros. y, routing =
-- by_modality{ f1, f2, .. }(x [.., d], ctx); the ids are ctx.modality_ids, one for each token, or one for each sequence:
-- [batch]. `by`, the second argument's option, names another field of ctx (task_ids, ..). Modules see rows [n, d] (norms, linear
-- layers, feed-forward networks, sparse layers) and, those written in Lua, ctx with its fields [batch, time, ..] cut to their
-- rows; one without rows is not called. copy_from(module) starts every modality from a trained one. Liang et al. 2024,
-- Mixture-of-Transformers (arXiv 2411.04996).
local ByModality = nn.module("by_modality")

function ByModality:init(modules, given)
  local o = options.read("by_modality", given, { by = { "string", "modality_ids" } }, 2)
  if type(modules) ~= "table" or getmetatable(modules) or #modules == 0 then
    error("by_modality: argument 1 must be a list of modules, one a modality, got " ..
      (type(modules) == "table" and not getmetatable(modules) and "an empty one" or "a " .. type(modules)), 3)
  end
  for i, m in ipairs(modules) do
    if not nn.is_module(m) then error(("by_modality: part %d must be a module, got a %s"):format(i, type(m)), 3) end
    self[i] = m
  end
  self._by = o.by
end

-- The ids of the rows, i64 [tokens].
local function ids_of(self, ctx, leading)
  local ids = ctx and ctx[self._by]
  if not core.is_tensor(ids) then
    error(("by_modality: ctx.%s must be a tensor of ids, got a %s"):format(self._by, type(ids)), 3)
  end
  local shape, count = ids.shape, 1
  for i, n in ipairs(leading) do
    count = count * n
    if shape[i] ~= n and (i == 1 or #shape > 1) then
      error(("by_modality: ctx.%s is [%s], x has [%s]"):format(self._by, table.concat(shape, ", "), table.concat(leading, ", ")), 3)
    end
  end
  if #shape == 1 and #leading > 1 then
    ids = ids:reshape { shape[1], 1 }:expand { leading[1], count // math.max(1, leading[1]) }
  end
  return ids:reshape { count }
end

--- x [.., d] -> y [.., d_out], the routing.
function ByModality:forward(x, ctx)
  local shape = x.shape
  local leading = table.move(shape, 1, #shape - 1, 1, {})
  local ids = ids_of(self, ctx, leading)
  local rows = x:reshape { -1, shape[#shape] }
  local routing = sparse.topk(ids:reshape { -1, 1 }, nil, #self)
  local picked, token, offsets = routing:gather(rows), routing.token, routing.offsets:totable()
  local parts = {}
  for m = 1, #self do
    local n = offsets[m + 1] - offsets[m]
    if n > 0 then
      local own = picked:narrow(1, offsets[m], n)
      if low.is(self[m]) then
        parts[#parts + 1] = self[m](own)
      else
        local inner = chosen_of.context(ctx, leading, token:narrow(1, offsets[m], n), { n })
        parts[#parts + 1] = (self[m](own, inner))
        chosen_of.report(ctx, inner)
      end
    end
  end
  local y
  if #parts == 0 then y = picked:sum() * 0 + core.zeros({ rows:size(1), shape[#shape] }, { dtype = x.dtype, device = x.device })
  else y = routing:combine(#parts == 1 and parts[1] or core.cat(parts, 1), false) end
  leading[#leading + 1] = y:size(2)
  return y:reshape(leading), routing
end

--- Every modality's module gets the weights of this one.
function ByModality:copy_from(module)
  for i = 1, #self do self[i]:load_state_dict(module:state_dict()) end
  return self
end

M.by_modality = ByModality

-- n modules of one kind, one a modality.
local function each(n, make)
  local list = {}
  for i = 1, n do list[i] = make() end
  return ByModality(list)
end

local ATTENTION <const> = {
  d_model = { "integer", options.required }, num_modalities = { "integer", options.required }, num_heads = { "integer", 1 },
  num_kv_heads = { "integer" }, head_dim = { "integer" }, bias = { "boolean", false }, causal = { "boolean", true },
  rope = { "boolean", false }, rope_base = { "number", 10000 },
}

--- Attention over all tokens whose projections are those of each token's modality: q, k, v = W_qkv^m x, y = W_o^m attention.
-- ctx.modality_ids [batch, time] from 1. A mixer: y [, state] = m(x [batch, time, d_model], state, ctx); ctx.attn_mask and
-- cu_seqlens as in moe.mixer.attention. Options as there, and num_modalities. Parameters qkv_proj.<m>.weight, o_proj.<m>.weight;
-- with one modality it is plain attention. Liang et al. 2024 (arXiv 2411.04996, algorithm 1).
local Attention = nn.module("modality_attention")

function Attention:init(given)
  local o = options.read("modality_attention", given, ATTENTION, 2)
  for _, key in ipairs { "d_model", "num_modalities", "num_heads", "num_kv_heads", "head_dim" } do
    if o[key] and o[key] < 1 then error(("modality_attention: %s must be at least 1, got %d"):format(key, o[key]), 3) end
  end
  local H = o.num_heads
  if not o.head_dim and o.d_model % H ~= 0 then
    error(("modality_attention: d_model = %d is no multiple of num_heads = %d (or give head_dim)"):format(o.d_model, H), 3)
  end
  o.head_dim, o.num_kv_heads = o.head_dim or o.d_model // H, o.num_kv_heads or H
  self._options = o
  local function linear(from, to)
    return function() return nn.linear { in_features = from, out_features = to, bias = o.bias } end
  end
  self.qkv_proj = each(o.num_modalities, linear(o.d_model, (H + 2 * o.num_kv_heads) * o.head_dim))
  self.o_proj = each(o.num_modalities, linear(H * o.head_dim, o.d_model))
end

function Attention:forward(x, state, ctx)
  local o = self._options
  local B, T, H, kv = x:size(1), x:size(2), o.num_heads, o.num_kv_heads
  local q, k, v = self.qkv_proj(x, ctx):reshape { B, T, H + 2 * kv, o.head_dim }:transpose(2, 3):split({ H, kv, kv }, 2)
  if o.rope then
    local turn = { offset = state and state.k:size(3) or 0, base = o.rope_base }
    q, k = q:rope(turn), k:rope(turn)
  end
  if state then k, v = core.cat({ state.k, k }, 3), core.cat({ state.v, v }, 3) end
  local mask = ctx.attn_mask
  if ctx.cu_seqlens then mask = chosen_of.packed_mask("modality_attention", ctx.cu_seqlens, B, T) end
  local y = core.attention(q, k, v, { causal = o.causal, mask = mask }):transpose(2, 3):reshape { B, T, H * o.head_dim }
  y = self.o_proj(y, ctx)
  if state then return y, { k = k, v = v } end
  return y
end

function Attention:state(batch)
  local o, w = self._options, self.o_proj[1].weight
  local size = { batch or 1, o.num_kv_heads, 0, o.head_dim }
  return { k = core.zeros(size, { dtype = w.dtype, device = w.device }), v = core.zeros(size, { dtype = w.dtype, device = w.device }) }
end

M.modality_attention = Attention

local BLOCK <const> = {
  intermediate_size = { "integer" }, activation = { "string", "gelu" }, norm = { { "layernorm", "rmsnorm" }, "layernorm" },
  ffn = { "function" },
}
for name, row in pairs(ATTENTION) do BLOCK[name] = row end

--- One layer of a Mixture-of-Transformers: norms, projections and feed-forward networks by each token's modality, attention over
-- all of them: x + attention(norm1(x)), then that + ffn(norm2(.)). y, state = m(x [batch, time, d_model], state, ctx) with
-- ctx.modality_ids; it stands for a layer of moe.model.lm. The work per token is that of one dense layer. Options: those of
-- modality_attention, norm, activation and intermediate_size (4 d_model) of the networks, or ffn, a function (modality) ->
-- module. With tied weights it is the dense layer. Liang et al. 2024 (arXiv 2411.04996).
local Block = nn.module("modality_block")

function Block:init(given)
  local o = options.read("modality_block", given, BLOCK, 2)
  local attention = {}
  for name in pairs(ATTENTION) do attention[name] = o[name] end
  local function norm() return moe.model.block.make_norm { d_model = o.d_model, norm = o.norm, norm_bias = o.bias } end
  self.norm1 = each(o.num_modalities, norm)
  self.mixer = Attention(attention)
  self.norm2 = each(o.num_modalities, norm)
  local list = {}
  for m = 1, o.num_modalities do
    list[m] = o.ffn and o.ffn(m) or
      nn.ffn { d_model = o.d_model, intermediate_size = o.intermediate_size, activation = o.activation, bias = o.bias }
  end
  self.ffn = ByModality(list)
end

function Block:forward(x, state, ctx)
  local y, after = self.mixer(self.norm1(x, ctx), state, ctx)
  x = x + y
  return x + self.ffn(self.norm2(x, ctx), ctx), after
end

M.modality_block = Block

return M
