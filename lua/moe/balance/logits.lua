-- Losses that keep the router's numbers small.

local base = require "moe.balance.base"

local M = {}

local NONE <const> = {}

--- The router z-loss, mean over tokens of logsumexp(logits)^2. It keeps logits small. (log E)^2 at zero logits. Takes
-- routing.logits [T, E]. (Zoph et al. 2022, ST-MoE, arXiv 2202.08906, eq. 5.)
function M.z(coef, given)
  base.read("z", given, NONE)
  return base.make("z", coef, 1e-3, function(routing)
    local lse = base.masked(routing, base.need(routing, "logits", "z"):logsumexp(-1, true))
    return (lse * lse):sum() / math.max(base.real_tokens(routing), 1)
  end)
end

--- The L1 norm of the gates, mean over tokens of the sum of |weight|, for routers whose zeros are learned (relu, sigmoid).
-- The share of experts at work falls as the coefficient rises; that of a router whose weights sum to 1 is constant.
-- Takes routing.weight. (Wang et al. 2024, ReMoE, arXiv 2412.14711, there with a coefficient that adapts.)
function M.gate_l1(coef, given)
  base.read("gate_l1", given, NONE)
  return base.make("gate_l1", coef, 1e-2, function(routing)
    return routing.weight:abs():sum() / math.max(base.real_tokens(routing), 1)
  end)
end

return M
