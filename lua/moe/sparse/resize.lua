-- Fewer or more experts in a layer that was trained: methods of moe.layer.

local core = require "moe.core"
local nn = require "moe.nn"

local M = {}

local function tensors(part)
  local out = {}
  for name, t in part:named_parameters() do out[name] = t end
  for name, t in part:named_buffers() do out[name] = t end
  return out
end

-- A part of the same class for E experts, those of `keep` (old numbers) first. Made anew, so that the dims that are
-- the experts' are those whose sizes differ.
local function remade(part, E, keep)
  local given, old = {}, tensors(part)
  for k, v in pairs(part._options) do given[k] = v end
  local was = part.num_experts
  given.d_model, given.num_experts = part.d_model, E
  if math.type(given.top_k) == "integer" then given.top_k = math.min(given.top_k, E) end
  local new = getmetatable(part)(given)
  local index = core.tensor(keep, { dtype = "i64" })
  core.no_grad(function()
    for name, to in pairs(tensors(new)) do
      local from, wide = old[name], to
      if not from then error(("%s has no %s to resize"):format(getmetatable(part).__name, name), 0) end
      for d, n in ipairs(to.shape) do
        if n ~= from.shape[d] then
          if n ~= E or from.shape[d] ~= was then
            error(("%s: %s does not follow the number of experts"):format(getmetatable(part).__name, name), 0)
          end
          from, wide = from:index_select(d, index), wide:narrow(d, 1, #keep)
        end
      end
      wide:copy_(from)
      if not old[name].requires_grad and to.requires_grad then to.requires_grad = false end
    end
  end)
  return new
end

-- Banks within a bank (experts.join) are cut one by one; `members` are numbers in the layer.
local function cut(bank, keep)
  if not bank.banks then return remade(bank, #keep, keep) end
  local kept, banks = {}, {}
  for _, e in ipairs(keep) do kept[e] = true end
  for i, part in ipairs(bank.banks) do
    local own = {}
    for at, e in ipairs(bank._members[i]) do
      if kept[e] then own[#own + 1] = at end
    end
    if #own == #bank._members[i] then banks[#banks + 1] = part
    elseif #own > 0 then banks[#banks + 1] = cut(part, own) end
  end
  return #banks == 1 and banks[1] or getmetatable(bank)(banks, bank.d_model)
end

local function resizable(layer, what)
  if type(layer.router) == "function" or not layer.router._options then
    error(("layer:%s: a router that is a function has no rows to resize"):format(what), 3)
  elseif not nn.is_module(layer.experts) or not (layer.experts._options or layer.experts.banks) then
    error(("layer:%s: the experts must be a bank of moe.experts"):format(what), 3)
  end
end

-- What else counts experts.
local function resized(layer, E)
  layer.num_experts, layer._options.num_experts = E, E
  for i, loss in ipairs(layer._losses) do
    layer._state[i] = {}
    if type(loss) == "table" and loss.start then loss:start(layer._state[i], E) end
  end
  if layer._load then layer._load = core.zeros({ E }, { dtype = "i64" }) end
  layer:reset_stats()
  if layer.resized then layer:resized(E) end
  return layer
end

--- Only the experts of `keep` (a list of numbers, ascending) stay, under new numbers 1 .. #keep, with their weights and their
-- rows of the router; a token that had chosen others takes the best of these. A router's top_k above #keep falls to it.
-- Parameters are new tensors: make the optimizer afterwards. Returns the layer. (Modules that a domain does not use, Shen et al.
-- 2023, arXiv 2306.04640.)
function M.prune(layer, keep)
  resizable(layer, "prune")
  if type(keep) ~= "table" or #keep == 0 then error("layer:prune: argument 1 must be a list of the experts to keep", 2) end
  for i, e in ipairs(keep) do
    if math.type(e) ~= "integer" or e < 1 or e > layer.num_experts or i > 1 and e <= keep[i - 1] then
      error(("layer:prune: the list must ascend within 1 .. %d, its entry %d is %s"):format(layer.num_experts, i, tostring(e)), 2)
    end
  end
  if #keep == layer.num_experts then return layer end
  layer.router, layer.experts = remade(layer.router, #keep, keep), cut(layer.experts, keep)
  return resized(layer, #keep)
end

--- n further experts after those there are, freshly initialised, with rows of the router. The former ones become a frozen bank of
-- their own (moe.experts.join) with freeze = true, so that training moves the new experts and the router alone; otherwise all
-- are one bank. Make the optimizer afterwards. Returns the layer. (Shen et al. 2023, arXiv 2306.04640: new modules for new
-- languages.)
function M.extend(layer, n, given)
  resizable(layer, "extend")
  local freeze = require("moe.nn.options").read("layer:extend", given, { freeze = { "boolean", false } }, 1).freeze
  if math.type(n) ~= "integer" or n < 1 then error("layer:extend: argument 1 must be how many experts to add, got " .. tostring(n), 2) end
  local old, all = layer.num_experts, {}
  for e = 1, old do all[e] = e end
  local bank = layer.experts
  layer.router = remade(layer.router, old + n, all)
  if freeze or bank.banks then
    local last = bank.banks and bank.banks[#bank.banks] or bank
    local options = {}
    for k, v in pairs(last._options) do options[k] = v end
    options.d_model, options.num_experts = last.d_model, n
    local banks = bank.banks and table.move(bank.banks, 1, #bank.banks, 1, {}) or { bank }
    if freeze then bank:freeze() end
    banks[#banks + 1] = getmetatable(last)(options)
    layer.experts = require "moe.experts.join"(banks, layer.d_model)
  else
    layer.experts = remade(bank, old + n, all)
  end
  return resized(layer, old + n)
end

return M
