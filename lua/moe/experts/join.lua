-- Several banks that are the experts of one layer together.

local nn = require "moe.nn"
local base = require "moe.experts.base"

--- Banks of different kinds or sizes as the experts of one layer: join{ bank, bank, ... }, each with its num_experts; the first
-- one's experts are numbers 1, 2, ..., then come the next one's. Each bank sees only the assignments of its own experts, through its
-- own kernel; their results are added. Child `banks`: state names banks.1.up_proj and so on.
local Join = nn.module("join", base.Bank)

-- How many experts a part has.
local function check(bank, i)
  if type(bank) ~= "table" or type(bank.bind) ~= "function" or not nn.is_module(bank) then
    error(("experts.join: part %d must be a bank of moe.experts, got a %s"):format(i, type(bank)), 4)
  end
  local n = bank.num_experts or bank._options and bank._options.num_experts
  if math.type(n) ~= "integer" then error(("experts.join: part %d needs num_experts"):format(i), 4) end
  return n
end

-- A bank made without sizes; lists of modules (map) need none.
local function described(bank) return bank.d_model == nil and (bank._options ~= nil or bank.banks ~= nil) end

function Join:init(banks, d_model)
  if type(banks) ~= "table" or nn.is_module(banks) or #banks == 0 then
    error("experts.join: argument 1 must be a list of banks, got " .. (type(banks) == "table" and "none" or "a " .. type(banks)), 3)
  end
  local members, first, bound = {}, 1, true -- the latter: every bank has its weights
  for i, bank in ipairs(banks) do
    local n = check(bank, i)
    members[i] = {}
    for e = 1, n do members[i][e] = first + e - 1 end
    first = first + n
    bound, d_model = bound and not described(bank), d_model or bank.d_model
  end
  self:hold(table.move(banks, 1, #banks, 1, {}), members, bound and d_model or nil)
end

--- Takes the banks; members[i]: the numbers of bank i's experts in the layer. d_model: nil for descriptions.
function Join:hold(banks, members, d_model)
  self.banks, self._members, self.num_experts = banks, members, 0
  for _, list in ipairs(members) do self.num_experts = self.num_experts + #list end
  if not d_model then return end
  self.d_model = d_model
  for i, bank in ipairs(banks) do
    for _, key in ipairs { "d_model", "d_out" } do
      if bank[key] and bank[key] ~= (self[key] or bank[key]) then
        error(("experts.join: %s of part %d is %d, of those before it %d"):format(key, i, bank[key], self[key]), 4)
      end
    end
    self.d_out = self.d_out or bank.d_out
  end
end

function Join:bind(sizes)
  if sizes.num_experts and sizes.num_experts ~= self.num_experts then
    error(("join: the banks have %d experts together, the layer wants %d"):format(self.num_experts, sizes.num_experts), 2)
  end
  local banks, own = {}, {}
  for k, v in pairs(sizes) do own[k] = v end
  for i, bank in ipairs(self.banks) do
    own.num_experts = #self._members[i]
    banks[i] = bank:bind(own)
  end
  return self.d_model and self or Join(banks, sizes.d_model)
end

function Join:work(x, routing, ctx)
  local name = getmetatable(self).__name
  if routing == nil then
    if self.num_experts > 1 then error(("experts.%s: %d experts need a routing"):format(name, self.num_experts), 0) end
    return self.banks[1](x, nil, ctx)
  elseif routing.num_experts ~= self.num_experts then
    error(("experts.%s: the routing is over %d experts, the bank has %d"):format(name, routing.num_experts, self.num_experts), 0)
  end
  local y
  for i, bank in ipairs(self.banks) do
    local part = bank(x, routing:pick(self._members[i]), ctx)
    y = y and y + part or part
  end
  return y
end

function Join:extra() return ("%d experts in %d banks"):format(self.num_experts, #self.banks) end

return Join
