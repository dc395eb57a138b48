-- The mini language of the operation table's `examples` column (csrc/op/op.h): sets of arguments, separated by ';'.
--   N(2,3) normal f64   P(2,3) uniform in [0.5, 1.5], f64   I(n,2,3) i64 of values 1..n   B(2,3) random bool
-- and numbers, true, false, "strings", {1,2}, {tensor, tensor}, nil, {name = value} last: an expression list of Lua.
local helper = require "spec.helper"

local mini = {}

-- Splits at ';' outside of strings and brackets.
function mini.split(text)
  local sets, depth, start, quote = {}, 0, 1, false
  for i = 1, #text do
    local c = text:sub(i, i)
    if c == '"' then
      quote = not quote
    elseif not quote then
      if c:find "[({]" then depth = depth + 1 end
      if c:find "[)}]" then depth = depth - 1 end
      if c == ";" and depth == 0 then
        sets[#sets + 1] = text:sub(start, i - 1)
        start = i + 1
      end
    end
  end
  sets[#sets + 1] = text:sub(start)
  for i = #sets, 1, -1 do
    sets[i] = sets[i]:match "^%s*(.-)%s*$"
    if sets[i] == "" then table.remove(sets, i) end
  end
  return sets
end

-- The arguments of one set as table.pack gives them; tensors without requires_grad. The same seed gives the same values.
function mini.evaluate(set, seed)
  local r = helper.random(seed or 1)
  local function normal(...) return helper.tensor(function() return r.normal() end, { ... }, { dtype = "f64" }) end
  local env = {
    N = normal,
    P = function(...) return helper.tensor(function() return 0.5 + r() end, { ... }, { dtype = "f64" }) end,
    I = function(n, ...) return helper.tensor(function() return r(n) end, { ... }, { dtype = "i64" }) end,
    B = function(...) return helper.tensor(function() return r() < 0.5 end, { ... }, { dtype = "bool" }) end,
    inf = math.huge,
  }
  local chunk, message = load("return " .. set, "=" .. set, "t", env)
  if not chunk then error("example '" .. set .. "': " .. message, 2) end
  return table.pack(chunk())
end

-- Calls visit(tensor, place) for every tensor of the arguments, lists and options included, in a fixed order;
-- a tensor that it returns takes the place. Arguments are copied, not changed.
function mini.map(args, visit)
  local place = 0
  local function copy(v)
    if type(v) == "userdata" then
      place = place + 1
      return visit(v, place) or v
    elseif type(v) == "table" then
      local keys, out = {}, {}
      for k in pairs(v) do keys[#keys + 1] = k end
      table.sort(keys, function(a, b) return tostring(a) < tostring(b) end)
      for _, k in ipairs(keys) do out[k] = copy(v[k]) end
      return out
    end
    return v
  end
  local out = { n = args.n }
  for i = 1, args.n do out[i] = copy(args[i]) end
  return out
end

function mini.tensors(args)
  local list = {}
  mini.map(args, function(t) list[#list + 1] = t end)
  return list
end

return mini
