--- Niceties for the prompt, none of them needed: `lua5.4 -l moe -i` already prints tensors and layers well.
-- lua5.4 -e 'require "moe.repl".start()' gives a prompt that knows ?name, who() and, where the readline module is
-- installed, completion and history. Nothing global changes unless start{globals = true} asks for it.

local M = {}

-- Names that may follow `value.` or `value:`.
local function members(value)
  local names = {}
  local function add(t)
    if type(t) ~= "table" then return end
    for key in next, t do
      if type(key) == "string" and not key:match "^__" then names[key] = true end
    end
  end
  if type(value) == "table" then add(value) end
  local ok, mt = pcall(getmetatable, value)
  if ok and type(mt) == "table" then
    add(mt.__index)
    if type(value) == "userdata" then add(mt) end -- the bindings show their methods as the metatable
    if type(mt.__names) == "function" then
      for _, name in ipairs(mt.__names(value)) do names[name] = true end
    end
  elseif type(value) == "string" then
    add(string)
  end
  return names
end

--- Completions of the last word of a line, sorted: complete("moe.nn.li", env) -> { "moe.nn.linear", ... }.
-- env is the table of globals, _G when it is left out.
function M.complete(line, env)
  local word = line:match "[%w_%.:]*$"
  local value, prefix = env or _G, ""
  for name, separator in word:gmatch "([%a_][%w_]*)([%.:])" do
    prefix = prefix .. name .. separator
    local ok, inner = pcall(function() return value[name] end)
    if not ok or inner == nil then return {} end
    value = inner
  end
  local start, list = word:match "[%w_]*$", {}
  for name in pairs(members(value)) do
    if name:sub(1, #start) == start then list[#list + 1] = prefix .. name end
  end
  table.sort(list)
  return list
end

local function bytes_text(n)
  for _, unit in ipairs { "B", "KB", "MB" } do
    if n < 1000 then return ("%.4g %s"):format(n, unit) end
    n = n / 1000
  end
  return ("%.4g GB"):format(n)
end

local SIZES = { f64 = 8, i64 = 8, f32 = 4, i32 = 4, bf16 = 2, f16 = 2, u8 = 1, bool = 1 }

--- Lists the tensors and modules among the globals (or the fields of env), with their sizes in memory, as text.
function M.who(env)
  local rows = {}
  for name, value in next, env or _G do
    if type(name) == "string" and (type(value) == "userdata" or type(value) == "table") then
      local ok, dtype = pcall(function() return value.dtype end)
      if ok and type(value) == "userdata" and SIZES[dtype] then
        rows[#rows + 1] = { name, ("%s [%s]"):format(dtype, table.concat(value.shape, ", ")),
          bytes_text(value:numel() * SIZES[dtype]) }
      else
        local counted, n = pcall(function() return value:num_parameters() end)
        if counted and type(n) == "number" then
          rows[#rows + 1] = { name, (tostring(value):match "^[^\n]*"), ("%d parameters"):format(n) }
        end
      end
    end
  end
  table.sort(rows, function(a, b) return a[1] < b[1] end)
  local out = {}
  for i, row in ipairs(rows) do out[i] = ("%-16s %-40s %s"):format(row[1], row[2], row[3]) end
  local memory = require "moe".memory()
  out[#out + 1] = ("tensors hold %s now, %s at most"):format(bytes_text(memory.live), bytes_text(memory.peak))
  return table.concat(out, "\n")
end

local function reader(prompt, env)
  local ok, readline = pcall(require, "readline")
  if ok and type(readline) == "table" and readline.readline then
    if readline.set_complete_function then
      readline.set_complete_function(function(text)
        return M.complete(text, env)
      end)
    end
    return function(p) return readline.readline(p or prompt) end
  end
  return function(p)
    io.write(p or prompt)
    io.flush()
    return io.read()
  end
end

-- "?name" asks for help, as a line of its own.
local function special(line)
  local name = line:match "^%s*%?%s*(.-)%s*$"
  if name then
    local help = require "moe.help"
    local text, message = help.text(name ~= "" and name or nil)
    return text or message
  end
end

--- Runs a prompt until the end of the input. Options: globals = true makes `moe` and `who` global, prompt = "> ",
-- read = function(prompt) -> line or nil, write = function(text).
function M.start(options)
  options = options or {}
  for key in pairs(options) do
    if key ~= "globals" and key ~= "prompt" and key ~= "read" and key ~= "write" then
      error(("repl.start: unknown option '%s' (globals, prompt, read, write)"):format(tostring(key)), 2)
    end
  end
  local moe = require "moe"
  local env = _G
  if not options.globals then env = setmetatable({}, { __index = _G }) end
  env.moe = moe
  local write = options.write or print
  env.who = function() write(M.who(env)) end
  local read = options.read or reader(options.prompt or "> ", env)
  write(("%s, %s: ?name for help, who() for what there is, end of input leaves"):format(moe._VERSION, _VERSION))
  while true do
    local line = read(options.prompt or "> ")
    if line == nil then break end
    local text = special(line)
    if text then
      write(text)
    elseif line:match "%S" then
      local chunk, message = load("return " .. line, "=stdin", "t", env)
      if not chunk then chunk, message = load(line, "=stdin", "t", env) end
      while not chunk and message:match "<eof>$" do -- an unfinished statement goes on
        local more = read(">> ")
        if more == nil then break end
        line = line .. "\n" .. more
        chunk, message = load(line, "=stdin", "t", env)
      end
      if not chunk then
        write(message)
      else
        local results = table.pack(xpcall(chunk, debug.traceback))
        if not results[1] then
          write(tostring(results[2]))
        elseif results.n > 1 then
          local shown = {}
          for i = 2, results.n do shown[i - 1] = tostring(results[i]) end
          write(table.concat(shown, "\t"))
        end
      end
    end
  end
end

return M
