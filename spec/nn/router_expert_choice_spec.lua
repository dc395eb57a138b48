local moe = require "moe"
local helper = require "spec.helper"

local function router(o)
  o.d_model, o.num_experts = o.d_model or 5, o.num_experts or 4
  moe.manual_seed(3)
  return moe.router.expert_choice(o)
end

-- The choice once more by loops: probs a table [T][E], groups a list of lists of tokens. Lists of tokens an expert.
local function reference(probs, groups, top_k, E)
  local out = {}
  for e = 1, E do
    out[e] = {}
    for _, tokens in ipairs(groups) do
      local order = table.move(tokens, 1, #tokens, 1, {})
      table.sort(order, function(a, b)
        if probs[a][e] ~= probs[b][e] then return probs[a][e] > probs[b][e] end
        return a < b
      end)
      for c = 1, math.min(#tokens, math.ceil(top_k * #tokens / E)) do out[e][#out[e] + 1] = order[c] end
    end
  end
  return out
end

describe("moe.router.expert_choice", function()
  it("lets each expert take the tokens that want it most", function()
    for _, case in ipairs { { 12, 1 }, { 12, 2 }, { 7, 1.5 }, { 3, 4 }, { 1, 0.25 } } do
      local T, k = case[1], case[2]
      local m = router { top_k = k, bias = true }
      local x = moe.randn(T, 5)
      local routing = m:route(x)
      local probs = (x:matmul(m.weight:t()) + m.bias):softmax(-1)
      assert.close(probs, routing.probs)
      local tokens = {}
      for t = 1, T do tokens[t] = t end
      local wanted = reference(routing.probs:totable(), { tokens }, k, 4)
      assert.same(wanted, routing.index:totable())
      local C = math.ceil(k * T / 4)
      for e = 1, 4 do
        assert.equal(C, routing:load():totable()[e])
        for c = 1, C do assert.equal(routing.probs[wanted[e][c]][e], routing.gate[e][c]) end
      end
    end
  end)

  it("chooses within sequences or positions", function()
    local B, time, E = 3, 4, 4
    local x = moe.randn(B * time, 5)
    local by = { sequence = {}, position = {} }
    for b = 1, B do
      for t = 1, time do
        by.sequence[b] = by.sequence[b] or {}
        by.position[t] = by.position[t] or {}
        table.insert(by.sequence[b], (b - 1) * time + t)
        table.insert(by.position[t], (b - 1) * time + t)
      end
    end
    for within, groups in pairs(by) do
      local routing = router { top_k = 2, within = within }:route(x, { shape = { B, time } })
      assert.same(reference(routing.probs:totable(), groups, 2, E), routing.index:totable())
    end
  end)

  it("is causal where it chooses within positions", function()
    local m = router { top_k = 1, within = "position" }
    local x = moe.randn(2 * 6, 5)
    local y = x:reshape { 2, 6, 5 }:clone()
    y:narrow(2, 4, 3):copy_(moe.randn(2, 3, 5))
    local function early(v)
      local routing, out = m:route(v, { shape = { 2, 6 } }):totable(), {}
      for i, t in ipairs(routing.token) do
        if (t - 1) % 6 < 3 then out[#out + 1] = ("%d %d %.6f"):format(t, routing.expert[i], routing.weight[i]) end
      end
      return out
    end
    assert.same(early(x), early(y:reshape { 12, 5 }))
    local batch = router { top_k = 1 }
    local a, b = batch:route(x).index:totable(), batch:route(y:reshape { 12, 5 }).index:totable()
    assert.not_same(a, b)
  end)

  it("follows the steps", function()
    local m = router { top_k = function(step) return step end }
    local x = moe.randn(8, 5)
    assert.equal(8, m:route(x, { step = 1 }).num_assignments)
    assert.equal(24, m:route(x, { step = 3 }).num_assignments)
    m:set { top_k = 0.5 }
    assert.equal(4, m:route(x, { step = 3 }).num_assignments)
    m.top_k = 2
    assert.equal(16, m:route(x).num_assignments)
    assert.matches("'top_k' must be above 0", helper.error_of(function() m:set { top_k = 0 } end))
  end)

  it("leaves masked tokens and masked experts alone", function()
    local m = router { top_k = 2 }
    local x = moe.randn(6, 5)
    local mask = moe.tensor { true, false, true, true, false, true }
    local routing = m:route(x, { mask = mask })
    for _, t in ipairs(routing.token:totable()) do assert.is_true(t ~= 2 and t ~= 5) end
    assert.same({ 2, 2, 2, 2 }, routing:load():totable()) -- of four tokens
    assert.close(mask:to "f32", routing.probs:sum(-1), { rtol = 1e-5 })
    local few = router({ top_k = 2, within = "sequence" }):route(x, { mask = mask, shape = { 2, 3 } })
    for _, t in ipairs(few.token:totable()) do assert.is_true(t ~= 2 and t ~= 5) end
    local open = m:route(x, { expert_mask = moe.tensor { true, false, true, true } })
    assert.same({ 3, 0, 3, 3 }, open:load():totable())
    assert.equal(0, m:route(moe.randn(0, 5)).num_assignments)
    assert.equal(0, m:route(x, { mask = moe.zeros({ 6 }, { dtype = "bool" }) }).num_assignments)
  end)

  it("has checked gradients", function()
    for _, o in ipairs { { top_k = 2 }, { top_k = 1, score = "sigmoid", within = "sequence" }, { top_k = 1, within = "position" } } do
      o.dtype, o.bias = "f64", true
      local m = router(o)
      moe.gradcheck(function(x, w)
        rawset(m, "weight", w)
        local routing = m:route(x, { shape = { 2, 3 } })
        return routing.weight, routing.probs
      end, { moe.randn(6, 5, { dtype = "f64" }), moe.randn(4, 5, { dtype = "f64" }) })
    end
  end)

  it("takes back its own choice, and one by tokens", function()
    local m = router { top_k = 2 }
    local x, z = moe.randn(7, 5), moe.randn(7, 5)
    local first = m:route(x)
    local again = m:route(z, { choice = first.index })
    assert.same(first.index:totable(), again.index:totable())
    local gates = again.probs:t():gather(2, first.index)
    assert.close(gates, again.gate)
    local even = m:route(z, { choice = moe.router.uniform_choice(7, 2, 4) })
    assert.equal(14, even.num_assignments)
  end)

  it("works in a layer, with one expert as a dense network", function()
    moe.manual_seed(4)
    local layer = moe.layer { d_model = 5, num_experts = 1, router = moe.router.expert_choice { top_k = 1 },
      experts = moe.experts.mlp { intermediate_size = 6 } }
    local x = moe.randn(4, 5)
    assert.same(layer.experts(x):totable(), layer(x):totable())
  end)

  it("names what is wrong", function()
    for _, case in ipairs {
      { "router.expert_choice: option 'top_k' must be above 0, got 0", { top_k = 0 } },
      { "top_k is 5, but there are 4 experts", { top_k = 5 } },
      { "unknown option 'topk'", { topk = 1 } },
      { "'within' must be one of batch, sequence, position", { within = "token" } },
    } do
      assert.matches(case[1], helper.error_of(function() router(case[2]) end))
    end
    local m = router {}
    local x = moe.randn(3, 5)
    x[{ 2, 3 }] = 0 / 0
    assert.matches("router.expert_choice: the logits of token 2 hold NaN", helper.error_of(function() m:route(x) end))
    assert.matches("token 1 may choose among 0 of 4 experts", helper.error_of(function()
      m:route(moe.randn(3, 5), { expert_mask = moe.zeros({ 4 }, { dtype = "bool" }) })
    end))
    assert.matches("ctx.choice must be an index %[3, k%], got i64 %[2, 2%]", helper.error_of(function()
      m:route(moe.randn(3, 5), { choice = moe.ones({ 2, 2 }, { dtype = "i64" }) })
    end))
    assert.matches("description without weights", helper.error_of(function() moe.router.expert_choice {}:route(x) end))
  end)
end)
