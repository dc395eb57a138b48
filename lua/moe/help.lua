--- moe.help(name): prints what is known of a name: signature, shapes, options, an example.
-- moe.help() lists everything in a few lines; moe.help(object) tells what a tensor, layer or function is.
local doc = require "moe.doc"

local KINDS = {
  tensor = "tensor", operand = "tensor or number", index = "integer tensor, counting from 1", tensors = "list of tensors",
  number = "number", int = "integer", dim = "dimension, 1 is the first, -1 the last", dims = "dimension or list of them",
  pos = "position, from 1", ints = "list of integers", bool = "boolean", dtype = "dtype", device = "device", string = "string",
}

local function describe(p)
  local what = p.choices and '"' .. table.concat(p.choices, '" | "') .. '"' or KINDS[p.kind] or p.kind
  if p.default then
    what = what .. (", default %s"):format(p.choices and '"' .. p.default .. '"' or p.default)
  elseif p.optional then
    what = what .. ", may be left out"
  end
  return what
end

local function entry_text(entry)
  local out = { entry.signature }
  if entry.usage then out[#out + 1] = "  " .. entry.usage end
  if entry.doc then out[#out + 1] = "  " .. entry.doc:gsub("\n", "\n  ") end
  local width = 0
  for _, p in ipairs(entry.params or {}) do width = math.max(width, #p.name) end
  for _, p in ipairs(entry.params or {}) do
    out[#out + 1] = ("    %-" .. width .. "s  %s"):format(p.name, describe(p))
  end
  if entry.kind == "operation" then
    local notes = { "results: " .. entry.results }
    if entry.method and not entry.path:match "^x:" then notes[#notes + 1] = ("also x:%s(...)"):format(entry.name) end
    if entry.inplace then notes[#notes + 1] = ("in place x:%s_(...)"):format(entry.name) end
    if entry.view then notes[#notes + 1] = "a view: shares storage" end
    if entry.random then notes[#notes + 1] = "random" end
    if entry.differentiable then notes[#notes + 1] = "differentiable" end
    out[#out + 1] = "  " .. table.concat(notes, "; ")
  end
  if entry.example then out[#out + 1] = "  example: " .. entry.example end
  return table.concat(out, "\n")
end

local function overview()
  local groups, order = {}, {}
  for _, entry in ipairs(doc.entries()) do
    local title
    if entry.kind == "operation" then title = "operations: moe.name(x, ...) and x:name(...)"
    elseif entry.kind == "method" then title = "methods of " .. entry.group
    elseif entry.group == "" then title = "moe"
    else title = "moe." .. entry.group end
    if not groups[title] then
      groups[title] = {}
      order[#order + 1] = title
    end
    table.insert(groups[title], entry.name)
  end
  local out = {}
  for _, title in ipairs(order) do
    out[#out + 1] = title
    local line = " "
    for _, name in ipairs(groups[title]) do
      if #line + #name > 100 then
        out[#out + 1] = line
        line = " "
      end
      line = line .. " " .. name
    end
    out[#out + 1] = line
  end
  out[#out + 1] = 'moe.help "name" tells more'
  return table.concat(out, "\n")
end

-- The nearest names, for a name that is not there.
local function nearest(name)
  local hits, word = {}, name:lower():match "([%w_]+)$" or name:lower()
  for _, entry in ipairs(doc.entries()) do
    local other = entry.name:lower()
    if #word >= 3 and (other:find(word, 1, true) or word:find(other, 1, true) and #other >= 3) or other:sub(1, 4) == word:sub(1, 4) then
      hits[#hits + 1] = entry.path
      if #hits == 6 then break end
    end
  end
  return hits
end

--- The help text of a name, or nil and a message that names similar ones.
local function text_of(name)
  if name == nil then return overview() end
  if type(name) == "function" then
    local args, comment = doc.of_function(name)
    for _, entry in ipairs(doc.entries()) do
      local value = require "moe"
      for part in entry.path:gmatch "[%w_]+" do
        if part ~= "moe" and type(value) == "table" then
          local ok, inner = pcall(function() return value[part] end)
          value = ok and inner or nil
        end
      end
      if value == name then return entry_text(entry) end
    end
    if args then return ("function(%s)\n  %s"):format(args, (comment or "no comment above it"):gsub("\n", "\n  ")) end
    return "a C function without an entry"
  end
  if type(name) ~= "string" then return tostring(name) end
  local found = doc.find(name)
  if #found == 0 then
    local near = nearest(name)
    return nil, ("help: nothing is called '%s'%s"):format(name, #near > 0 and "; near: " .. table.concat(near, ", ") or "")
  end
  local out = {}
  for i, entry in ipairs(found) do out[i] = entry_text(entry) end
  return table.concat(out, "\n\n")
end

return setmetatable({ text = text_of }, {
  __call = function(_, name)
    local text, message = text_of(name)
    print(text or message)
  end,
})
