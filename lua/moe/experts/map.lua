-- Experts made of Lua functions or modules.

local core = require "moe.core"
local nn = require "moe.nn"
local routing_of = require "moe.routing"

--- Experts of one's own: f(xe, e, ctx) -> [n, d_out] for the rows xe [n, d_model] of expert e; nil stands for zeros. Or a
-- list of modules or functions, one an expert; modules' parameters are the bank's.
local Map = nn.module "map"

function Map:init(f)
  local kind = type(f)
  if kind ~= "function" and not nn.is_module(f) and kind ~= "table" then
    error("experts.map: argument 1 must be a function (xe, e), a module or a list of them, got a " .. kind, 3)
  end
  self.experts = f
end

function Map:bind() return self end

function Map:forward(x, routing, ctx)
  local f = self.experts
  local function work(e, xe)
    local g = f
    if type(f) == "table" and not nn.is_module(f) then
      g = f[e]
      if g == nil then error(("experts.map: the list has no expert %d"):format(e), 0) end
      if type(g) ~= "function" then return g(xe) end
    end
    return g(xe, e, ctx)
  end
  if routing == nil then return work(1, x) end
  return routing_of.through(routing, x, function(rows)
    local gathered = routing:gather(rows)
    local offsets, parts, width = routing.offsets:totable(), {}, nil
    for e = 1, routing.num_experts do
      local n = offsets[e + 1] - offsets[e]
      if n > 0 then
        local ye = work(e, gathered:narrow(1, offsets[e], n))
        if ye ~= nil then
          local s = core.is_tensor(ye) and ye.shape
          if not s or #s ~= 2 or s[1] ~= n or (width and s[2] ~= width) then
            error(("experts.map: expert %d gave %s for %d rows, wanted a tensor [%d, %s]"):format(e,
              s and "[" .. table.concat(s, ", ") .. "]" or "a " .. type(ye), n, n, width or "d"), 0)
          end
          width = s[2]
        end
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

return Map
