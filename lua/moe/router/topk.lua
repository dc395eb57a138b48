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
-- top_k may be a function (step, layer_number) of what ctx says; where ctx has no step the last value stays. It can be set
-- later, router:set{ top_k = 1 } or router.top_k = 1: the weights have nothing to do with it.
-- Shazeer et al. 2017 (arXiv 1701.06538); the order of steps is that of DeepSeek-V3 (arXiv 2412.19437).
local TopK = nn.module("topk", base.Router)

TopK.rows = base.rows({
  top_k = { "integer|function", 2 },
  score = { { "softmax", "sigmoid", "sqrtsoftplus", "relu" }, "softmax" }, score_after = { "boolean", false },
  norm_topk_prob = { "boolean" }, routed_scaling_factor = { "number", 1 },
  n_group = { "integer", 1 }, topk_group = { "integer", 1 }, group_top = { "integer", 0 },
  selection_bias = { "boolean", false },
}, true)

TopK.takes_selection_bias = true

TopK.settable = { top_k = { "integer|function" } }

function TopK:check(o, k)
  local E = o.num_experts
  k = k or o.top_k
  if type(k) == "function" then return end
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
  local bound = self:setup(given, self.rows)
  local o = self._options
  self:check(o)
  if not bound then return end
  self:projection ""
  if o.selection_bias then
    self:buffer("expert_bias", core.zeros({ self.num_experts }, { dtype = "f32", device = o.device }))
  end
  self._call = {
    score = o.score, score_after = o.score_after, n_group = o.n_group, topk_group = o.topk_group,
    group_top = o.group_top, routed_scaling_factor = o.routed_scaling_factor,
  }
  self:changed(o)
end

-- So many experts a token from now on.
local function choose(self, k)
  local o, call = self._options, self._call
  local whole = math.tointeger(k)
  if not whole then self:fail("top_k must be a whole number, got %s", tostring(k)) end
  self:check(o, whole)
  self.top_k, call.top_k = whole, whole
  call.norm_topk_prob = o.norm_topk_prob == nil and whole > 1 and not o.score_after or o.norm_topk_prob == true
end

function TopK:changed(o)
  if self._call and type(o.top_k) ~= "function" then choose(self, o.top_k) end
end

-- Takes over top_k of a schedule, or as someone has set the field.
function TopK:follow(ctx)
  local f = self._options.top_k
  local k = self.top_k
  if type(f) == "function" and ctx.step then k = f(ctx.step, ctx.layer_number) end
  if k == nil then self:fail "top_k is a function of the step, but ctx has no step" end
  if k ~= self._call.top_k then choose(self, k) end
end

function TopK:route(x, ctx)
  self:ready()
  ctx = ctx or {}
  self:follow(ctx)
  local call = self._call
  local logits, clean, std = self:logits(x, ctx)
  call.bias, call.mask, call.choice = self.expert_bias, ctx.mask, ctx.choice
  local weight, index, score = core.router_topk(logits, call)
  call.bias, call.mask, call.choice = nil, nil, nil
  local routing = sparse.topk(index, weight, self.num_experts, ctx.mask)
  routing.logits = logits
  routing.clean_logits, routing.noise_std = clean, std
  routing.top_k = self.top_k
  -- probabilities sum to one, whatever the scores do
  routing.probs = self._options.score == "softmax" and score or score / (score:sum(-1, true) + 1e-20)
  return routing
end

TopK.forward = TopK.route

function TopK:traits(o)
  local k = self.top_k or o.top_k
  local parts = { ("top_k=%s, score=%s"):format(type(k) == "function" and "function" or k, o.score) }
  if o.n_group > 1 then parts[#parts + 1] = ("%d of %d groups"):format(o.topk_group, o.n_group) end
  return parts
end

return TopK
