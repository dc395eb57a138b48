-- What the layers of a model are made of: patterns of names, functions and modules, and the options that follow the model's.

local moe = require "moe"
local nn = moe.nn
local low = require("moe.core")._module

local M = {}

local GATED <const> = { swiglu = "silu", geglu = "gelu", reglu = "relu" } -- the activation of the gate
local FFNS <const> = { "dense", "moe", "none" }
local NO_MIXER <const> = { with_map = true, attention_weights = true } -- of moe.mixer, but no constructors

-- Mixers that take num_heads from the model where their own options give neither num_heads nor head_dim.
local HEADS <const> = {
  retention = true, gla = true, delta = true, gated_delta = true, kda = true, lightning = true, based = true, rwkv7 = true, mla = true,
  stick_breaking = true, mixture_of_heads = true,
}

-- Mixers that see a set: without positions they do not know the order (attention: only as far as it is causal).
local SETS <const> = { attention = true, mixture_of_heads = true, mixture_of_attention = true, modality_attention = true, identity = true,
  none = true }

-- Mixers that know their place: in the model, or among their own kind (the first rwkv7 leaves its values for the others).
local PLACED <const> = { lightning = "model", rwkv7 = "kind" }

-- --- patterns ---

local function is_list(v) return type(v) == "table" and getmetatable(v) == nil end

--- One choice a layer: a list of n, a shorter list over and over, or one choice for all.
function M.pattern(name, choice, n)
  if not is_list(choice) then
    choice = { choice }
  elseif #choice == 0 and n > 0 then
    error(("lm: %s is an empty list"):format(name), 5)
  elseif #choice > n then
    error(("lm: %s lists %d layers, num_layers is %d"):format(name, #choice, n), 5)
  end
  local out = {}
  for i = 1, n do out[i] = choice[(i - 1) % #choice + 1] end
  return out
end

local function callable(v)
  if type(v) == "function" then return true end
  local mt = getmetatable(v)
  return type(mt) == "table" and mt.__call ~= nil
end

local function unknown(what, i, name, names)
  if type(name) ~= "string" then
    error(("lm: the %s of layer %d must be a name, a function(layer) or a module, got %s"):format(what, i, tostring(name)), 0)
  end
  table.sort(names)
  local near = low.nearest(name, names)
  error(("lm: the %s of layer %d: there is no '%s'%s; known: %s"):format(what, i, name,
    near and (" (did you mean '%s'?)"):format(near) or "", table.concat(names, ", ")), 0)
end

local function mixer_names()
  local names = { "none" }
  for name in pairs(moe.mixer) do
    if not NO_MIXER[name] then names[#names + 1] = name end
  end
  return names
end

-- --- mixers ---

local function own_options(o, kind, i)
  local given = o.mixers and o.mixers[kind]
  if type(given) == "function" then given = given(i) end
  if given ~= nil and type(given) ~= "table" then
    error(("lm: mixers.%s must be a table of options or a function(layer) that gives one, got a %s"):format(kind, type(given)), 0)
  end
  local out = {}
  for k, v in pairs(given or {}) do out[k] = v end
  return out
end

local function attention_options(o, out)
  local follow = {
    num_heads = o.num_heads or 1, num_kv_heads = o.num_kv_heads, head_dim = o.head_dim, bias = o.bias, qkv_bias = o.qkv_bias,
    dropout = o.dropout, rope = o.positional == "rope", rope_base = o.rope_base, qk_norm = o.qk_norm,
  }
  for k, v in pairs(follow) do
    if out[k] == nil then out[k] = v end
  end
end

-- o.layer_types: the pattern, one choice a layer.
function M.mixer(o, i)
  local kind = o.layer_types[i]
  if kind == "none" then return nil end
  if nn.is_module(kind) then return kind end
  if type(kind) == "function" then return kind(i) end
  local make = type(kind) == "string" and not NO_MIXER[kind] and moe.mixer[kind]
  if not (make and callable(make)) then unknown("mixer", i, kind, mixer_names()) end
  local out = own_options(o, kind, i)
  out.d_model = out.d_model or o.d_model
  if kind == "attention" then
    attention_options(o, out)
  elseif HEADS[kind] and out.num_heads == nil and out.head_dim == nil then
    out.num_heads = o.num_heads
  end
  if kind:find "^mixture_of" and out.rope == nil then out.rope = o.positional == "rope" end
  if PLACED[kind] and out.layer == nil and out.num_layers == nil then
    local before, all = 0, 0
    for j, other in ipairs(o.layer_types) do
      if PLACED[kind] == "model" or other == kind then
        all = all + 1
        if j <= i then before = before + 1 end
      end
    end
    out.layer, out.num_layers = before, all
  end
  return make(out)
end

--- Whether a layer holds a named mixer that knows the order of what it sees by itself.
function M.ordered(layer_types)
  for _, kind in ipairs(layer_types) do
    if type(kind) == "string" and not SETS[kind] then return true end
  end
  return false
end

--- Options for a mixer that no layer holds are an error: a misspelt name must not pass.
function M.check_mixers(o)
  local kinds, names = {}, {}
  for _, kind in ipairs(o.layer_types) do
    if type(kind) == "string" and not kinds[kind] then
      kinds[kind] = true
      names[#names + 1] = kind
    end
  end
  for name in pairs(o.mixers or {}) do
    if not kinds[name] then
      local near = type(name) == "string" and low.nearest(name, names)
      error(("lm: mixers holds options for '%s', but no layer is one%s"):format(tostring(name),
        near and (" (did you mean '%s'?)"):format(near) or ""), 4)
    end
  end
end

-- --- feed-forward networks ---

local function hidden_size(o)
  local hidden = o.intermediate_size or o.ffn_hidden
  if hidden then return hidden end
  if GATED[o.activation] then return (o.d_model * 8 // 3 + 15) // 16 * 16 end
  return 4 * o.d_model
end

-- The options of moe.layer: what is not given follows the model.
local function sparse_layer(o, i)
  local given = o.moe
  if type(given) == "function" then given = given(i) end
  local out = {}
  for k, v in pairs(given or {}) do out[k] = v end
  if out.num_experts == nil then error("lm: ffn = \"moe\" needs moe = { num_experts = ... }", 0) end
  out.d_model = out.d_model or o.d_model
  out.router = out.router or moe.router.topk { top_k = out.top_k or math.min(2, out.num_experts) }
  if out.experts == nil then
    local hidden = out.intermediate_size or hidden_size(o)
    local gate = GATED[o.activation]
    local bank = moe.experts[gate and "glu" or "mlp"]
    out.experts = bank { intermediate_size = hidden, act = gate or o.activation, bias = o.bias }
  end
  out.top_k, out.intermediate_size = nil, nil
  return moe.layer(out)
end

-- o.ffn: the pattern, one choice a layer.
function M.ffn(o, i)
  local kind = o.ffn[i]
  if kind == "none" then return nil end
  if kind == "dense" then
    return nn.ffn { d_model = o.d_model, intermediate_size = hidden_size(o), activation = o.activation, bias = o.bias }
  end
  if kind == "moe" then return sparse_layer(o, i) end
  if nn.is_module(kind) then return kind end
  if type(kind) == "function" then return kind(i) end
  unknown("ffn", i, kind, { table.unpack(FFNS) })
end

return M
