-- Evenness by the coefficient of variation: importance, load, and both weighted by what the experts cost.

local core = require "moe.core"
local base = require "moe.balance.base"

local M = {}

local NONE <const> = {}
local LATENCY <const> = { cost = { "table" }, on = { { "both", "importance", "load" }, "both" } }

-- The experts' summed weights [E].
local function importance_of(routing)
  local weight = routing.weight
  return base.sum_by(routing.expert, weight, routing.num_experts)
end

-- The normal distribution function.
local function normal_cdf(x) return (x * math.sqrt(0.5)):erf() * 0.5 + 0.5 end

-- How many tokens an expert would get were its noise drawn again, [E]: of each, the chance to come out above the k-th
-- best of the others. clean, noisy, std [T, E].
local function noisy_load(routing, k)
  local clean, noisy, std = routing.clean_logits, routing.logits, routing.noise_std
  local E = routing.num_experts
  if k >= E then return core.full({ E }, routing.num_tokens, { dtype = noisy.dtype }) end
  local best = noisy:topk(k + 1)
  local to_enter, to_stay = best:narrow(2, k, 1), best:narrow(2, k + 1, 1)
  -- one of the k best has the next one to beat, others the last of the k
  local threshold = core.where(noisy:gt(to_stay), to_stay, to_enter)
  return base.masked(routing, normal_cdf((clean - threshold) / std)):sum(1)
end

-- The probability of what was chosen, summed for each expert [E].
local function chosen_load(routing, name)
  local probs = base.need(routing, "probs", name)
  local token, expert = base.choices(routing, name)
  local E = routing.num_experts
  return base.sum_by(expert, probs:reshape { -1 }:index_select(1, (token - 1) * E + expert), E)
end

local function load_of(routing, name)
  if routing.noise_std and routing.top_k then return noisy_load(routing, routing.top_k) end
  return chosen_load(routing, name)
end

--- The importance loss, CV^2 of the experts' summed weights. CV^2(v) = mean((v - mean v)^2) / (mean v)^2. 0 when they are even,
-- E/k - 1 when k experts share all. Takes routing.weight. (Shazeer et al. 2017, arXiv 1701.06538, eq. 6 and 7.)
function M.importance(coef, given)
  base.read("importance", given, NONE)
  return base.make("importance", coef, 0.01, function(routing) return base.variation(importance_of(routing)) end)
end

--- The load loss, CV^2 of the experts' load, in a form that has a gradient. 0 when even.
-- Where the router has noise: load_e = sum over tokens of Phi((clean_e - kth best of the other noisy logits) / std_e), the
-- chance to be chosen if the noise of e alone were drawn again (Shazeer et al. 2017, arXiv 1701.06538, eq. 8 to 11; Phi:
-- the normal distribution function). Takes routing.clean_logits, logits, noise_std [T, E] and top_k, as moe.router.topk with
-- `noise` sets them in training. Without noise the assignments stand for it, each with its probability:
-- load_e = sum of probs[t, e] over the tokens t that chose e (a form of this library). Takes routing.probs [T, E].
function M.load(coef, given)
  base.read("load", given, NONE)
  return base.make("load", coef, 0.01, function(routing) return base.variation(load_of(routing, "load")) end)
end

--- The balance of time instead of tokens, for experts of unequal cost. It is CV^2(a * importance) + CV^2(a * load), where
-- a_e = cost_e / sum of cost. 0 when each expert's share is inverse to its cost. Options: cost, a list of one positive number
-- an expert (seconds, operations, bytes: only ratios count); on = "importance" or "load" for one term alone. The load is that of
-- moe.loss.load. (You et al. 2023, ShiftAddViT, arXiv 2306.06446.)
function M.latency(coef, given)
  local o = base.read("latency", given, LATENCY)
  local list, total = o.cost, 0
  if not list then error("loss.latency: the option 'cost' is missing: one positive number an expert", 2) end
  for e, c in ipairs(list) do
    if type(c) ~= "number" or not (c > 0 and c < math.huge) then
      error(("loss.latency: cost[%d] must be a positive number, got %s"):format(e, tostring(c)), 2)
    end
    total = total + c
  end
  local share = {}
  for e, c in ipairs(list) do share[e] = c / total end
  return base.make("latency", coef, 0.01, function(routing)
    if #share ~= routing.num_experts then
      error(("loss.latency: cost lists %d experts, the routing has %d"):format(#share, routing.num_experts), 0)
    end
    local sum
    for term, of in pairs { importance = importance_of, load = load_of } do
      if o.on == "both" or o.on == term then
        local v = of(routing, "latency")
        v = base.variation(v * core.tensor(share, { dtype = v.dtype }))
        sum = sum and sum + v or v
      end
    end
    return sum
  end)
end

return M
