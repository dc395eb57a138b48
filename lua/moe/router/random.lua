-- Routers that learn nothing: a fixed random projection, and experts drawn by lot.

local core = require "moe.core"
local nn = require "moe.nn"
local base = require "moe.router.base"
local routings = require "moe.routing"

--- Random routing, of two kinds.
-- A fixed random projection (default): the top_k best of softmax(weight x), `weight` [E, d_model] a buffer that is
-- never trained; top_k may be a function of the step (ctx.step), the published way being a linear growth from 1 or 2 to all.
-- Chen et al. 2023, SMoE-Dropout (arXiv 2303.01610), section 3.
-- Stochastic experts: with `draw` = "batch", each forward draws top_k experts and all tokens go to them; "token" draws for
-- each token; without replacement, from moe.manual_seed's generator, each with the weight 1 / top_k. ctx.draws = n cuts
-- the tokens into n equal runs which get different experts, as if n forwards had drawn without replacement: a batch
-- given n times over is that many passes in one. Zuo et al. 2021, THOR (arXiv 2110.04260), section 3.
-- Options: top_k (a number or a function, default 1), draw, inference: what evaluation does, "random" (as in training, the
-- last k that training had) or "all" (all experts; the drawn ones in equal parts); norm_topk_prob (default: for k > 1) and
-- init of the projection. ctx.choice forces the experts.
local Random = nn.module("random", base.Router)

local ROWS <const> = base.rows {
  top_k = { "integer|function", 1 }, draw = { { "batch", "token" } }, inference = { { "random", "all" }, "random" },
  norm_topk_prob = { "boolean" }, init = { "string|number|function" },
}

function Random:init(given)
  local bound = self:setup(given, ROWS)
  local o = self._options
  local k, E = o.top_k, o.num_experts
  if type(k) == "number" and k < 1 then self:fail("option 'top_k' must be at least 1, got %d", k) end
  if type(k) == "number" and E and k > E then self:fail("top_k is %d, but there are %d experts", k, E) end
  if not bound then return end
  if type(k) == "number" then self.top_k = k end
  if not o.draw then
    self:projection ""
    self:buffer("weight", self.weight:detach())
  end
end

-- The number of experts of a token now.
local function current_k(self, ctx)
  if not self.training and self._options.inference == "all" then return self.num_experts end
  self.top_k = math.max(1, math.min(self.num_experts, math.floor(self:scheduled("top_k", ctx) + 0.5)))
  return self.top_k
end

-- [T, k], drawn without replacement: the order of random numbers is a random order.
local function draw(self, tokens, k, ctx)
  local E, runs = self.num_experts, ctx.draws or 1
  if k == E and runs == 1 then return (core.arange(1, E):to "i64"):reshape { 1, E }:expand { tokens, E } end
  if runs < 1 or runs * k > E then self:fail("ctx.draws = %d runs of %d experts each, but there are %d", runs, k, E) end
  if tokens % runs ~= 0 then self:fail("%d tokens cannot be cut into ctx.draws = %d equal runs", tokens, runs) end
  local rows = self._options.draw == "batch" and 1 or tokens // runs
  local _, order = core.rand(rows, E):topk(runs * k)
  local of_run = order:reshape { rows, runs, k }:transpose(1, 2) -- [runs, rows, k]
  return of_run:expand { runs, tokens // runs, k }:reshape { tokens, k }
end

function Random:route(x, ctx)
  self:ready()
  ctx = ctx or {}
  local o, k = self._options, current_k(self, ctx)
  if o.draw then
    local index = ctx.choice or draw(self, x:size(1), k, ctx)
    local weight = core.full(index.shape, 1 / index:size(2), { dtype = x.dtype == "f64" and "f64" or "f32", device = x.device })
    return routings.topk(index, weight, self.num_experts, ctx.mask and { mask = ctx.mask })
  end
  local norm = o.norm_topk_prob
  if norm == nil then norm = k > 1 end
  local logits = self:input(x):linear(self.weight)
  local weight, index, probs = core.router_topk(logits, {
    top_k = k, norm_topk_prob = norm and k > 1, mask = ctx.mask, choice = ctx.choice,
  })
  local routing = routings.topk(index, weight, self.num_experts, ctx.mask and { mask = ctx.mask })
  routing.logits, routing.probs, routing.top_k = logits, probs, k
  return routing
end

function Random.traits(_, o)
  return { ("top_k=%s"):format(type(o.top_k) == "function" and "function" or o.top_k), o.draw and "draw=" .. o.draw or nil }
end

return Random
