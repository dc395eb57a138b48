-- fake_quantize against a loop over numbers; its gradient is the one that passes by.
local helper = require "spec.helper"
local moe = require "moe"

local function round(v) -- halves to even
  local f = math.floor(v)
  local d = v - f
  if d > 0.5 or (d == 0.5 and f % 2 == 1) then f = f + 1 end
  return f
end

local function reference(rows, levels, mean)
  local out = {}
  for r, row in ipairs(rows) do
    local most, sum = 0, 0
    for _, v in ipairs(row) do
      most, sum = math.max(most, math.abs(v)), sum + math.abs(v)
    end
    local s = mean and sum / #row or most / levels
    out[r] = {}
    for i, v in ipairs(row) do
      out[r][i] = s == 0 and 0 or math.max(-levels, math.min(levels, round(v / s))) * s
    end
  end
  return out
end

describe("fake_quantize", function()
  it("agrees with loops, row by row, for both scales and several numbers of levels", function()
    moe.manual_seed(1)
    for _, n in ipairs { 1, 7, 64, 2100 } do
      local x = moe.randn(3, n, { dtype = "f64" })
      for _, levels in ipairs { 1, 7, 127 } do
        for _, scale in ipairs { "absmax", "absmean" } do
          assert.close(reference(x:totable(), levels, scale == "absmean"), x:fake_quantize(levels, scale),
            { rtol = 1e-12, atol = 1e-12 })
        end
      end
    end
  end)

  it("shares a scale over as many dimensions as it is told", function()
    local x = moe.randn(2, 3, 4, { dtype = "f64" })
    for dims, rows in pairs { [0] = 24, [1] = 6, [2] = 2, [3] = 1 } do
      local wanted = reference(x:reshape({ rows, 24 // rows }):totable(), 7, false)
      assert.close(wanted, x:fake_quantize(7, "absmax", dims):reshape { rows, 24 // rows }, { rtol = 1e-12, atol = 1e-15 })
    end
  end)

  it("rounds halves to even and is its own fixed point", function()
    assert.close({ 4, 2, 2, 0, 0, -4 }, moe.tensor { 4, 2.5, 1.5, 0.5, -0.5, -3.5 }:fake_quantize(4))
    local y = moe.randn(5, 33):fake_quantize(7)
    assert.close(y, y:fake_quantize(7), { rtol = 1e-6 })
  end)

  it("gives few values: three for ternary weights", function()
    moe.manual_seed(2)
    local w = moe.randn(4, 50)
    local seen = {}
    for _, v in ipairs(w:fake_quantize(1, "absmean", 2):reshape({ -1 }):totable()) do seen[v] = true end
    local n = 0
    for _ in pairs(seen) do n = n + 1 end
    assert.equal(3, n)
    assert.is_true(seen[0.0])
  end)

  it("lets gradients pass as they are", function()
    local x = moe.randn({ 3, 4 }, { requires_grad = true })
    local g = moe.randn(3, 4)
    x:fake_quantize(1, "absmean"):backward(g)
    assert.close(g, x.grad)
  end)

  it("gives 0 for zeros, and spoils only the row of a NaN", function()
    local y = moe.tensor { { 0, 0 }, { 1, 0 / 0 }, { 1, 2 } }:fake_quantize(3)
    assert.close({ 0, 0 }, y[1])
    assert.is_true(y[2]:isnan():all():item())
    assert.close({ 4 / 3, 2 }, y[3], { rtol = 1e-6 })
    assert.same({ 0, 3 }, moe.zeros(0, 3):fake_quantize().shape)
    assert.same({ 3, 0 }, moe.zeros(3, 0):fake_quantize().shape)
  end)

  it("names what is wrong", function()
    assert.matches("levels must lie in 1..2%^20, got 0", helper.error_of(moe.fake_quantize, moe.ones(3), 0))
    assert.matches("dims must lie in 0..1, .* got 2", helper.error_of(moe.fake_quantize, moe.ones(3), 7, "absmax", 2))
    assert.matches("floating, got i64", helper.error_of(moe.fake_quantize, moe.ones({ 3 }, { dtype = "i64" })))
  end)
end)
