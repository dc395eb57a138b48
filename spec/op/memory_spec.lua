-- Lookups in large tables, against plain loops.
require "spec.helper"
local moe = require "moe"

local function i64(list) return moe.tensor(list, { dtype = "i64" }) end

describe("memory_mix and memory_dots", function()
  it("are sums of, and products with, the rows that an index names; 0 names none", function()
    for _, dtype in ipairs { "f32", "f64" } do
      moe.manual_seed(2)
      local table_, index = moe.randn(50, 7, { dtype = dtype }), moe.randint(0, 50, 4, 3, 5)
      local weight, x = moe.randn(4, 3, 5, { dtype = dtype }), moe.randn(4, 3, 7, { dtype = dtype })
      local mixed, dots = moe.memory_mix(table_, index, weight), moe.memory_dots(table_, index, x)
      assert.same({ 4, 3, 7 }, mixed.shape)
      assert.same({ 4, 3, 5 }, dots.shape)
      local rows, at = table_:totable(), index:totable()
      local w, v, want_mix, want_dots = weight:totable(), x:totable(), {}, {}
      for a = 1, 4 do
        want_mix[a], want_dots[a] = {}, {}
        for b = 1, 3 do
          want_mix[a][b], want_dots[a][b] = {}, {}
          for c = 1, 7 do want_mix[a][b][c] = 0 end
          for k = 1, 5 do
            local row, dot = rows[at[a][b][k]], 0
            for c = 1, row and 7 or 0 do
              want_mix[a][b][c] = want_mix[a][b][c] + w[a][b][k] * row[c]
              dot = dot + v[a][b][c] * row[c]
            end
            want_dots[a][b][k] = dot
          end
        end
      end
      local tolerance = { rtol = dtype == "f64" and 1e-13 or 1e-5, atol = 1e-6 }
      assert.close(want_mix, mixed, tolerance)
      assert.close(want_dots, dots, tolerance)
    end
  end)

  it("have the gradients of gathered rows, with positions that name none and rows named twice", function()
    moe.manual_seed(4)
    local values = moe.randn(6, 3, { dtype = "f64" })
    local index = i64 { { 2, 0, 2 }, { 6, 6, 1 }, { 0, 0, 0 } }
    local weight, x = moe.randn(3, 3, { dtype = "f64" }), moe.randn(3, 3, { dtype = "f64" })
    for _, sparse in ipairs { true, false } do
      moe.gradcheck(function(v, w) return moe.memory_mix(v, index, w, sparse) end, { values, weight })
      moe.gradcheck(function(v, y) return moe.memory_dots(v, index, y, sparse) end, { values, x })
    end
    local leaf = values:clone()
    leaf.requires_grad = true
    moe.memory_mix(leaf, index, weight):sum():backward()
    assert.same({ 1, 2, 6 }, leaf.grad_rows:totable())
    leaf.grad = nil
    moe.memory_mix(leaf, index, weight, false):sum():backward()
    assert.is_nil(leaf.grad_rows)
  end)

  it("have second derivatives", function()
    moe.manual_seed(4)
    local values, index = moe.randn(6, 3, { dtype = "f64", requires_grad = true }), i64 { { 2, 0, 2 }, { 6, 5, 1 } }
    local weight = moe.randn(2, 3, { dtype = "f64", requires_grad = true })
    local function square(v, w) -- |d/dw sum (mix)^2 / 2|^2
      local y = moe.memory_mix(v, index, w)
      local gw = moe.grad((y * y):sum() / 2, w, { create_graph = true })
      return (gw * gw):sum()
    end
    local gv, gw = moe.grad(square(values, weight), { values, weight })
    local eps = 1e-6
    for _, case in ipairs { { values, gv, 2 }, { weight, gw, 1 } } do
      local t, g = case[1], case[2]
      local at = t:detach()
      local old = at[case[3]][1]
      at[{ case[3], 1 }] = old + eps
      local up = square(values, weight):item()
      at[{ case[3], 1 }] = old - eps
      local down = square(values, weight):item()
      at[{ case[3], 1 }] = old
      assert.close((up - down) / (2 * eps), g[case[3]][1], { rtol = 1e-6 })
    end
  end)

  it("say what is wrong with their arguments", function()
    local v, ids = moe.zeros(4, 2), i64 { { 1, 5 } }
    assert.error_matches(function() moe.memory_mix(v, ids, moe.ones(1, 2)) end,
      "memory_mix: index 5 is outside of 1..4 %(0: none%), the rows of values %[4, 2%]")
    assert.error_matches(function() moe.memory_mix(v, i64 { { -1 } }, moe.ones(1, 1)) end, "index %-1 is outside")
    assert.error_matches(function() moe.memory_mix(v, i64 { { 1, 2 } }, moe.ones(2, 2)) end,
      "memory_mix: weight must be %[1, 2%], got %[2, 2%]: values is %[4, 2%], index %[1, 2%]")
    assert.error_matches(function() moe.memory_dots(v, i64 { { 1, 2 } }, moe.ones(1, 3)) end,
      "memory_dots: x must be %[1, 2%], got %[1, 3%]")
    assert.error_matches(function() moe.memory_dots(moe.zeros(4), ids, moe.ones(1, 2)) end, "keys must be floats %[rows, features%]")
    assert.error_matches(function() moe.memory_mix(v, moe.ones(1, 2), moe.ones(1, 2)) end, "memory_mix: argument 2")
  end)
end)

