local moe = require "moe"
local helper = require "spec.helper"

local function router(o)
  moe.manual_seed(1)
  o.d_model, o.num_experts = 6, 4
  return moe.router.topk(o)
end

describe("a router's top_k", function()
  local x = moe.randn(5, 6)

  it("can be set later: the same as a router made so, weights kept", function()
    local r = router { top_k = 4 }
    local weight = r.weight
    for k = 1, 3 do
      local wanted = router { top_k = k }:route(x)
      for _, way in ipairs { function() r:set { top_k = k } end, function() r.top_k = k end } do
        r.top_k = 4
        r:route(x)
        way()
        local got = r:route(x)
        assert.same(wanted.index:totable(), got.index:totable())
        assert.same(wanted.weight:totable(), got.weight:totable()) -- normalised for k > 1 alone
        assert.equal(k, got.top_k)
      end
    end
    assert.equal(weight, r.weight)
    assert.matches("top_k=3", tostring(r))
    assert.equal(r, r:set { top_k = 2 })
    assert.equal(2, r.top_k)
  end)

  it("follows the steps, and stays where there is no step", function()
    local r = router { top_k = function(step, layer) return step < 3 and 4 or layer end }
    assert.matches("top_k is a function of the step, but ctx has no step", helper.error_of(function() r:route(x) end))
    assert.equal(4, r:route(x, { step = 1 }).index:size(2))
    assert.equal(4, r:route(x).index:size(2))
    assert.equal(2, r:route(x, { step = 3, layer_number = 2 }).index:size(2))
    assert.equal(2, r.top_k)
    assert.equal(1, r:route(x, { step = 3, layer_number = 1 }).index:size(2))
    assert.matches("top_k=function", tostring(router { top_k = function() end }))
    r:set { top_k = 3 } -- instead of the function
    assert.equal(3, r:route(x, { step = 9, layer_number = 1 }).index:size(2))
    r:set { top_k = function() return 1 end }
    assert.equal(1, r:route(x, { step = 1 }).index:size(2))
  end)

  it("is that of the step for a forced choice too", function()
    local layer = moe.layer {
      d_model = 6, num_experts = 4, force = "uniform", router = moe.router.topk { top_k = function(step) return step end },
      experts = moe.experts.mlp { intermediate_size = 3 },
    }
    for _, k in ipairs { 3, 1, 2 } do
      local _, r = layer(x, { step = k })
      assert.equal(5 * k, r.num_assignments)
    end
  end)

  it("is checked, and a refused one changes nothing", function()
    local r = router { top_k = 2, norm_topk_prob = true }
    assert.matches("router.topk: top_k is 5, but there are 4 experts", helper.error_of(function() r:set { top_k = 5 } end))
    assert.matches("norm_topk_prob with top_k = 1", helper.error_of(function() r:set { top_k = 1 } end))
    assert.matches("'top_k' must be of type integer or function", helper.error_of(function() r:set { top_k = "2" } end))
    assert.matches("unknown option 'topk' %(did you mean 'top_k'", helper.error_of(function() r:set { topk = 2 } end))
    assert.equal(2, r:route(x).index:size(2))
    r.top_k = 2.5
    assert.matches("top_k must be a whole number, got 2.5", helper.error_of(function() r:route(x) end))
    r.top_k = 0
    assert.matches("'top_k' must be at least 1, got 0", helper.error_of(function() r:route(x) end))
    r.top_k = 3
    assert.equal(3, r:route(x).index:size(2))
    local f = router { top_k = function(step) return step end }
    assert.matches("top_k is 5, but there are 4", helper.error_of(function() f:route(x, { step = 5 }) end))
    assert.equal(2, f:route(x, { step = 2 }).index:size(2))
  end)

  it("follows the steps of a trainer, through a model", function()
    local seen = {}
    local model = moe.model.lm {
      vocab_size = 7, d_model = 8, num_layers = 2, max_seq_len = 4,
      ffn = "moe", moe = {
        num_experts = 4, intermediate_size = 4, top_k = function(step, layer) return layer == 1 and math.max(1, 4 - step) or 1 end,
        balance = { moe.loss.switch(function(step) return step * 0.01 end), function(routing, ctx)
          seen[#seen + 1] = { ctx.step, ctx.layer_number, routing.top_k, ctx.sharpness }
        end },
      },
    }
    local function ids(t) return moe.tensor({ t }, { dtype = "i64" }) end
    local batch = { x = ids { 1, 2, 3, 4 }, y = ids { 2, 3, 4, 5 } }
    local trainer = moe.trainer {
      model = model, optimizer = moe.optim.sgd { lr = 0.1 }, quiet = true,
      schedules = { sharpness = function(step) return step * 2 end },
      loss = function(m, b, ctx) return moe.loss.cross_entropy(m(b.x, ctx), b.y) + m:aux() end,
    }
    trainer:fit({ batch }, { steps = 3 })
    assert.same({ { 1, 1, 3, 2 }, { 1, 2, 1, 2 }, { 2, 1, 2, 4 }, { 2, 2, 1, 4 }, { 3, 1, 1, 6 }, { 3, 2, 1, 6 } }, seen)
    model:eval()
    model(batch.x) -- without a step: the last one
    assert.equal(1, model.routings[1].top_k)
  end)
end)
