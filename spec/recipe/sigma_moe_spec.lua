local moe = require "moe"
local sigma = require "moe.recipe.sigma_moe"

local SIZES <const> = {
  d_model = 32, num_experts = 32, intermediate_size = 16, num_layers = 2, seq_len = 32, batch_size = 16, steps = 200,
}

describe("Sigma-MoE-Tiny", function()
  it("the balance loss is at its least value however skewed the load, when the probabilities are even", function()
    for _, index in ipairs { { { 1 }, { 1 }, { 1 }, { 1 } }, { { 1 }, { 2 }, { 1 }, { 3 } } } do
      local r = moe.routing.topk(moe.tensor(index, { dtype = "i64" }), nil, 8, { probs = moe.full({ 4, 8 }, 1 / 8) })
      for _, by in ipairs { "batch", "global" } do
        assert.close(1, moe.loss.switch(1, { by = by })(r), { rtol = 1e-6 })
      end
      assert.is_true(r:max_over_mean() >= 4)
    end
  end)

  it("begins with more experts in the lowest layers, and ends with one", function()
    local function row(step)
      return { sigma.experts_of(step, 100, 1), sigma.experts_of(step, 100, 2), sigma.experts_of(step, 100, 3) }
    end
    assert.same({ 4, 4, 1 }, row(1))
    assert.same({ 4, 4, 1 }, row(79))
    assert.same({ 1, 1, 1 }, row(80))
    assert.same({ 8, 1 }, { sigma.experts_of(49, 100, 1, { 8 }, 0.5), sigma.experts_of(50, 100, 1, { 8 }, 0.5) })
  end)

  it("switches k and keeps the weights", function()
    local o = {
      vocab_size = 11, d_model = 8, num_layers = 2, num_heads = 4, num_experts = 8, intermediate_size = 4, max_seq_len = 6,
    }
    moe.manual_seed(3)
    local model, plain = sigma.model(o), sigma.model(o)
    plain:load_state_dict(model:state_dict()) -- a model of one expert a token
    local before = {}
    for name, p in model:named_parameters() do before[name] = p:clone() end
    local ids = moe.randint(1, 11, { 2, 6 })
    sigma.step(model, 1, 10)
    local many = model(ids, {})
    assert.equal(4, model.routings[1].top_k)
    sigma.step(model, 8, 10)
    local one = model(ids, {})
    assert.equal(1, model.routings[1].top_k)
    assert.same(plain(ids, {}):totable(), one:totable())
    assert.is_true((many - one):abs():max():item() > 0)
    for name, p in model:named_parameters() do assert.same(before[name]:totable(), p:totable()) end
  end)

  it("progressive k: a lower loss than k = 1 throughout; a load that the loss calls even is not", function()
    local lab = require "moe.recipe.lab"
    local text = lab.text()
    local batch = text.val:batches { batch_size = 16, seq_len = 32 }()
    local fixed = { title = "one expert throughout", model = sigma.model }
    local loss, busiest = { 0, 0 }, { 0, 0 }
    for seed = 1, 3 do
      for i, recipe in ipairs { sigma, fixed } do
        SIZES.seed = seed
        local run = lab.train(recipe, SIZES)
        local model = run.model:eval()
        moe.no_grad(function() model(batch.x, {}) end)
        assert.equal(1, model.routings[1].top_k)
        loss[i], busiest[i] = loss[i] + run.val_loss / 3, busiest[i] + model.routings[1]:max_over_mean() / 3
        if i == 2 then
          local even, far = false, false
          for _, r in ipairs(model.routings) do
            if r:max_over_mean() > 2 then
              far = true
              even = even or moe.loss.switch(1)(r):item() < 1.25
            end
          end
          assert.is_true(far and even)
        end
      end
    end
    assert.is_true(loss[1] < loss[2], ("%.4f against %.4f"):format(loss[1], loss[2]))
    -- the balance of the lowest layer is not much different at this size: see the recipe's outcome
    assert.is_true(busiest[1] < 1.15 * busiest[2], ("%.3f against %.3f"):format(busiest[1], busiest[2]))
  end)
end)
