-- Shared experts that always work, routed ones, and a learned balance between the two.

local core = require "moe.core"
local nn = require "moe.nn"
local base = require "moe.router.base"
local sparse = core._sparse

--- Shared experts by a weight each, and the best of the others: the first `num_shared` experts take every token, and of the rest
-- its `top_k`. With [a1, a2] = softmax(W_h x): g_i = a1 softmax(W_s x)_i for the shared, g_i = a2 softmax(W_r x)_i for the chosen.
-- `norm_topk_prob` (default: for k > 1): over the chosen. `rescale` (default): times how many share each of the three
-- distributions, so that the working experts' weights are 1 on average and the output keeps the scale of the dense layer.
-- Without shared experts: g = softmax(W_r x) over the chosen. Parameters weight [R, d], shared_weight [S, d], stage_weight [2, d].
-- routing.probs are those of the routed experts, 0 for the shared. Jin et al. 2024, MoH (arXiv 2410.11842, eq. 4-6); the
-- rescaling is ours to name.
local TwoStage = nn.module("two_stage", base.Router)

local ROWS <const> = base.rows({
  top_k = { "integer", 2 }, num_shared = { "integer", 0 }, norm_topk_prob = { "boolean" }, rescale = { "boolean", true },
}, true)

function TwoStage:init(given)
  local bound = self:setup(given, ROWS)
  local o = self._options
  local S, R = o.num_shared, o.num_experts and o.num_experts - o.num_shared
  if S < 0 then self:fail("option 'num_shared' must not be negative, got %d", S) end
  if o.top_k < 1 then self:fail("option 'top_k' must be at least 1, got %d", o.top_k) end
  if o.top_k == 1 and o.norm_topk_prob then
    self:fail "norm_topk_prob with top_k = 1 makes the weight constant and cuts the router off from its gradient"
  end
  if R and o.top_k > R then
    self:fail("top_k is %d, but of %d experts %d are shared, which leaves %d to route", o.top_k, o.num_experts, S, math.max(R, 0))
  end
  if not bound then return end
  self.top_k, self.num_shared = S + o.top_k, S
  self:projection("", R)
  if S > 0 then
    self:projection("shared_", S)
    self:projection("stage_", 2)
  end
  local norm = o.norm_topk_prob
  if norm == nil then norm = o.top_k > 1 end
  self._call = { top_k = o.top_k, norm_topk_prob = norm }
end

function TwoStage:route(x, ctx)
  self:ready()
  ctx = ctx or {}
  local o, call, S, T = self._options, self._call, self.num_shared, x:size(1)
  local allowed = ctx.expert_mask -- of all experts; the shared ones work anyway
  if allowed and S > 0 then allowed = allowed:narrow(-1, S + 1, self.num_experts - S) end
  local logits = self:logits(x, { expert_mask = allowed })
  call.mask, call.choice = ctx.mask, ctx.choice and ctx.choice:narrow(2, S + 1, o.top_k) - S
  local weight, index, probs = core.router_topk(logits, call)
  call.mask, call.choice = nil, nil
  if o.rescale then weight = weight * (call.norm_topk_prob and o.top_k or self.num_experts - S) end
  if S > 0 then
    local xs, all = self:input(x), o.rescale and 2 or 1
    local stage = xs:linear(self.stage_weight, self.stage_bias):softmax(-1) * all
    local shared = xs:linear(self.shared_weight, self.shared_bias):softmax(-1) * (o.rescale and S or 1)
    weight = core.cat({ shared * stage:narrow(2, 1, 1), weight * stage:narrow(2, 2, 1) }, 2)
    -- a token without a choice (masked) has no shared expert either
    local none = core.eq(index, 0)
    local always = core.arange(1, S):to "i64":reshape { 1, S }:expand { T, S }
    index = core.cat({ core.where(none:narrow(2, 1, 1), 0, always):to "i64", core.where(none, 0, index + S):to "i64" }, 2)
    probs = core.cat({ core.zeros({ T, S }, { dtype = probs.dtype, device = probs.device }), probs }, 2)
  end
  local routing = sparse.topk(index, weight, self.num_experts, ctx.mask)
  routing.probs, routing.top_k = probs, self.top_k
  if S == 0 then routing.logits = logits end
  return routing
end

TwoStage.forward = TwoStage.route

function TwoStage.traits(_, o) return { ("top_k=%d, num_shared=%d"):format(o.top_k, o.num_shared) } end

return TwoStage
