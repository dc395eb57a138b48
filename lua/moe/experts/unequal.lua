-- Experts of unequal widths.

local nn = require "moe.nn"
local base = require "moe.experts.base"
local options = require "moe.nn.options"
local Join = require "moe.experts.join"

--- Networks of unequal widths in one layer: widths = { 64, 64, 256, ... } gives the intermediate size of every expert. Experts of one
-- width share a bank, in `banks` in the order in which the widths come, so that no product is padded.
-- Options: widths; gated (true: glu, false: mlp); act, order, eps, bias, init, d_out as there; d_model for a bank of its own.
-- Costs as its experts do, plus one addition of [T, d_out] for each further width.
local Unequal = nn.module("unequal", Join)

local ROWS <const> = require("moe.experts.activation").rows(nil, {
  widths = { "table", options.required }, gated = { "boolean", true },
})
ROWS.intermediate_size = nil

-- The widths in the order in which they come, and the experts of each.
local function classes(name, list)
  local widths, members, at = {}, {}, {}
  if #list == 0 then error(name .. ": option 'widths' lists no expert", 4) end
  for e = 1, #list do
    local w = list[e]
    if math.type(w) ~= "integer" or w < 1 then
      error(("%s: widths[%d] must be a positive integer, got %s"):format(name, e, tostring(w)), 4)
    end
    if not at[w] then
      widths[#widths + 1], at[w] = w, #widths + 1
      members[#widths] = {}
    end
    table.insert(members[at[w]], e)
  end
  return widths, members
end

function Unequal:init(given)
  local bound = self:setup("experts.unequal", given, ROWS)
  local o = self._options
  local widths, members = classes("experts.unequal", o.widths)
  if o.num_experts and o.num_experts ~= #o.widths then
    error(("experts.unequal: widths lists %d experts, num_experts is %d"):format(#o.widths, o.num_experts), 3)
  end
  local kind = require("moe.experts")[o.gated and "glu" or "mlp"]
  local banks = {}
  for i, w in ipairs(widths) do
    banks[i] = kind {
      d_model = o.d_model, num_experts = #members[i], intermediate_size = w, d_out = o.d_out, act = o.act, order = o.order, eps = o.eps,
      bias = o.bias, init = o.init, dtype = o.dtype, device = o.device,
    }
  end
  self:hold(banks, members, bound and o.d_model)
end

-- the sizes make it anew
function Unequal:bind(sizes)
  local n = sizes.num_experts
  if n and n ~= self.num_experts then
    error(("experts.unequal: widths lists %d experts, the layer wants %d"):format(self.num_experts, n), 2)
  end
  return base.Bank.bind(self, sizes)
end

function Unequal:extra()
  local list = table.concat(self._options.widths, " ", 1, math.min(16, #self._options.widths))
  return ("widths=%s%s"):format(list, #self._options.widths > 16 and " .." or "")
end

return Unequal
