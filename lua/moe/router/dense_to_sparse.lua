-- A gate that starts dense and turns sparse as its temperature falls.

local core = require "moe.core"
local nn = require "moe.nn"
local base = require "moe.router.gates"

--- Gumbel softmax with a temperature; experts under a bound are dropped: P = softmax((W x + n) / t), n ~ Gumbel(0, 1) in
-- training (without it elsewhere), g_e = P_e where P_e > c, else 0; at least `min_k` (1) experts. At a high temperature
-- all experts work, at a low one hardly more than the best. Options: `temperature` (1) and `threshold` c (default 0.2 /
-- E), numbers or functions of the step, both fields that can be set later: moe.schedule.linear { max = 2, min = 0.3,
-- steps = n } anneals; `gumbel` (default true; false: without the noise), `max_k`, `norm_topk_prob` (default false);
-- bias, noise, jitter, init as in topk. Nie et al. 2021, EvoMoE (arXiv 2112.14397): the gate DTS; its threshold's value
-- is ours to choose.
local DenseToSparse = nn.module("dense_to_sparse", base.Gates)

local ROWS <const> = base.rows({
  temperature = { "number|function", 1 }, threshold = { "number|function" }, gumbel = { "boolean", true },
  min_k = { "integer", 1 }, max_k = { "integer" }, norm_topk_prob = { "boolean", false },
}, true)

DenseToSparse.settable = {
  temperature = { "number|function" }, threshold = { "number|function" }, min_k = { "integer" }, max_k = { "integer" },
  norm_topk_prob = { "boolean" },
}

function DenseToSparse:check(o)
  self:check_counts(o)
  if type(o.temperature) == "number" and (o.temperature <= 0 or o.temperature ~= o.temperature) then
    self:fail("option 'temperature' must be above 0, got %g", o.temperature)
  end
end

function DenseToSparse:changed(o) self:keep_numbers(o, "temperature", "threshold") end

function DenseToSparse:init(given)
  local bound = self:setup(given, ROWS)
  self:check(self._options)
  if not bound then return end
  bound.threshold = bound.threshold or 0.2 / self.num_experts
  self:changed(bound)
  self:projection ""
end

function DenseToSparse:route(x, ctx)
  ctx = ctx or {}
  local o = self._options
  local logits, clean, std = self:open(x, ctx)
  local noisy, t = logits, self:scheduled("temperature", ctx)
  if t <= 0 or t ~= t then self:fail("temperature must be above 0, got %g", t) end
  if o.gumbel and self.training then
    local u = core.rand_like(logits:detach())
    noisy = logits - (-(u + 1e-20):log() + 1e-20):log()
  end
  local probs = (noisy / t):softmax(-1)
  local gates = self:choose(probs, ctx, { threshold = self:scheduled("threshold", ctx), min_k = o.min_k, max_k = o.max_k })
  if o.norm_topk_prob then gates = self.normalised(gates) end
  return self:routing(gates, ctx, probs, logits, clean, std)
end

function DenseToSparse:traits(o)
  local t = self.temperature or o.temperature
  return { type(t) == "number" and ("temperature=%g"):format(t) or "temperature=function" }
end

return DenseToSparse
