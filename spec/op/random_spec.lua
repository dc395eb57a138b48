-- Random tensors: moments and frequencies against their closed forms (bounds of five standard errors), and the same
-- numbers for the same seed whatever the threads, layouts and sizes.
local helper = require "spec.helper"
local moe = require "moe"

local function shape_of(t) return { table.unpack(t.shape) } end

local function moments(t)
  local v = helper.flatten(t)
  local n, mean, var, low, high = #v, 0, 0, math.huge, -math.huge
  for _, x in ipairs(v) do
    mean = mean + x / n
    low, high = math.min(low, x), math.max(high, x)
  end
  for _, x in ipairs(v) do var = var + (x - mean) ^ 2 / n end
  return mean, var, low, high, v
end

local function near(want, got, sigma)
  assert.is_true(math.abs(got - want) <= 5 * sigma, ("%g is not near %g (%g)"):format(got, want, sigma))
end

local N = 40001

describe("random numbers", function()
  before_each(function() moe.manual_seed(1234) end)

  it("rand is uniform in [0, 1)", function()
    for _, dtype in ipairs { "f32", "f64", "bf16", "f16" } do
      local mean, var, low, high = moments(moe.rand(N, { dtype = dtype }))
      near(1 / 2, mean, math.sqrt(1 / 12 / N))
      near(1 / 12, var, math.sqrt(1 / 180 / N))
      assert.is_true(low >= 0 and (high < 1 or (dtype:match "16" and high <= 1)))
    end
  end)

  it("randn is normal", function()
    for _, dtype in ipairs { "f32", "f64", "bf16" } do
      local mean, var, _, _, v = moments(moe.randn(N, { dtype = dtype }))
      near(0, mean, math.sqrt(1 / N))
      near(1, var, math.sqrt(2 / N))
      local within, fourth, neighbours = 0, 0, 0
      for i, x in ipairs(v) do
        within = within + (math.abs(x) < 1 and 1 or 0)
        fourth = fourth + x ^ 4 / N
        if i > 1 then neighbours = neighbours + x * v[i - 1] / N end
      end
      near(0.682689492, within / N, math.sqrt(0.217 / N))
      near(3, fourth, math.sqrt(96 / N))
      near(0, neighbours, math.sqrt(1 / N)) -- the two of a pair are independent
    end
  end)

  it("uniform_ and normal_ redraw in place, views too", function()
    local x = moe.zeros(N)
    local mean, var, low, high = moments(x:uniform_(-2, 3))
    near(0.5, mean, math.sqrt(25 / 12 / N))
    near(25 / 12, var, math.sqrt(625 / 180 / N))
    assert.is_true(low >= -2 and high < 3)
    mean, var = moments(x:normal_(5, 0.1))
    near(5, mean, math.sqrt(0.01 / N))
    near(0.01, var, 0.01 * math.sqrt(2 / N))
    local m = moe.zeros(3, 4)
    m:narrow(2, 2, 2):uniform_(1, 2)
    assert.close({ 0, 0, 0 }, m:select(2, 1))
    assert.is_true(m:select(2, 2):ge(1):all():item())
    assert.close({ 2, 2 }, moe.zeros(2):uniform_(2, 2))
    assert.matches("uniform", helper.error_of(function() m:uniform_(2, 1) end))
    assert.matches("normal", helper.error_of(function() m:normal_(0, -1) end))
    assert.matches("normal", helper.error_of(function() moe.zeros(2, { dtype = "i64" }):normal_() end))
  end)

  it("randint takes both ends, each as likely", function()
    local v = helper.flatten(moe.randint(1, 6, N))
    local count = {}
    for _, x in ipairs(v) do count[x] = (count[x] or 0) + 1 end
    local chi = 0
    for f = 1, 6 do chi = chi + (count[f] - N / 6) ^ 2 / (N / 6) end
    count[1], count[2], count[3], count[4], count[5], count[6] = nil, nil, nil, nil, nil, nil
    assert.is_nil(next(count))
    assert.is_true(chi < 30) -- 5 degrees of freedom: beyond 30 once in 70,000
    assert.same({ 2, 3 }, shape_of(moe.randint(-1, 1, 2, 3)))
    assert.same({ 2, 3 }, shape_of(moe.randint(-1, 1, { 2, 3 })))
    assert.equal("i64", moe.randint(0, 9, 2).dtype)
    assert.equal("u8", moe.randint(0, 9, { 2 }, { dtype = "u8" }).dtype)
    assert.same({ 7, 7 }, moe.randint(7, 7, 2):totable())
    moe.randint(math.mininteger, math.maxinteger, 4)
    assert.matches("randint: low = 3 is above high = 2", helper.error_of(moe.randint, 3, 2, 1))
  end)

  it("randperm is a permutation of 1..n, every one as likely", function()
    local v = moe.randperm(1000):totable()
    table.sort(v)
    for i = 1, 1000 do assert.equal(i, v[i]) end
    local seen = {}
    for _ = 1, 6000 do
      local key = table.concat(moe.randperm(3):totable())
      seen[key] = (seen[key] or 0) + 1
    end
    local n = 0
    for _, k in pairs(seen) do
      n = n + 1
      near(1000, k, math.sqrt(1000 * 5 / 6))
    end
    assert.equal(6, n)
    assert.same({}, moe.randperm(0):totable())
    assert.matches("randperm", helper.error_of(moe.randperm, -1))
  end)

  it("bernoulli follows p", function()
    local p = moe.tensor { 0, 0.1, 0.5, 0.9, 1 }
    local y = p:expand(8000, 5):bernoulli()
    assert.equal("f32", y.dtype)
    local mean = y:mean(1):totable()
    for i, q in ipairs { 0, 0.1, 0.5, 0.9, 1 } do near(q, mean[i], math.sqrt(q * (1 - q) / 8000) + 1e-7) end
    assert.matches("bernoulli: element 2 of p is 1.5", helper.error_of(function() moe.tensor { 0.5, 1.5 }:bernoulli() end))
    assert.matches("bernoulli", helper.error_of(function() moe.tensor { 0 / 0 }:bernoulli() end))
  end)

  it("multinomial draws positions in proportion", function()
    local w = moe.tensor { { 1, 0, 3, 6 }, { 0, 0, 2, 0 } }
    local y = w:multinomial(20000, true)
    assert.same({ 2, 20000 }, shape_of(y))
    local count = { 0, 0, 0, 0 }
    for _, p in ipairs(y:select(1, 1):totable()) do count[p] = count[p] + 1 end
    assert.equal(0, count[2])
    for i, q in pairs { 0.1, [3] = 0.3, [4] = 0.6 } do near(q * 20000, count[i], math.sqrt(q * (1 - q) * 20000)) end
    assert.is_true(y:select(1, 2):eq(3):all():item())
  end)

  it("multinomial without putting back: no position twice, successive draws", function()
    local first = { 0, 0, 0 }
    local y = moe.tensor { 1, 2, 3 }:expand(6000, 3):multinomial(2):totable()
    local both = 0
    for _, p in ipairs(y) do
      assert.is_true(p[1] ~= p[2])
      first[p[1]] = first[p[1]] + 1
      if p[1] == 3 and p[2] == 2 then both = both + 1 end
    end
    for i = 1, 3 do near(1000 * i, first[i], math.sqrt(6000 * (i / 6) * (1 - i / 6))) end
    near(6000 * 0.5 * 2 / 3, both, math.sqrt(6000 / 3 * 2 / 3)) -- 3 first, then 2 of {1, 2}
    local all = moe.rand(5, 9):multinomial(9):sort(-1)
    if type(all) == "table" then all = all[1] end
    assert.close(moe.arange(9):expand(5, 9), all)
    local function refused(message, w, ...) assert.matches("multinomial: " .. message, helper.error_of(moe.multinomial, w, ...)) end
    refused("row 1 of probs has 1 weights above 0", moe.tensor { 0, 1 }, 2)
    refused("cannot draw num_samples = 3 of 2", moe.ones(2), 3)
    refused("probs has %-1 at row 2, position 1", moe.tensor { { 1, 1 }, { -1, 1 } }, 1)
    refused("row 1 of probs sums to 0", moe.zeros(3), 1, true)
    refused("probs has %-?nan", moe.tensor { 0 / 0, 1 }, 1, true)
  end)

  it("dropout scales what stays, and its backward finds the same mask", function()
    local x = moe.ones(N, { requires_grad = true })
    local y = x:dropout(0.3)
    local v, kept = helper.flatten(y), 0
    for _, q in ipairs(v) do
      assert.is_true(q == 0 or math.abs(q - 1 / 0.7) < 1e-6)
      if q ~= 0 then kept = kept + 1 end
    end
    near(0.7 * N, kept, math.sqrt(0.21 * N))
    y:sum():backward()
    assert.close(y:detach(), x.grad, { rtol = 0, atol = 0 })
    assert.close({ 1, 2 }, moe.tensor { 1, 2 }:dropout(0.5, false))
    assert.close({ 1, 2 }, moe.tensor { 1, 2 }:dropout { p = 0 })
    assert.close({ 0, 0 }, moe.tensor { 1, math.huge }:dropout(1))
    assert.equal("bf16", moe.ones(4, { dtype = "bf16" }):dropout(0.5).dtype)
    assert.matches("dropout: p must lie in", helper.error_of(function() x:dropout(1.5) end))
    assert.matches("dropout: p must lie in", helper.error_of(function() x:dropout(0 / 0) end))
    -- second order: linear, so the gradient of the gradient by g is the mask again
    local a = moe.ones(5, { dtype = "f64", requires_grad = true })
    local z = (a * a):dropout(0.5)
    local g = moe.grad(z:sum(), a, { create_graph = true })
    if type(g) == "table" then g = g[1] end
    local h = moe.grad(g:sum(), a)
    if type(h) == "table" then h = h[1] end
    assert.close(z:detach() * 2, h)
  end)
end)

