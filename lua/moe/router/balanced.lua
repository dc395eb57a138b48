-- Routers that give every expert its share of the tokens in training.

local core = require "moe.core"
local nn = require "moe.nn"
local base = require "moe.router.base"
local routings = require "moe.routing"

--- Choices that even out the load, so that no loss has to. logits = W x [T, E]; in training tokens are chosen together, in
-- evaluation each takes its own top_k best. The weight of a choice is its score, sigmoid(logit) or softmax(logits)
-- (`score`), which knows nothing of the balance; `norm_topk_prob` divides by their sum.
-- method = "sinkhorn": the top_k largest of logits / temperature + price, where price [E] makes the columns of
-- softmax(logits / temperature + price) sum to T / E: the entropy-regularised assignment, iterated at most `iterations`
-- times, until shares are even to within `tolerance`. A lower `temperature` evens out the choices themselves better. Clark
-- et al. 2022, S-BASE (arXiv 2202.01169, section 3.2). method = "assignment": the exact one: each expert gets T top_k / E
-- tokens (to within one), the sum of the chosen logits being the largest possible. Lewis et al. 2021, BASE layers (arXiv
-- 2103.16716, eq. 2-3). Finite logits only: ctx.expert_mask is an error in training. Options: method, top_k (1), score
-- ("sigmoid"), norm_topk_prob (false), temperature (1), iterations (20), tolerance (1e-3), and those of a projection: bias,
-- init, noise, jitter. ctx.choice forces the experts, ctx.mask leaves tokens out.
local Balanced = nn.module("balanced", base.Router)

local ROWS <const> = base.rows({
  top_k = { "integer", 1 }, method = { { "sinkhorn", "assignment" }, "sinkhorn" }, score = { { "sigmoid", "softmax" }, "sigmoid" },
  norm_topk_prob = { "boolean", false }, temperature = { "number", 1 }, iterations = { "integer", 20 }, tolerance = { "number", 1e-3 },
}, true)

function Balanced:init(given)
  local bound = self:setup(given, ROWS)
  local o = self._options
  local k, E = o.top_k, o.num_experts
  if k < 1 then self:fail("option 'top_k' must be at least 1, got %d", k) end
  if E and k > E then self:fail("top_k is %d, but there are %d experts", k, E) end
  if k == 1 and o.norm_topk_prob then
    self:fail "norm_topk_prob with top_k = 1 makes every weight 1 and cuts the router off from its gradient"
  end
  if o.temperature <= 0 or o.temperature ~= o.temperature then self:fail("option 'temperature' must be above 0, got %g", o.temperature) end
  if o.iterations < 1 then self:fail("option 'iterations' must be at least 1, got %d", o.iterations) end
  if not bound then return end
  self.top_k = k
  self:projection ""
end

-- The balanced choice [T, k]: a decision, without a gradient.
local function choose(self, logits, mask)
  local o = self._options
  logits = logits:detach()
  if o.method == "assignment" then return core.balanced_assignment(logits, { mask = mask, top_k = o.top_k }) end
  if o.temperature ~= 1 then logits = logits / o.temperature end
  local price = core.sinkhorn_price(logits, { mask = mask, iterations = o.iterations, tolerance = o.tolerance })
  local _, index = (logits + price):topk(o.top_k)
  return index
end

function Balanced:route(x, ctx)
  ctx = ctx or {}
  local o = self._options
  local logits = self:logits(x, ctx)
  local choice = ctx.choice
  if not choice and self.training then choice = core.no_grad(choose, self, logits, ctx.mask) end
  local weight, index, score = core.router_topk(logits, {
    top_k = o.top_k, score = o.score, norm_topk_prob = o.norm_topk_prob, mask = ctx.mask, choice = choice,
  })
  local routing = routings.topk(index, weight, self.num_experts, ctx.mask and { mask = ctx.mask })
  routing.logits, routing.top_k = logits, o.top_k
  routing.probs = o.score == "softmax" and score or score / (score:sum(-1, true) + 1e-20)
  return routing
end

function Balanced.traits(_, o) return { ("top_k=%d, method=%s"):format(o.top_k, o.method) } end

return Balanced
