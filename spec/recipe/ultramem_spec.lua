require "spec.helper"
local moe = require "moe"
local ultramem = require "moe.recipe.ultramem"

describe("UltraMemV2", function()
  it("is a narrow network and a memory of one-unit networks: one slot is an FFN of width 1", function()
    moe.manual_seed(1)
    local layer = ultramem.layer {
      d_model = 8, num_experts = 4, top_k = 2, intermediate_size = 8, num_keys = 1, slots = 1, heads = 1, value_dim = 8, rank = 1,
    }
    local slot = layer.memory
    local x = moe.randn(5, 8)
    local one = moe.nn.ffn { d_model = 8, intermediate_size = 1, activation = "silu", bias = false }
    moe.no_grad(function()
      one.up_proj.weight:copy_(slot.down_embed)
      one.down_proj.weight:copy_(slot.up_embed:t())
    end)
    local _, weight = slot:choice(x)
    assert.close(layer.ffn(x) + weight * one(x), layer(x), { rtol = 1e-5, atol = 1e-6 })
  end)

  it("with the additive score finds the best of the whole grid; with a Tucker core nearly", function()
    for seed = 1, 3 do
      moe.manual_seed(seed)
      local x = moe.randn(100, 16)
      local function keys(rank)
        return moe.nn.product_keys { d_model = 16, num_keys = 32, top_k = 8, heads = 2, query_norm = "layer", rank = rank }
      end
      assert.equal(1, ultramem.recall(keys(1), x))
      for rank = 2, 4 do assert.is_true(ultramem.recall(keys(rank), x) > 0.93) end
    end
  end)

  it("has the gradients of the dense memory", function()
    local grads = {}
    for i, dense in ipairs { false, true } do
      moe.manual_seed(4)
      local layer = ultramem.layer { d_model = 8, num_experts = 4, top_k = 2, intermediate_size = 8 }
      local x, seen = moe.randn(20, 8), {}
      for _, p in ipairs { layer.memory.down_embed, layer.memory.up_embed } do
        if dense then p:register_hook(function(g) seen[#seen + 1] = g end) end
      end
      layer(x):square():sum():backward()
      assert.equal(dense, layer.memory.up_embed.grad_rows == nil)
      grads[i] = { layer.memory.down_embed.grad:totable(), layer.memory.up_embed.grad:totable(), layer.memory.keys.keys.grad:totable() }
    end
    assert.same(grads[2], grads[1])
  end)

  it("memorises more pairs with more slots at the same active compute", function()
    local share = {}
    for i, n in ipairs { 4, 8, 16, 32 } do
      moe.manual_seed(1)
      share[i] = ultramem.memorise(moe.nn.peer {
        d_model = 32, num_keys = n, top_k = 4, heads = 2, key_dim = 32, rank = 2,
      }, { steps = 60 })
    end
    for i = 2, 4 do assert.is_true(share[i] > share[i - 1] + 0.05, table.concat(share, " ")) end
    assert.is_true(share[4] > 0.8 and share[1] < 0.4, table.concat(share, " "))
  end)

  it("keeps the core near rank 1 while it learns, and the filter finds the best slots", function()
    moe.manual_seed(2)
    local layer = ultramem.layer { d_model = 16, num_experts = 8, top_k = 2, intermediate_size = 16, core_coef = 0.1 }
    local keys, x = layer.memory.keys, moe.randn(64, 16)
    moe.no_grad(function() keys.core:copy_(moe.tensor { { 1, 0.3 }, { -0.2, 0.8 } }) end)
    local before = keys:core_loss(0.1):item()
    local opt = moe.optim.adamw(layer, { lr = 0.01, weight_decay = 0 })
    local target = moe.randn(64, 16)
    for _ = 1, 60 do
      opt:zero_grad();
      (moe.loss.mse(layer(x), target) + layer:aux() * 20):backward()
      opt:step()
    end
    assert.is_true(keys:core_loss(0.1):item() < 0.1 * before)
    assert.is_true(ultramem.recall(keys, x) > 0.8)
  end)

  it("trains as the feed-forward part of a language model", function()
    local run = moe.recipe.train("ultramem", {
      text = moe.recipe.text { kind = "generated", size = 20000 }, d_model = 16, num_heads = 2, num_experts = 4, intermediate_size = 16,
      seq_len = 32, batch_size = 4, steps = 80, eval_steps = 2,
    })
    assert.is_true(run.losses[80] < run.losses[1] - 0.5)
  end)
end)
