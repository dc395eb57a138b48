-- A decoder language model: embeddings, layers of any mixer and a feed-forward network (dense or sparse), a head.

local moe = require "moe"
local nn = moe.nn
local options = require "moe.nn.options"
local Block = require "moe.model.block"
local parts = require "moe.model.parts"
local generate = require "moe.model.generate"
local low = require("moe.core")._module

--- A causal language model of any mixers and feed-forward networks:
--   logits = head(norm(layer_n(.. layer_1(embed(ids) [+ positions])))), each layer as moe.model.block says.
-- layer_types: one choice for all layers, a list of one a layer, or a shorter list that is repeated ({ "mamba", "mamba",
-- "attention" } over 9 layers). A choice is the name of a mixer (moe.mixer: "attention", "mamba", "mamba2", "rwkv7", ..; "none" for a
-- layer that is its ffn alone), a function(layer) -> mixer, or a module; one module in several layers shares its weights.
-- mixers = { mamba = { d_state = 16 } } are options of each kind, or function(layer) -> them; d_model, num_heads and the place of
-- those that know it follow the model. ffn likewise: "dense", "moe", "none", a function(layer) -> ffn, or a module.
-- positional: "learned", "rope" (of the attention) or "none"; when not given, "none" as soon as a layer holds a named mixer that
-- knows the order by itself (any but kinds of attention), else "learned". norm_placement ("post" needs no last norm) and residual: see
-- moe.model.block. Mixers other than attention keep the initial values of their own papers; init and residual_scale leave them.
-- logits = model(ids [batch, time]); logits, state = model(ids, ctx, state) with state = model:state(batch), whatever the mixers:
-- whole, in pieces and token by token give the same. Options: ROWS in lua/moe/model/lm.lua.
local LM = nn.module "lm"

local ROWS = {
  vocab_size = { "integer", options.required },
  d_model = { "integer", options.required },
  num_layers = { "integer" },            -- may be left out where layer_types lists them
  layer_types = { "any" },               -- as said above
  mixers = { "table" },                  -- options of each kind
  num_heads = { "integer" },             -- attention: 1; other mixers: their own default
  num_kv_heads = { "integer" },
  head_dim = { "integer" },
  max_seq_len = { "integer" },           -- needed for learned positions; elsewhere a window for generate
  positional = { { "learned", "rope", "none" } },
  rope_base = { "number" },
  qk_norm = { "boolean" },
  norm = { { "layernorm", "rmsnorm" }, "layernorm" },
  norm_eps = { "number" },
  norm_placement = { { "pre", "post", "sandwich" }, "pre" },
  residual = { { "serial", "parallel" }, "serial" },
  bias = { "boolean", false },           -- of the attention, the dense ffn and the norms
  qkv_bias = { "boolean" },              -- where it differs from bias
  norm_bias = { "boolean" },
  head_bias = { "boolean", false },
  dropout = { "number", 0 },             -- of embeddings, attention weights and what joins the residual stream
  tie_embeddings = { "boolean", true },
  mixer = { "any" },                     -- another name of layer_types
  ffn = { "any", "dense" },              -- as said above
  ffn_hidden = { "integer" },            -- default 4 d_model; for gated activations 8/3 d_model, rounded up to 16
  intermediate_size = { "integer" },     -- the same
  activation = { { "gelu", "gelu_tanh", "relu", "relu2", "silu", "swiglu", "geglu", "reglu" }, "gelu" },
  moe = { "table|function" },            -- options of moe.layer, or function(layer) -> them; also top_k
  init = { "string|function", "normal(0.02)" }, -- of the linear weights; "default": each layer's own
  embedding_init = { "string|function", "normal(0.02)" },
  bias_init = { "string|function", "zeros" },
  residual_scale = { "boolean", true },  -- projections into the residual stream times 1 / sqrt(2 num_layers)
}

-- --- initial values ---

-- A matrix by the initialiser; a bank [experts, out, in] expert by expert, so that fans are those of one expert.
local function fill(t, how)
  local values = t:detach()
  if #t.shape < 3 then
    nn.init.apply(values, how)
  else
    for e = 1, t.shape[1] do nn.init.apply(values[e], how) end
  end
end

-- kept(name): whether a part keeps the values it has.
local function init_part(part, o, kept)
  for name, p in part:named_parameters() do
    local dims = #p.shape
    if kept and kept(name) then
      goto continue
    elseif name:find "bias$" then
      if o.bias_init ~= "default" then nn.init.apply(p:detach(), o.bias_init) end
    elseif dims >= 2 and o.init ~= "default" and nn.decays(p) then -- what does not decay is a vector an expert, no matrix
      fill(p, o.init)
    end
    local into_residual = name:find "o_proj%.weight$" or name:find "down_proj$" or name:find "down_proj%.weight$"
    if o.residual_scale and dims >= 2 and into_residual then
      p:detach():mul_(1 / math.sqrt(2 * o.num_layers))
    end
    ::continue::
  end
