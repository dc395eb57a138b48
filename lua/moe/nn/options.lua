-- Options of Lua modules: a table of what is known, checked as the C layers check theirs.
--
-- read(name, given, rows): rows[option] = { kind, default }, where kind is a Lua type ("number", "integer",
-- "string", "boolean", "table", "function"), several of them joined by "|", a list of choices { "a", "b" }, or "any". Without
-- a default an option may be absent; a default of `read.required` makes it an error.

local low = require("moe.core")._module

local required <const> = {}

local function known_names(rows)
  local names = {}
  for name in pairs(rows) do names[#names + 1] = name end
  table.sort(names)
  return names
end

local function text(v)
  if type(v) == "string" then return ("the string %q"):format(v) end
  if type(v) == "number" or type(v) == "boolean" then return "the " .. type(v) .. " " .. tostring(v) end
  return "a " .. type(v)
end

local function fits(v, kind)
  if kind == "any" then return true end
  if type(kind) == "table" then
    for _, choice in ipairs(kind) do
      if v == choice then return true end
    end
    return false
  end
  for one in kind:gmatch "[^|]+" do
    if one == "integer" and math.type(v) == "integer" then return true end
    if one ~= "integer" and type(v) == one then return true end
  end
  return false
end

local function wanted(kind)
  if type(kind) == "table" then return "one of " .. table.concat(kind, ", ") end
  return "of type " .. kind:gsub("|", " or ")
end

local function read(name, given, rows, level)
  level = (level or 1) + 2
  if given ~= nil and type(given) ~= "table" then
    error(("%s: takes a table of options, got %s"):format(name, text(given)), level)
  end
  local out = {}
  for k, v in pairs(given or {}) do
    local row = rows[k]
    if not row then
      local near = type(k) == "string" and low.nearest(k, known_names(rows))
      local hint = near and (" (did you mean '%s'?)"):format(near) or ""
      error(("%s: unknown option '%s'%s"):format(name, tostring(k), hint), level)
    end
    if not fits(v, row[1]) then
      error(("%s: option '%s' must be %s, got %s"):format(name, k, wanted(row[1]), text(v)), level)
    end
    out[k] = v
  end
  for k, row in pairs(rows) do
    if out[k] == nil then
      if row[2] == required then error(("%s: option '%s' is missing"):format(name, k), level) end
      out[k] = row[2]
    end
  end
  return out
end

return { read = read, required = required }
