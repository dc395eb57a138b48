-- sort, argsort, topk against a stable sort in Lua: each of the kernel's ways (packed, threshold, insertion, radix) by
-- its sizes, ties, NaN, both zeros, every dim and type.
local helper = require "spec.helper"
local moe = require "moe"

local inf, nan = math.huge, 0 / 0

-- Positions of list in the order wanted; NaN is the largest, equals stay in order.
local function order_of(list, descending)
  local at = {}
  for i = 1, #list do at[i] = i end
  local function above(a, b) -- a is larger
    if a ~= a then return b == b end
    return b == b and a > b
  end
  table.sort(at, function(i, j)
    local a, b = list[i], list[j]
    if above(a, b) then return descending end
    if above(b, a) then return not descending end
    return i < j
  end)
  return at
end

local function picked(list, at, k)
  local v, p = {}, {}
  for i = 1, k do
    p[i] = at[i]
    v[i] = list[at[i]]
  end
  return v, p
end

local function check_rows(rows, x, k, largest)
  local v, p = x:topk(k, -1, largest)
  local vt, pt = v:totable(), p:totable()
  for i, row in ipairs(rows) do
    local values, at = picked(row, order_of(row, largest), k)
    assert.same(at, pt[i])
    assert.close(values, vt[i], { rtol = 0, atol = 0, nan = true })
  end
end

describe("topk", function()
  for _, dtype in ipairs { "f32", "f64", "i64" } do
    it("of rows of many lengths, " .. dtype, function()
      local r = helper.random(4)
      for _, n in ipairs { 1, 2, 5, 8, 16, 33, 64, 200, 256, 1024, 1025, 3000 } do
        for _, ties in ipairs { false, true } do
          local rows = {}
          for k = 1, 4 do
            rows[k] = {}
            for i = 1, n do rows[k][i] = ties and r(5) or (dtype == "i64" and r(1 << 40) or r.normal()) end
          end
          local x = moe.tensor(rows, { dtype = dtype })
          rows = x:totable()
          for _, k in ipairs { 1, 2, 8, 16, 17, 64, 65, n } do
            if k <= n and (n < 1000 or k < 100) then
              check_rows(rows, x, k, true)
              check_rows(rows, x, k, false)
            end
          end
        end
      end
    end)
  end

  it("NaN is the largest, zeros of both signs are equal, infinities are in order", function()
    local row = { 1, nan, -inf, 0.0, -0.0, inf, -nan, -3, 0.0, -0.0 }
    for _, dtype in ipairs { "f32", "f64" } do
      for _, times in ipairs { 1, 7, 150 } do -- packed, then too long for it
        local long = {}
        for i = 1, times * #row do long[i] = row[(i - 1) % #row + 1] end
        local x = moe.tensor({ long }, { dtype = dtype })
        for _, k in ipairs { 3, 10, math.min(70, #long) } do
          check_rows({ long }, x, k, true)
          check_rows({ long }, x, k, false)
        end
      end
    end
  end)

  it("along every dim, from strided views", function()
    local x = moe.randn(4, 5, 6)
    for dim = 1, 3 do
      local v, p = x:topk(2, dim)
      local shape = { 4, 5, 6 }
      shape[dim] = 2
      assert.same(shape, v.shape)
      assert.same(shape, p.shape)
      local moved = x:transpose(dim, 3):contiguous()
      local v2, p2 = moved:topk(2)
      assert.close(v2:transpose(dim, 3), v, { rtol = 0, atol = 0 })
      assert.close(p2:transpose(dim, 3), p)
      for _, view in ipairs(helper.views(x)) do assert.close(p, (select(2, view[2]:topk(2, dim))), { rtol = 0 }) end
    end
  end)

  it("scalars, nothing, types, messages", function()
    local v, p = moe.tensor(5):topk(1)
    assert.equal(5, v:item())
    assert.equal(1, p:item())
    assert.same({ 3, 0 }, moe.randn(3, 4):topk(0).shape)
    assert.same({ 0, 2 }, moe.zeros(0, 4):topk(2).shape)
    for _, dtype in ipairs { "bf16", "f16", "i32", "u8" } do
      v, p = moe.tensor({ 3, 1, 2 }, { dtype = dtype }):topk(2)
      assert.equal(dtype, v.dtype)
      assert.same({ 3, 2 }, v:totable())
      assert.same({ 1, 3 }, p:totable())
    end
    local x = moe.zeros(2, 3)
    assert.matches("topk: k = 4 is out of range: x is %[2, 3%], dim 2 has 3 elements", helper.error_of(x.topk, x, 4))
    assert.matches("topk: k = %-1 is out of range", helper.error_of(x.topk, x, -1))
    assert.matches("topk: dim 3 is out of range", helper.error_of(x.topk, x, 1, 3))
  end)

  it("the gradient goes to the chosen", function()
    local x = moe.tensor({ { 1, 5, 5, 2 }, { 9, 0, -1, 3 } }, { requires_grad = true })
    local v = x:topk(2)
    v:backward(moe.tensor { { 1, 2 }, { 3, 4 } })
    assert.same({ { 0, 1, 2, 0 }, { 3, 0, 0, 4 } }, x.grad:totable())
    local y = moe.tensor({ { 1, 5 }, { 9, 0 }, { 4, 2 } }, { requires_grad = true })
    y:topk(1, 1, false):backward(moe.tensor { { 7, 8 } })
    assert.same({ { 7, 0 }, { 0, 8 }, { 0, 0 } }, y.grad:totable())
  end)
end)

describe("sort", function()
  it("is stable both ways, for every length and type", function()
    local r = helper.random(9)
    for _, dtype in ipairs { "f32", "f64", "i64" } do
      for _, n in ipairs { 1, 2, 10, 48, 49, 64, 65, 300, 5000 } do
        local row = {}
        for i = 1, n do row[i] = r() < 0.3 and r(4) or math.floor(1000 * r.normal()) end
        local x = moe.tensor(row, { dtype = dtype })
        for _, descending in ipairs { false, true } do
          local v, p = x:sort(1, descending)
          local values, at = picked(row, order_of(row, descending), n)
          assert.same(at, p:totable())
          assert.close(values, v, { rtol = 0 })
          assert.same(at, x:argsort(1, descending):totable())
        end
      end
    end
  end)

  it("extremes of integers", function()
    local x = moe.tensor({ 0, math.mininteger, math.maxinteger, -1, 1 }, { dtype = "i64" })
    assert.same({ 2, 4, 1, 5, 3 }, x:argsort():totable())
    assert.same({ 3, 5, 1, 4, 2 }, x:argsort(1, true):totable())
  end)

  it("along a middle dim; empty", function()
    local x = moe.randn(3, 7, 2)
    local v, p = x:sort(2)
    local moved = x:transpose(2, 3):contiguous()
    assert.close(moved:sort():transpose(2, 3), v, { rtol = 0 })
    assert.close(x:gather(2, p), v, { rtol = 0 })
    assert.same({ 0, 3 }, moe.zeros(0, 3):sort(1).shape)
    assert.same({ 3, 0 }, moe.zeros(3, 0):sort().shape)
  end)

  it("the gradient goes back to where each was", function()
    local x = moe.tensor({ 3, 1, 2, 1 }, { requires_grad = true })
    x:sort():backward(moe.tensor { 10, 20, 30, 40 })
    assert.same({ 40, 10, 30, 20 }, x.grad:totable())
  end)
end)
