-- The balance loss of Switch and GShard: share of the load times mean probability.

local moe = require "moe"
local core = require "moe.core"
local base = require "moe.balance.base"

local ROWS <const> = {
  norm = { { "1", "k" }, "1" }, by = { { "batch", "sequence", "global" }, "batch" }, groups = { "integer|table" },
}

-- Assignments of each expert in each sequence of T tokens, [B, E], before capacity.
local function sequence_demand(routing, batch, T)
  local E = routing.num_experts
  local token, expert = base.choices(routing, "switch")
  local cell = (token - 1):floor_divide(T) * E + expert
  return core.bincount(cell, batch * E):reshape { batch, E }
end

-- groups: their number (equal, consecutive), or the group of each expert -> lists member [E, D] of 0 and 1, scale [D] = E over
-- the experts of a group.
local function membership(groups, E)
  local of, n = {}, 0
  if type(groups) == "table" then
    if #groups ~= E then error(("loss.switch: groups lists %d experts, the routing has %d"):format(#groups, E), 0) end
    for e, g in ipairs(groups) do
      if math.type(g) ~= "integer" or g < 1 then
        error(("loss.switch: groups[%d] must be a number of a group from 1, got %s"):format(e, tostring(g)), 0)
      end
      of[e], n = g, math.max(n, g)
    end
  else
    if groups < 1 or E % groups ~= 0 then
      error(("loss.switch: groups is %d, wanted a divisor of the %d experts"):format(groups, E), 0)
    end
    n = groups
    for e = 1, E do of[e] = (e - 1) // (E // groups) + 1 end
  end
  local rows, count = {}, {}
  for g = 1, n do count[g] = 0 end
  for e = 1, E do
    rows[e] = {}
    for g = 1, n do rows[e][g] = g == of[e] and 1 or 0 end
    count[of[e]] = count[of[e]] + 1
  end
  for g = 1, n do
    if count[g] == 0 then error(("loss.switch: no expert is in group %d of %d"):format(g, n), 0) end
    count[g] = E / count[g]
  end
  return { member = rows, scale = count, experts = E }
end

local M = {}

--- The balance loss of Switch and GShard, E * sum over experts of f_e * P_e. Here f_e is the share of all assignments (before
-- capacity) that went to expert e and P_e the mean of its probability, both over the tokens that take part. 1 at
-- balance, E/k when k experts take all. Only P has a gradient. Takes routing.probs [T, E].
-- (Fedus et al. 2021, arXiv 2101.03961, eq. 4 to 6; Lepikhin et al. 2020, arXiv 2006.16668.)
--
-- Options: by = "batch" takes f and P over all tokens of the forward; "sequence" within each sequence (ctx.shape tells
-- the batch), then averages (DeepSeek-V3, arXiv 2412.19437, eq. 17); "global" counts f over the micro-batches of the
-- optimizer step up to this one, so that one of a single domain need not be even in itself (Qiu et al.
-- 2025, arXiv 2501.11873; the layer's after_step begins anew). groups: over devices instead of experts, the
-- sum over groups i of (E / E_i) * f_i * P_i with f and P summed over the E_i experts of the group (DeepSeekMoE, arXiv
-- 2401.06066, eq. 15 to 17); a number of equal groups of neighbours, or the group of each expert as a list. norm =
-- "k" multiplies by the experts a token has, the form of Hugging Face's models: k at balance.
function M.switch(coef, given)
  local o = base.read("switch", given, ROWS)
  local known -- the groups as lists: tensors made in a forward may not outlive it (moe.scope)
  local loss = base.make("switch", coef, 0.01, function(routing, ctx, state)
    local probs, real = base.probabilities(routing, "switch")
    local E, dtype = routing.num_experts, probs.dtype
    local batch, mass, demand = 1 -- sequences, rows of
    if o.by == "sequence" and ctx.shape and #ctx.shape > 1 then
      local T = ctx.shape[#ctx.shape]
      batch = routing.num_tokens // math.max(T, 1)
      demand = sequence_demand(routing, batch, math.max(T, 1))
      mass = probs:reshape { batch, T, E }:sum(2)
    else
      demand = routing:demand():reshape { 1, E }
      mass = probs:sum(1, true)
    end
    local own = demand:sum():item()
    if real == 0 or own == 0 then return probs:sum() * 0 end
    -- run again by a checkpoint, this micro-batch is counted already
    if o.by == "global" and state then
      demand = moe.recomputing() and state.count:reshape { 1, E } or demand + state.count:reshape { 1, E }
    end
    demand = demand:to(dtype)
    local tokens = routing.mask and routing.mask:reshape { batch, -1 }:to(dtype):sum(-1, true):clamp(1)
    local share = mass / (tokens or routing.num_tokens // batch)
    local count = demand:sum(-1, true)
    local load = demand / count:clamp(1)
    if batch > 1 then batch = math.max(1, math.tointeger(count:gt(0):sum():item())) end -- sequences that have tokens
    local value
    if o.groups then
      if not known or known.experts ~= E then known = membership(o.groups, E) end
      local as = { dtype = dtype, device = probs.device }
      local member, scale = core.tensor(known.member, as), core.tensor(known.scale, as)
      value = (load:matmul(member) * scale * share:matmul(member)):sum() / batch
    else
      value = (load * share):sum() * (E / batch)
    end
    return o.norm == "k" and value * (own / real) or value
  end)
  if o.by == "global" then
    function loss.start(_, state, num_experts) state.count = core.zeros({ num_experts }, { dtype = "i64" }) end
    function loss.observe(_, routing, _, state) state.count:add_(routing:demand()) end
    function loss.after_step(_, _, state) state.count:mul_(0) end
  end
  return loss
end

return M