describe("product_key_topk", function()
  -- all n m sums, sorted by value, equals by slot
  local function brute(a, b, k)
    local all = {}
    for i = 1, #a do
      for j = 1, #b do all[#all + 1] = { a[i] + b[j], (i - 1) * #b + j } end
    end
    table.sort(all, function(p, q)
      if p[1] ~= q[1] then return p[1] > q[1] end
      return p[2] < q[2]
    end)
    local score, slot = {}, {}
    for c = 1, k do score[c], slot[c] = all[c][1], all[c][2] end
    return score, slot
  end

  it("finds the best of all sums among the best of the halves, ties and all", function()
    for seed = 1, 30 do
      moe.manual_seed(seed)
      local n, m = seed % 7 * 5 + 1, seed % 5 * 9 + 1
      local k = math.min(n * m, seed % 11 * 3 + 1)
      for kind = 1, 3 do
        local a, b = moe.randn(6, n, { dtype = "f64" }), moe.randn(6, m, { dtype = "f64" })
        if kind == 2 then a, b = (a * 2):round(), (b * 2):round() end -- many equal sums
        if kind == 3 then a, b = a:fill(1.5), b:fill(-2) end          -- all equal
        for _, dtype in ipairs { "f64", "f32" } do
          a, b = a:to(dtype), b:to(dtype)
          local score, slot = moe.product_key_topk(a, b, k)
          for t = 1, 6 do
            local want_score, want_slot = brute(a[t]:totable(), b[t]:totable(), k)
            assert.same(want_slot, slot[t]:totable())
            assert.close(want_score, score[t], { rtol = 1e-6, atol = 1e-6 })
          end
        end
      end
    end
  end)

  it("of f32 tells apart what a sum in f32 would not", function()
    local a, b = moe.tensor { { 1e8, 0 } }, moe.tensor { { 1, 2, 1.5 } } -- 1e8 + 1, 1e8 + 2: one f32 number
    local _, slot = moe.product_key_topk(a, b, 3)
    assert.same({ { 2, 3, 1 } }, slot:totable())
  end)

  it("is the composed choice, for many rows, on any number of threads, with its gradient", function()
    moe.manual_seed(1)
    local a, b, k = moe.randn(64, 100, { requires_grad = true }), moe.randn(64, 90, { requires_grad = true }), 16
    local threads = moe.threads()
    moe.threads(3)
    local score, slot = moe.product_key_topk(a, b, k)
    moe.threads(threads)
    local va, ia = a:topk(k)
    local vb, ib = b:topk(k)
    local grid, at = (va:unsqueeze(3) + vb:unsqueeze(2)):flatten(2):topk(k)
    assert.close(grid, score, { rtol = 1e-6 })
    local i, j = ia:gather(2, (at - 1):floor_divide(k) + 1), ib:gather(2, (at - 1):remainder(k) + 1)
    assert.same(((i - 1) * 90 + j):totable(), slot:totable())
    local c = moe.randn(64, k)
    local ga, gb = moe.grad((score * c):sum(), { a, b })
    local wa, wb = moe.grad((grid * c):sum(), { a, b })
    assert.close(wa, ga, { rtol = 1e-5, atol = 1e-6 })
    assert.close(wb, gb, { rtol = 1e-5, atol = 1e-6 })
  end)

  it("takes NaN as the least, and infinities", function()
    local nan, inf = 0 / 0, math.huge
    local _, slot = moe.product_key_topk(moe.tensor { { nan, 1, -inf } }, moe.tensor { { 0, nan } }, 6)
    assert.equal(3, slot[1][1])
    local seen = {}
    for _, s in ipairs(slot[1]:totable()) do seen[s] = true end
    assert.equal(6, #seen)
    local score = moe.product_key_topk(moe.tensor { { 1, inf } }, moe.tensor { { 2, -inf } }, 1)
    assert.equal(inf, score[1][1])
  end)

  it("says what is wrong with its arguments", function()
    local a = moe.zeros(2, 3)
    assert.error_matches(function() moe.product_key_topk(a, moe.zeros(2, 4), 13) end, "k is 13, wanted 1 to 12")
    assert.error_matches(function() moe.product_key_topk(a, moe.zeros(2, 4), 0) end, "k is 0")
    assert.error_matches(function() moe.product_key_topk(a, moe.zeros(3, 4), 1) end, "got f32 %[2, 3%] and f32 %[3, 4%]")
    assert.error_matches(function() moe.product_key_topk(a, moe.zeros({ 2, 4 }, { dtype = "f64" }), 1) end, "of one type")
    assert.error_matches(function() moe.product_key_topk(a, moe.zeros(2, 0), 1) end, "wanted 1 to 0")
  end)
end)

describe("ngram_hash", function()
  it("is multiply and xor of the ids back to each order, into tables one after the other", function()
    moe.manual_seed(7)
    local ids = moe.randint(1, 1000, 2, 9)
    local mul, sizes = { 0x7fffffffffffffc5, 12345678901234567, -3 }, { 11, 13, 1009, 17 }
    local got, t = moe.ngram_hash(ids, mul, sizes):totable(), ids:totable()
    for b = 1, 2 do
      for time = 1, 9 do
        local function id(back) return time > back and t[b][time - back] or 0 end
        local two = id(0) * mul[1] ~ id(1) * mul[2]
        local hash = { two, two, two ~ id(2) * mul[3], two ~ id(2) * mul[3] }
        local offset = 0
        for h = 1, 4 do
          local high, low = hash[h] >> 32, hash[h] & 0xffffffff -- an unsigned remainder
          local rest = ((high % sizes[h]) * (0x100000000 % sizes[h]) + low) % sizes[h]
          assert.equal(offset + rest + 1, got[b][time][h])
          offset = offset + sizes[h]
        end
      end
    end
  end)

  it("depends on the last ids alone", function()
    local a = moe.ngram_hash(i64 { { 5, 1, 2, 3 } }, { 3, 5, 7 }, { 101, 103 })
    local b = moe.ngram_hash(i64 { { 9, 1, 2, 3 } }, { 3, 5, 7 }, { 101, 103 })
    assert.same(a[1][4]:totable(), b[1][4]:totable())
    assert.equal(a[1][3][1], b[1][3][1])
    assert.are_not.equal(a[1][3][2], b[1][3][2])
  end)

  it("says what is wrong with its arguments", function()
    local ids = i64 { { 1, 2 } }
    assert.error_matches(function() moe.ngram_hash(ids, { 3 }, { 7 }) end, "multipliers must be at least 2 numbers")
    assert.error_matches(function() moe.ngram_hash(ids, { 3, 5, 7 }, { 7 }) end,
      "sizes must be as many numbers for each of the 2 orders 2..3, got 1")
    assert.error_matches(function() moe.ngram_hash(ids, { 3, 5 }, { 0 }) end, "sizes must be positive, got 0")
    assert.error_matches(function() moe.ngram_hash(moe.ones(2), { 3, 5 }, { 7 }) end, "ngram_hash: argument 1")
  end)
end)

