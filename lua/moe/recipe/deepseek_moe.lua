--- DeepSeekMoE: Towards Ultimate Expert Specialization in Mixture-of-Experts Language Models (Dai et al. 2024, arXiv 2401.06066).
--
--   y = sum_{i <= Ks} FFN_i(x) + sum_{i in top(mK - Ks)} g_i FFN_i(x),    g = softmax(x W^T), not normalised again
--
-- Each of N experts of width I is cut into m of width I / m, of which m K work: Ks of them always (shared experts, eq. 9),
-- mK - Ks by choice out of mN - Ks. Parameters and operations are those of K out of N. The loss adds a balance over
-- experts (eq. 12) and one over devices, groups of neighbouring experts (eq. 15). The default layer has neither shared nor fine
-- experts, and normalises the weights.

local moe = require "moe"

local M = {
  title = "DeepSeekMoE", paper = "arXiv 2401.06066", number = 155,
  claim = "m = 4 with a shared expert beats top-2 of 8 at equal parameters; losing its best experts hurts it more",
  outcome = "loss reproduced: 2.57 against 2.66 (three seeds, 200 steps; 2.63 with normalised weights); without an eighth of the "
    .. "best experts, not reproduced: + 0.20 against + 0.40 of the coarse layer",
}

-- The group of each of E experts on D devices, as evenly as E allows.
local function devices(E, D)
  local of = {}
  for e = 1, E do of[e] = (e - 1) * D // E + 1 end
  return of
end

--- The layer of o.num_experts experts of o.intermediate_size, o.top_k of which would work for a token, cut into o.split
-- (default 4) each, o.shared (default 1) of the pieces shared, over o.devices (default 4).
function M.layer(o)
  local m, shared = o.split or 4, o.shared or 1
  if o.intermediate_size % m ~= 0 then
    error(("deepseek_moe: intermediate_size = %d cannot be cut into %d"):format(o.intermediate_size, m), 2)
  end
  local width, E, D = o.intermediate_size // m, m * o.num_experts - shared, o.devices or 4
  return moe.layer {
    d_model = o.d_model, num_experts = E, dtype = o.dtype,
    router = moe.router.topk { top_k = m * o.top_k - shared, norm_topk_prob = false },
    experts = moe.experts.mlp { intermediate_size = width },
    shared = shared > 0 and moe.experts.mlp { intermediate_size = shared * width } or nil,
    balance = { moe.loss.switch(0.01), moe.loss.switch(0.01, { groups = devices(E, math.min(D, E)) }) },
  }
end

--- A bank of m E experts of a m-th of the width with the same weights: with all pieces chosen at weight 1 their sum is the
-- output of the whole experts.
function M.split(bank, m)
  local E, I, d = table.unpack(bank.up_proj.shape)
  local fine = moe.experts.mlp {
    d_model = d, num_experts = m * E, intermediate_size = I // m, act = bank._options.act, dtype = bank.up_proj.dtype,
  }
  moe.no_grad(function()
    fine.up_proj:copy_(bank.up_proj:reshape { E * m, I // m, d })
    fine.down_proj:copy_(bank.down_proj:reshape { E, d, m, I // m }:transpose(2, 3):reshape { E * m, d, I // m })
  end)
  return fine
end

--- Runs f while every sparse layer of the model lacks, for each token, the share of experts that its router likes best:
-- as many as before are chosen from what is left. Returns what f returns.
function M.without_best(model, share, f)
  local kept = {}
  for _, layer in model:named_modules() do
    local router = type(layer.stats) == "function" and layer.router
    if router then
      kept[layer] = router
      layer.router = function(x, ctx)
        local lost = math.floor(share * layer.num_experts + 0.5)
        local _, best = router:route(x, ctx).probs:topk(lost)
        local gone = moe.zeros(x:size(1), layer.num_experts):scatter(2, best, moe.ones(best.shape))
        return router:route(x, setmetatable({ expert_mask = gone:eq(0) }, { __index = ctx }))
      end
    end
  end
  local results = table.pack(pcall(f))
  for layer, router in pairs(kept) do layer.router = router end
  if not results[1] then error(results[2], 0) end
  return table.unpack(results, 2, results.n)
end

return M
