-- A layer's router chooses for the layer after it.

local nn = require "moe.nn"
local TopK = require "moe.router.topk"

--- topk whose logits come from the layer before: layer l computes next_logits = next_weight x_l, and layer l + 1 routes its
-- own tokens by them, so that its experts are known one layer early (and can be fetched meanwhile). They are found on the
-- routing of the layer before (ctx.previous_routing, as moe.model.lm sets it, or ctx.routing, which a moe.layer leaves in a
-- ctx that layers share), as `next_logits`. Where there are none, or of other sizes, the router uses its own, weight x: so
-- does the first layer. `own` = false saves those weights where they are never used (then a missing choice is an error),
-- `ahead` = false the others, in a last layer. Options of topk but the noise. The layer before must be part of the same
-- recorded forward: a checkpoint around a single layer is not supported. Hwang et al. 2023, Pre-gated MoE (arXiv 2308.12066,
-- section 4.1).
local LookAhead = nn.module("lookahead", TopK)

LookAhead.rows = { own = { "boolean", true }, ahead = { "boolean", true } }
for k, v in pairs(TopK.rows) do LookAhead.rows[k] = v end
for _, k in ipairs { "noise", "noise_in_eval" } do LookAhead.rows[k] = nil end

function LookAhead:check(o, k)
  TopK.check(self, o, k)
  if not o.own and not o.ahead then self:fail "with own = false and ahead = false there is nothing to learn" end
end

function LookAhead:projection()
  local o = self._options
  if o.own then TopK.projection(self, "") end
  if o.ahead then TopK.projection(self, "next_") end
end

function LookAhead:logits(x, ctx)
  self:ready()
  local before = ctx.previous_routing or ctx.routing
  local given = before and before.next_logits
  if given and given:size(1) == x:size(1) and given:size(2) == self.num_experts then return self:masked(given, ctx) end
  if not self.weight then
    self:fail(given and "the layer before chose for [%d, %d] tokens and experts, wanted [%d, %d]"
      or "no layer before this one has chosen for it (ctx.previous_routing.next_logits)", given and given:size(1), given and given:size(2),
      x:size(1), self.num_experts)
  end
  return TopK.logits(self, x, ctx)
end

function LookAhead:route(x, ctx)
  local routing = TopK.route(self, x, ctx)
  if self.next_weight then routing.next_logits = self:input(x):linear(self.next_weight, self.next_bias) end
  return routing
end

LookAhead.forward = LookAhead.route

return LookAhead
