--- Optimizers. moe.optim.adamw(what, options) is bound to what it updates: a module, a tensor, a list of tensors, or a
-- list of groups { params = ..., lr = ..., ... } whose options go before the common ones. moe.optim.adamw{ lr = 1e-3 }
-- is unbound: a trainer binds it, or you do, by calling it with the same kinds of `what`.
--
--   local opt = moe.optim.adamw(model, { lr = 1e-3, betas = { 0.9, 0.99 }, weight_decay = 0.1 })
--   opt:zero_grad(); loss:backward(); local norm = opt:step{ clip = 1.0 }
--   opt.lr = opt.lr * 0.5; opt.groups[2].weight_decay = 0
--
-- A row-sparse gradient - of a table read by moe.embedding{ .., sparse = true }, moe.memory_mix or moe.memory_dots - lists the rows
-- p.grad_rows [U] and what comes to them, p.grad_values [U, ..] (p.grad reads as a dense copy of both). A step moves
-- these rows and their states alone, as PyTorch's SparseAdam: the others neither move nor decay, and bias correction counts
-- the steps of the whole table. Clipping, accumulation, checkpoints and trainers work as with dense gradients, to the bit;
-- hooks and moe.grad see dense ones.
--
-- no_decay says which parameters are spared from weight decay: "tagged" (the default: those that their layer marks),
-- "vectors" (those of fewer than two dimensions) or "none".

local core = require "moe.core"
local low = core._optimizer
local is_tensor = core.is_tensor

local M = {}

local function has(what, name)
  local kind = type(what)
  if kind == "table" or (kind == "userdata" and not is_tensor(what)) then
    local ok, f = pcall(function() return what[name] end)
    return ok and type(f) == "function"
  end
  return false
end

-- Appends the parameters of `what` (a module, a tensor, a list of them) with their names; false when it is none of these.
local function gather(what, list, names, depth)
  depth = depth or 0
  if depth > 32 then return false end -- a table that holds itself
  if is_tensor(what) then
    list[#list + 1] = what
  elseif has(what, "named_parameters") then
    for name, p in what:named_parameters() do
      list[#list + 1] = p
      names[#list] = name
    end
  elseif has(what, "parameters") then
    for _, p in ipairs(what:parameters()) do list[#list + 1] = p end
  elseif type(what) == "table" and getmetatable(what) == nil then
    for i = 1, #what do
      if not gather(what[i], list, names, depth + 1) then return false end
    end
  else
    return false
  end
  return true
end

--- The parameters of a module, a tensor or a list of either, as a list; and a table from places to names.
function M.parameters(what)
  local list, names = {}, {}
  if not gather(what, list, names) then
    error(("optim: a module, a tensor or a list of them was wanted, got a %s"):format(type(what)), 2)
  end
  return list, names
end

local function is_groups(what)
  return type(what) == "table" and getmetatable(what) == nil and type(what[1]) == "table"
    and getmetatable(what[1]) == nil and what[1].params ~= nil
end

local function make(kind, what, options)
  local groups = {}
  local used, taken = {}, 0
  for i, source in ipairs(is_groups(what) and what or { { params = what } }) do
    if type(source) ~= "table" then error(("%s: group %d must be a table, got a %s"):format(kind, i, type(source)), 3) end
    local group, list, names = {}, {}, {}
    for k, v in pairs(options) do group[k] = v end
    for k, v in pairs(source) do group[k] = v end
    if not gather(source.params, list, names) then
      error(("%s: a module, a tensor, a list of them or a list of groups was wanted, got a %s")
        :format(kind, type(source.params)), 3)
    end
    -- names tell states apart in files: one that two groups share is replaced by the parameter's number
    for k = 1, #list do
      local name = names[k] or tostring(taken + k)
      if used[name] then name = ("%d.%s"):format(taken + k, name) end
      used[name] = true
      names[k] = name
    end
    taken = taken + #list
    group.params, group.names = list, names
    groups[i] = group
  end
  return low.new(kind, groups)
end

local Unbound = { __name = "moe.optim.unbound" }
Unbound.__index = Unbound
Unbound.__call = function(self, what) return make(self.kind, what, self.options) end
Unbound.__tostring = function(self) return ("moe.optim.%s (not bound yet)"):format(self.kind) end

local function is_unbound_call(what)
  if what == nil then return true end
  if type(what) ~= "table" or getmetatable(what) ~= nil then return false end
  if what[1] ~= nil then return false end
  for k in pairs(what) do
    if k == "params" then return false end
  end
  return true
end

local function constructor(row)
  local kind = row.name
  return function(what, ...)
    if select("#", ...) > 1 then error(("%s: takes what it updates and a table of options"):format(kind), 2) end
    local options = ...
    if options == nil and is_unbound_call(what) then
      local own = {}
      for k, v in pairs(what or {}) do own[k] = v end
      local check = { params = {}, names = {} }
      for k, v in pairs(own) do check[k] = v end
      low.new(kind, { check }) -- wrong options are told now, not when a trainer binds
      return setmetatable({ kind = kind, options = own }, Unbound)
    end
    if options ~= nil and type(options) ~= "table" then
      error(("%s: argument 2 must be a table of options, got a %s"):format(kind, type(options)), 2)
    end
    if type(what) == "table" and getmetatable(what) == nil and what.params ~= nil then what = { what } end -- one group
    return make(kind, what, options or {})
  end
end

--- What there is: a list of { name, doc, options = { name = default } }.
M.kinds = low.kinds()
for _, row in ipairs(M.kinds) do M[row.name] = constructor(row) end

--- Scales the gradients of a module's parameters, or of a list of tensors, to a global 2-norm of at most `max`;
-- returns the norm that they had.
function M.clip_grad_norm(what, max)
  return low.clip_grad_norm((M.parameters(what)), max)
end

--- True for an optimizer that is not bound yet.
function M.is_unbound(v) return getmetatable(v) == Unbound end

return M
