-- As many experts as hold a share of the probability.

local nn = require "moe.nn"
local base = require "moe.router.gates"

--- The smallest set of experts whose probabilities reach `p`, for each token: P = softmax(W x), sorted; S = the first n
-- with P_1 + .. + P_n >= p; gates g_e = P_e for e in S, else 0. p -> 0 is the best expert alone, p = 1 all of them.
-- Options: p (0.4; a number, or a function of the step; router.p can be set later), at least `min_k` (1), at most
-- `max_k` experts, `norm_topk_prob` (the gates of S sum to 1; default false, as published); bias, noise, jitter, init as
-- in topk. The entropy loss of the paper, which keeps the sets small, is moe.loss.entropy. routing: gates [T, E],
-- any number of experts a token. Huang et al. 2024, Harder Tasks Need More Experts (arXiv 2403.07652, eq. 3-5).
local TopP = nn.module("top_p", base.Gates)

local ROWS <const> = base.rows({
  p = { "number|function", 0.4 }, min_k = { "integer", 1 }, max_k = { "integer" }, norm_topk_prob = { "boolean", false },
}, true)

TopP.settable = { p = { "number|function" }, min_k = { "integer" }, max_k = { "integer" } }

function TopP:check(o)
  self:check_counts(o)
  if type(o.p) == "number" and not (o.p >= 0 and o.p <= 1) then self:fail("option 'p' must be in [0, 1], got %g", o.p) end
end

function TopP:changed(o) self:keep_numbers(o, "p") end

function TopP:init(given)
  local bound = self:setup(given, ROWS)
  self:check(self._options)
  if not bound then return end
  self:changed(bound)
  self:projection ""
end

function TopP:route(x, ctx)
  ctx = ctx or {}
  local o = self._options
  local logits, clean, std = self:open(x, ctx)
  local probs = logits:softmax(-1)
  local gates = self:choose(probs, ctx, { mass = self:scheduled("p", ctx), min_k = o.min_k, max_k = o.max_k })
  if o.norm_topk_prob then gates = self.normalised(gates) end
  return self:routing(gates, ctx, probs, logits, clean, std)
end

function TopP.traits(_, o) return { type(o.p) == "function" and "p=function" or ("p=%g"):format(o.p) } end

return TopP
