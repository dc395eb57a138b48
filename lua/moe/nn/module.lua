-- What a module is: the protocol that C layers and Lua modules share, and the classes of Lua modules.
--
-- A module is anything whose metatable has an `entries` function: entries(m) -> { name, value, name, value, ... },
-- its own tensors and its children, in order. Everything below is written over that one function.

local core = require "moe.core"
local low = core._module

local PARAMETER <const>, BUFFER <const>, NO_DECAY <const> = 1, 2, 4

local info = low.info -- tag, is a leaf, requires a gradient, elements, identity
local ORDER = {}      -- the key under which an instance keeps the order in which its fields came

local Module = { training = true }

local function is_module(v)
  local kind = type(v)
  if kind ~= "table" and kind ~= "userdata" then return false end
  local mt = getmetatable(v)
  return type(mt) == "table" and type(mt.entries) == "function"
end

-- "parameter", "buffer" or nil for a tensor that is neither (a cached result, a constant).
local function role(t)
  local tag, leaf, wants = info(t)
  if tag & BUFFER ~= 0 then return "buffer" end
  if tag & PARAMETER ~= 0 or (leaf and wants) then return "parameter" end
end

local function by_kind_then_value(a, b)
  local na, nb = type(a) == "number", type(b) == "number"
  if na ~= nb then return na end
  return a < b
end

