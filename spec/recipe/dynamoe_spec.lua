local moe = require "moe"
local digits = require "spec.recipe.toy_digits"
local dynamoe = moe.recipe.dynamoe

local function options(pattern, static)
  return {
    inputs = digits.inputs, classes = digits.classes, d_model = 32, num_layers = 4, num_experts = 4, top_k = 2,
    intermediate_size = 16, pattern = pattern, static = static,
  }
end

-- Accuracy and the model after some steps.
local function train(pattern, static, seed, steps)
  moe.manual_seed(seed)
  local model = dynamoe.classifier(options(pattern, static))
  local optimizer = moe.optim.adamw(model, { lr = 5e-3 })
  for _ = 1, steps do
    local x, y = digits.draw(64)
    local ctx = {}
    local loss = moe.loss.cross_entropy(model(x, ctx), y) + moe.loss.aux(ctx)
    optimizer:zero_grad()
    loss:backward()
    optimizer:step()
  end
  model:eval()
  moe.manual_seed(1000)
  local x, y = digits.draw(1500)
  local ctx = {}
  local scores = moe.no_grad(function() return model(x, ctx) end)
  return scores:argmax(-1):eq(y):to("f32"):mean():item(), model, ctx.routings
end

describe("recipe dynamoe", function()
  it("places one total of experts after six patterns", function()
    for _, pattern in ipairs(dynamoe.patterns) do
      local model, counts, total = dynamoe.classifier(options(pattern)), {}, 0
      for i, layer in ipairs(model.layers) do
        counts[i] = layer.num_experts
        total = total + counts[i]
      end
      assert.equal(16, total)
      if pattern == "descending" then assert.is_true(counts[1] > counts[2] and counts[2] > counts[3] and counts[3] > counts[4]) end
    end
  end)

  it("is top-k where the quantile of the token passes k", function()
    moe.manual_seed(1)
    local E, k, x = 6, 2, moe.randn(20, 8)
    local top = moe.router.topk { d_model = 8, num_experts = E, top_k = k }
    local threshold = moe.router.threshold { d_model = 8, num_experts = E, quantile = (E - k - 0.5) / (E - 1) }
    threshold:load_state_dict(top:state_dict())
    local a, b = top:route(x):totable(), threshold:route(x):totable()
    assert.same(a.token, b.token)
    assert.same(a.expert, b.expert)
    assert.close(a.weight, b.weight, { rtol = 1e-5 })
  end)

  it("gives tokens different numbers of experts, at least one, and counts them", function()
    moe.manual_seed(2)
    local layer = dynamoe.layer {
      d_model = 8, num_experts = 6, top_k = 2, intermediate_size = 4, pattern = "uniform", layer = 1, num_layers = 1,
    }
    local _, routing = layer(moe.randn(300, 8) * 3)
    local counts, tokens, assignments = dynamoe.histogram(routing), 0, 0
    for n, count in ipairs(counts) do tokens, assignments = tokens + count, assignments + n * count end
    assert.equal(300, tokens)
    assert.equal(routing.num_assignments, assignments)
    assert.is_true(counts[1] > 0 and counts[2] > 0 and counts[3] > 0)
    assert.equal(0, counts[5]) -- the layer's maximum is 4
    layer.router.weight:detach():fill_(0) -- all logits alike: the first expert
    assert.same({ 300, 0, 0, 0, 0, 0 }, dynamoe.histogram(select(2, layer(moe.randn(300, 8)))))
  end)

  it("learns digits with each pattern, and with descending no worse than static top-k", function()
    local mean = {}
    for _, pattern in ipairs { "descending", "uniform", "ascending", "pyramid_up", "pyramid_down", "wave", "static" } do
      local static = pattern == "static"
      mean[pattern] = train(static and "uniform" or pattern, static, 1, 100)
      assert.is_true(mean[pattern] > 0.3, ("%s: %.3f"):format(pattern, mean[pattern])) -- by chance: 0.1
    end
    local descending, static = 0, 0
    for seed = 1, 2 do
      descending = descending + train("descending", false, seed, 500)
      static = static + train("uniform", true, seed, 500)
    end
    assert.is_true(descending > static - 0.01, ("%.3f against %.3f"):format(descending / 2, static / 2))
  end)

  it("measures the variance of the gradient", function()
    local _, model = train("uniform", true, 1, 5)
    local x, y = digits.draw(64)
    assert.close(0, dynamoe.gradient_variance(model, function() return x, y end, 4), { atol = 1e-4 }) -- one batch: no variance
    assert.is_true(dynamoe.gradient_variance(model, function() return digits.draw(16) end, 4) > 0.1)
  end)
end)
