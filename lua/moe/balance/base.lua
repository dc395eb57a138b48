-- What balance losses share: the callable, coefficients that follow the steps, and what is read off a routing.

local core = require "moe.core"
local options = require "moe.nn.options"
local schedule = require "moe.schedule"

local M = {}

local Loss = {}
Loss.__index = Loss
Loss.__tostring = function(self)
  return ("moe.loss.%s(%s)"):format(self.name, type(self.coef) == "function" and "function" or tostring(self.coef))
end

-- The coefficient of this call: a number, or a function (step, layer_number) of what the context says.
local function coefficient(self, ctx)
  local c = schedule.now(self.coef, ctx, ("loss.%s: the coefficient"):format(self.name))
  if type(c) ~= "number" then
    error(("loss.%s: the coefficient's function must return a number, got a %s"):format(self.name, type(c)), 0)
  end
  return c
end

Loss.__call = function(self, routing, ctx, state)
  ctx = ctx or {}
  local value = self.value(routing, ctx, state)
  return value and value * coefficient(self, ctx)
end

--- A loss of a name, its coefficient (a number or a function (step, layer_number); nil: the default) and
-- value(routing, ctx, state), the loss before the coefficient.
function M.make(name, coef, default, value)
  if coef == nil then coef = default end
  if type(coef) ~= "number" and type(coef) ~= "function" then
    error(("loss.%s: argument 1 (coef) must be a number or a function of the step, got a %s"):format(name, type(coef)), 3)
  end
  return setmetatable({ name = name, coef = coef, value = value }, Loss)
end

--- The options of a loss.
function M.read(name, given, rows) return options.read("loss." .. name, given, rows, 3) end

--- A field of the routing, or an error that names the loss.
function M.need(routing, what, name)
  local t = routing[what]
  if t == nil then error(("loss.%s: the routing has no %s; this router cannot be balanced by it"):format(name, what), 0) end
  return t
end

--- Tokens that take part.
function M.real_tokens(routing)
  local mask = routing.mask
  return mask and math.tointeger(mask:to "i64":sum():item()) or routing.num_tokens
end

--- x [T, n] with the rows of masked tokens at 0. They may hold anything: chosen, not multiplied.
function M.masked(routing, x)
  local mask = routing.mask
  if not mask then return x end
  return core.where(mask:reshape { -1, 1 }, x, core.zeros({ 1, 1 }, { dtype = x.dtype, device = x.device }))
end

--- The probabilities [T, E], 0 for masked tokens, and how many tokens take part.
function M.probabilities(routing, name)
  return M.masked(routing, M.need(routing, "probs", name)), M.real_tokens(routing)
end

--- The assignments that the router wanted, those lost to capacity included: token, expert, [A + dropped].
function M.choices(routing, name)
  if routing.dispatch then error(("loss.%s: a soft routing has no choices to balance"):format(name), 0) end
  local token, expert = routing.token, routing.expert
  if routing.dropped > 0 then
    token, expert = core.cat({ token, routing.dropped_token }, 1), core.cat({ expert, routing.dropped_expert }, 1)
  end
  return token, expert
end

--- Sums values [A] by place [A] into [n].
function M.sum_by(place, values, n)
  return core.zeros({ n }, { dtype = values.dtype, device = values.device }):index_add(1, place, values)
end

--- The entropy of each row of p [.., E], in nats; 0 log 0 = 0.
function M.entropy(p) return -(p * (p + 1e-30):log()):sum(-1) end

--- The squared coefficient of variation of a vector: variance over squared mean; 0 when even, E - 1 when one has all.
function M.variation(v)
  local mean = v:mean()
  local gap = v - mean
  return (gap * gap):mean() / (mean * mean + 1e-10)
end

return M
