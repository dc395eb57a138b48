-- Even shares: the exact assignment against all assignments there are, and Sinkhorn's prices against a plain loop.
local moe = require "moe"
local helper = require "spec.helper"

-- The largest sum of an assignment of k experts a token with loads from low to high, by trying all.
local function best_sum(s, T, E, k, low, high)
  local sets = {}
  for bits = 0, (1 << E) - 1 do
    local list = {}
    for e = 1, E do
      if bits >> (e - 1) & 1 == 1 then list[#list + 1] = e end
    end
    if #list == k then sets[#sets + 1] = list end
  end
  local load, best = {}, -math.huge
  for e = 1, E do load[e] = 0 end
  local function go(t, sum)
    if t > T then
      for e = 1, E do
        if load[e] < low then return end
      end
      best = math.max(best, sum)
      return
    end
    for _, list in ipairs(sets) do
      local fits, add = true, 0
      for _, e in ipairs(list) do fits, add = fits and load[e] < high, add + s[t][e] end
      if fits then
        for _, e in ipairs(list) do load[e] = load[e] + 1 end
        go(t + 1, sum + add)
        for _, e in ipairs(list) do load[e] = load[e] - 1 end
      end
    end
  end
  go(1, 0)
  return best
end

-- Sum of the chosen scores and the loads; checks that choices differ and come best first.
local function judge(s, index, E)
  local sum, load = 0, {}
  for e = 1, E do load[e] = 0 end
  for t, row in ipairs(index) do
    local seen = {}
    for i, e in ipairs(row) do
      assert.is_nil(seen[e])
      seen[e], sum, load[e] = true, sum + s[t][e], load[e] + 1
      if i > 1 then
        local a, b = s[t][row[i - 1]], s[t][e]
        assert.is_true(a > b or a == b and row[i - 1] < e)
      end
    end
  end
  return sum, load
end

-- No cycle of moves between experts gains anything: Bellman-Ford over the experts. With even loads that is optimality.
local function has_gain(s, index, E)
  local gain, chosen = {}, {}
  for t, row in ipairs(index) do
    chosen[t] = {}
    for _, e in ipairs(row) do chosen[t][e] = true end
  end
  for e = 1, E do
    gain[e] = {}
    for f = 1, E do gain[e][f] = -math.huge end
  end
  for t = 1, #index do
    for e in pairs(chosen[t]) do
      for f = 1, E do
        if not chosen[t][f] then gain[e][f] = math.max(gain[e][f], s[t][f] - s[t][e]) end
      end
    end
  end
  local far = {}
  for e = 1, E do far[e] = 0 end
  for round = 1, E do
    local moved = false
    for e = 1, E do
      for f = 1, E do
        if far[e] + gain[e][f] > far[f] + 1e-9 then far[f], moved = far[e] + gain[e][f], true end
      end
    end
    if not moved then return false end
    if round == E then return true end
  end
end

describe("moe.balanced_assignment", function()
  it("is the best of all even assignments", function()
    local r = helper.random(5)
    for case = 1, 150 do
      local E, T = r(1, 4), r(1, 5)
      local k, s = r(1, E), {}
      for t = 1, T do
        s[t] = {}
        for e = 1, E do s[t][e] = case % 3 == 0 and r(-2, 2) or 3 * r.normal() + (e == 1 and 4 or 0) end -- ties, and a favourite
      end
      local index = moe.balanced_assignment(moe.tensor(s, { dtype = "f64" }), { top_k = k }):totable()
      local sum, load = judge(s, index, E)
      local low, high = T * k // E, (T * k + E - 1) // E
      for e = 1, E do assert.is_true(load[e] >= low and load[e] <= high) end
      assert.close(best_sum(s, T, E, k, low, high), sum, { rtol = 1e-12, atol = 1e-12 })
    end
  end)

  it("leaves no cycle of moves that gains, where quarters of the tokens set the prices", function()
    local r = helper.random(8)
    for _, case in ipairs { { 700, 8, 1 }, { 600, 8, 3 }, { 1024, 16, 2 } } do
      local T, E, k = table.unpack(case)
      local s = {}
      for t = 1, T do
        s[t] = {}
        for e = 1, E do s[t][e] = r.normal() + 2 * e / E end
      end
      local index = moe.balanced_assignment(moe.tensor(s, { dtype = "f64" }), { top_k = k }):totable()
      local sum, load = judge(s, index, E)
      for e = 1, E do assert.is_true(load[e] == T * k // E or load[e] == (T * k + E - 1) // E) end
      assert.is_false(has_gain(s, index, E))
      -- what is tested can fail: swapping two tokens that do not want it
      local first, second
      for t = 1, T do
        local e = index[t][1]
        if not first then first = t elseif e ~= index[first][1] then second = second or t end
      end
      if k == 1 then
        index[first], index[second] = index[second], index[first]
        local swapped = judge(s, index, E)
        assert.is_true(swapped < sum)
        assert.is_true(has_gain(s, index, E))
      end
    end
  end)

  it("agrees with the Hungarian method of another library", function()
    for _, case in ipairs(require "spec.fixture.assignment") do
      local index = moe.balanced_assignment(moe.tensor(case.score, { dtype = "f64" })):totable()
      assert.close(case.sum, (judge(case.score, index, #case.score[1])), { rtol = 1e-12 })
    end
  end)

  it("does not depend on threads, and takes every float type", function()
    moe.manual_seed(2)
    local s = moe.randn(200, 8)
    local before = moe.threads()
    moe.threads(1)
    local one = moe.balanced_assignment(s, { top_k = 2 }):totable()
    moe.threads(3)
    assert.same(one, moe.balanced_assignment(s, { top_k = 2 }):totable())
    moe.threads(before)
    assert.same(one, moe.balanced_assignment(s:to "f64", { top_k = 2 }):totable())
    assert.equal(200, #moe.balanced_assignment(s:to "bf16"))
  end)

  it("leaves masked tokens out, whatever they hold", function()
    local nan = 0 / 0
    local s = moe.tensor { { 5, 0 }, { nan, math.huge }, { 4, 0 }, { 3, 2.5 } }
    local mask = moe.tensor { 1, 0, 1, 1 }:gt(0)
    local index = moe.balanced_assignment(s, { mask = mask }):totable()
    assert.same({ { 1 }, { 0 }, { 1 }, { 2 } }, index)
    assert.same({ { 0 }, { 0 } }, moe.balanced_assignment(moe.ones(2, 3), { mask = moe.zeros(2):gt(0) }):totable())
    assert.same({ 0, 2 }, moe.balanced_assignment(moe.ones(0, 3), { top_k = 2 }).shape)
  end)

  it("names what is wrong", function()
    local function says(message, ...)
      local args = table.pack(...)
      assert.matches(message, helper.error_of(function() return moe.balanced_assignment(table.unpack(args, 1, args.n)) end))
    end
    says("the score of token 2 for expert 1 is NaN", moe.tensor { { 1, 2 }, { 0 / 0, 1 } })
    says("the score of token 1 for expert 2 is infinite", moe.tensor { { 1, -math.huge } })
    says("top_k is 3, wanted 1 to 2", moe.ones(4, 2), { top_k = 3 })
    says("top_k is 0, wanted 1 to 2", moe.ones(4, 2), { top_k = 0 })
    says("score is a f32 tensor %[4%], wanted floats %[tokens, experts%]", moe.ones(4))
    says("mask is a bool tensor %[3%], wanted bool %[4%]", moe.ones(4, 2), { mask = moe.ones(3):gt(0) })
    says("further apart than a number can hold", moe.tensor({ { 1.7e308, -1.7e308 }, { 1.7e308, -1.7e308 } }, { dtype = "f64" }))
  end)
end)

describe("moe.sinkhorn_price", function()
  -- One price more until columns are even.
  local function reference(x, mask, iterations)
    local E, g, n = #x[1], {}, 0
    for e = 1, E do g[e] = 0 end
    for t = 1, #x do n = n + (mask[t] and 1 or 0) end
    for _ = 1, iterations do
      local share, mean = {}, 0
      for e = 1, E do share[e] = 0 end
      for t = 1, #x do
        local z = 0
        for e = 1, E do z = z + math.exp(x[t][e] + g[e]) end
        for e = 1, mask[t] and E or 0 do share[e] = share[e] + math.exp(x[t][e] + g[e]) / z end
      end
      for e = 1, E do g[e] = g[e] + math.log(n / E / share[e]) end
      for e = 1, E do mean = mean + g[e] / E end
      for e = 1, E do g[e] = g[e] - mean end
    end
    return g
  end

  it("is the iteration, by a loop", function()
    local r = helper.random(3)
    local x, mask = {}, {}
    for t = 1, 300 do
      x[t], mask[t] = {}, r() < 0.8
      for e = 1, 5 do x[t][e] = 2 * r.normal() + e end
    end
    for _, n in ipairs { 1, 2, 7 } do
      local price = moe.sinkhorn_price(moe.tensor(x, { dtype = "f64" }), { mask = moe.tensor(mask), iterations = n, tolerance = 0 })
      assert.close(reference(x, mask, n), price, { rtol = 1e-10, atol = 1e-12 })
    end
    local single = moe.sinkhorn_price(moe.tensor(x), { mask = moe.tensor(mask), iterations = 7, tolerance = 0 })
    assert.close(reference(x, mask, 7), single, { rtol = 1e-4, atol = 1e-5 })
  end)

  it("makes the shares even, also of experts that nobody wants", function()
    moe.manual_seed(5)
    local x = moe.randn(500, 6, { dtype = "f64" }) + moe.tensor { 0, 0, 3, -200, 0, 90 }
    local price = moe.sinkhorn_price(x, { iterations = 200, tolerance = 1e-6 })
    assert.close(moe.full({ 6 }, 500 / 6), (x + price):softmax(-1):sum(1), { rtol = 1e-5 })
    assert.close(0, price:sum(), { atol = 1e-9 })
    local early = moe.sinkhorn_price(x, { iterations = 200, tolerance = 0.5 })
    assert.is_true(((x + early):softmax(-1):sum(1) / (500 / 6) - 1):abs():max():item() < 0.5)
    assert.not_close(price, early)
  end)

  it("does not depend on threads", function()
    moe.manual_seed(2)
    local s, before = moe.randn(1000, 8), moe.threads()
    moe.threads(1)
    local one = moe.sinkhorn_price(s):totable()
    moe.threads(3)
    assert.same(one, moe.sinkhorn_price(s):totable())
    moe.threads(before)
  end)

  it("names what is wrong", function()
    local function says(message, ...)
      local args = table.pack(...)
      assert.matches(message, helper.error_of(function() return moe.sinkhorn_price(table.unpack(args, 1, args.n)) end))
    end
    says("the logit of token 1 for expert 2 is NaN", moe.tensor { { 1, 0 / 0 } })
    says("the logit of token 2 for expert 1 is infinite", moe.tensor { { 1, 0 }, { math.huge, 0 } })
    says("iterations is 0, wanted at least 1", moe.ones(2, 2), { iterations = 0 })
    says("tolerance must not be negative", moe.ones(2, 2), { tolerance = -1 })
    says("logits is a i64 tensor", moe.ones({ 2, 2 }, { dtype = "i64" }))
  end)
end)
