local moe = require "moe"
local helper = require "spec.helper"

local EXACT = { rtol = 1e-5, atol = 1e-6 }

local function router_of(o)
  moe.manual_seed(o.seed or 1)
  o.seed = nil
  o.d_model, o.num_experts = 5, 6
  return moe.router.two_stage(o)
end

local function softmax(row)
  local sum, out = 0, {}
  for i, v in ipairs(row) do
    out[i] = math.exp(v)
    sum = sum + out[i]
  end
  for i, v in ipairs(out) do out[i] = v / sum end
  return out
end

-- { [expert] = weight } of each token, by the formula.
local function reference(router, x, k, S, norm, rescale)
  local routed = x:linear(router.weight):totable()
  local shared = S > 0 and x:linear(router.shared_weight):totable()
  local stage = S > 0 and x:linear(router.stage_weight):totable()
  local out = {}
  for t = 1, #routed do
    local p, order = softmax(routed[t]), {}
    for e in ipairs(p) do order[e] = e end
    table.sort(order, function(i, j) return p[i] > p[j] end)
    local sum = 0
    for i = 1, k do sum = sum + p[order[i]] end
    local a = S > 0 and softmax(stage[t]) or { 0, 1 }
    local twice = rescale and S > 0 and 2 or 1
    out[t] = {}
    for i = 1, k do
      local g = norm and p[order[i]] / sum * (rescale and k or 1) or p[order[i]] * (rescale and #p or 1)
      out[t][order[i] + S] = a[2] * twice * g
    end
    if S > 0 then
      for e, g in ipairs(softmax(shared[t])) do out[t][e] = a[1] * twice * g * (rescale and S or 1) end
    end
  end
  return out
end

describe("router.two_stage", function()
  for _, case in ipairs {
    { k = 2, S = 2, norm = true, rescale = true }, { k = 2, S = 2, norm = false, rescale = false },
    { k = 1, S = 3, norm = false, rescale = true },
    { k = 3, S = 0, norm = true, rescale = true }, { k = 2, S = 0, norm = false, rescale = true },
  } do
    it(("weighs shared and chosen by the formula: k %d, S %d"):format(case.k, case.S), function()
      local router = router_of { top_k = case.k, num_shared = case.S, norm_topk_prob = case.norm, rescale = case.rescale }
      local x = moe.randn(7, 5)
      local routing = router:route(x, {})
      local want, seen = reference(router, x, case.k, case.S, case.norm, case.rescale), 0
      local token, expert, weight = routing.token:totable(), routing.expert:totable(), routing.weight:totable()
      for a = 1, #token do
        assert.close(want[token[a]][expert[a]], weight[a], EXACT)
        seen = seen + 1
      end
      assert.equal(7 * (case.k + case.S), seen)
      assert.close(moe.ones(7), routing.probs:sum(-1), EXACT)
      assert.equal(case.k + case.S, routing.top_k)
      local even = case.S == 0 or case.S == case.k -- a1 + a2 = 1
      if case.norm and case.rescale and even then assert.close(1, routing.weight:mean(), EXACT) end
    end)
  end

  it("follows a choice, a mask of experts and a mask of tokens", function()
    local router, x = router_of { top_k = 2, num_shared = 2 }, moe.randn(4, 5)
    local index = router:route(x, {}).index
    assert.same({ 1, 2 }, index[1]:narrow(1, 1, 2):totable())
    local other = moe.tensor({ { 1, 2, 3, 4 }, { 1, 2, 5, 6 }, { 1, 2, 4, 3 }, { 1, 2, 6, 3 } }, { dtype = "i64" })
    assert.same(other:totable(), router:route(x, { choice = other }).index:totable())
    local allowed = moe.tensor { 1, 1, 0, 1, 1, 0 }:ne(0)
    for _, row in ipairs(router:route(x, { expert_mask = allowed }).index:totable()) do
      table.sort(row)
      assert.same({ 1, 2, 4, 5 }, row)
    end
    local routing = router:route(x, { mask = moe.tensor { 1, 0, 1, 1 }:ne(0) })
    assert.equal(12, routing.num_assignments)
    assert.same({ 0, 0, 0, 0 }, routing.index:totable()[2])
  end)

  it("says what is wrong", function()
    local function says(want, o)
      local message = helper.error_of(router_of, o)
      assert.truthy(message:find(want, 1, true), message)
    end
    says("of 6 experts 5 are shared, which leaves 1 to route", { top_k = 2, num_shared = 5 })
    says("option 'num_shared' must not be negative", { num_shared = -1 })
    says("norm_topk_prob with top_k = 1", { top_k = 1, norm_topk_prob = true })
    says("did you mean 'num_shared'", { num_share = 1 })
  end)
end)
