--- What can be said about every public name: collected from the operation table, the table of layers, the notes on
-- other C functions (coredoc.lua) and the comments above Lua functions. moe.help prints it, docgen.lua writes the
-- reference page and the editor stubs from it, and the specs call the whole interface by it.
--
-- The comment of a Lua function is the block right above it whose first line begins with three dashes; lines of two
-- dashes continue it. Its first sentence is the summary.

local M = {}

-- Submodules in the order of the reference page.
M.GROUPS = {
  "nn", "router", "experts", "routing", "loss", "inspect", "plot", "optim", "schedule", "data", "data.synthetic", "io", "model", "mixer",
  "recipe", "repl",
}
-- Submodules that are functions themselves.
M.CALLABLES = { "layer", "trainer", "help", "gradcheck" }

-- Splits at commas outside of brackets.
local function split(text)
  local parts, depth, start = {}, 0, 1
  for i = 1, #text do
    local c = text:sub(i, i)
    if c == "(" or c == "{" then
      depth = depth + 1
    elseif c == ")" or c == "}" then
      depth = depth - 1
    elseif c == "," and depth == 0 then
      parts[#parts + 1] = text:sub(start, i - 1)
      start = i + 1
    end
  end
  parts[#parts + 1] = text:sub(start)
  return parts
end

--- Parses a signature of csrc/op/op.h, "x:tensor, dim:dims?, keepdim:bool=false", into a list of
-- { name, kind, optional, default, choices }.
function M.parameters(text)
  local list = {}
  for _, part in ipairs(split(text or "")) do
    local name, rest = part:match "^%s*([%w_]+)%s*:%s*(.-)%s*$"
    if name then
      local kind, default = rest:match "^(.-)%s*=%s*(.+)$"
      kind = kind or rest
      local optional = default ~= nil or kind:sub(-1) == "?"
      kind = kind:gsub("%?$", "")
      local choices
      local inner = kind:match "^enum%((.*)%)$"
      if inner then
        kind, choices = "enum", {}
        for choice in inner:gmatch "[^|]+" do choices[#choices + 1] = choice:match "^%s*(.-)%s*$" end
        if default and not tonumber(default) then default = default:gsub('^"?(.-)"?$', "%1") end
      end
      list[#list + 1] = { name = name, kind = kind, optional = optional, default = default, choices = choices }
    end
  end
  return list
end

-- "x, dim, {keepdim = false}"-like text: positional names, optional ones in brackets.
local function call_text(params)
  local parts = {}
  for _, p in ipairs(params) do
    local text = p.name
    if p.default then
      text = text .. " = " .. (p.kind == "enum" and '"' .. p.default .. '"' or p.default)
    end
    parts[#parts + 1] = p.optional and "[" .. text .. "]" or text
  end
  return table.concat(parts, ", ")
end

local function option_text(params)
  if #params == 0 then return "()" end
  local named = {}
  for i, p in ipairs(params) do
    local value = p.default and (p.kind == "enum" and '"' .. p.default .. '"' or p.default) or p.kind
    named[i] = p.name .. " = " .. value
  end
  return "{ " .. table.concat(named, ", ") .. " }"
end

-- Lines of a source file, read once.
local sources = {}
local function lines_of(path)
  local lines = sources[path]
  if lines == nil then
    lines = false
    local file = io.open(path)
    if file then
      lines = {}
      for line in file:lines() do lines[#lines + 1] = line end
      file:close()
    end
    sources[path] = lines
  end
  return lines
end

-- The comment block right above line `at`: text, or nil when there is none that begins with three dashes (`any`: two).
local function comment_above(lines, at, any)
  local first = at - 1
  while first >= 1 and lines[first]:match "^%s*%-%-" do first = first - 1 end
  for i = first + 1, at - 1 do
    if any or lines[i]:match "^%s*%-%-%-" then
      local text = {}
      for k = i, at - 1 do text[#text + 1] = lines[k]:gsub("^%s*%-%-%-?%s?", "") end
      return table.concat(text, "\n")
    end
  end
end

--- Signature and comment of a Lua function: text of its arguments, comment or nil. nil for a C function.
function M.of_function(f)
  local info = debug.getinfo(f, "Su")
  if info.what == "C" or info.source:sub(1, 1) ~= "@" then return nil end
  local lines = lines_of(info.source:sub(2))
  local names = {}
  for i = 1, info.nparams do names[i] = debug.getlocal(f, i) end
  if info.isvararg then names[#names + 1] = "..." end
  local comment
  if lines then
    comment = comment_above(lines, info.linedefined)
    -- A module that is one function: the comment at the head of its file.
    if not comment and lines[1]:match "^%-%-%-" then
      local returned
      for i = #lines, 1, -1 do
        returned = lines[i]:match "^return ([%w_]+)%s*$"
        if returned or lines[i]:match "%S" then break end
      end
      if returned and lines[info.linedefined]:find("function " .. returned .. "(", 1, true) then
        local last = 1
        while lines[last + 1] and lines[last + 1]:match "^%-%-" do last = last + 1 end
        comment = comment_above(lines, last + 1)
      end
    end
  end
  return table.concat(names, ", "), comment
end

-- An argument of the mini language (csrc/op/op.h) as a user would write it.
local function readable(set)
  local text = set
  text = text:gsub("%f[%w]N(%b())", function(sizes) return "moe.randn" .. sizes end)
  text = text:gsub("%f[%w]P(%b())", function(sizes) return "(moe.rand" .. sizes .. " + 0.5)" end)
  text = text:gsub("%f[%w]B(%b())", function(sizes) return "moe.rand" .. sizes .. ":gt(0.5)" end)
  text = text:gsub("%f[%w]I%((%d+),?%s*([^()]*)%)", function(n, sizes)
    return ("moe.randint(1, %s, {%s})"):format(n, sizes)
  end)
  return text
end

local function first_example(row)
  local sets = row.examples
  if not sets or sets == "" then return nil end
  local set = sets:match "^%s*(.-)%s*;" or sets
  return readable(set)
end

local function operation_entry(row)
  local params = M.parameters(row.args)
  local method_only = row.method_only
  local entry = {
    kind = "operation", name = row.name, group = "", doc = row.doc, params = params, results = row.results, row = row,
    inplace = row.inplace, view = row.view, random = row.random,
    differentiable = row.differentiable,
  }
  entry.path = (method_only and "x:" or "moe.") .. row.name
  local is_method = not row.function_only and params[1] ~= nil and params[1].kind ~= "tensors"
  entry.method = is_method or method_only
  if method_only then
    entry.signature = ("x:%s(%s)"):format(row.name, call_text(table.move(params, 2, #params, 1, {})))
  else
    entry.signature = ("moe.%s(%s)"):format(row.name, call_text(params))
  end
  local example = first_example(row)
  if example then
    if method_only then
      local given = split(example)
      entry.example = ("%s:%s(%s)"):format(given[1], row.name, table.concat(given, ",", 2):match "^%s*(.-)$")
    else
      entry.example = ("moe.%s(%s)"):format(row.name, example)
    end
  end
  return entry
end

local function layer_entry(row)
  local params = M.parameters(row.options)
  return {
    kind = "layer", name = row.name, group = row.group, path = ("moe.%s.%s"):format(row.group, row.name), doc = row.doc,
    params = params, call = M.parameters(row.call), row = row,
    signature = ("moe.%s.%s%s"):format(row.group, row.name, option_text(params)),
    usage = row.call and row.call ~= "" and ("layer(%s)"):format(call_text(M.parameters(row.call))) or nil,
  }
end

-- Public functions of a table of Lua or C functions, sorted: { name, function }.
local function functions_of(t)
  local list = {}
  for name, value in next, t do
    if type(name) == "string" and type(value) == "function" and not name:match "^_" then
      list[#list + 1] = { name, value }
    end
  end
  table.sort(list, function(a, b) return a[1] < b[1] end)
  return list
end

local function first_sentence(text)
  local flat = text:gsub("\n%s*\n.*", ""):gsub("%s*\n%s*", " ")
  return flat:match "^(.-[.:])%s" or flat
end
M.first_sentence = first_sentence

-- The comment above `M.name = ...` in the file of moe.<group>, for functions that are defined elsewhere.
local function comment_of_assignment(group, name)
  local path = package.searchpath("moe." .. group, package.path)
  for i, line in ipairs(path and lines_of(path) or {}) do
    if line:match("^[%a_][%w_]*%." .. name .. "%s*=") then return comment_above(lines_of(path), i) end
  end
end

-- The comment at the head of the file of moe.<name>.
local function comment_of_file(name)
  local path = package.searchpath("moe." .. name, package.path)
  local lines = path and lines_of(path)
  if not lines then return nil end
  local last = 1
  while lines[last] and lines[last]:match "^%-%-" do last = last + 1 end
  return comment_above(lines, last)
end

-- Options that a class of modules reads: the table of rows { type, default } that its init refers to, as text.
local function class_options(init)
  for i = 1, debug.getinfo(init, "u").nups do
    local upname, rows = debug.getupvalue(init, i)
    if type(rows) == "table" and (upname:match "ROWS$" or upname == "rows" or upname == "defaults") and type(next(rows)) == "string" then
      local names = {}
      for name in pairs(rows) do names[#names + 1] = name end
      table.sort(names)
      for k, name in ipairs(names) do
        local row = rows[name]
        if upname == "defaults" then row = { type(row), row } end
        local kind, default = row[1], row[2]
        if type(kind) == "table" then kind = '"' .. table.concat(kind, '" or "') .. '"' end
        if type(default) == "string" then default = '"' .. default .. '"' end
        if type(default) == "table" then default = nil end -- required
        names[k] = ("%s = %s"):format(name, default ~= nil and tostring(default) or tostring(kind):gsub("|", " or "))
      end
      return "{ " .. table.concat(names, ", ") .. " }"
    end
  end
end

-- A class of modules made in Lua, which is called to make one.
local function class_entry(group, name, class, notes, operations)
  local path = ("moe.%s.%s"):format(group, name)
  local init = class.init
  local args, comment = "...", nil
  local options
  if type(init) == "function" then
    args, comment = M.of_function(init)
    args = (args or "..."):gsub("^self,? ?", "")
    options = class_options(init)
    local own = rawget(class, "init") -- an inherited one lies in another file
    for key, f in next, class do
      own = own or type(f) == "function" and key:sub(1, 2) ~= "__" and f
    end
    local source = debug.getinfo(own or init, "S").source
    local lines = lines_of(source:sub(2)) or {}
    for i, line in ipairs(lines) do
      if comment then break end
      if line:match('module[ (]+"' .. name .. '"') or line:match("^M%." .. name .. "%s*=") then
        comment = comment_above(lines, i, true)
      end
    end
  end
  comment = comment or comment_of_assignment(group, name)
  if not comment and operations[name] then comment = "the operation " .. name .. " as a module: " .. operations[name].doc end
  local note = notes[path]
  return { kind = "function", name = name, group = group, path = path, doc = note and note[2] or comment,
    signature = note and note[1] or options and path .. options or ("%s(%s)"):format(path, args) }
end

local function function_entry(prefix, group, name, f, notes)
  local path = prefix .. name
  local note = notes[path]
  local args, comment = M.of_function(f)
  if group == "" then comment = comment or comment_of_file(name)
  else comment = comment or comment_of_assignment(group, name) end
  if note then
    return { kind = "function", name = name, group = group, path = path, signature = note[1], doc = note[2], example = note[3] }
  end
  return { kind = "function", name = name, group = group, path = path, signature = ("%s(%s)"):format(path, args or "..."),
    doc = comment }
end

-- A constructor that a module describes by its own table `kinds`: { name, doc, options = { name = default } }.
local function kind_entry(group, row)
  local names = {}
  for name in pairs(row.options) do names[#names + 1] = name end
  table.sort(names)
  for i, name in ipairs(names) do
    local v = row.options[name]
    if type(v) == "table" then v = "{ " .. table.concat(v, ", ") .. " }"
    elseif type(v) == "string" then v = '"' .. v .. '"' end
    names[i] = ("%s = %s"):format(name, tostring(v))
  end
  local path = ("moe.%s.%s"):format(group, row.name)
  return { kind = "function", name = row.name, group = group, path = path, doc = row.doc,
    signature = ("%s([model or parameters or groups,] { %s })"):format(path, table.concat(names, ", ")) }
end

-- Classes that users meet; others are the bindings' own.
local CLASSES <const> = { ["moe.Tensor"] = true, ["moe.Module"] = true, ["moe.Routing"] = true, ["moe.Optimizer"] = true,
  ["moe.Trainer"] = true }

-- The metatables that the bindings have registered: { { "moe.Tensor", methods }, ... }, sorted.
function M.classes()
  local list = {}
  for key, mt in pairs(debug.getregistry()) do
    if CLASSES[key] and type(mt) == "table" then
      local methods = rawget(mt, "__metatable")
      if type(methods) ~= "table" then methods = rawget(mt, "__index") end
      if type(methods) == "table" then list[#list + 1] = { key, methods } end
    end
  end
  table.sort(list, function(a, b) return a[1] < b[1] end)
  return list
end

--- Every public name as a list of entries { kind, path, name, group, signature, doc, params, example, ... }, in the
-- order of the reference page. kind: "operation", "layer", "function" or "method".
function M.entries()
  local moe = require "moe"
  local notes = require "moe.coredoc"
  local list, seen = {}, {}
  local function add(entry)
    if not seen[entry.path] then
      seen[entry.path] = entry
      list[#list + 1] = entry
    end
  end

  for _, row in ipairs(moe.core.ops()) do
    if not row.internal then add(operation_entry(row)) end
  end
  for _, row in ipairs(moe.core.modules and moe.core.modules() or {}) do add(layer_entry(row)) end
  local callable = {}
  for _, name in ipairs(M.CALLABLES) do callable[name] = true end
  for _, pair in ipairs(functions_of(moe)) do
    -- name_ is the in-place form of an operation and described with it
    local base = seen["moe." .. pair[1]:gsub("_$", "")]
    if not (base and base.kind == "operation" or callable[pair[1]]) then
      add(function_entry("moe.", "", pair[1], pair[2], notes))
    end
  end
  for _, name in ipairs(M.CALLABLES) do
    local ok, value = pcall(function() return moe[name] end)
    if ok and value ~= nil then
      local f = value
      if type(value) == "table" then
        f = (getmetatable(value) or {}).__call
        -- what else it holds (the methods of a class of modules) is public where it has a comment
        for _, pair in ipairs(functions_of(value)) do
          local args, comment = M.of_function(pair[2])
          if comment then
            local method = type(value.entries) == "function"
            local path = ("moe.%s%s%s"):format(name, method and ":" or ".", pair[1])
            if method then args = args:gsub("^self,? ?", "") end
            add { kind = "function", name = pair[1], group = "", path = path, signature = ("%s(%s)"):format(path, args), doc = comment }
          end
        end
      end
      if f then
        local entry = function_entry("moe.", "", name, f, notes)
        if type(value) == "table" and not notes[entry.path] then
          local options = type(value.init) == "function" and class_options(value.init)
          entry.signature = options and entry.path .. options or entry.signature:gsub("%([^,)]*,? ?", "(")
        end
        add(entry)
      end
    end
  end
  for _, group in ipairs(M.GROUPS) do
    local ok, value = pcall(function()
      local at = moe
      for part in group:gmatch "[^.]+" do at = at[part] end
      return at
    end)
    if ok and type(value) == "table" then
      for _ in pairs(value) do end -- loads what is loaded when it is named
      local kinds = {}
      for _, row in ipairs(type(value.kinds) == "table" and value.kinds or {}) do kinds[row.name] = row end
      for _, pair in ipairs(functions_of(value)) do
        local name, operation = pair[1], seen["moe." .. pair[1]]
        if kinds[name] then
          add(kind_entry(group, kinds[name]))
        elseif operation and rawequal(moe[name], pair[2]) then
          add {
            kind = "function", name = name, group = group, path = ("moe.%s.%s"):format(group, name), doc = operation.doc,
            signature = operation.signature:gsub("^moe%.", ("moe.%s."):format(group)),
          }
        else
          add(function_entry("moe." .. group .. ".", group, name, pair[2], notes))
        end
      end
      local classes, operations = {}, {}
      for name, class in next, value do
        local mt = type(class) == "table" and getmetatable(class)
        if mt and mt.__call and type(class.entries) == "function" then classes[#classes + 1] = name end
        operations[name] = seen["moe." .. tostring(name)]
      end
      table.sort(classes)
      for _, name in ipairs(classes) do add(class_entry(group, name, value[name], notes, operations)) end
    end
  end
  for _, class in ipairs(M.classes()) do
    for _, pair in ipairs(functions_of(class[2])) do
      local operation = seen["moe." .. pair[1]] or seen["moe." .. pair[1]:gsub("_$", "")] or seen["x:" .. pair[1]]
        or seen["x:" .. pair[1]:gsub("_$", "")]
      if not (class[1] == "moe.Tensor" and operation and operation.kind == "operation") then
        local path = class[1] .. ":" .. pair[1]
        local note = notes[path] or notes["*:" .. pair[1]]
        local args, comment = M.of_function(pair[2])
        if args then args = args:gsub("^self,? ?", "") end
        add {
          kind = "method", name = pair[1], group = class[1], path = path,
          signature = note and note[1] or ("%s(%s)"):format(path, args or "..."),
          doc = note and note[2] or comment, example = note and note[3],
        }
      end
    end
  end
  return list
end

--- The entries that a name means: by its whole path ("moe.nn.linear", "topk"), else by its last part; a list.
function M.find(name)
  name = name:gsub("^moe%.", ""):gsub("%(%s*%)$", "")
  local exact, last = {}, {}
  for _, entry in ipairs(M.entries()) do
    local path = entry.path:gsub("^moe%.", "")
    if path == name or path == "x:" .. name then
      exact[#exact + 1] = entry
    elseif entry.name == name or entry.name .. "_" == name then
      last[#last + 1] = entry
    end
  end
  return #exact > 0 and exact or last
end

return M
