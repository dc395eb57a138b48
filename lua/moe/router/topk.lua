-- Token choice: the k best experts of each token, by the one order of steps (csrc/op/router.c).

local core = require "moe.core"
local nn = require "moe.nn"
local base = require "moe.router.base"
local sparse = core._sparse

--- The k best experts of each token. Steps, each an option: `score` of the logits (softmax, sigmoid, sqrtsoftplus, relu;
-- `score_after`: of the chosen alone) -> + `selection_bias` -> `n_group` groups, of which `topk_group` stay, judged
-- by the sum of their `group_top` best -> choose `top_k` -> their unbiased scores -> `norm_topk_prob` (default: for
-- k > 1) -> `routed_scaling_factor`. Also: `bias` of the projection, `noise` ("learned" or a number) added to the
-- logits in training (`noise_in_eval`: always), `jitter` (x times 1 +- jitter in training), `init`.
-- Shazeer et al. 2017 (arXiv 1701.06538); the order of steps is that of DeepSeek-V3 (arXiv 2412.19437).
local TopK = nn.module("topk", base.Router)

local ROWS <const> = base.rows({
  top_k = { "integer", 2 },
  score = { { "softmax", "sigmoid", "sqrtsoftplus", "relu" }, "softmax" }, score_after = { "boolean", false },
  norm_topk_prob = { "boolean" }, routed_scaling_factor = { "number", 1 },
  n_group = { "integer", 1 }, topk_group = { "integer", 1 }, group_top = { "integer", 0 },
  selection_bias = { "boolean", false },
}, true)

TopK.takes_selection_bias = true

local function check(self, o)
  local k, E = o.top_k, o.num_experts
  if k < 1 then self:fail("option 'top_k' must be at least 1, got %d", k) end
  if E and k > E then self:fail("top_k is %d, but there are %d experts", k, E) end
  if k == 1 and o.norm_topk_prob then
    self:fail "norm_topk_prob with top_k = 1 makes every weight 1 and cuts the router off from its gradient"
  end
  if k == 1 and o.score_after and o.score == "softmax" then
    self:fail "a softmax over one choice (score_after with top_k = 1) is always 1 and cuts the router off from its gradient"
  end
end

function TopK:init(given)
  local bound = self:setup(given, ROWS)
  local o = self._options
  check(self, o)
  if not bound then return end
  self.top_k = o.top_k
  self:projection ""
  if o.selection_bias then
    self:buffer("expert_bias", core.zeros({ self.num_experts }, { dtype = "f32", device = o.device }))
  end
  self._call = {
    top_k = o.top_k, score = o.score, score_after = o.score_after, n_group = o.n_group, topk_group = o.topk_group,
    group_top = o.group_top, routed_scaling_factor = o.routed_scaling_factor,
    norm_topk_prob = o.norm_topk_prob == nil and o.top_k > 1 and not o.score_after or o.norm_topk_prob == true,
  }
end

function TopK:route(x, ctx)
  self:ready()
  ctx = ctx or {}
  local logits, call = self:logits(x, ctx), self._call
  call.bias, call.mask, call.choice = self.expert_bias, ctx.mask, ctx.choice
  local weight, index, score = core.router_topk(logits, call)
  call.bias, call.mask, call.choice = nil, nil, nil
  local routing = sparse.topk(index, weight, self.num_experts, ctx.mask)
  routing.logits = logits
  routing.top_k = self.top_k
  -- probabilities sum to one, whatever the scores do
  routing.probs = self._options.score == "softmax" and score or score / (score:sum(-1, true) + 1e-20)
  return routing
end

TopK.forward = TopK.route

function TopK.traits(_, o)
  local parts = { ("top_k=%d, score=%s"):format(o.top_k, o.score) }
  if o.n_group > 1 then parts[#parts + 1] = ("%d of %d groups"):format(o.topk_group, o.n_group) end
  return parts
end

return TopK
