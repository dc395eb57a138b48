-- What may stand between the two products of a network: a name that the fused kernel knows, a polynomial with learned
-- coefficients, or a module or function of one's own.

local core = require "moe.core"
local nn = require "moe.nn"
local base = require "moe.experts.base"
local coefficients = require "moe.nn.coefficients"
local sparse = core._sparse

local M = {}

-- The kernel's activations as methods.
local PLAIN <const> = {
  silu = function(h) return h:silu() end,
  gelu = function(h) return h:gelu() end,
  gelu_tanh = function(h) return h:gelu("tanh") end,
  relu = function(h) return h:relu() end,
  relu2 = function(h) return h:relu_squared() end,
  tanh = function(h) return h:tanh() end,
  sigmoid = function(h) return h:sigmoid() end,
  identity = function(h) return h end,
}

local POLY <const> = {
  poly_relu = function(h, a) return h:poly_relu(a) end,
  poly_norm = function(h, a, eps) return h:poly_norm(a, eps) end,
}

--- Option rows of a bank that takes any activation.
function M.rows(default, extra)
  local rows = { act = { "string|function|table|userdata", default }, order = { "integer", 3 }, eps = { "number", 1e-6 } }
  for k, v in pairs(extra or {}) do rows[k] = v end
  return base.rows(rows)
end

local function callable(v)
  if type(v) == "function" or nn.is_module(v) then return true end
  local mt = getmetatable(v)
  return type(mt) == "table" and mt.__call ~= nil and not core.is_tensor(v)
end

--- Raises for an activation that is none; called with the options of a description, too.
function M.check(name, o, level)
  local act = o.act
  if o.order < 1 or o.order > 15 then
    error(("%s: option 'order' must lie in 1..15, got %d"):format(name, o.order), level)
  elseif type(act) == "string" and not PLAIN[act] and not POLY[act] then
    error(("%s: option 'act' must be one of %s, poly_relu, poly_norm, a module or a function, got the string %q"):format(name,
      table.concat(base.ACTS, ", "), act), level)
  elseif type(act) ~= "string" and not callable(act) then
    error(("%s: option 'act' must be a name, a module or a function, got a %s"):format(name, type(act)), level)
  end
end

--- Gives a bank what its activation needs: `coefficients` [E, order + 1] of a polynomial, or the module as the child `act`.
function M.attach(self, o)
  if POLY[o.act] then
    self.coefficients = coefficients(o.order, self.num_experts, o)
  elseif type(o.act) ~= "string" then -- nil: the class says it
    self.act = o.act
  end
end

local function act_of(self) return self.fixed_act or self._options.act end

--- The activation of rows h [.., n], which are those of a routing (nil: all of one expert).
function M.apply(self, h, routing)
  local act = act_of(self)
  if PLAIN[act] then return PLAIN[act](h) end
  if not POLY[act] then
    if type(act) == "function" then return act(h, routing) end
    return self.act(h)
  end
  local a = self.coefficients
  if routing then a = a:index_select(1, routing.expert) else a = a[1] end
  return POLY[act](h, a, self._options.eps)
end

-- x [.., k] times the matrices w [E, n, k] of its rows' experts, plus b [E, n].
local function product(x, routing, w, b)
  if routing then return routing:linear(x, w, b) end
  return x:linear(w[1], b and b[1])
end

--- The network of a bank, x [T, d] -> [T, d_out]: one fused kernel where it knows the activation, else the grouped products
-- with whatever is between them (which keeps the gathered input and both hidden layers for the backward). self.before,
-- where a bank has it, is applied to what enters each product.
function M.network(self, x, routing, w_in, w_out, b_in, b_out, gated)
  if PLAIN[act_of(self)] and not self.before then
    return sparse.ffn(x, w_in, w_out, b_in, b_out, routing, act_of(self), gated)
  end
  local name = getmetatable(self).__name
  if routing == nil and self.num_experts ~= 1 then error(("experts.%s: %d experts need a routing"):format(name, self.num_experts), 0) end
  if routing and routing.num_experts ~= self.num_experts then
    error(("experts.%s: the routing is over %d experts, the bank has %d"):format(name, routing.num_experts, self.num_experts), 0)
  end
  if self.before then x = self:before(x) end
  local h = product(routing and routing:gather(x) or x, routing, w_in, b_in)
  if gated then
    local I = h:size(-1) // 2
    h = M.apply(self, h:narrow(-1, 1, I), routing) * h:narrow(-1, I + 1, I)
  else
    h = M.apply(self, h, routing)
  end
  if self.before then h = self:before(h) end
  local y = product(h, routing, w_out, b_out)
  return routing and routing:combine(y) or y
end

return M
