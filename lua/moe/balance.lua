--- Balance losses of sparse layers, under moe.loss: functions (routing, ctx) -> scalar, for moe.layer's `balance`. Each is
-- 1 x its coefficient when the load is even (z and importance: 0).
--
-- Anything that answers loss(routing, ctx, state) will do, a plain function too; nil means "nothing to add". `state` is a
-- table that belongs to the layer; `loss:start(state, num_experts)`, where it is there, fills it once. One with
-- `loss:observe(routing, ctx, state)` sees every first training forward, and one with `loss:after_step(layer, state, ctx)` is
-- called once an optimizer step: see selection_bias.

local core = require "moe.core"
local options = require "moe.nn.options"

local M = {}

local Loss = {}
Loss.__index = Loss
Loss.__call = function(self, routing, ctx, state) return self.value(routing, ctx or {}, state, self) end
Loss.__tostring = function(self) return ("moe.loss.%s(%s)"):format(self.name, self.coef) end

local function make(name, coef, default, value)
  coef = coef == nil and default or coef
  if type(coef) ~= "number" then error(("loss.%s: argument 1 (coef) must be a number, got a %s"):format(name, type(coef)), 3) end
  return setmetatable({ name = name, coef = coef, value = value }, Loss)
end

local function need(routing, what, name)
  local t = routing[what]
  if t == nil then error(("loss.%s: the routing has no %s; this router cannot be balanced by it"):format(name, what), 0) end
  return t
end

-- Tokens that take part.
local function real_tokens(routing)
  local mask = routing.mask
  return mask and math.tointeger(mask:to "i64":sum():item()) or routing.num_tokens
end

local SWITCH <const> = { norm = { { "1", "k" }, "1" }, by = { { "batch", "sequence" }, "batch" } }

-- Assignments of each expert in each sequence, [B, E], before capacity.
local function sequence_demand(routing, batch)
  local T, E = routing.num_tokens // batch, routing.num_experts
  local index = need(routing, "index", "switch")
  local k = index:size(2)
  local of_token = core.arange(0, batch * T - 1):to "i64":floor_divide(T):reshape { batch * T, 1 }:expand { batch * T, k }
  local cell = (of_token * (E + 1) + index):reshape { -1 } + 1 -- column 1: tokens without an expert
  return core.bincount(cell, batch * (E + 1)):reshape { batch, E + 1 }:narrow(2, 2, E)
end

--- The balance loss of Switch and GShard (Fedus et al. 2021, eq. 4): E times the sum over experts of the share of the
-- assignments f and the mean probability P. 1 at balance, E/k when k experts take all.
-- Options: norm = "k" multiplies by the experts a token has (Hugging Face's form); by = "sequence" takes f and P within
-- each sequence of the batch and averages (ctx.shape tells the batch).
function M.switch(coef, given)
  local o = options.read("loss.switch", given, SWITCH)
  return make("switch", coef, 0.01, function(routing, ctx, _, self)
    local probs, E = need(routing, "probs", "switch"), routing.num_experts
    local total, value
    if o.by == "sequence" and ctx.shape and #ctx.shape > 1 then
      local T = ctx.shape[#ctx.shape]
      local batch = routing.num_tokens // math.max(T, 1)
      local demand = sequence_demand(routing, batch):to(probs.dtype)
      local count = demand:sum(-1, true):clamp(1)
      local mass = probs:reshape { batch, T, E }:sum(2)
      local share = mass / mass:detach():sum(-1, true):clamp(1e-20)
      total = demand:sum():item()
      value = (demand / count * share):sum() * (E / math.max(batch, 1))
    else
      local demand = routing:demand():to(probs.dtype)
      total = demand:sum():item()
      local real = real_tokens(routing)
      if total == 0 or real == 0 then return probs:sum() * 0 end
      value = (probs:sum(1) * demand):sum() * (E / total / real)
    end
    local scale = self.coef
    if o.norm == "k" then scale = scale * total / math.max(real_tokens(routing), 1) end
    return value * scale
  end)
end

--- The router z-loss (Zoph et al. 2022, eq. 5): the mean square of logsumexp of the logits; keeps logits small.
function M.z(coef)
  return make("z", coef, 1e-3, function(routing, _, _, self)
    local lse = need(routing, "logits", "z"):logsumexp(-1)
    if routing.mask then lse = lse * routing.mask:reshape { -1 }:to(lse.dtype) end
    return (lse * lse):sum() * (self.coef / math.max(real_tokens(routing), 1))
  end)
end

--- The importance loss (Shazeer et al. 2017, eq. 7): variance over squared mean of the experts' summed weights.
function M.importance(coef)
  return make("importance", coef, 0.01, function(routing, _, _, self)
    local weight = routing.weight
    local sum = core.zeros({ routing.num_experts }, { dtype = weight.dtype }):index_add(1, routing.expert, weight)
    local mean = sum:mean()
    local gap = sum - mean
    return (gap * gap):mean() / (mean * mean + 1e-10) * self.coef
  end)
end

local Bias = {}
Bias.__index = Bias
Bias.__call = function() return nil end
Bias.__tostring = function(self) return ("moe.loss.selection_bias(%s)"):format(tostring(self.rate)) end

function Bias.start(_, state, num_experts)
  state.count, state.seen, state.steps = core.zeros({ num_experts }, { dtype = "i64" }), false, 0
end

function Bias.observe(_, routing, _, state)
  state.count:add_(routing:demand())
  state.seen = true
end

function Bias:after_step(layer, state)
  if not state.seen then return end
  state.seen = false
  state.steps = state.steps + 1
  local rate = self.rate
  if type(rate) ~= "number" then rate = rate(state.steps) end
  core.no_grad(function()
    local load = state.count:to "f32"
    layer.router.expert_bias:add_((load:mean() - load):sign() * rate)
    state.count:mul_(0)
  end)
end

--- Balance without a loss (Wang et al. 2024, arXiv 2408.15664): after each optimizer step the selection bias of an expert
-- moves by `rate` towards the mean load. rate: a number, or a function of the step. Needs a router with
-- selection_bias = true; moe.layer's `bias_update_rate` sets up both.
function M.selection_bias(rate)
  if type(rate) ~= "number" and type(rate) ~= "function" then
    error("loss.selection_bias: argument 1 (rate) must be a number or a function of the step, got a " .. type(rate), 2)
  end
  return setmetatable({ name = "selection_bias", rate = rate }, Bias)
end

--- The sum of the auxiliary losses of all routings of a forward: ctx.routings, which every moe.layer called with that ctx
-- has joined. A scalar tensor; 0 when there is none.
function M.aux(ctx)
  if ctx ~= nil and type(ctx) ~= "table" then
    error("loss.aux: argument 1 (ctx) must be the table that the layers were called with, got a " .. type(ctx), 2)
  end
  local sum
  for _, routing in ipairs(ctx and ctx.routings or {}) do
    if routing.losses then sum = sum and sum + routing:aux() or routing:aux() end
  end
  return sum or core.tensor(0)
end

return M
