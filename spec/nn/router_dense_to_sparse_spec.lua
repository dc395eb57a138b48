local moe = require "moe"
local helper = require "spec.helper"

local function router(o)
  o.d_model, o.num_experts = o.d_model or 5, o.num_experts or 6
  moe.manual_seed(3)
  return moe.router.dense_to_sparse(o)
end

describe("moe.router.dense_to_sparse", function()
  it("drops the experts under the bound", function()
    for _, o in ipairs { {}, { temperature = 0.3 }, { temperature = 2, threshold = 0.15, norm_topk_prob = true } } do
      local t, c = o.temperature or 1, o.threshold or 0.2 / 6
      local m = router(o):eval()
      local x = moe.randn(15, 5) * 2
      local routing = m:route(x)
      local probs = (x:matmul(m.weight:t()) / t):softmax(-1)
      assert.close(probs, routing.probs, { rtol = 1e-4 })
      local wanted = probs * probs:gt(c):to "f32"
      if o.norm_topk_prob then wanted = wanted / wanted:sum(-1, true) end
      assert.close(wanted, routing.gate, { rtol = 1e-4 })
    end
  end)

  it("goes from all experts to one as the temperature falls", function()
    local m = router { temperature = function(step) return step == 1 and 100 or 1e-3 end }
    local x = moe.randn(50, 5)
    assert.equal(300, m:route(x, { step = 1 }).num_assignments)
    assert.equal(50, m:route(x, { step = 2 }).num_assignments)
    m = router { temperature = 100 }
    m.temperature = 1e-3
    assert.equal(50, m:route(x).num_assignments)
    m:set { temperature = 100 }
    assert.equal(300, m:route(x).num_assignments)
    m.threshold = 0.99 -- at least one all the same
    assert.equal(50, m:route(x).num_assignments)
  end)

  it("draws its experts by Gumbel noise in training alone", function()
    local m = router { temperature = 0.01 }
    m.weight:detach():fill_(0)
    m.weight:detach():narrow(1, 1, 1):fill_(1)
    local x = moe.full({ 20000, 5 }, 0.2 * math.log(2)) -- logits log 2, 0, 0, 0, 0, 0
    moe.manual_seed(5)
    local load = m:route(x):load():totable()
    -- the largest of logits + Gumbel noise is drawn with the probabilities of a softmax: 2/7, 1/7, ..
    for e, n in ipairs(load) do
      local wanted = (e == 1 and 2 or 1) / 7 * 20000
      assert.is_true(math.abs(n - wanted) < 5 * math.sqrt(wanted) + 300)
    end
    assert.same({ 20000, 0, 0, 0, 0, 0 }, m:eval():route(x):load():totable())
    local still = router { temperature = 0.01, gumbel = false }
    local z = moe.randn(4, 5)
    assert.same(still:route(z).gate:totable(), still:route(z).gate:totable())
    assert.not_same(m:train():route(z).probs:totable(), m:route(z).probs:totable())
  end)

  it("has checked gradients, noise included", function()
    local m = router { dtype = "f64", temperature = 0.7, bias = true }
    moe.gradcheck(function(x, w)
      rawset(m, "weight", w)
      local routing = m:route(x)
      return routing.gate, routing.probs
    end, { moe.randn(4, 5, { dtype = "f64" }), moe.randn(6, 5, { dtype = "f64" }) }, { seed = 6 })
  end)

  it("leaves masked tokens and experts alone", function()
    local m = router { temperature = 100 }
    local routing = m:route(moe.randn(3, 5), {
      mask = moe.tensor { true, false, true }, expert_mask = moe.tensor { true, true, false, true, true, true },
    })
    assert.same({ 2, 2, 0, 2, 2, 2 }, routing:load():totable())
    assert.equal(0, m:route(moe.randn(0, 5)).num_assignments)
  end)

  it("names what is wrong", function()
    assert.matches("'temperature' must be above 0, got 0", helper.error_of(function() router { temperature = 0 } end))
    local m = router {}
    m.temperature = -1
    assert.matches("temperature must be above 0, got %-1", helper.error_of(function() m:route(moe.randn(2, 5)) end))
    assert.matches("unknown option 'tau'", helper.error_of(function() router { tau = 1 } end))
  end)
end)
