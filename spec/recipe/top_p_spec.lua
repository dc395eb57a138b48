local moe = require "moe"
local top_p = moe.recipe.top_p

-- Inputs of clusters, each with a map of its own: x = the cluster's direction + noise; an easy token is of one cluster, a hard one
-- of three at once, and its target is the mean of their maps.
local function task(d, clusters)
  local direction, map = moe.eye(d):narrow(1, 1, clusters) * 3, moe.randn(clusters, d, d)
  return function(n, hard)
    local member = moe.zeros(n, clusters)
    for _ = 1, hard and 3 or 1 do member = member + moe.one_hot(moe.randint(1, clusters, { n }), clusters):to "f32" end
    member = member:gt(0):to "f32"
    local share = member / member:sum(-1, true)
    local z = moe.randn(n, d) * 0.3
    return member:matmul(direction) + z, moe.einsum("nc,cij,nj->ni", share, map, z * 3)
  end
end

describe("recipe top_p", function()
  it("gives hard tokens more experts than easy ones", function()
    moe.manual_seed(1)
    local draw = task(16, 6)
    local layer = top_p.layer { d_model = 16, num_experts = 6, intermediate_size = 24, p = 0.7 }
    local optimizer = moe.optim.adamw(layer, { lr = 1e-2 })
    for _ = 1, 200 do
      local xe, ye = draw(48, false)
      local xh, yh = draw(48, true)
      local y, routing = layer(moe.cat({ xe, xh }, 1))
      local loss = moe.loss.mse(y, moe.cat({ ye, yh }, 1)) + routing:aux()
      optimizer:zero_grad()
      loss:backward()
      optimizer:step()
    end
    layer:eval()
    local mean = {}
    for i, hard in ipairs { false, true } do
      local x = draw(500, hard)
      mean[i] = top_p.experts_of(select(2, layer(x))):to("f32"):mean():item()
    end
    assert.is_true(mean[1] < 1.1, "easy: " .. mean[1])
    assert.is_true(mean[2] > mean[1] + 0.2, ("hard: %.2f, easy: %.2f"):format(mean[2], mean[1]))
  end)

  it("has fewer than two experts a token, at a loss no higher than top-2's", function()
    local o = { steps = 250, seq_len = 32, eval_steps = 30, lr = 4e-3 }
    local assignments, tokens = 0, 0
    o.log = function(step, _, model)
      for _, routing in ipairs(step > 200 and model.routings or {}) do
        assignments, tokens = assignments + routing.num_assignments, tokens + routing.num_tokens
      end
    end
    local run = moe.recipe.train("top_p", o)
    o.log = nil
    local base = moe.recipe.train("topk", o)
    assert.is_true(assignments / tokens < 2)
    assert.is_true(run.val_loss < base.val_loss, ("%.4f against %.4f"):format(run.val_loss, base.val_loss))
  end)
end)
