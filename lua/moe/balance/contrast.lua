-- Losses that keep experts apart: of the tokens that they get, and of what they compute.

local core = require "moe.core"
local base = require "moe.balance.base"

local M = {}

local CONTRASTIVE <const> = { temperature = { "number", 0.1 }, prototypes = { "function" } }
local DIVERSITY <const> = {
  of = { { "outputs", "weights" }, "outputs" }, tokens = { "integer" }, parameter = { "string", "down_proj" },
}

local function unit(x) return x / (x * x):sum(-1, true):clamp(1e-12):sqrt() end

local function layer_of(ctx, name)
  local layer = ctx.layer
  if not layer then error(("loss.%s: ctx has no layer: it works inside of moe.layer alone"):format(name), 0) end
  return layer
end

-- The input of the layer [T, d_model].
local function input_of(ctx, name)
  if not core.is_tensor(ctx.x) then error(("loss.%s: ctx has no x, the tokens that were routed"):format(name), 0) end
  return ctx.x
end

--- The routing contrastive loss, by which an expert's prototype is pulled to the mean of its tokens and pushed from the means
-- of the other experts' tokens. With c_ij = cos(prototype_i, mean_j) / temperature it is mean over experts i with tokens of
-- logsumexp_j(c_ij) - c_ii, j over experts with tokens. log(number of such experts) when all means (or all prototypes) are
-- alike, near 0 when they are well apart, 0 for one. Tokens and prototypes have gradients. Options: temperature; prototypes,
-- a function (layer) -> [E, d_model], the rows of the router's weight when absent. (Wei et al. 2025, ProMoE, arXiv
-- 2510.24711.)
function M.contrastive(coef, given)
  local o = base.read("contrastive", given, CONTRASTIVE)
  if o.temperature ~= o.temperature or o.temperature <= 0 then
    error(("loss.contrastive: temperature must be above 0, got %g"):format(o.temperature), 2)
  end
  return base.make("contrastive", coef, 0.1, function(routing, ctx)
    local layer, x = layer_of(ctx, "contrastive"), input_of(ctx, "contrastive")
    local prototypes
    if o.prototypes then prototypes = o.prototypes(layer)
    elseif type(layer.router) ~= "function" then prototypes = layer.router.prototypes or layer.router.weight end
    local E, d = routing.num_experts, x:size(2)
    local shape = core.is_tensor(prototypes) and prototypes.shape
    if not shape or #shape ~= 2 or shape[1] ~= E or shape[2] ~= d then
      error(("loss.contrastive: prototypes must be a tensor [%d, %d], got %s"):format(E, d,
        shape and "[" .. table.concat(shape, ", ") .. "]" or "a " .. type(prototypes)), 0)
    end
    local token, expert = base.choices(routing, "contrastive")
    local sums = core.zeros({ E, d }, { dtype = x.dtype }):index_add(1, expert, x:index_select(1, token))
    local used = core.bincount(expert, E):gt(0)
    local there = used:nonzero():reshape { -1 }
    local n = there:numel()
    if n == 0 then return nil end
    -- of unit length: the sum of an expert's tokens points as their mean does
    local means = unit(sums:index_select(1, there))
    local cosine = unit(prototypes:index_select(1, there):to(x.dtype)):matmul(means:t()) * (1 / o.temperature)
    return (cosine:logsumexp(-1) - cosine:diagonal()):mean()
  end)
end

-- Mean of the squared cosines of all pairs among the rows of v [.., n, d]: 1 when all are alike, 0 when orthogonal.
-- count: how many pairs there are, where rows of zeros take no part.
local function overlap(v, pairs_)
  local gram = v:matmul(v:transpose(-1, -2))
  local own = (v * v):sum(-1)
  return ((gram * gram):sum() - (own * own):sum()) / math.max(pairs_, 1)
end

-- What each of a token's experts computes of it, before weights, as unit vectors [n, k, d_out], and the number of
-- ordered pairs. One more pass of the experts over the chosen tokens.
local function outputs(routing, ctx, layer, limit)
  local x, index = input_of(ctx, "diversity"), base.need(routing, "index", "diversity")
  local bank = layer.experts
  if type(bank) ~= "table" or type(bank.work) ~= "function" then
    error("loss.diversity: of = \"outputs\" needs a bank of experts (work(x, routing, ctx))", 0)
  end
  local T = index:size(1)
  local n = limit and math.min(limit, T) or T
  if n < T then -- evenly over the tokens
    local at = (core.arange(0, n - 1):to "i64" * T):floor_divide(n) + 1
    x, index = x:index_select(1, at), index:index_select(1, at)
  end
  local k, d = index:size(2), x:size(2)
  local rows = x:reshape { n, 1, d }:expand { n, k, d }:reshape { n * k, d }
  local one = core._sparse.topk(index:reshape { n * k, 1 }, nil, routing.num_experts)
  local y = bank:work(rows, one, ctx)
  local chosen = index:gt(0):to "i64":sum(-1)
  return unit(y:reshape { n, k, y:size(2) }), (chosen * (chosen - 1)):sum():item()
end

--- The overlap of experts, a mean squared cosine, 1 when experts are alike, 0 when they are orthogonal.
-- of = "outputs": between what a token's experts compute of it, over all pairs of them; it costs a second pass of the
-- experts, over `tokens` evenly spread tokens where that is given. (Guo et al. 2025, "Advancing Expert Specialization",
-- arXiv 2505.22323, which adds up projections; squared cosines do not reward short outputs.) Takes routing.index [T, k], k > 1.
-- of = "weights": between the experts' weights `parameter` [E, ...] as vectors, over all pairs of experts: ||W W^T - I||^2 /
-- (E (E - 1)) for rows of unit length (the orthogonality penalty of Bansal et al. 2018, arXiv 1810.09102, across experts).
function M.diversity(coef, given)
  local o = base.read("diversity", given, DIVERSITY)
  if o.tokens and o.tokens < 1 then error(("loss.diversity: tokens must be at least 1, got %d"):format(o.tokens), 2) end
  return base.make("diversity", coef, 0.01, function(routing, ctx)
    local layer = layer_of(ctx, "diversity")
    if o.of == "outputs" then return overlap(outputs(routing, ctx, layer, o.tokens)) end
    local weight = type(layer.experts) == "table" and layer.experts[o.parameter]
    if not core.is_tensor(weight) then
      error(("loss.diversity: the experts have no parameter '%s'"):format(o.parameter), 0)
    end
    local E = weight:size(1)
    return overlap(unit(weight:reshape { E, weight:numel() // E }), E * (E - 1))
  end)
end

return M
