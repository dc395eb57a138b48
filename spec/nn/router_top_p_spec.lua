local moe = require "moe"
local helper = require "spec.helper"

local function router(o)
  o.d_model, o.num_experts = o.d_model or 5, o.num_experts or 6
  moe.manual_seed(3)
  return moe.router.top_p(o)
end

local function layer_of(r)
  moe.manual_seed(7)
  return moe.layer { d_model = 5, num_experts = 6, router = r, experts = moe.experts.mlp { intermediate_size = 4 } }
end

describe("moe.router.top_p", function()
  it("takes the smallest set that reaches p", function()
    for _, p in ipairs { 0.2, 0.4, 0.7, 0.95 } do
      local m = router { p = p, bias = true }
      local x = moe.randn(20, 5) * 3
      local routing = m:route(x)
      local probs = (x:matmul(m.weight:t()) + m.bias):softmax(-1)
      assert.close(probs, routing.probs)
      local gates, all = routing.gate:totable(), routing.probs:totable()
      for t = 1, 20 do
        local held, least, left = 0, math.huge, 0
        for e = 1, 6 do
          if gates[t][e] > 0 then
            assert.equal(all[t][e], gates[t][e])
            held, least = held + gates[t][e], math.min(least, gates[t][e])
          else
            left = math.max(left, all[t][e])
          end
        end
        assert.is_true(held >= p - 1e-6 and held - least < p) -- enough, and none too many
        assert.is_true(least >= left) -- the best ones
      end
    end
  end)

  it("is the best expert alone at p = 0, and the whole soft mixture at p = 1", function()
    local x = moe.randn(9, 5)
    local best = router({ p = 0 }):route(x)
    local _, wanted = best.probs:topk(1)
    assert.equal(9, best.num_assignments)
    for t, row in ipairs(wanted:totable()) do assert.equal(best.probs[t][row[1]], best.gate[t][row[1]]) end
    local layer = layer_of(router { p = 1 })
    local y, routing = layer(x)
    assert.equal(54, routing.num_assignments)
    local sum = moe.zeros(9, 5)
    for e = 1, 6 do
      local one = moe.routing.topk(moe.full({ 9, 1 }, e, { dtype = "i64" }), routing.probs:narrow(2, e, 1):contiguous(), 6)
      sum = sum + layer.experts(x, one)
    end
    assert.close(sum, y, { rtol = 1e-4, atol = 1e-6 })
  end)

  it("keeps between min_k and max_k experts, normalises, and follows the steps", function()
    local x = moe.randn(30, 5) * 2
    local routing = router({ p = 0.6, min_k = 2, max_k = 3, norm_topk_prob = true }):route(x)
    for _, row in ipairs(routing.gate:ne(0):to("i64"):sum(-1):totable()) do assert.is_true(row == 2 or row == 3) end
    assert.close(moe.ones(30), routing.gate:sum(-1), { rtol = 1e-5 })
    local m = router { p = function(step) return step < 3 and 1 or 0 end }
    assert.equal(180, m:route(x, { step = 1 }).num_assignments)
    assert.equal(30, m:route(x, { step = 3 }).num_assignments)
    assert.equal(30, m:route(x).num_assignments) -- the last one stays
    local set = router { p = 0 }
    set.p = 1
    assert.equal(180, set:route(x).num_assignments)
    set:set { p = 0 }
    assert.equal(30, set:route(x).num_assignments)
  end)

  it("leaves masked tokens and masked experts alone", function()
    local x = moe.randn(4, 5)
    x[{ 2, 1 }] = 0 / 0 -- a padding token may hold anything
    local mask = moe.tensor { true, false, true, true }
    local m = router { p = 1 }
    local routing = m:route(x, { mask = mask, expert_mask = moe.tensor { true, false, true, true, true, true } })
    assert.same({ 3, 0, 3, 3, 3, 3 }, routing:load():totable())
    assert.close(mask:to "f32", routing.probs:sum(-1), { rtol = 1e-5 })
    routing.gate:sum():backward()
    assert.equal(0, m:route(moe.randn(0, 5)).num_assignments)
  end)

  it("has checked gradients, through a layer too", function()
    for _, o in ipairs { { p = 0.6 }, { p = 0.5, norm_topk_prob = true, min_k = 2 } } do
      o.dtype = "f64"
      local layer = moe.layer { d_model = 5, num_experts = 6, router = router(o), dtype = "f64",
        experts = moe.experts.mlp { intermediate_size = 3 } }
      moe.gradcheck(function(x, w)
        rawset(layer.router, "weight", w)
        local y, routing = layer(x)
        return y, routing.probs
      end, { moe.randn(4, 5, { dtype = "f64" }), moe.randn(6, 5, { dtype = "f64" }) })
    end
  end)

  it("takes back a choice made before", function()
    local routing = router({ p = 0.5 }):route(moe.randn(3, 5), { choice = moe.tensor({ { 1, 3 }, { 0, 2 }, { 6, 5 } }, { dtype = "i64" }) })
    assert.same({ { 1, 3 }, { 2 }, { 5, 6 } }, (function()
      local out = {}
      for t, row in ipairs(routing.gate:totable()) do
        out[t] = {}
        for e, v in ipairs(row) do
          if v ~= 0 then table.insert(out[t], e) end
        end
      end
      return out
    end)())
  end)

  it("names what is wrong", function()
    for _, case in ipairs {
      { "router.top_p: option 'p' must be in %[0, 1%], got 1.5", { p = 1.5 } },
      { "min_k is 7, but there are 6 experts", { min_k = 7 } },
      { "'max_k' must be at least 2, got 1", { min_k = 2, max_k = 1 } },
      { "unknown option 'top_p'", { top_p = 1 } },
    } do
      assert.matches(case[1], helper.error_of(function() router(case[2]) end))
    end
    local x = moe.randn(3, 5)
    for _, bad in ipairs { -1, 7 } do
      assert.matches("router.top_p: ctx.choice has a value outside of 0 %(none%) to 6", helper.error_of(function()
        router({}):route(x, { choice = moe.full({ 3, 1 }, bad, { dtype = "i64" }) })
      end))
    end
    assert.matches("must be an index %[3, k%], got f32 %[3, 1%]", helper.error_of(function()
      router({}):route(x, { choice = moe.ones(3, 1) })
    end))
    x[{ 3, 1 }] = math.huge
    local layer = layer_of(moe.router.top_p {})
    assert.matches("layer: the router %(top_p%): router.top_p: the logits of token 3 hold", helper.error_of(function() layer(x) end))
    assert.equal(2, #layer(moe.randn(3, 5)).shape) -- usable afterwards
  end)
end)
