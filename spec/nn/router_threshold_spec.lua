local moe = require "moe"
local helper = require "spec.helper"

local function router(o)
  o.d_model, o.num_experts = o.d_model or 5, o.num_experts or 6
  moe.manual_seed(3)
  return moe.router.threshold(o)
end

-- How many experts each token has.
local function counts(routing) return routing.gate:ne(0):to("i64"):sum(-1):totable() end

describe("moe.router.threshold", function()
  it("takes the experts above an even share, or above the bound given", function()
    local x = moe.randn(20, 5) * 2
    for _, o in ipairs { {}, { threshold = 0.3 }, { threshold = 0.6, score = "sigmoid" }, { threshold = 0.05, norm_topk_prob = false } } do
      local bound = o.threshold or 1 / 6
      local soft, norm = o.score ~= "sigmoid", o.norm_topk_prob ~= false
      local m = router(o)
      local routing = m:route(x)
      local logits = x:matmul(m.weight:t())
      local scores = soft and logits:softmax(-1) or logits:sigmoid()
      assert.close(soft and scores or scores / scores:sum(-1, true), routing.probs)
      local kept = scores * scores:gt(bound):to "f32"
      local none = kept:sum(-1):eq(0) -- at least one
      local wanted = moe.where(none:reshape { 20, 1 }, scores * scores:eq(scores:amax(-1, true)):to "f32", kept)
      if norm then wanted = wanted / wanted:sum(-1, true) end
      assert.close(wanted, routing.gate, { rtol = 1e-4 })
    end
  end)

  it("is top-k exactly at the token's quantile that passes k", function()
    local x = moe.randn(30, 5)
    for k = 1, 5 do
      for _, q in ipairs { (6 - k - 0.5) / 5, (6 - k) / 5 - 1 / 5 } do
        if q >= 0 then
          local routing = router({ quantile = q, norm_topk_prob = false }):route(x)
          local value, index = routing.probs:topk(k)
          assert.same(moe.zeros(30, 6):scatter(2, index, value):totable(), routing.gate:totable())
        end
      end
    end
  end)

  it("takes one expert where all score alike, the first", function()
    local m = router { quantile = 0.5 }
    m.weight:detach():fill_(0)
    local routing = m:route(moe.randn(4, 5))
    assert.same({ 4, 0, 0, 0, 0, 0 }, routing:load():totable())
    assert.close(moe.ones(4), routing.gate:sum(-1))
    local three = router { quantile = 0.5, min_k = 3, max_k = 4 }
    three.weight:detach():fill_(0)
    assert.same({ 4, 4, 4, 0, 0, 0 }, three:route(moe.randn(4, 5)):load():totable())
  end)

  it("bounds by a quantile of the whole batch, masked tokens aside", function()
    local x = moe.randn(40, 5) * 2
    local mask = moe.arange(1, 40):gt(7)
    for _, m in ipairs { false, mask } do
      local routing = router({ quantile = 0.7, over = "batch", min_k = 0, norm_topk_prob = false }):route(x, { mask = m or nil })
      local all = {}
      for t = m and 8 or 1, 40 do
        for _, v in ipairs(routing.probs[t]:totable()) do all[#all + 1] = v end
      end
      table.sort(all)
      local n = #all - 1 - math.floor((#all - 1) * 0.7)
      assert.equal(n, routing.num_assignments)
      assert.equal(all[#all - n + 1], moe.where(routing.gate:gt(0), routing.gate, 9):amin():item())
      local list = counts(routing)
      assert.is_true(math.max(table.unpack(list)) > math.min(table.unpack(list, 8))) -- the number differs from token to token
    end
    local none = router({ quantile = 0.7, over = "batch" }):route(x, { mask = mask:logical_and(false) })
    assert.equal(0, none.num_assignments)
  end)

  it("takes as many experts as are said for each token", function()
    local x = moe.randn(4, 5)
    assert.same({ 3, 3, 3, 3 }, counts(router({ top_k = 3 }):route(x)))
    local seen
    local m = router { top_k = function(_, ctx, scores)
      seen = scores.shape
      return ctx.wanted
    end }
    assert.same({ 1, 6, 2, 5 }, counts(m:route(x, { wanted = moe.tensor({ 1, 6, 2, 5 }, { dtype = "i64" }) })))
    assert.same({ 2, 2, 2, 2 }, counts(m:route(x, { wanted = 2 })))
    assert.same({ 4, 6 }, seen)
    assert.matches("'top_k' must give a number or a tensor %[4%], got a nil", helper.error_of(function() m:route(x, {}) end))
    assert.matches("min_k is a i64 tensor %[3%]", helper.error_of(function()
      m:route(x, { wanted = moe.ones({ 3 }, { dtype = "i64" }) })
    end))
  end)

  it("follows the steps", function()
    local m = router { threshold = function(step) return step < 2 and 0 or 1 end }
    local x = moe.randn(3, 5)
    assert.equal(18, m:route(x, { step = 1 }).num_assignments)
    assert.equal(3, m:route(x, { step = 2 }).num_assignments)
    m:set { threshold = 0 }
    assert.equal(18, m:route(x, { step = 5 }).num_assignments)
    local q = router { quantile = 0.9 }
    q.quantile = 0
    assert.equal(15, q:route(x).num_assignments)
    assert.equal(0, q:route(moe.randn(0, 5)).num_assignments)
  end)

  it("has checked gradients", function()
    for _, o in ipairs { {}, { quantile = 0.5 }, { quantile = 0.6, over = "batch", score = "sigmoid" },
      { top_k = 2, norm_topk_prob = false } } do
      o.dtype, o.bias = "f64", true
      local m = router(o)
      moe.gradcheck(function(x, w)
        rawset(m, "weight", w)
        local routing = m:route(x)
        return routing.gate, routing.probs
      end, { moe.randn(5, 5, { dtype = "f64" }), moe.randn(6, 5, { dtype = "f64" }) })
    end
  end)

  it("names what is wrong", function()
    for _, case in ipairs {
      { "options 'threshold' and 'quantile' exclude each other", { threshold = 0.1, quantile = 0.5 } },
      { "'quantile' must be in %[0, 1%), got 1", { quantile = 1.0 } },
      { "'top_k' must be at least 1, got 0", { top_k = 0 } },
      { "'min_k' must not be negative", { min_k = -1 } },
      { "'over' must be one of token, batch", { over = "sequence" } },
    } do
      assert.matches(case[1], helper.error_of(function() router(case[2]) end))
    end
    local x = moe.randn(2, 5)
    x[{ 2, 2 }] = 0 / 0
    assert.matches("router.threshold: the logits of token 2 hold NaN", helper.error_of(function() router({}):route(x) end))
  end)
end)