-- The string and number keys of a table: those that were there from the start (numbers, then names sorted),
-- then the rest in the order of assignment.
local function ordered_keys(t)
  local order = rawget(t, ORDER)
  local at = order and order.at or {}
  local keys = {}
  for k in next, t do
    local kind = type(k)
    if (kind == "string" or kind == "number") and not at[k] then keys[#keys + 1] = k end
  end
  table.sort(keys, by_kind_then_value)
  if order then table.move(order, 1, #order, #keys + 1, keys) end
  return keys
end

local function collect(t, prefix, out, seen)
  if seen[t] then return end
  seen[t] = true
  for _, k in ipairs(ordered_keys(t)) do
    local v = rawget(t, k)
    local kind = type(v)
    if (kind == "userdata" or kind == "table") and not (type(k) == "string" and k:byte() == 95) then -- "_"
      if is_module(v) or (kind == "userdata" and low.is_tensor(v) and role(v)) then
        out[#out + 1] = prefix .. k
        out[#out + 1] = v
      elseif kind == "table" and getmetatable(v) == nil then
        collect(v, prefix .. k .. ".", out, seen)
      end
    end
  end
end

--- The module's own tensors and children: { name, value, name, value, ... }. Fields that hold plain tables are
-- looked into; fields whose names begin with "_" are not part of the module.
function Module:entries()
  local out = {}
  collect(self, "", out, {})
  return out
end

-- Calls visit(name, tensor, role) for every tensor below m in order, under every name it has.
local function each_tensor(m, visit, prefix, path)
  if path[m] then return end
  path[m] = true
  local list = getmetatable(m).entries(m)
  for i = 1, #list, 2 do
    local name, v = prefix .. list[i], list[i + 1]
    if is_module(v) then
      each_tensor(v, visit, name .. ".", path)
    else
      local r = role(v)
      if r then visit(name, v, r) end
    end
  end
  path[m] = nil
end

-- Tensors of one role as a list of { name, tensor }, each tensor once, under its first name.
local function distinct(m, wanted)
  local seen, out = {}, {}
  each_tensor(m, function(name, t, r)
    local _, _, _, _, id = info(t)
    if r == wanted and not seen[id] then
      seen[id] = true
      out[#out + 1] = { name, t }
    end
  end, "", {})
  return out
end

-- Calls visit(name, module) for m and everything below it, each module once, parents first.
local function each_module(m, visit, name, seen)
  if seen[m] then return end
  seen[m] = true
  visit(name, m)
  local list = getmetatable(m).entries(m)
  for i = 1, #list, 2 do
    if is_module(list[i + 1]) then
      each_module(list[i + 1], visit, name == "" and list[i] or name .. "." .. list[i], seen)
    end
  end
end

local function pairs_of(list)
  local i = 0
  return function()
    i = i + 1
    if list[i] then return list[i][1], list[i][2] end
  end
end

local function seconds(list)
  local out = {}
  for i, pair in ipairs(list) do out[i] = pair[2] end
  return out
end

--- All parameters, as a list; a shared one appears once.
function Module:parameters() return seconds(distinct(self, "parameter")) end

--- Iterates over name, parameter in order; a shared one appears once, under its first name.
function Module:named_parameters() return pairs_of(distinct(self, "parameter")) end

--- All buffers (tensors that are saved but not trained), as a list.
function Module:buffers() return seconds(distinct(self, "buffer")) end

--- Iterates over name, buffer in order.
function Module:named_buffers() return pairs_of(distinct(self, "buffer")) end

--- The modules directly below this one, as a list.
function Module:children()
  local out, list = {}, getmetatable(self).entries(self)
  for i = 2, #list, 2 do
    if is_module(list[i]) then out[#out + 1] = list[i] end
  end
  return out
end

--- Iterates over name, module: this one under "", then everything below it, parents first.
function Module:named_modules()
  local list = {}
  each_module(self, function(name, m) list[#list + 1] = { name, m } end, "", {})
  return pairs_of(list)
end

--- Every module in the tree, as a list.
function Module:modules()
  local list = {}
  each_module(self, function(_, m) list[#list + 1] = m end, "", {})
  return list
end

--- A table from names to tensors that share the parameters' and buffers' storage, without history.
function Module:state_dict()
  local out = {}
  each_tensor(self, function(name, t) out[name] = t:detach() end, "", {})
  return out
end

local function shape_text(t) return "[" .. table.concat(t.shape, ", ") .. "]" end

local function same_shape(a, b)
  local s, r = a.shape, b.shape
  if #s ~= #r then return false end
  for i = 1, #s do
    if s[i] ~= r[i] then return false end
  end
  return true
end

--- Copies values from a table of named tensors. Nothing is changed unless everything fits; the error lists every
-- missing, unexpected and misshapen name. {strict = false} lets missing and unexpected names pass.
-- Returns a table {missing = {names}, unexpected = {names}}.
function Module:load_state_dict(state, options)
  if type(state) ~= "table" then
    error("load_state_dict: argument 1 must be a table of named tensors, got a " .. type(state), 2)
  end
  if options ~= nil and type(options) ~= "table" then
    error("load_state_dict: argument 2 must be a table of options, got a " .. type(options), 2)
  end
  local strict = true
  for k, v in pairs(options or {}) do
    if k ~= "strict" then
      error(("load_state_dict: unknown option '%s' (did you mean 'strict'?)"):format(tostring(k)), 2)
    end
    strict = v
  end
  local missing, unexpected, wrong, todo, known = {}, {}, {}, {}, {}
  each_tensor(self, function(name, t)
    local v = state[name]
    known[name] = true
    if v == nil then
      missing[#missing + 1] = name
    elseif not low.is_tensor(v) then
      wrong[#wrong + 1] = ("%s (%s here, a %s there)"):format(name, shape_text(t), type(v))
    elseif not same_shape(t, v) then
      wrong[#wrong + 1] = ("%s (%s here, %s there)"):format(name, shape_text(t), shape_text(v))
    else
      todo[#todo + 1] = { t, v }
    end
  end, "", {})
  for name in pairs(state) do
    if not known[name] then unexpected[#unexpected + 1] = tostring(name) end
  end
  table.sort(unexpected)
  local faults = {}
  local function fault(what, list)
    if #list > 0 then faults[#faults + 1] = ("%d %s: %s"):format(#list, what, table.concat(list, ", ")) end
  end
  if strict then
    fault("missing", missing)
    fault("unexpected", unexpected)
  end
  fault("of another shape", wrong)
  if #faults > 0 then error("load_state_dict: " .. table.concat(faults, "; "), 2) end
  for _, pair in ipairs(todo) do low.assign(pair[1], pair[2]) end
  return { missing = missing, unexpected = unexpected }
end

--- Converts all floating parameters and buffers in place, to a type ("bf16"), a device ("cuda:0") or both; whoever
-- holds them (an optimizer) sees the change. Returns the module.
function Module:to(...)
  local targets = table.pack(...)
  if targets.n == 1 and type(targets[1]) == "table" then targets = { targets[1].dtype, targets[1].device, n = 2 } end
  each_module(self, function(_, m)
    if type(m) == "userdata" and low.is(m) then
      low.convert(m, table.unpack(targets, 1, targets.n))
    else
      local list = getmetatable(m).entries(m)
      for i = 2, #list, 2 do
        if not is_module(list[i]) then low.convert(list[i], table.unpack(targets, 1, targets.n)) end
      end
    end
  end, "", {})
  return self
end

local function set_training(self, on)
  each_module(self, function(_, m) m.training = on end, "", {})
  return self
end

--- Puts the whole tree into training mode; train(false) is eval(). Returns the module.
function Module:train(on) return set_training(self, on ~= false) end

--- Puts the whole tree into evaluation mode: no dropout, no noise, no counting. Returns the module.
function Module:eval() return set_training(self, false) end

local function set_frozen(self, frozen)
  for _, pair in ipairs(distinct(self, "parameter")) do
    local t = pair[2]
    low.set_tag(t, info(t) | PARAMETER) -- it stays a parameter without a gradient
    low.mark(t, not frozen)
    if frozen then low.drop_grad(t) end
  end
  return self
end

--- Stops training of all parameters below; they stay in the state dict. Returns the module.
function Module:freeze() return set_frozen(self, true) end

--- Undoes freeze. Returns the module.
function Module:unfreeze() return set_frozen(self, false) end

--- Calls f(module) for every module of the tree, children before parents. Returns the module.
function Module:apply(f)
  if type(f) ~= "function" and not (getmetatable(f) or {}).__call then
    error("apply: argument 1 must be a function, got a " .. type(f), 2)
  end
  local list = self:modules()
  for i = #list, 1, -1 do f(list[i]) end
  return self
end

--- Drops the gradients of all parameters.
function Module:zero_grad()
  for _, pair in ipairs(distinct(self, "parameter")) do low.drop_grad(pair[2]) end
end

--- The number of elements of all parameters, shared ones once; num_parameters(true): of those being trained.
function Module:num_parameters(trainable)
  local n = 0
  for _, pair in ipairs(distinct(self, "parameter")) do
    local _, _, wants, count = info(pair[2])
    if wants or not trainable then n = n + count end
  end
  return n
end

--- Puts a tensor into a field as a buffer: saved in the state dict, moved by to(), not trained. Returns the tensor.
function Module:buffer(name, t)
  if type(name) ~= "string" then error("buffer: argument 1 must be a name, got a " .. type(name), 2) end
  if not low.is_tensor(t) then error("buffer: argument 2 must be a tensor, got a " .. type(t), 2) end
  low.set_tag(t, (info(t) & ~PARAMETER) | BUFFER)
  low.mark(t, false)
  self[name] = t
  return t
end

function Module:forward()
  error(getmetatable(self).__name .. ": this module has no forward(self, ...)", 0)
end

--- What tostring shows of a module's own settings, in brackets after its name; a module may define its own.
function Module.extra() return "" end

-- --- text ---

local function grouped(n)
  local s = tostring(n)
  while true do
    local k
    s, k = s:gsub("^(%-?%d+)(%d%d%d)", "%1,%2")
    if k == 0 then return s end
  end
end

local function count_text(n) return n == 0 and "" or (" %s parameter%s"):format(grouped(n), n == 1 and "" or "s") end

local describe

-- Siblings 1, 2, 3 ... that read the same are shown once.
local function children_lines(m, indent, path)
  local lines = {}
  local list = getmetatable(m).entries(m)
  for i = 1, #list, 2 do
    local name, v = list[i], list[i + 1]
    local text = is_module(v) and describe(v, indent .. "  ", path)
      or ("%s %s %s"):format(role(v), v.dtype, shape_text(v))
    local stem, k = tostring(name):match "^(.-)(%d+)$"
    local last = lines[#lines]
    if k and last and last.stem == stem and last.to + 1 == tonumber(k) and last.text == text then
      last.to = last.to + 1
    else
      lines[#lines + 1] = { name = name, stem = k and stem, from = tonumber(k), to = tonumber(k), text = text }
    end
  end
  local out = {}
  for _, line in ipairs(lines) do
    local name = line.name
    if line.from and line.to > line.from then name = ("%s%d-%d"):format(line.stem, line.from, line.to) end
    out[#out + 1] = ("%s  %s: %s"):format(indent, name, line.text)
    if line.from and line.to > line.from then
      out[#out] = out[#out]:gsub(": ", (": %d x "):format(line.to - line.from + 1), 1)
    end
  end
  return out
end

function describe(m, indent, path)
  local name, extra
  if type(m) == "userdata" and low.is(m) then
    name, extra = low.head(m), ""
  else
    name = getmetatable(m).__name or "module"
    extra = type(m.extra) == "function" and m:extra() or ""
    if extra ~= "" then extra = "(" .. extra .. ")" end
  end
  local head = name .. extra
  if path[m] then return head .. " (above)" end
  head = head .. count_text(Module.num_parameters(m))
  if type(m) == "userdata" then return head end
  path[m] = true
  local lines = children_lines(m, indent, path)
  path[m] = nil
  return table.concat({ head, table.unpack(lines) }, "\n")
end

local function to_text(m) return describe(m, "", {}) end

-- --- classes ---

local function call(self, ...) return self:forward(...) end

local function remember(self, key, value)
  rawset(self, key, value)
  local order = rawget(self, ORDER)
  if not order then
    order = { at = {} }
    rawset(self, ORDER, order)
  end
  if not order.at[key] then
    order.at[key] = true
    order[#order + 1] = key
  end
end

local function next_field(self, key)
  local value
  repeat key, value = next(self, key) until key ~= ORDER
  return key, value
end

local function fields(self) return next_field, self, nil end

local function construct(class, ...)
  local self = setmetatable({ [ORDER] = { at = {} } }, class)
  if class.init then class.init(self, ...) end
  return self
end

local class_mt = {
  __call = construct,
  __tostring = function(class) return "class " .. class.__name end,
}

--- Makes a class of modules: `local Block = moe.nn.module("Block")`, then `function Block:init(options)` and
-- `function Block:forward(x)`, and `Block{...}` makes one. Fields that hold parameters, modules or tables of them are
-- its parts; assign tensors with requires_grad, `moe.nn.parameter(t)` or `self:buffer(name, t)`. `base` is a class to
-- inherit from.
local function module(name, base)
  if type(name) ~= "string" then error("module: argument 1 must be a name, got a " .. type(name), 2) end
  if base ~= nil and not (type(base) == "table" and type(base.entries) == "function") then
    error("module: argument 2 (base) must be a class made by moe.nn.module, got a " .. type(base), 2)
  end
  local class = { __name = name, __call = call, __tostring = to_text, __newindex = remember, __pairs = fields }
  class.__index = class
  local mt = {}
  for k, v in pairs(class_mt) do mt[k] = v end
  mt.__index = base or Module
  return setmetatable(class, mt)
end

--- Marks a tensor as a parameter and returns it: a leaf that wants a gradient. {decay = false} keeps it out of
-- weight decay.
local function parameter(t, options)
  if not low.is_tensor(t) then error("parameter: argument 1 must be a tensor, got a " .. type(t), 2) end
  local tag, leaf = info(t)
  if options ~= nil and type(options) ~= "table" then
    error("parameter: argument 2 must be a table of options, got a " .. type(options), 2)
  end
  if not leaf then error("parameter: the tensor is the result of a recorded call (detach it)", 2) end
  tag = (tag & ~BUFFER) | PARAMETER
  for k, v in pairs(options or {}) do
    if k ~= "decay" then error(("parameter: unknown option '%s' (did you mean 'decay'?)"):format(tostring(k)), 2) end
    tag = v and tag & ~NO_DECAY or tag | NO_DECAY
  end
  low.set_tag(t, tag)
  low.mark(t, true)
  return t
end

--- Whether weight decay applies to a parameter: not where it was marked with {decay = false}, nor to the biases and
-- norms of C layers.
local function decays(t) return info(t) & NO_DECAY == 0 end

-- C layers answer the same methods.
low.methods.entries = low.entries
for name, f in pairs(Module) do
  if type(f) == "function" and low.methods[name] == nil then low.methods[name] = f end
end

return {
  Module = Module,
  module = module,
  parameter = parameter,
  decays = decays,
  is_module = is_module,
}
