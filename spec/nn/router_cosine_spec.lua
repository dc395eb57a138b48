local moe = require "moe"
local helper = require "spec.helper"

local function router(o)
  o.d_model, o.num_experts, o.proj_dim = o.d_model or 5, o.num_experts or 6, o.proj_dim or 3
  moe.manual_seed(3)
  return moe.router.cosine(o)
end

local function unit(v) return v / (v * v):sum(-1, true):sqrt() end

describe("moe.router.cosine", function()
  it("measures angles, over a temperature", function()
    for _, bias in ipairs { false, true } do
      local m = router { top_k = 2, bias = bias, temperature = 0.25 }
      local x = moe.randn(8, 5)
      local p = x:matmul(m.proj:t())
      if bias then p = p + m.proj_bias end
      local cosines = unit(p):matmul(unit(m.weight):t())
      local routing = m:route(x)
      assert.close(cosines / 0.25, routing.logits, { rtol = 1e-4, atol = 1e-5 })
      assert.equal(16, routing.num_assignments)
      assert.close(0.25, m:temperature(), { rtol = 1e-5 })
      assert.is_true(routing.logits:abs():amax():item() <= 4 + 1e-5)
    end
  end)

  it("does not see the lengths of tokens, nor of experts", function()
    local m = router { top_k = 2 }
    local x = moe.randn(8, 5)
    local before = m:route(x).logits:detach()
    assert.close(before, m:route(x * 7).logits, { rtol = 1e-4, atol = 1e-5 })
    m.weight:detach():mul_(3)
    assert.close(before, m:route(x).logits, { rtol = 1e-4, atol = 1e-5 })
    assert.same(moe.zeros(2, 6):totable(), m:route(moe.zeros(2, 5)).logits:totable())
  end)

  it("keeps the temperature above its floor", function()
    local m = router { top_k = 2 }
    m.log_scale:detach():fill_(50)
    assert.close(0.01, m:temperature())
    local routing = m:route(moe.randn(4, 5))
    assert.is_true(routing.logits:abs():amax():item() <= 100.001)
    routing.logits:sum():backward()
    assert.equal(0, m.log_scale.grad:item())
  end)

  it("has checked gradients", function()
    local m = router { top_k = 2, dtype = "f64", bias = true, noise = 0.5 }
    moe.gradcheck(function(x, p, w, a)
      rawset(m, "proj", p)
      rawset(m, "weight", w)
      rawset(m, "log_scale", a)
      local routing = m:route(x)
      return routing.weight, routing.probs
    end, { moe.randn(4, 5, { dtype = "f64" }), moe.randn(3, 5, { dtype = "f64" }), moe.randn(6, 3, { dtype = "f64" }),
      moe.tensor({ 0.4 }, { dtype = "f64" }) }, { seed = 2 })
  end)

  it("takes the options of topk, and binds to a layer", function()
    local layer = moe.layer { d_model = 5, num_experts = 8, bias_update_rate = 1e-3,
      router = moe.router.cosine { top_k = 2, proj_dim = 4, score = "sigmoid", n_group = 2, topk_group = 1 },
      experts = moe.experts.mlp { intermediate_size = 4 } }
    local _, routing = layer(moe.randn(3, 5))
    assert.equal(6, routing.num_assignments)
    assert.is_true(layer.router.expert_bias ~= nil)
    layer.router:set { top_k = 1 }
    assert.equal(3, select(2, layer(moe.randn(3, 5))).num_assignments)
    local names = {}
    for name in layer.router:named_parameters() do names[#names + 1] = name end
    table.sort(names)
    assert.same({ "log_scale", "proj", "weight" }, names)
  end)

  it("names what is wrong", function()
    for _, case in ipairs {
      { "router.cosine: option 'proj_dim' must be at least 1", { proj_dim = 0 } },
      { "'noise' must be a standard deviation, got \"learned\"", { noise = "learned" } },
      { "'temperature' must be at least min_temperature = 0.01, above 0, got 0.001", { temperature = 0.001 } },
      { "top_k is 9, but there are 6 experts", { top_k = 9 } },
    } do
      assert.matches(case[1], helper.error_of(function() router(case[2]) end))
    end
  end)
end)
