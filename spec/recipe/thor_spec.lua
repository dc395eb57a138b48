-- Stochastic experts: what a pair of draws is, exactly; then a made translation with few examples.
local moe = require "moe"
local helper = require "spec.helper"
local lab = require "moe.recipe.lab"
local thor = require "moe.recipe.thor"
local toy = require "spec.recipe.toy_reversal"

local O = { d_model = 8, num_experts = 4, top_k = 1, intermediate_size = 6, vocab_size = 13, num_layers = 2, num_heads = 2,
  max_seq_len = 8 }

local function small(layer)
  moe.manual_seed(3)
  return moe.model.lm {
    vocab_size = 13, d_model = 8, num_layers = 2, num_heads = 2, max_seq_len = 8, ffn = function() return layer(O) end,
  }
end

local function switch(o)
  return moe.layer {
    d_model = o.d_model, num_experts = o.num_experts, router = moe.router.topk { top_k = 1 },
    experts = moe.experts.mlp { intermediate_size = o.intermediate_size }, balance = { moe.loss.switch(0.01) },
  }
end

-- Cross entropy of the translation; in training with the balance loss.
local function plain_loss(model, batch, ctx)
  local keep = batch.mask:reshape { -1 }:to "f32"
  local rows = moe.loss.cross_entropy(model(batch.x, ctx):reshape { -1, 13 }, batch.y:reshape { -1 }, { reduction = "none" })
  local ce = (rows * keep):sum() / keep:sum():item()
  return ctx.training and ce + model:aux() or ce
end

describe("recipe thor", function()
  it("says twice what two forwards with the experts of either pass say", function()
    local model = small(thor.layer)
    local batch = toy.batch(3, 4)
    moe.manual_seed(5)
    local p1, p2 = thor.pair(model, batch.x, { training = true })
    local first, second = {}, {}
    for i, routing in ipairs(model.routings) do
      local index = routing.index:totable()
      first[i], second[i] = index[1][1], index[25][1] -- 24 tokens a pass
      assert.is_true(first[i] ~= second[i])
    end
    for pass, drawn in ipairs { first, second } do
      for i = 1, 2 do
        model.layers[i].ffn.force = function(x) return moe.full({ x:size(1), 1 }, drawn[i], { dtype = "i64" }) end
      end
      assert.close(pass == 1 and p1 or p2, model(batch.x), { rtol = 1e-5, atol = 1e-6 })
    end
  end)

  it("trains on the loss of the paper, halved", function()
    local model = small(thor.layer)
    local batch = toy.batch(3, 4)
    moe.manual_seed(5)
    local value, parts = thor.loss(model, batch, { training = true }, 3)
    moe.manual_seed(5)
    local p1, p2 = thor.pair(model, batch.x, { training = true })
    local ce, cr, count = { 0, 0 }, 0, 0
    for b = 1, 3 do
      for t = 5, 8 do -- the translation: predicted from the mark on
        local a, c = p1[b][t]:log_softmax(-1):totable(), p2[b][t]:log_softmax(-1):totable()
        local y = batch.y[b][t]
        y = type(y) == "number" and y or y:item()
        ce[1], ce[2], count = ce[1] - a[y], ce[2] - c[y], count + 1
        for i = 1, 13 do cr = cr + 0.5 * (math.exp(a[i]) * (a[i] - c[i]) + math.exp(c[i]) * (c[i] - a[i])) end
      end
    end
    assert.close(cr / count, parts.cr:item(), { rtol = 1e-3, atol = 1e-7 })
    assert.close(((ce[1] + ce[2]) + 3 * cr) / count / 2, value:item(), { rtol = 1e-5 })
    value:backward()
    for name, p in model:named_parameters() do
      if name:find "experts" then assert.is_true(p.grad ~= nil, name) end
    end
  end)

  it("averages all experts at inference, if told", function()
    local layer = thor.layer(setmetatable({ inference = "all" }, { __index = O }))
    layer:eval()
    local x = moe.randn(5, 8)
    local sum = moe.zeros(5, 8)
    for e = 1, 4 do
      sum = sum + layer.experts(x, moe.routing.topk(moe.full({ 5, 1 }, e, { dtype = "i64" }), nil, 4))
    end
    assert.close(sum / 4, (layer(x)), { rtol = 1e-5, atol = 1e-6 })
    assert.matches("there are 1", helper.error_of(function()
      thor.layer(setmetatable({ num_experts = 1 }, { __index = O }))(x, { draws = 2 })
    end))
  end)

  it("beats Switch of equal size on few examples; agreement grows, and draws matter less for it", function()
    local given = { examples = 96, steps = 300 }
    local function validation(model)
      moe.manual_seed(99)
      return moe.no_grad(function()
        local sum = 0.0
        for _ = 1, 5 do sum = sum + plain_loss(model, toy.batch(64, 6), {}):item() / 5 end
        return sum
      end)
    end
    -- the variance of a probability over draws, the mean over outputs
    local function spread(model)
      moe.manual_seed(98)
      return moe.no_grad(function()
        local batch, says = toy.batch(64, 6), {}
        for i = 1, 8 do says[i] = model(batch.x, {}):softmax(-1) end
        return moe.stack(says, 1):var(1):mean():item()
      end)
    end
    local function one(seed, alpha)
      local first, last = 0.0, 0.0
      given.seed = seed
      given.log = function(step, parts)
        if step <= 20 then first = first + parts.cr:item() / 20 end
        if step > given.steps - 20 then last = last + parts.cr:item() / 20 end
      end
      local model = toy.train(thor.layer, function(m, batch, ctx) return thor.loss(m, batch, ctx, alpha) end, given)
      given.log = nil
      return validation(model), spread(model), first, last
    end
    local loss, rival, loose, tight = {}, {}, {}, {}
    for seed = 1, 2 do
      local first, last
      loss[seed], tight[seed], first, last = one(seed, thor.alpha)
      assert.is_true(last < first / 3)
      loose[seed] = select(2, one(seed, 0))
      given.seed, given.steps = seed, 600 -- THOR's steps are two passes
      rival[seed] = validation(toy.train(switch, plain_loss, given))
      given.steps = 300
    end
    assert.is_true(lab.mean(loss) < lab.mean(rival))
    assert.is_true(lab.mean(tight) < lab.mean(loose))
  end)
end)
