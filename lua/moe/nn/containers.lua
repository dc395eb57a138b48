-- Modules that hold modules, and the activations as modules.

local protocol = require "moe.nn.module"
local module, Module = protocol.module, protocol.Module

local M = {}

local function callable(v)
  if type(v) == "function" then return true end
  local mt = getmetatable(v)
  if type(mt) ~= "table" then return false end
  return mt.__call ~= nil or protocol.is_module(v)
end

-- The parts of f(a, b, c) and f{a, b, c}.
local function parts_of(name, ...)
  local n, first = select("#", ...), ...
  local list = { ... }
  if n == 1 and type(first) == "table" and getmetatable(first) == nil then list, n = first, #first end
  for i = 1, n do
    if not callable(list[i]) then
      error(("%s: part %d must be a module or a function, got a %s"):format(name, i, type(list[i])), 4)
    end
  end
  for k in pairs(list) do
    if math.type(k) ~= "integer" then
      error(("%s: the parts come as a list, got the key '%s'"):format(name, tostring(k)), 4)
    end
  end
  return list, n
end

local function fill(self, name, ...)
  local list, n = parts_of(name, ...)
  for i = 1, n do self[i] = list[i] end
end

local function append(self, part)
  if not callable(part) then error("append: the part must be a module or a function, got a " .. type(part), 2) end
  self[#self + 1] = part
  return self
end

-- sequential(a, b, c)(x) = c(b(a(x))): each part gets the first result of the one before it; the results of the last
-- one are the results.
local Sequential = module "sequential"
M.sequential = Sequential

function Sequential:init(...) fill(self, "sequential", ...) end
Sequential.append = append

-- A context, where one is given, goes to every part.
function Sequential:forward(x, ctx)
  local n = #self
  if n == 0 then return x end
  if ctx == nil then
    for i = 1, n - 1 do x = self[i](x) end
    return self[n](x)
  end
  for i = 1, n - 1 do x = self[i](x, ctx) end
  return self[n](x, ctx)
end

-- list{a, b, c}: parts by number, to be called as one likes.
local List = module "list"
M.list = List

function List:init(...) fill(self, "list", ...) end
List.append = append

-- dict{name = part, ...}: parts by name.
local Dict = module "dict"
M.dict = Dict

function Dict:init(parts)
  if type(parts) ~= "table" or getmetatable(parts) then
    error("dict: argument 1 must be a table of modules by name, got a " .. type(parts), 3)
  end
  local names = {}
  for k, v in pairs(parts) do
    if type(k) ~= "string" then error("dict: a name must be a string, got " .. tostring(k), 3) end
    if Module[k] ~= nil then error(("dict: '%s' is the name of a method"):format(k), 3) end
    if not callable(v) then error(("dict: '%s' must be a module or a function, got a %s"):format(k, type(v)), 3) end
    names[#names + 1] = k
  end
  table.sort(names)
  for _, k in ipairs(names) do self[k] = parts[k] end
end

-- residual(f)(x) = x + scale f(x); what else f takes and returns (a state) passes through.
local Residual = module "residual"
M.residual = Residual

function Residual:init(f, scale)
  if not callable(f) then error("residual: argument 1 must be a module or a function, got a " .. type(f), 3) end
  if scale ~= nil and type(scale) ~= "number" then
    error("residual: argument 2 (scale) must be a number, got a " .. type(scale), 3)
  end
  self.inner = f
  self.scale = scale
end

local function add(x, scale, y, ...)
  if scale then y = y * scale end
  return x + y, ...
end

function Residual:forward(x, ...) return add(x, self.scale, self.inner(x, ...)) end

function Residual:extra() return self.scale and ("scale=%g"):format(self.scale) or "" end

-- lambda(f): a function as a module.
local Lambda = module "lambda"
M.lambda = Lambda

function Lambda:init(f)
  if type(f) ~= "function" then error("lambda: argument 1 must be a function, got a " .. type(f), 3) end
  self.f = f
end

function Lambda:forward(...) return self.f(...) end

return M