end

-- A router that came with the options was initialised as they say; a bank beside a frozen base starts as that base.
local function own_values(o, layer)
  local router = not (type(o.moe) == "table" and o.moe.router == nil)
  local bank = type(layer.experts) == "table" and layer.experts.own_values
  return function(name) return router and name:find "^router%." or bank and name:find "^experts%." end
end

-- Mixers other than attention keep their own values: decays and time steps are no projections.
local function init_weights(self, o)
  if o.embedding_init ~= "default" then
    nn.init.apply(self.embed.weight:detach(), o.embedding_init)
    if self.positions then nn.init.apply(self.positions.weight:detach(), o.embedding_init) end
  end
  for i, block in ipairs(self.layers) do
    if o.layer_types[i] == "attention" then init_part(block.mixer, o) end
    if o.ffn[i] == "dense" then init_part(block.ffn, o) end
    if o.ffn[i] == "moe" then init_part(block.ffn, o, own_values(o, block.ffn)) end
  end
  if self.head then
    if o.init ~= "default" then fill(self.head.weight, o.init) end
    if self.head.bias and o.bias_init ~= "default" then nn.init.apply(self.head.bias:detach(), o.bias_init) end
  end
end

local function check(o)
  if o.layer_types ~= nil and o.mixer ~= nil then error("lm: layer_types and mixer are one option: give one of them", 4) end
  if o.layer_types == nil then o.layer_types = o.mixer end
  if o.layer_types == nil then o.layer_types = "attention" end
  if o.num_layers == nil then
    local list = o.layer_types
    if type(list) ~= "table" or getmetatable(list) ~= nil then error("lm: option 'num_layers' is missing", 4) end
    o.num_layers = #list
  end
  for _, name in ipairs { "vocab_size", "d_model", "num_layers", "num_heads", "max_seq_len", "intermediate_size" } do
    local least = name == "num_layers" and 0 or 1
    if o[name] and o[name] < least then
      error(("lm: %s must be at least %d, got %d"):format(name, least, o[name]), 4)
    end
  end
  o.layer_types = parts.pattern("layer_types", o.layer_types, o.num_layers)
  o.ffn = parts.pattern("ffn", o.ffn, o.num_layers)
  parts.check_mixers(o)
  if o.positional == nil then o.positional = parts.ordered(o.layer_types) and "none" or "learned" end
  if o.positional == "learned" and not o.max_seq_len then
    error("lm: positional = \"learned\" needs max_seq_len", 4)
  end
  if not (o.dropout >= 0 and o.dropout < 1) then error(("lm: dropout must lie in [0, 1), got %g"):format(o.dropout), 4) end
end

function LM:init(given)
  local o = options.read("lm", given, ROWS, 2)
  check(o)
  self.vocab_size, self.d_model, self.num_layers, self.max_seq_len = o.vocab_size, o.d_model, o.num_layers, o.max_seq_len
  self.positional, self.routings = o.positional, {}
  self.embed = nn.embedding(o.vocab_size, o.d_model)
  if o.positional == "learned" then self.positions = nn.embedding(o.max_seq_len, o.d_model) end
  if o.dropout > 0 then self.dropout = nn.dropout(o.dropout) end
  local norm_bias = o.norm_bias
  if norm_bias == nil then norm_bias = o.bias end
  local layers = nn.list()
  for i = 1, o.num_layers do
    layers:append(Block {
      d_model = o.d_model, mixer = parts.mixer(o, i), ffn = parts.ffn(o, i), norm = o.norm, norm_eps = o.norm_eps,
      norm_bias = norm_bias, norm_placement = o.norm_placement, residual = o.residual, dropout = o.dropout,
    })
  end
  self.layers = layers
  if o.norm_placement ~= "post" or o.num_layers == 0 then -- after a post norm the stream is normed already
    self.norm = Block.make_norm { d_model = o.d_model, norm = o.norm, norm_eps = o.norm_eps, norm_bias = norm_bias }
  end
  if not o.tie_embeddings then
    self.head = nn.linear { in_features = o.d_model, out_features = o.vocab_size, bias = o.head_bias }
  end
  init_weights(self, o)
end

function LM:extra()
  return ("vocab_size=%d, d_model=%d, num_layers=%d, positional=%s"):format(self.vocab_size, self.d_model, self.num_layers,
    self.positional)
end

