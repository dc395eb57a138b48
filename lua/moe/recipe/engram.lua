--- Conditional Memory via Scalable Lookup: A New Axis of Sparsity for Large Language Models (Cheng et al. 2026, arXiv 2601.07372).
--
--   h <- h + Y(h, ids),   Y = u + silu(conv(rms(u))),   u = sigmoid(rms(h) . rms(W_K e) / sqrt(d)) W_V e,
--   e = rows of tables at hashes of the 2- and 3-grams that end here
--
-- Knowledge of fixed phrases is looked up by the tokens themselves instead of being computed: a hashed n-gram memory
-- (moe.nn.ngram_memory) adds to the residual stream before some early blocks. Of the parameters that are not active for a token,
-- `share` go from experts to the tables, so that model and cost a token stay the same. The default model has share 0.

local moe = require "moe"
local nn = moe.nn

local M = {
  title = "Engram", paper = "arXiv 2601.07372", number = 52,
  claim = "at equal parameters a hashed n-gram memory beside fewer experts beats experts alone; neither share 0 nor 1 is best",
  outcome = "reproduced: 2.01 with half the inactive parameters in the memory against 2.60 with experts alone (three seeds); not "
    .. "reproduced: an optimum between the ends (shares 0.25 / 0.5 / 0.75 / 1: 2.05 / 2.01 / 2.00 / 1.99 at 400 steps, "
    .. "the same order at 2000)",
}

-- A block that reads the memory before it works.
local Block = nn.module "engram_block"

function Block:init(block, memory)
  self.memory = memory
  self.block = block
end

function Block:forward(x, state, ctx) return self.block(x + self.memory(x, ctx), state, ctx) end

--- How the parameters are shared out: { num_experts, rows (of the tables of one memory) }. o as in M.model.
function M.split(o)
  local share, layers = o.share or 0.25, o.memory_layers or { math.min(2, o.num_layers) }
  local free = o.num_experts - o.top_k -- experts of a layer that do not work for a token
  local kept = math.floor((1 - share) * free + 0.5)
  local moved = (free - kept) * o.num_layers * 2 * o.d_model * o.intermediate_size
  return { num_experts = o.top_k + kept, rows = moved // (#layers * (o.embed_dim or 8)), layers = layers }
end

--- The language model: o.num_experts experts in each layer would be those without a memory. Options beyond those of every recipe: share
-- (0.25), memory_layers ({ 2 }), heads (2) of each order, embed_dim (8), max_ngram (3), canonical.
function M.model(o)
  local s = M.split(o)
  local model = moe.model.lm {
    vocab_size = o.vocab_size, d_model = o.d_model, num_layers = o.num_layers, num_heads = o.num_heads, max_seq_len = o.max_seq_len,
    ffn = "moe",
    moe = {
      num_experts = s.num_experts, top_k = o.top_k, balance = { moe.loss.switch(0.01) },
      experts = moe.experts.mlp { intermediate_size = o.intermediate_size },
    },
  }
  local hashes = ((o.max_ngram or 3) - 1) * (o.heads or 2)
  if s.rows >= hashes then
    for _, i in ipairs(s.layers) do
      model.layers[i] = Block(model.layers[i], nn.ngram_memory {
        d_model = o.d_model, vocab_size = o.vocab_size, table_size = s.rows // hashes, heads = o.heads or 2, max_ngram = o.max_ngram,
        embed_dim = o.embed_dim or 8, canonical = o.canonical, seed = i,
      })
    end
    model._sparse = true -- its blocks want the token ids
  end
  return model
end

--- Reads all memories of a model for ids, before the model runs: ctx.ngram_rows for model(ids, ctx).
function M.prefetch(model, ids)
  local rows = {}
  for _, block in ipairs(model.layers) do
    if block.memory then rows[block.memory] = block.memory:fetch(ids) end
  end
  return rows
end

return M
