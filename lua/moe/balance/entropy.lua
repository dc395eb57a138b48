-- Losses of what the choice of an expert tells: entropies of the router's probabilities, in nats.

local core = require "moe.core"
local base = require "moe.balance.base"

local M = {}

local NONE <const> = {}
local MUTUAL <const> = { by = { { "token", "task" }, "token" } }

-- The mean probability of each expert [E].
local function marginal(probs, real) return probs:sum(1) / math.max(real, 1) end

--- The mean entropy of a token's probabilities, mean over tokens of -sum_e p log p. log E when undecided, 0 when certain. A
-- negative coefficient raises it. Takes routing.probs [T, E].
-- (Huang et al. 2024, "Harder Tasks Need More Experts", arXiv 2403.07652: lowered, it keeps the sets of top-p small.)
function M.entropy(coef, given)
  base.read("entropy", given, NONE)
  return base.make("entropy", coef, 1e-4, function(routing)
    local probs, real = base.probabilities(routing, "entropy")
    return base.entropy(probs):sum() / math.max(real, 1)
  end)
end

-- The task of each token [T], from ctx.task_ids: a number, one a token, or one a sequence.
local function tasks(ctx, T)
  local ids = ctx.task_ids
  if math.type(ids) == "integer" then return core.full({ T }, ids, { dtype = "i64" }) end
  if not core.is_tensor(ids) then
    error("loss.mutual_information: by = \"task\" needs ctx.task_ids, a number or a tensor of one a token or a sequence", 0)
  end
  local n = ids:numel()
  if n == T then return ids:reshape { T } end
  if n == 0 or T % n ~= 0 then
    error(("loss.mutual_information: ctx.task_ids has %d elements, wanted %d tokens or their sequences"):format(n, T), 0)
  end
  return ids:reshape { n, 1 }:expand { n, T // n }:reshape { T }
end

--- The negative mutual information of experts and tokens. It is E[H(m given x)] - H(m), with H(m) the entropy of the mean
-- probabilities and H(m given x) that of a token's. 0 when all tokens have the same probabilities (even or collapsed), -log E
-- at best: each token certain, all experts used alike. Takes routing.probs [T, E].
-- (Shen et al. 2023, ModuleFormer, arXiv 2306.04640.)
-- by = "task": of experts and tasks instead, with the mean probabilities of a task in place of a token's; ctx.task_ids from 1
-- (Chen et al. 2022, Mod-Squad, arXiv 2212.08066; here with the tasks' shares of the tokens).
function M.mutual_information(coef, given)
  local o = base.read("mutual_information", given, MUTUAL)
  return base.make("mutual_information", coef, 1e-2, function(routing, ctx)
    local probs, real = base.probabilities(routing, "mutual_information")
    real = math.max(real, 1)
    local whole = base.entropy(marginal(probs, real))
    if o.by == "token" then return base.entropy(probs):sum() / real - whole end
    local id = tasks(ctx, routing.num_tokens)
    local n = id:numel() > 0 and math.tointeger(id:max():item()) or 1
    local mass = core.zeros({ n, routing.num_experts }, { dtype = probs.dtype }):index_add(1, id, probs)
    local tokens = mass:detach():sum(-1, true) -- rows of probs sum to 1
    local within = base.entropy(mass / tokens:clamp(1e-20)) * tokens:squeeze(2)
    return within:sum() / real - whole
  end)
end

--- The entropy of the mean probabilities, H(m) = -sum_e P_e log P_e. Lowered in finetuning, it gathers the work on few
-- experts, so that the others can be pruned. log E when even, 0 when one has all. Takes routing.probs [T, E].
-- (Shen et al. 2023, ModuleFormer, arXiv 2306.04640.)
function M.load_concentration(coef, given)
  base.read("load_concentration", given, NONE)
  return base.make("load_concentration", coef, 1e-2, function(routing)
    return base.entropy(marginal(base.probabilities(routing, "load_concentration")))
  end)
end

return M