-- The rows of the learned positions for packed sequences: each counts from 1.
local function packed_positions(self, lengths, time)
  local at, numbers = lengths:totable(), {}
  for s = 2, #at do
    if at[s] - at[s - 1] > self.max_seq_len then
      error(("lm: a sequence of %d positions, but max_seq_len is %d"):format(at[s] - at[s - 1], self.max_seq_len), 4)
    end
    for i = 1, at[s] - at[s - 1] do numbers[#numbers + 1] = i end
  end
  if #numbers ~= time then error(("lm: cu_seqlens counts %d positions, ids has %d"):format(#numbers, time), 4) end
  return self.positions(moe.tensor(numbers, { dtype = "i64", device = self.positions.device }))
end

-- The embedded tokens, those of the first position being number start + 1.
local function embed(self, ids, start, ctx)
  local shape = ids.shape
  if #shape ~= 2 then
    error(("lm: ids must be [batch, time], got [%s]"):format(table.concat(shape, ", ")), 3)
  end
  local x, time = self.embed(ids), shape[2]
  if self.positions and ctx and ctx.cu_seqlens then
    x = x + packed_positions(self, ctx.cu_seqlens, time)
  elseif self.positions then
    if start + time > self.max_seq_len then
      error(("lm: %d positions, but max_seq_len is %d"):format(start + time, self.max_seq_len), 3)
    end
    local rows = self.positions.weight
    if time < self.max_seq_len then rows = rows:narrow(1, start + 1, time) end
    x = x + rows
  end
  if self.dropout then x = self.dropout(x) end
  return x
end

-- What the layers see: the caller's context, with the token ids and the layer's number.
local function inner_context(ctx, ids)
  local inner = { token_ids = ids }
  for k, v in pairs(ctx or {}) do inner[k] = v end
  inner.routings, inner.routing = nil, nil -- of an earlier forward with the same table
  return inner
end

-- Sparse layers, mixers among them, have joined inner.routings themselves; what a function returned joins here.
local function join(inner, routing)
  local list = inner.routings or {}
  for i = #list, 1, -1 do
    if list[i] == routing then return end
  end
  list[#list + 1] = routing
  inner.routings, inner.routing = list, routing
end

local function is_sparse(self)
  if self._sparse == nil then
    self._sparse = false
    for _, block in ipairs(self.layers) do
      if not (block.mixer and low.is(block.mixer)) or block.ffn and not low.is(block.ffn) then self._sparse = true end
    end
  end
  return self._sparse
end

local function check_state(self, state)
  if type(state) ~= "table" or math.type(state.position) ~= "integer" then
    error(("lm: the state must be what model:state(batch) gives, got a %s"):format(
      type(state) == "table" and "table without a position" or type(state)), 3)
  end
  for i = 1, #self.layers do
    if state[i] == nil then error(("lm: the state holds nothing for layer %d"):format(i), 3) end
  end
end

--- The normed last hidden states [batch, time, d_model]; with a state also the state after ids.
function LM:hidden(ids, ctx, state)
  self.routings = {}
  if state ~= nil then check_state(self, state) end
  local x = embed(self, ids, state and state.position or 0, ctx)
  local inner = (ctx ~= nil or is_sparse(self)) and inner_context(ctx, ids) or nil
  local after = state and { position = state.position + ids.shape[2] }
  for i, block in ipairs(self.layers) do
    local s, routing
    if inner then inner.layer_number = i end
    x, s, routing = block(x, state and state[i], inner)
    if after then after[i] = s end
    if routing ~= nil then
      join(inner, routing)
      inner.previous_routing = routing
    end
  end
  self.routings = inner and inner.routings or {}
  if ctx and inner.routings then ctx.routings, ctx.routing = inner.routings, inner.routing end
  if self.norm then x = self.norm(x) end
  return x, after
end

--- Scores of hidden states: [.., d_model] -> [.., vocab_size].
function LM:logits(x)
  if self.head then return self.head(x) end
  return x:linear(self.embed.weight)
end

--- ids [batch, time] counting from 1 -> logits [batch, time, vocab_size]. With a state (model:state(batch), or what
-- this returned) also the state after ids, and time continues from it.
function LM:forward(ids, ctx, state)
  local x, after = self:hidden(ids, ctx, state)
  return self:logits(x), after
end

--- The empty state of a batch: caches of the mixers.
function LM:state(batch)
  local state = { position = 0 }
  for i, block in ipairs(self.layers) do state[i] = (block.mixer or block):state(batch or 1) end
  return state
end

--- The sum of the auxiliary losses of the last forward's routings; the number 0 where there are none.
function LM:aux()
  local sum
  for _, routing in ipairs(self.routings) do
    local aux = routing:aux()
    if aux ~= nil then sum = sum and sum + aux or aux end
  end
  return sum or 0
end

LM.generate = generate

return LM
