-- As many experts as score above a bound, or as many as are said for each token.

local core = require "moe.core"
local nn = require "moe.nn"
local base = require "moe.router.gates"

--- The experts whose score (`score`: "softmax" or "sigmoid" of W x) lies above a bound, at least `min_k` (1) and at most
-- `max_k` of them, the best first. The bound is one of: `threshold` (default 1 / E, an even share), a number; `quantile`
-- q in [0, 1): the score that a share q of scores lies at or below, the order statistic 1 + floor((n - 1) q) of the n =
-- E scores of the token, or of the n = T E scores of the batch (`over` = "batch"), then a confident token has fewer
-- experts than an undecided one; or instead of a bound `top_k`, how many experts a token takes: a number, or a function
-- (x, ctx, scores) -> a number or a tensor [T]. threshold and quantile may be functions of the step, and fields of those
-- names can be set later. `norm_topk_prob` (default true): the gates of a token sum to 1. A token's own
-- quantile q passes ceil((E - 1) (1 - q)) experts, fewer where scores are equal: q = (E - k - 1/2) / (E - 1) is top-k.
-- bias, noise, jitter, init as in topk. Gülmez 2026, DynaMoE (arXiv 2603.01697): the token's quantile, gates normalised.
local Threshold = nn.module("threshold", base.Gates)

local ROWS <const> = base.rows({
  score = { { "softmax", "sigmoid" }, "softmax" },
  threshold = { "number|function" }, quantile = { "number|function" }, over = { { "token", "batch" }, "token" },
  top_k = { "integer|function" }, min_k = { "integer", 1 }, max_k = { "integer" }, norm_topk_prob = { "boolean", true },
}, true)

Threshold.settable = {
  threshold = { "number|function" }, quantile = { "number|function" }, min_k = { "integer" }, max_k = { "integer" },
}

function Threshold:check(o)
  self:check_counts(o)
  local given = {}
  for _, key in ipairs { "threshold", "quantile", "top_k" } do
    if o[key] ~= nil then given[#given + 1] = key end
  end
  if #given > 1 then self:fail("options '%s' and '%s' exclude each other", given[1], given[2]) end
  if type(o.quantile) == "number" and not (o.quantile >= 0 and o.quantile < 1) then
    self:fail("option 'quantile' must be in [0, 1), got %g", o.quantile)
  end
  if type(o.top_k) == "number" and o.top_k < 1 then self:fail("option 'top_k' must be at least 1, got %d", o.top_k) end
end

function Threshold:changed(o) self:keep_numbers(o, "threshold", "quantile") end

function Threshold:init(given)
  local bound = self:setup(given, ROWS)
  self:check(self._options)
  if not bound then return end
  if not (bound.threshold or bound.quantile or bound.top_k) then bound.threshold = 1 / self.num_experts end
  self:changed(bound)
  self:projection ""
end

-- The q-quantile of each row of scores [rows, n], [rows].
local function quantile(scores, q)
  local n = scores:size(2)
  local below = math.floor((n - 1) * q + 1e-9) -- so many lie under it
  local largest = n - below <= below + 1
  local values = scores:topk(largest and n - below or below + 1, -1, largest)
  return values:narrow(2, values:size(2), 1):reshape { -1 }
end

-- The limits of moe.router_gates.
local function limits(self, x, ctx, scores)
  local o = self._options
  local tokens = scores:size(1)
  if o.top_k then
    local k = o.top_k
    if type(k) == "function" then k = k(x, ctx, scores) end
    if type(k) ~= "number" and not core.is_tensor(k) then
      self:fail("option 'top_k' must give a number or a tensor [%d], got a %s", tokens, type(k))
    end
    return { min_k = k, max_k = k }
  end
  local bound = self:scheduled("threshold", ctx)
  if o.quantile then
    local q, plain = self:scheduled("quantile", ctx), scores:detach()
    if not (q >= 0 and q < 1) then self:fail("quantile must be in [0, 1), got %g", q) end
    if tokens == 0 then
      bound = 0
    elseif o.over == "token" then
      bound = quantile(plain, q)
    else
      if ctx.mask then plain = plain:masked_select(ctx.mask:reshape { -1, 1 }) end
      bound = plain:numel() > 0 and quantile(plain:reshape { 1, -1 }, q):item() or 0
    end
  end
  return { threshold = bound, min_k = o.min_k, max_k = o.max_k }
end

function Threshold:route(x, ctx)
  ctx = ctx or {}
  local o = self._options
  local logits, clean, std = self:open(x, ctx)
  local soft = o.score == "softmax"
  local scores = soft and logits:softmax(-1) or logits:sigmoid()
  local gates = self:choose(scores, ctx, not ctx.choice and limits(self, x, ctx, scores))
  if o.norm_topk_prob then gates = self.normalised(gates) end
  return self:routing(gates, ctx, soft and scores or self.normalised(scores), logits, clean, std)
end

function Threshold:traits(o)
  for _, key in ipairs { "quantile", "top_k" } do
    if o[key] then return { ("%s=%s"):format(key, type(o[key]) == "function" and "function" or o[key]), "score=" .. o.score } end
  end
  local bound = self.threshold or o.threshold
  return { type(bound) == "number" and ("threshold=%g"):format(bound) or "threshold=function", "score=" .. o.score }
end

return Threshold
