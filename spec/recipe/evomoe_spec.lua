local moe = require "moe"
local evomoe = moe.recipe.evomoe

-- Experts of a token in the last forward.
local function active(model)
  local assignments, tokens = 0, 0
  for _, routing in ipairs(model.routings) do
    assignments, tokens = assignments + routing.num_assignments, tokens + routing.num_tokens
  end
  return assignments / tokens
end

local switch = {
  title = "Switch from scratch",
  layer = function(o)
    return moe.layer {
      d_model = o.d_model, num_experts = o.num_experts, router = moe.router.topk { top_k = 1 },
      experts = moe.experts.mlp { intermediate_size = o.intermediate_size }, balance = { moe.loss.switch(0.01) },
    }
  end,
}

describe("recipe evomoe", function()
  it("is the one expert before the spawning, and after it without masks", function()
    moe.manual_seed(1)
    local layer = evomoe.layer { d_model = 6, num_experts = 4, intermediate_size = 5 }
    local bank, x = layer.experts, moe.randn(9, 6)
    local one = moe.routing.topk(moe.ones({ 9, 1 }, { dtype = "i64" }), nil, 4)
    local alone = bank(x, one):detach()
    assert.close(alone, layer(x), { rtol = 1e-5, atol = 1e-7 })
    evomoe.spawn(layer, { mask = 0, noise = 0 })
    layer.router:set { threshold = 0 } -- no expert dropped
    local y, routing = layer(x)
    assert.equal(36, routing.num_assignments)
    assert.close(alone, y, { rtol = 1e-4, atol = 1e-6 })
  end)

  it("anneals from phase 2 on", function()
    local o = evomoe.defaults
    assert.equal(o.from, evomoe.temperature(1, 100))
    assert.equal(o.from, evomoe.temperature(25, 100))
    assert.close((o.from + o.to) / 2, evomoe.temperature(25 + 75 / 2, 100))
    assert.close(o.to, evomoe.temperature(100, 100))
  end)

  it("goes from one expert over all of them to about one, and ends below Switch from scratch", function()
    local o = { steps = 200, seq_len = 32, eval_steps = 30, lr = 4e-3 }
    local at = {}
    o.log = function(step, _, model) at[step] = active(model) end
    local run = moe.recipe.train("evomoe", o)
    assert.equal(1, at[50])
    assert.is_true(at[51] > 7.5)
    assert.is_true(at[75] > at[125] and at[125] > at[175] and at[175] > at[200])
    assert.is_true(at[200] < 1.6, "at the end: " .. at[200])
    run.model:eval()
    run.model(moe.ones({ 2, 8 }, { dtype = "i64" }))
    o.log = nil
    local base = moe.recipe.train(switch, o)
    assert.is_true(run.val_loss < base.val_loss, ("%.4f against %.4f"):format(run.val_loss, base.val_loss))
  end)
end)
