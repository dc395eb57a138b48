--- DynaMoE: Dynamic Token-Level Expert Activation with Layer-Wise Adaptive Capacity for Mixture-of-Experts Neural Networks.
-- Gülmez 2026, arXiv 2603.01697.
--
--   S = { e : P_e > quantile_q }, P = softmax(W x), at least 1 and at most M_l experts;   y = sum over S of P_e / P(S) FFN_e(x)
--   E_l = mean (1 + spread s(l)): the number of experts of layer l by one of six patterns over the depth, one total for all
--
-- The default layer takes k of E experts for every token in every layer. A quantile of the token's own scores passes the same number
-- for all tokens (and is then top-k exactly), so the number varies here by the quantile of the batch: a token that is sure takes few.
-- q = 1 - k / E; the maximum M_l and the sizes are chosen here. The paper's finding on images: "descending" (most experts in
-- the lowest layers) is best.

local moe = require "moe"

local M = {
  title = "DynaMoE: experts by threshold, capacity by depth", paper = "arXiv 2603.01697", number = 150,
  claim = "of six patterns of capacity over the depth and static top-k, all of one total, descending classifies digits best",
  outcome = "reproduced on digits in strong noise: descending 81.4 %, the other patterns 79.8 to 80.4 %, static top-2 79.1 % (five " ..
    "seeds); in weak noise 94.6 %, behind wave's 94.7 %; the gradient's variance is not lower than with top-2 (10.0 against 8.9)",
  patterns = { "uniform", "descending", "ascending", "pyramid_up", "pyramid_down", "wave" },
}

--- Options besides those of a recipe: pattern ("descending"), static (true: top-k in place of the threshold).
function M.layer(o)
  local experts = moe.schedule.capacity { pattern = o.pattern or "descending", mean = o.num_experts }(o.layer, o.num_layers)
  local k = math.min(o.top_k, experts)
  local router = o.static and moe.router.topk { top_k = k }
    or moe.router.threshold { quantile = math.max(0, 1 - k / experts), over = "batch", max_k = math.min(experts, 2 * k) }
  return moe.layer {
    d_model = o.d_model, num_experts = experts, router = router,
    experts = moe.experts.mlp { intermediate_size = o.intermediate_size }, balance = { moe.loss.switch(o.balance or 0.01) },
  }
end

local Classifier = moe.nn.module "dynamoe_classifier"

function Classifier:init(o)
  self.embed, self.layers, self.norms = moe.nn.linear(o.inputs, o.d_model), moe.nn.list(), moe.nn.list()
  for i = 1, o.num_layers do
    self.norms:append(moe.nn.layernorm(o.d_model))
    self.layers:append(M.layer(setmetatable({ layer = i }, { __index = o })))
  end
  self.head = moe.nn.linear(o.d_model, o.classes)
end

-- x [n, inputs] -> scores [n, classes]
function Classifier:forward(x, ctx)
  x = self.embed(x)
  for i, layer in ipairs(self.layers) do x = x + layer(self.norms[i](x), ctx) end
  return self.head(x)
end

--- A classifier of vectors: residual sparse layers between two projections. Options: inputs, classes, and those of layer.
M.classifier = Classifier

--- How many tokens have 1, 2, .. experts, a list.
function M.histogram(routing)
  return moe.bincount(routing.gate:ne(0):to("i64"):sum(-1):clamp(1), routing.num_experts):totable()
end

--- The variance of a model's gradient over draws of a batch, relative to the squared mean gradient: draw() -> x, y.
function M.gradient_variance(model, draw, n)
  local sum, square, parameters = 0, 0, model:parameters()
  for _ = 1, n do
    local x, y = draw()
    local ctx = {}
    local grads, loss = {}, moe.loss.cross_entropy(model(x, ctx), y) + moe.loss.aux(ctx)
    model:zero_grad()
    loss:backward()
    for _, p in ipairs(parameters) do grads[#grads + 1] = (p.grad or moe.zeros_like(p:detach())):reshape { -1 } end
    local g = moe.cat(grads, 1)
    sum, square = sum + g, square + g * g
  end
  model:zero_grad()
  local mean = sum / n
  return ((square / n - mean * mean):sum() / (mean * mean):sum()):item()
end

return M
