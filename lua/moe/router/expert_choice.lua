-- Expert choice: experts pick their tokens.

local core = require "moe.core"
local nn = require "moe.nn"
local base = require "moe.router.gates"
local sparse = core._sparse

--- Each expert takes the tokens that want it most: S = softmax(W x) over the experts (`score` = "sigmoid": of each alone),
-- G, I = the C largest of S^T [E, T] in each row, C = ceil(top_k T / E); weights G. The load is even by construction; a token
-- has `top_k` experts on average (2; any number above 0, or a function of the step; the paper's capacity factor; router.top_k
-- can be set later), and may have none. `within` says which tokens an expert chooses among: all those of the batch ("batch",
-- the default; a token is then chosen in view of later ones, so that training and decoding differ), those of a sequence
-- ("sequence"), or those at one position of all sequences ("position": causal; C = ceil(top_k B / E) of B sequences; one
-- sequence alone gets all experts); the latter two need ctx.shape {B, time}. Equals go to the first token. Masked tokens are
-- not chosen; within a sequence or a position they count for C. ctx.choice: index [T, k], or a recorded [E, C] where T is
-- not E. bias, noise, jitter, init as in topk. routing.index,
-- routing.gate [E, C]. Zhou et al. 2022, Mixture-of-Experts with Expert Choice Routing (arXiv 2202.09368, eq. 1-2).
local ExpertChoice = nn.module("expert_choice", base.Gates)

local ROWS <const> = base.rows({
  top_k = { "number|function", 2 }, score = { { "softmax", "sigmoid" }, "softmax" },
  within = { { "batch", "sequence", "position" }, "batch" },
}, true)

ExpertChoice.settable = { top_k = { "number|function" } }

function ExpertChoice:check(o)
  if type(o.top_k) == "function" then return end
  if o.top_k <= 0 or o.top_k ~= o.top_k then self:fail("option 'top_k' must be above 0, got %g", o.top_k) end
  if o.num_experts and o.top_k > o.num_experts then self:fail("top_k is %g, but there are %d experts", o.top_k, o.num_experts) end
end

function ExpertChoice:changed(o) self:keep_numbers(o, "top_k") end

function ExpertChoice:init(given)
  local bound = self:setup(given, ROWS)
  self:check(self._options)
  if not bound then return end
  self:changed(bound)
  self:projection ""
end

-- The groups that an expert chooses in: scores [T, E] as [E, groups, n], and the token number of each [groups, n].
local function grouped(self, scores, x, ctx)
  local within, E, T = self._options.within, self.num_experts, x:size(1)
  local batch, time = 1, T
  if within ~= "batch" then batch, time = self:sequences(x, ctx) end
  local parts, token = scores:reshape { batch, time, E }, core.arange(1, batch * time):to "i64":reshape { batch, time }
  if within == "position" then return parts:permute { 3, 2, 1 }, token:t() end
  return parts:permute { 3, 1, 2 }, token
end

function ExpertChoice:route(x, ctx)
  ctx = ctx or {}
  local o, E, T, mask = self._options, self.num_experts, x:size(1), ctx.mask
  local logits, clean, std = self:open(x, ctx)
  local soft = o.score == "softmax"
  local scores = soft and logits:softmax(-1) or logits:sigmoid()
  local probs = soft and scores or self.normalised(scores)
  if ctx.choice and not (ctx.choice:size(1) == E and T ~= E) then
    return self:routing(self:choose(scores, ctx), ctx, probs, logits, clean, std)
  end
  local weight, index
  if ctx.choice then -- a recorded routing.index [E, C]
    index = ctx.choice
    weight = scores:t():gather(2, index:clamp(1))
  else
    local off = mask and mask:reshape { -1, 1 }:logical_not()
    local keys, token = grouped(self, off and scores:masked_fill(off, -1) or scores, x, ctx)
    local groups, n = token:size(1), token:size(2)
    local real = n
    if off and o.within == "batch" then real = n - math.tointeger(off:to "i64":sum():item()) end
    local k = self:scheduled("top_k", ctx)
    local C = math.max(math.min(real, math.ceil(k * real / E - 1e-9)), 0)
    local at
    weight, at = keys:topk(C)
    if groups == 1 then
      index = at
    else
      index = token:reshape { 1, groups, n }:expand { E, groups, n }:gather(3, at)
    end
    index, weight = index:reshape { E, groups * C }, weight:reshape { E, groups * C }
    -- experts that were masked for a token score 0 there
    if ctx.expert_mask then index = index:masked_fill(weight:detach():le(0), 0) end
  end
  local routing = sparse.experts(index, weight, T, mask)
  routing.logits, routing.clean_logits, routing.noise_std = logits, clean, std
  routing.probs = mask and probs:masked_fill(mask:reshape { -1, 1 }:logical_not(), 0) or probs
  return routing
end

function ExpertChoice.traits(_, o)
  return { type(o.top_k) == "function" and "top_k=function" or ("top_k=%g"):format(o.top_k), "within=" .. o.within }
end

return ExpertChoice
