--- Sigma-MoE-Tiny Technical Report (Hu et al. 2025, arXiv 2512.16248).
--
--   y = g_i FFN_i(x), i the best of many small experts;    k(step, layer) = first[layer] early, 1 from `share` of the steps on
--
-- One of up to 96 fine experts a token. So sparse, the balance loss E sum f_i P_i breaks down in the lowest layers: it has its
-- least value, 1, at even probabilities P whatever the load f is. Progressive sparsification: the lowest layers begin with more
-- experts a token and come down to one late in training; the weights stay. Load counted over the global batch; grouped
-- queries with normed queries and keys, RMSNorm, SwiGLU. The default layer has two experts a token throughout. The start
-- and the share of the switch are chosen here.

local moe = require "moe"

local M = {
  title = "Sigma-MoE-Tiny", paper = "arXiv 2512.16248", number = 148,
  claim = "progressive k evens the load of the lowest layer better than k = 1 from the start, at no worse loss",
  outcome = "loss reproduced: 2.51 against 2.60 (three seeds, 200 steps); lowest layer: busiest expert 4.1 against "
    .. "5.3 times the mean, but idle experts in both, and no gain after 500 steps; a loss near 1 at a skewed load: reproduced",
}

--- The experts of a token at a step of `steps`, in a layer: 4 in the two lowest layers up to `share` of the training, then 1.
function M.experts_of(step, steps, layer, first, share)
  return moe.schedule.sparsify { from = first or { 4, 4 }, to = 1, steps = math.ceil((share or 0.8) * steps) }(step, layer)
end

function M.layer(o)
  return moe.layer {
    d_model = o.d_model, num_experts = o.num_experts, dtype = o.dtype,
    router = moe.router.topk { top_k = 1, norm_topk_prob = false }, -- one scale of the weights for every k
    experts = moe.experts.swiglu { intermediate_size = o.intermediate_size },
    balance = { moe.loss.switch(o.balance or 0.01, { by = "global" }) },
  }
end

function M.model(o)
  return moe.model.lm {
    vocab_size = o.vocab_size, d_model = o.d_model, num_layers = o.num_layers, num_heads = o.num_heads,
    max_seq_len = o.max_seq_len,
    num_kv_heads = math.max(1, o.num_heads // 4), qk_norm = true, positional = "rope", norm = "rmsnorm",
    ffn = function(i) return M.layer(setmetatable({ layer = i }, { __index = o })) end,
  }
end

--- Sets the experts of a token in every layer for this step.
function M.step(model, step, steps)
  for i, block in ipairs(model.layers) do block.ffn.router:set { top_k = M.experts_of(step, steps, i) } end
end

return M
