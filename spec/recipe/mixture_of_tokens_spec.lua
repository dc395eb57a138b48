-- Mixture of Tokens: what groups of one are, that time never mixes, and training beside Switch without a balance loss.
local moe = require "moe"
require "spec.helper"
local lab = require "moe.recipe.lab"
local mot = require "moe.recipe.mixture_of_tokens"

local EXACT = { rtol = 1e-9, atol = 1e-11 }

local function layer_of(o)
  moe.manual_seed(3)
  return mot.layer(setmetatable(o, { __index = { d_model = 6, num_experts = 4, top_k = 1, intermediate_size = 5, dtype = "f64" } }))
end

describe("recipe mixture_of_tokens", function()
  it("with groups of one is the dense sum of its experts", function()
    local layer = layer_of { group_size = 1 }
    local x = moe.randn({ 3, 4, 6 }, { dtype = "f64" })
    local sum = 0
    for e = 1, 4 do
      sum = sum + layer.experts(x:reshape { 12, 6 }, moe.routing.topk(moe.full({ 12, 1 }, e, { dtype = "i64" }), nil, 4))
    end
    assert.close(sum:reshape { 3, 4, 6 }, (layer(x)), EXACT)
  end)

  it("costs what top_k experts a token cost", function()
    for _, k in ipairs { 1, 2, 4 } do
      local _, routing = layer_of { top_k = k } (moe.randn({ 4, 5, 6 }, { dtype = "f64" }))
      assert.equal(k * 4 * 5, routing.num_assignments)
    end
  end)

  it("in a whole model lets no logit see later tokens, of any example", function()
    local o = setmetatable({ dtype = "f32" }, { __index = { d_model = 8, num_experts = 4, top_k = 1, intermediate_size = 6 } })
    moe.manual_seed(4)
    local model = moe.model.lm {
      vocab_size = 9, d_model = 8, num_layers = 2, num_heads = 2, max_seq_len = 7, ffn = function() return mot.layer(o) end,
    }
    local ids = moe.randint(1, 9, { 4, 7 })
    local before = model(ids)
    for t = 2, 7 do
      local other = ids:clone()
      other:select(2, t):copy_(ids:select(2, t):remainder(9) + 1)
      local after = model(other)
      assert.same(before:narrow(2, 1, t - 1):totable(), after:narrow(2, 1, t - 1):totable())
      assert.is_true((after - before):select(2, t):abs():max():item() > 0)
    end
    -- while the examples of a group do see each other
    local other = ids:clone()
    other[1]:copy_(ids[1]:remainder(9) + 1)
    assert.is_true((model(other) - before)[2]:abs():max():item() > 0)
  end)

  it("trains as smoothly as Switch without a balance loss, evenly, and tunes into token choice", function()
    local switch = {
      title = "Switch without balance",
      layer = function(o)
        return moe.layer {
          d_model = o.d_model, num_experts = o.num_experts, router = moe.router.topk { top_k = 1 },
          experts = moe.experts.mlp { intermediate_size = o.intermediate_size },
        }
      end,
    }
    -- deviations from the running mean of the loss once it has flattened: how large, and the highest
    local function swing(losses)
      local mean, sum, highest = losses[50], 0.0, 0.0
      for i = 51, #losses do
        local d = losses[i] - mean
        mean, sum, highest = mean + 0.1 * d, sum + d * d, math.max(highest, d)
      end
      return math.sqrt(sum / (#losses - 50)), highest
    end
    local given = { steps = 200, top_k = 1, d_model = 32, intermediate_size = 64, lr = 1e-2, eval_steps = 15 }
    local text, kind = lab.text()
    local val, rival, tuned = {}, {}, {}
    for seed = 1, 2 do
      given.seed = seed
      local theirs, run = lab.train(switch, given), lab.train("mixture_of_tokens", given)
      val[seed], rival[seed] = run.val_loss, theirs.val_loss
      local size, highest = swing(run.losses)
      assert.is_true(size < 1.25 * swing(theirs.losses) and highest < 0.3)
      assert.equal(1, run.model.layers[2].ffn:stats().max_over_mean)
      assert.is_true(theirs.model.layers[2].ffn:stats().max_over_mean > 1.5)

      -- alone, an example gets the sum of all experts at full weight: not what the model has learnt
      local function alone(model)
        model:eval()
        local sum = 0.0
        moe.no_grad(function()
          local n = 0
          for batch in text.val:batches { batch_size = 1, seq_len = 64 } do
            n = n + 1
            sum = sum + moe.loss.cross_entropy(model(batch.x, {}), batch.y):item() / 20
            if n == 20 then break end
          end
        end)
        model:train()
        return sum
      end
      local unmixed = alone(run.model)
      mot.transition(run.model, 1)
      local brief = { steps = 80, lr = 5e-3, top_k = 1, seed = seed, eval_steps = 15 }
      tuned[seed] = lab.train("topk", brief, run.model).val_loss
      assert.is_true(unmixed > run.val_loss + 0.1)
    end
    if kind == "real" then
      assert.is_true(lab.mean(val) < lab.mean(rival))
      assert.is_true(lab.mean(tuned) < 1.03 * lab.mean(val))
    else -- where a token says much about the next, the average of eight learns later: better than attention alone, no more
      local alone = { title = "no network", layer = function(o) return moe.nn.ffn { d_model = o.d_model, intermediate_size = 1 } end }
      given.seed = 1
      assert.is_true(val[1] < lab.train(alone, given).val_loss)
      assert.is_true(lab.mean(tuned) < lab.mean(val))
    end
  end)
end)
