-- What banks of experts share: options kept for bind, parameters [num_experts, ...], the call, the text.
--
-- A bank is a class of this base: init(given) calls self:setup and makes its weights when the sizes are known;
-- work(x, routing, ctx) answers x [T, d_model] with y [T, d_out].

local core = require "moe.core"
local nn = require "moe.nn"
local options = require "moe.nn.options"
local routing_of = require "moe.routing"

local M = {}

local function want_positive(name, o, keys)
  for _, key in ipairs(keys) do
    if o[key] and o[key] < 1 then error(("%s: option '%s' must be at least 1, got %d"):format(name, key, o[key]), 4) end
  end
end

--- A parameter [E, ...]: every expert is initialised as a layer of its own.
function M.parameter(o, shape, init, fan_in)
  local w = core.zeros(shape, { dtype = o.dtype or "f32", device = o.device })
  for e = 1, shape[1] do
    if init == nil then
      nn.init.uniform_(w[e], -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
    elseif #shape > 2 then
      nn.init.apply(w[e], init)
    end
  end
  return nn.parameter(w, #shape < 3 and { decay = false } or nil)
end

local Bank = nn.module "bank"

local COMMON <const> = {
  d_model = { "integer" }, num_experts = { "integer" }, intermediate_size = { "integer", options.required },
  d_out = { "integer" }, init = { "string|number|function" }, bias = { "boolean", false }, dtype = { "string" }, device = { "string" },
}

--- Option rows: those of every bank, and one's own.
function M.rows(extra)
  local rows = {}
  for k, v in pairs(COMMON) do rows[k] = v end
  for k, v in pairs(extra) do rows[k] = v end
  return rows
end

--- The same bank for these sizes: itself when it has weights already, else a new one.
function Bank:bind(sizes)
  local o = self._options
  if self.d_model then
    for _, key in ipairs { "d_model", "num_experts" } do
      if sizes[key] and sizes[key] ~= self[key] then
        error(("%s: the bank has %s = %d, the layer wants %d"):format(getmetatable(self).__name, key, self[key], sizes[key]), 2)
      end
    end
    return self
  end
  local given = {}
  for k, v in pairs(o) do given[k] = v end
  for _, key in ipairs { "d_model", "num_experts", "dtype", "device" } do given[key] = given[key] or sizes[key] end
  return getmetatable(self)(given)
end

function Bank:setup(name, given, rows)
  local o = options.read(name, given, rows, 3)
  want_positive(name, o, { "d_model", "num_experts", "intermediate_size", "d_out" })
  self._options = o
  self.intermediate_size = o.intermediate_size
  if not o.d_model then return end
  self.d_model, self.num_experts, self.d_out = o.d_model, o.num_experts or 1, o.d_out or o.d_model
  return o
end

-- x [T, d_model], routing -> y [T, d_out]; the dense network without a routing.
function Bank:forward(x, routing, ctx)
  if not self.d_model then
    error(("%s: this is a description without weights: give d_model and num_experts"):format(getmetatable(self).__name), 0)
  end
  if routing == nil then return self:work(x, nil, ctx) end
  return routing_of.through(routing, x, function(rows) return self:work(rows, routing, ctx) end)
end

function Bank:extra()
  local parts = {}
  if self.d_model then
    parts[1] = ("%d x %d -> %d -> %d"):format(self.num_experts, self.d_model, self.intermediate_size, self.d_out)
  else
    parts[1] = ("intermediate_size=%d, unbound"):format(self.intermediate_size)
  end
  local act = self._options.act
  if act then parts[2] = "act=" .. (type(act) == "string" and act or type(act) == "function" and "function" or "module") end
  return table.concat(parts, ", ")
end

M.Bank = Bank
M.ACTS = { "silu", "gelu", "gelu_tanh", "relu", "relu2", "tanh", "sigmoid", "identity" }

return M
