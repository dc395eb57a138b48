--- Union of Experts: Adapting Hierarchical Routing to Equivalently Decomposed Transformer (Yang, Lian, Li 2025,
-- arXiv 2503.02495).
--
--   feed-forward:  y = sum_e W2[:, slice e] gelu(W1[slice e, :] x)       one network cut as for tensor parallelism
--   attention:     y = sum_h W_o[:, head h] softmax(Q_h K_h^T) V_h       a head is an expert, among the tokens that chose it
--   routing:       tokens like their top-k experts by softmax(x W_r), experts take their share of the patches that like them
--
-- Experts are parts of one network, so that all of them on all patches are the dense model, and no weight scales them: the gate
-- has its gradient, but the value 1. The default layer's experts are networks of their own, weighed, and its attention is dense.
-- In the language model patches compete across the batch, not within the sequence, so that no choice looks ahead.

local moe = require "moe"

local M = {
  title = "Union of Experts", paper = "arXiv 2503.02495", number = 11,
  claim = "all experts and patches on = the dense model; lower loss than a top-k mixture at fewer operations",
  outcome = "identities exact; at 76 % of the operations 2.534 against 2.545 (150 steps, three seeds), but 2.37 against 2.25 " ..
    "after 500 steps: not reproduced for longer training; on generated sentences 1.46 against 1.17 after 150",
}

local function router(top_k, share, o)
  return moe.router.patches { top_k = top_k, share = share, patch_size = o.patch_size or 1, causal = true }
end

--- The feed-forward part: one network of o.num_experts slices of o.intermediate_size, of which a token likes o.liked (twice
-- o.top_k), each taking o.share of the patches (top_k / num_experts: then the work is that of top_k experts a token);
-- o.patch_size (1).
function M.layer(o)
  local liked = o.liked or math.min(2 * o.top_k, o.num_experts)
  return moe.layer {
    d_model = o.d_model, num_experts = o.num_experts, dtype = o.dtype, router = router(liked, o.share or o.top_k / o.num_experts, o),
    experts = moe.experts.mlp { intermediate_size = o.intermediate_size, init = o.init }, balance = { moe.loss.switch(0.01) },
  }
end

--- The attention part: o.num_heads heads, of which a token likes o.liked_heads (all), each taking o.head_share of the patches
-- (0.6).
function M.mixer(o)
  return moe.mixer.mixture_of_heads {
    d_model = o.d_model, num_heads = o.num_heads, dtype = o.dtype, keys = "chosen", init = o.head_init or "normal(0.02)",
    router = router(o.liked_heads or o.num_heads, o.head_share or 0.6, o), balance = { moe.loss.switch(0.01) },
  }
end

--- The language model of both.
function M.model(o)
  return moe.model.lm {
    vocab_size = o.vocab_size, d_model = o.d_model, num_layers = o.num_layers, max_seq_len = o.max_seq_len,
    mixer = function() return M.mixer(o) end, ffn = function() return M.layer(o) end,
  }
end

--- A layer's weights from a dense network's up [I, d] and down [d, I] projections, cut into its experts.
function M.decompose(layer, up, down)
  local bank = layer.experts
  local E, I, d = table.unpack(bank.up_proj.shape)
  moe.no_grad(function()
    bank.up_proj:copy_(up:reshape { E, I, d })
    bank.down_proj:copy_(down:reshape { d, E, I }:transpose(1, 2))
  end)
  return layer
end

--- Multiplications and additions of a token in all layers, forward, on average, as the layers counted assignments since they were
-- made: projections by assignments, scores by the keys that a query sees in a sequence of `time`.
function M.operations(model, time)
  local sum = 0
  local d = model.d_model
  for _, block in ipairs(model.layers) do
    for _, part in ipairs { block.mixer, block.ffn } do
      local s = type(part.stats) == "function" and part:stats()
      local share = s and s.assignments / math.max(1, s.tokens) / part.num_experts -- of the experts, for a token
      if part == block.ffn then
        local width = s and share * part.num_experts * part.experts.intermediate_size or part:num_parameters() / (2 * d)
        sum = sum + 4 * d * width + (s and 2 * d * part.num_experts or 0)
      elseif s then -- queries, keys, values and output; scores among the share that chose the head
        sum = sum + 8 * d * d * share + 4 * d * time / 2 * share * share + 2 * d * part.num_experts
      else
        sum = sum + 8 * d * d + 4 * d * time / 2
      end
    end
  end
  return sum
end

return M
