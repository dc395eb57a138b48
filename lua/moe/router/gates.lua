-- What routers share that give a token any number of experts, by gates [T, E]: those that are not zero are assignments.

local core = require "moe.core"
local nn = require "moe.nn"
local base = require "moe.router.base"
local sparse = core._sparse

local M = {}

local Gates = nn.module("gates", base.Router)

-- Number options that may follow the steps: in the fields that Router:scheduled looks at.
function Gates:keep_numbers(o, ...)
  for _, key in ipairs { ... } do
    if type(o[key]) ~= "function" then self[key] = o[key] end
  end
end

--- Checks the options min_k and max_k.
function Gates:check_counts(o)
  local E = o.num_experts
  if o.min_k < 0 then self:fail("option 'min_k' must not be negative, got %d", o.min_k) end
  if E and o.min_k > E then self:fail("min_k is %d, but there are %d experts", o.min_k, E) end
  if o.max_k and o.max_k < math.max(1, o.min_k) then
    self:fail("option 'max_k' must be at least %d, got %d", math.max(1, o.min_k), o.max_k)
  end
end

-- NaN, infinity and a token without a single expert left are errors: all three give no finite largest logit.
local function check_logits(self, logits)
  local top = logits:detach():amax(-1)
  local sum = (top * 0):sum():item()
  if sum == sum then return end
  for t, v in ipairs(top:totable()) do
    if v == -math.huge then
      self:fail("token %d may choose among 0 of %d experts (all are masked)", t, logits:size(2))
    elseif v ~= v or v == math.huge then
      self:fail("the logits of token %d hold %s", t, v == v and "infinity" or "NaN")
    end
  end
end

--- The logits of x, checked, 0 for the tokens that ctx.mask leaves out; and what Router:logits gives beside them.
function Gates:open(x, ctx)
  local logits, clean, std = self:logits(x, ctx)
  if ctx.mask then logits = logits:masked_fill(ctx.mask:reshape { -1, 1 }:logical_not(), 0) end
  check_logits(self, logits)
  return logits, clean, std
end

-- A choice made before, index [T, k] with 0 for none, as a bool [T, E].
local function forced(self, index, tokens)
  local shape, E = core.is_tensor(index) and index.shape, self.num_experts
  if not shape or #shape ~= 2 or shape[1] ~= tokens or index.dtype:find "f" then
    self:fail("ctx.choice must be an index [%d, k], got %s", tokens,
      shape and ("%s [%s]"):format(index.dtype, table.concat(shape, ", ")) or "a " .. type(index))
  end
  if index:numel() > 0 and (index:min():item() < 0 or index:max():item() > E) then
    self:fail("ctx.choice has a value outside of 0 (none) to %d", E)
  end
  return core.zeros { tokens, E + 1 }:scatter(2, index + 1, 1):narrow(2, 2, E):ne(0)
end

--- Gates [T, E]: the scores that `limits` (those of moe.router_gates) or a forced choice leave, else 0.
function Gates:choose(scores, ctx, limits)
  if not ctx.choice then return core.router_gates(scores, limits) end
  return scores:masked_fill(forced(self, ctx.choice, scores:size(1)):logical_not(), 0)
end

--- Each token's gates divided by their sum.
function Gates.normalised(gates) return gates / (gates:sum(-1, true) + 1e-20) end

--- The routing of gates [T, E], with logits and probs [T, E] on it; masked tokens have neither gates nor probabilities.
function Gates.routing(_, gates, ctx, probs, logits, clean, std)
  local mask = ctx.mask
  if mask then
    local off = mask:reshape { -1, 1 }:logical_not()
    gates, probs = gates:masked_fill(off, 0), probs:masked_fill(off, 0)
  end
  local routing = sparse.dense(gates, mask)
  routing.probs, routing.logits = probs, logits
  routing.clean_logits, routing.noise_std = clean, std
  return routing
end

M.Gates = Gates
M.rows = base.rows

return M
