local moe = require "moe"
local lab = require "moe.recipe.lab"
local remoe = moe.recipe.remoe

describe("recipe remoe", function()
  it("gives the gates a gradient on both sides of zero", function()
    moe.manual_seed(1)
    local layer = remoe.layer { d_model = 4, num_experts = 3, top_k = 1, intermediate_size = 5, dtype = "f64" }
    local x = moe.randn(1, 4, { dtype = "f64" })
    local shut = x:linear(layer.router.weight):neg():detach():reshape { -1 } -- the bias that shuts every gate
    for _, shift in ipairs { 1e-3, -1e-3 } do
      moe.gradcheck(function(z, b)
        rawset(layer.router, "bias", b)
        return (layer(z))
      end, { x, shut + shift })
    end
  end)

  it("shares one coefficient among its layers, which grows while too many gates are open", function()
    moe.manual_seed(1)
    local model = lab.build(remoe, { vocab_size = 11, d_model = 16, num_heads = 2, num_experts = 4, top_k = 1 })
    model(moe.ones({ 2, 5 }, { dtype = "i64" }), {})
    assert.is_true(remoe.open(model) > 1)
    assert.is_true(model:aux():item() > 0)
    for _, block in ipairs(model.layers) do block.ffn:after_step() end
    for _, block in ipairs(model.layers) do assert.close(1.02e-4, block.ffn.l1_coef:item(), { rtol = 1e-9 }) end
  end)

  it("settles at k experts a token, at a loss no worse than top-k's", function()
    local o = { steps = 300, d_model = 32, num_layers = 2, seq_len = 32, batch_size = 16, eval_steps = 30, lr = 5e-3 }
    local early, middle, late, n = 0, 0, 0, 0
    o.log = function(step, _, model)
      if step == 1 then early = remoe.open(model) end
      if step == 100 then middle = remoe.open(model) end
      if step > 240 then late, n = late + remoe.open(model), n + 1 end
    end
    local run = moe.recipe.train("remoe", o)
    o.log = nil
    local base = moe.recipe.train("topk", o)
    assert.is_true(early > 3)
    local _, kind = moe.recipe.text()
    if kind == "real" then
      assert.close(2, late / n, { atol = 0.1 }) -- within 5 %
    else -- made sentences sharpen the gates late: after 300 steps the controller is still on its way
      assert.is_true(late / n < 0.9 * middle, late / n)
    end
    assert.is_true(run.val_loss < 1.01 * base.val_loss, ("%.4f against %.4f"):format(run.val_loss, base.val_loss))
  end)
end)
