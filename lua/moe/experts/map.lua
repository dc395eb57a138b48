-- Experts made of Lua functions or modules.

local core = require "moe.core"
local nn = require "moe.nn"
local routing_of = require "moe.routing"

--- Experts of one's own: f(xe, e, ctx) -> [n, d_out] for the rows xe [n, d_model] of expert e; nil stands for zeros. Or a
-- list of modules or functions, one an expert and as different as one likes; modules are children 1, 2, ... (state names
-- 1.weight and so on). Or one module, the child `experts`, for all. Modules are called with xe alone.
-- A layer of another number of experts than the list is an error.
local Map = nn.module "map"

local function callable(v)
  local mt = getmetatable(v)
  return type(v) == "function" or nn.is_module(v) or type(mt) == "table" and mt.__call ~= nil and not core.is_tensor(v)
end

function Map:init(f)
  if callable(f) then
    self.experts = f
    return
  elseif type(f) ~= "table" then
    error("experts.map: argument 1 must be a function (xe, e), a module or a list of them, got a " .. type(f), 3)
  end
  for k in pairs(f) do
    if math.type(k) ~= "integer" or k < 1 or k > #f then
      error(("experts.map: the experts come as a list, got the key '%s'"):format(tostring(k)), 3)
    end
  end
  if #f == 0 then error("experts.map: the list has no expert", 3) end
  for e = 1, #f do
    if not callable(f[e]) then error(("experts.map: expert %d must be a function or a module, got a %s"):format(e, type(f[e])), 3) end
    self[e] = f[e]
  end
  self.num_experts = #f
end

function Map:bind(sizes)
  local n = sizes and sizes.num_experts
  if n and self.num_experts and n ~= self.num_experts then
    error(("experts.map: the list has %d experts, the layer wants %d"):format(self.num_experts, n), 2)
  end
  return self
end

-- The rows of expert e through it.
local function call(self, e, xe, ctx)
  local f = self[e] or self.experts
  if type(f) == "function" then return f(xe, e, ctx) end
  return f(xe)
end

-- What an expert gave must be a row for a row, all of one width.
local function check(e, ye, n, width)
  local s = core.is_tensor(ye) and ye.shape
  if s and #s == 2 and s[1] == n and (width == nil or s[2] == width) then return s[2] end
  error(("experts.map: expert %d gave %s for %d rows, wanted a tensor [%d, %s]"):format(e,
    s and "[" .. table.concat(s, ", ") .. "]" or "a " .. type(ye), n, n, width or "d"), 0)
end

function Map:forward(x, routing, ctx)
  if routing == nil then
    if (self.num_experts or 1) > 1 then error(("experts.map: %d experts need a routing"):format(self.num_experts), 0) end
    return call(self, 1, x, ctx)
  elseif self.num_experts and routing.num_experts ~= self.num_experts then
    error(("experts.map: the routing is over %d experts, the list has %d"):format(routing.num_experts, self.num_experts), 0)
  end
  return routing_of.through(routing, x, function(rows)
    local gathered = routing:gather(rows)
    local offsets, parts, width = routing.offsets:totable(), {}, nil
    for e = 1, routing.num_experts do
      local n = offsets[e + 1] - offsets[e]
      if n > 0 then
        local ye = call(self, e, gathered:narrow(1, offsets[e], n), ctx)
        if ye ~= nil then width = check(e, ye, n, width) end
        parts[#parts + 1] = ye or n -- nil: an expert that gives nothing
      end
    end
    width = width or rows:size(2)
    for i, part in ipairs(parts) do
      if type(part) == "number" then parts[i] = core.zeros({ part, width }, { dtype = rows.dtype, device = rows.device }) end
    end
    if #parts == 0 then return core.zeros({ rows:size(1), width }, { dtype = rows.dtype, device = rows.device }) end
    return routing:combine(#parts == 1 and parts[1] or core.cat(parts, 1))
  end)
end

function Map:extra() return self.num_experts and ("%d experts"):format(self.num_experts) or "" end

return Map
