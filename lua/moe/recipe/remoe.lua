--- ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing. Wang, Chen, Zhu 2024, arXiv 2412.14711.
--
--   y = sum_e relu(W x)_e FFN_e(x);   loss + (l / L) sum over layers of (1 / T) sum_te f_e relu(W x_t)_e,  f_e = E load_e / (k T)
--   l <- l alpha^sign(mean open gates - k) after each step, one l for all layers
--
-- The default layer takes the k best experts, and its output jumps where their order changes. Here a gate opens and shuts at zero,
-- so that the whole is differentiable, and k holds on average alone: tokens and layers share the gates out among themselves.
-- Training passes through three phases: dense, growing sparse, sparse. The bias of the router, and the start and the pace of l (for
-- hundreds of steps instead of tens of thousands) are chosen here.

local moe = require "moe"

local M = {
  title = "ReMoE: ReLU routing", paper = "arXiv 2412.14711", number = 85,
  claim = "the mean number of open experts settles at k; loss no worse than softmax top-k of the same active width",
  outcome = "reproduced: 2.330 +- 0.022 against 2.383 +- 0.057 (three seeds, 400 steps); 2.0 experts a token at the end, after " ..
    "5.3 at the start",
}

--- The controller that a model's layers share: start and alpha as in moe.loss.relu_l1.
function M.control(o)
  return moe.loss.relu_l1 { top_k = o.top_k, start = o.start or 1e-4, alpha = o.alpha or 1.02 }
end

function M.layer(o)
  return moe.layer {
    d_model = o.d_model, num_experts = o.num_experts, dtype = o.dtype, router = moe.router.relu {},
    experts = moe.experts.mlp { intermediate_size = o.intermediate_size }, balance = { o.control or M.control(o) },
  }
end

function M.model(o)
  local control = M.control(o)
  return moe.model.lm {
    vocab_size = o.vocab_size, d_model = o.d_model, num_layers = o.num_layers, num_heads = o.num_heads, max_seq_len = o.max_seq_len,
    ffn = function(i) return M.layer(setmetatable({ layer = i, control = control }, { __index = o })) end,
  }
end

--- The mean number of experts of a token over the layers of the last forward.
function M.open(model)
  local assignments, tokens = 0, 0
  for _, routing in ipairs(model.routings) do
    assignments, tokens = assignments + routing.num_assignments, tokens + routing.num_tokens
  end
  return assignments / tokens
end

return M
