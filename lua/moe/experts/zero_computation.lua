-- Experts that do no work, beside a bank of those that do.

local core = require "moe.core"
local nn = require "moe.nn"
local base = require "moe.experts.base"
local options = require "moe.nn.options"
local routing_of = require "moe.routing"

--- A bank and experts that cost next to nothing, so that simple tokens use less work: zero_computation{ bank, zero = 1, copy
-- = 1, constant = 1 }. Of the layer's num_experts = N, all counted, the first N - zero - copy - constant are the bank's;
-- then come `zero` (null) experts, E(x) = 0; `copy` experts, E(x) = x; and `constant` experts, E(x) = a_1 x + a_2 v with
-- [a_1, a_2] = softmax(W x). The bank's kernel sees only the assignments of its own experts.
-- x [T, d_model] -> [T, d_model]: d_out of the bank must be d_model. Parameters: those of the bank under `bank`,
-- constant_weight W [2 constant, d] (for each a_1's row, then a_2's), constant_value v [constant, d].
-- Jin et al. 2024, MoE++ (arXiv 2410.07348, eq. 3-5).
local ZeroComputation = nn.module("zero_computation", base.Bank)

local COUNT <const> = { "integer", 0 }
local ROWS <const> = {
  zero = COUNT, copy = COUNT, constant = COUNT, d_model = { "integer" }, num_experts = { "integer" }, dtype = { "string" },
  device = { "string" }, init = { "string|number|function" }, bank = { "table|userdata" },
}

function ZeroComputation:init(given)
  local name = "experts.zero_computation"
  if type(given) ~= "table" then error(name .. ": takes a table of options, got a " .. type(given), 3) end
  local list = {}
  for k, v in pairs(given) do list[k == 1 and "bank" or k] = v end
  local o = options.read(name, list, ROWS, 2)
  self._options = o
  if type(o.bank) ~= "table" or not o.bank.bind then
    error(name .. ": wants a bank of moe.experts first, got a " .. type(o.bank), 3)
  end
  for _, key in ipairs { "zero", "copy", "constant" } do
    if o[key] < 0 then error(("%s: option '%s' must not be negative, got %d"):format(name, key, o[key]), 3) end
  end
  self.idle = o.zero + o.copy + o.constant
  if not o.d_model then return end
  local real = (o.num_experts or 0) - self.idle
  if real < 1 then
    error(("%s: of %d experts %d do no work, which leaves %d for the bank, wanted at least 1"):format(name, o.num_experts or 0,
      self.idle, real), 3)
  end
  self.d_model, self.num_experts, self.num_working, self.d_out = o.d_model, o.num_experts, real, o.d_model
  self.bank = o.bank:bind { d_model = o.d_model, num_experts = real, dtype = o.dtype, device = o.device }
  if (self.bank.d_out or o.d_model) ~= o.d_model and o.copy + o.constant > 0 then
    error(("%s: the bank's d_out is %d, but what is copied has d_model = %d"):format(name, self.bank.d_out, o.d_model), 3)
  end
  if o.constant > 0 then
    local w = core.zeros({ 2 * o.constant, o.d_model }, { dtype = o.dtype or "f32", device = o.device })
    local r = 1 / math.sqrt(o.d_model)
    if o.init ~= nil then nn.init.apply(w, o.init) else nn.init.uniform_(w, -r, r) end
    self.constant_weight = nn.parameter(w)
    self.constant_value = base.parameter(o, { o.constant, o.d_model }, nil, o.d_model)
  end
end

local function range(first, count)
  local list = {}
  for i = 1, count do list[i] = first + i - 1 end
  return list
end

-- The weights [T, n] with which the rows have experts first .. first + n - 1.
local function gates(routing, tokens, first, n)
  local part = routing:pick(range(first, n))
  local weight = part.weight
  local cell = (part.token - 1) * n + part.expert
  return core.zeros({ tokens * n }, { dtype = weight.dtype, device = weight.device }):index_add(1, cell, weight):reshape { tokens, n }
end

function ZeroComputation:forward(x, routing, ctx)
  if not self.d_model then
    error("experts.zero_computation: this is a description without weights: give d_model and num_experts", 0)
  elseif routing == nil or routing.num_experts ~= self.num_experts then
    error(("experts.zero_computation: wants a routing over %d experts, got %s"):format(self.num_experts,
      routing and "one over " .. routing.num_experts or "none"), 0)
  end
  local o, real = self._options, self.num_working
  return routing_of.through(routing, x, function(rows)
    local y = self.bank:forward(rows, routing:pick(range(1, real)), ctx)
    local tokens = rows:size(1)
    if o.copy > 0 then
      y = y + rows * gates(routing, tokens, real + o.zero + 1, o.copy):sum(-1, true):to(rows.dtype)
    end
    if o.constant > 0 then
      local n = o.constant
      local g = gates(routing, tokens, real + o.zero + o.copy + 1, n):to(rows.dtype)
      local a = rows:linear(self.constant_weight):reshape { tokens, n, 2 }:softmax(-1) * g:reshape { tokens, n, 1 }
      y = y + rows * a:narrow(3, 1, 1):sum(2) + a:narrow(3, 2, 1):reshape { tokens, n }:matmul(self.constant_value)
    end
    return y
  end)
end

function ZeroComputation:extra()
  local o = self._options
  return ("%s experts, of them zero=%d, copy=%d, constant=%d"):format(self.num_experts or "unbound", o.zero, o.copy, o.constant)
end

return ZeroComputation