describe("the random stream", function()
  local draws = {
    rand = function(n) return moe.rand(n) end,
    randn = function(n) return moe.randn(n) end,
    rand64 = function(n) return moe.rand(n, { dtype = "f64" }) end,
    randn64 = function(n) return moe.randn(n, { dtype = "f64" }) end,
    randint = function(n) return moe.randint(1, 1000000, n) end,
    bernoulli = function(n) return moe.full({ n }, 0.5):bernoulli() end,
    dropout = function(n) return moe.ones(n):dropout(0.5) end,
    multinomial = function(n) return moe.ones(n, 5):multinomial(3) end,
  }
  for name, draw in pairs(draws) do
    it(name .. " is the same for a seed and for any number of threads, and moves on", function()
      local threads = moe.threads()
      local n = name == "multinomial" and 300 or 50003
      moe.manual_seed(7)
      local a, next_a = draw(n):totable(), draw(9):totable()
      moe.manual_seed(7)
      moe.threads(1)
      local b, next_b = draw(n):totable(), draw(9):totable()
      moe.threads(3)
      moe.manual_seed(7)
      local c = draw(n):totable()
      moe.threads(threads)
      assert.same(a, b)
      assert.same(a, c)
      assert.same(next_a, next_b)
      moe.manual_seed(8)
      assert.are_not.same(a, draw(n):totable())
      moe.manual_seed(7)
      local first = draw(9):totable()
      assert.are_not.same(first, next_a)
      -- a shorter draw is the beginning of a longer one
      for i = 1, 9 do assert.same(a[i], first[i]) end
    end)
  end
end)
