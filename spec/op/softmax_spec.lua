-- softmax and log_softmax against plain loops: every dim, sizes around the kernels' blocks, extreme values.
local helper = require "spec.helper"
local moe = require "moe"

local inf = math.huge

-- softmax of each list of `rows`
local function reference(row)
  local m, s, y = -inf, 0, {}
  for _, v in ipairs(row) do m = math.max(m, v) end
  for i, v in ipairs(row) do
    y[i] = math.exp(v - m)
    s = s + y[i]
  end
  for i = 1, #y do y[i] = y[i] / s end
  return y
end

describe("softmax", function()
  for _, dtype in ipairs { "f32", "f64" } do
    local rtol = dtype == "f32" and 3e-6 or 1e-13
    it("of rows of every length, " .. dtype, function()
      local r = helper.random(11)
      for _, n in ipairs { 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 128, 1000, 2049, 5000 } do
        local rows = { {}, {}, {} }
        for k = 1, 3 do
          for i = 1, n do rows[k][i] = 3 * r.normal() end
        end
        local x = moe.tensor(rows, { dtype = dtype })
        local input = x:totable() -- as rounded
        local expected, logs = {}, {}
        for k = 1, 3 do
          expected[k], logs[k] = reference(input[k]), {}
          for i = 1, n do logs[k][i] = math.log(expected[k][i]) end
        end
        assert.close(expected, x:softmax(), { rtol = rtol, atol = 1e-30 })
        assert.close(logs, x:log_softmax(-1), { rtol = rtol, atol = dtype == "f32" and 2e-6 or 1e-13 })
        -- the same along the first dim of the transpose, by another kernel
        assert.close(expected, x:t():contiguous():softmax(1):t(), { rtol = rtol, atol = 1e-30 })
        assert.close(logs, x:t():contiguous():log_softmax(1):t(), { rtol = rtol, atol = dtype == "f32" and 2e-6 or 1e-13 })
      end
    end)

    it("in the middle of many columns, " .. dtype, function()
      local x = moe.randn(3, 5, 131, { dtype = dtype })
      local y = x:softmax(2)
      assert.close(x:transpose(2, 3):contiguous():softmax():transpose(2, 3), y, { rtol = rtol })
      assert.close(moe.ones(3, 131, { dtype = dtype }), y:sum(2), { rtol = rtol })
      for _, view in ipairs(helper.views(x)) do assert.close(y, view[2]:softmax(2), { rtol = 0, atol = 0 }) end
    end)
  end

  it("large values, equal values, one value", function()
    assert.close({ 0.5, 0.5, 0 }, moe.tensor({ 1e30, 1e30, -1e30 }):softmax())
    assert.close({ 0.5, 0.5, 0 }, moe.tensor({ 700, 700, -inf }):softmax())
    assert.close({ 0, 0 - 200 }, moe.tensor({ 100, -100 }):log_softmax())
    assert.close({ 0.25, 0.25, 0.25, 0.25 }, moe.zeros(4):softmax())
    assert.equal(1, moe.tensor(3):softmax():item())
    assert.equal(-inf, moe.tensor({ 0, -inf }):log_softmax():totable()[2])
  end)

  it("NaN, +inf and rows of -inf give NaN, and leave other rows alone", function()
    for _, dtype in ipairs { "f32", "f64" } do
      local x = moe.tensor({ { 0 / 0, 1 }, { inf, 1 }, { -inf, -inf }, { 2, 2 } }, { dtype = dtype })
      for _, y in ipairs { x:softmax(), x:t():contiguous():softmax(1):t(), x:log_softmax() } do
        local t = y:totable()
        for k = 1, 3 do assert.is_true(t[k][1] ~= t[k][1], "row " .. k) end
        assert.is_true(t[4][1] == t[4][2])
      end
    end
  end)

  it("empty sizes and types", function()
    assert.same({ 0, 3 }, moe.zeros(0, 3):softmax().shape)
    assert.same({ 3, 0 }, moe.zeros(3, 0):softmax().shape)
    assert.equal("f32", moe.tensor({ 1, 2 }, { dtype = "i64" }):softmax().dtype)
    for _, dtype in ipairs { "bf16", "f16" } do
      local y = moe.tensor({ 1, 2 }, { dtype = dtype }):softmax()
      assert.equal(dtype, y.dtype)
      assert.close(reference { 1, 2 }, y, { rtol = 1e-2 })
    end
    assert.matches("softmax: dim 3 is out of range", helper.error_of(moe.softmax, moe.zeros(2, 2), 3))
  end)

  it("takes columns in strips, each row by row the same", function()
    for _, shape in ipairs { { 2, 5, 700 }, { 1, 70, 257 }, { 3, 4, 256 } } do
      local x = moe.randn(shape, { requires_grad = true })
      local g = moe.randn(shape)
      local wanted, lse = x:transpose(2, 3):contiguous():softmax(-1):transpose(2, 3), x:transpose(2, 3):contiguous():logsumexp(-1)
      wanted:backward(g)
      local gradient = x.grad
      x.grad = nil
      local y = x:softmax(2)
      y:backward(g)
      assert.close(wanted, y, { rtol = 1e-5, atol = 1e-7 })
      assert.close(gradient, x.grad, { rtol = 1e-4, atol = 1e-6 })
      assert.close(lse, x:logsumexp(2), { rtol = 1e-5, atol = 1e-6 })
    end
  end)

  it("gradient: y (g - sum g y), in rows and in columns, f32", function()
    for _, n in ipairs { 5, 65, 3000 } do
      local x = moe.randn(4, n, { requires_grad = true })
      local g = moe.randn(4, n)
      local y = x:softmax()
      y:backward(g)
      local yd = y:detach()
      assert.close(yd * (g - (g * yd):sum(2, true)), x.grad, { rtol = 1e-4, atol = 1e-6 })
      local xt = x:detach():t():contiguous()
      xt.requires_grad = true
      xt:softmax(1):backward(g:t())
      assert.close(x.grad, xt.grad:t(), { rtol = 1e-4, atol = 1e-6 })
      x.grad = nil
      x:log_softmax():backward(g)
      assert.close(g - yd * g:sum(2, true), x.grad, { rtol = 1e-4, atol = 1e-5 })
    end
  end)
end)
