-- tostring(tensor).
local moe = require "moe"

local function lines(t)
  local list = {}
  for line in (tostring(t) .. "\n"):gmatch "(.-)\n" do list[#list + 1] = line end
  return list
end

describe("the text of a tensor", function()
  it("is an aligned table and a summary", function()
    assert.equal("  1   2\n  3  10\nmoe.Tensor f32 [2×2] cpu",
      tostring(moe.tensor { { 1, 2 }, { 3, 10 } }))
    assert.equal("  0.5000  -1.2500\nmoe.Tensor f64 [2] cpu", tostring(moe.tensor({ 0.5, -1.25 }, { dtype = "f64" })))
    assert.equal(" -3  40\nmoe.Tensor i64 [2] cpu", tostring(moe.tensor({ -3, 40 }, { dtype = "i64" })))
    assert.equal("  true  false\nmoe.Tensor bool [2] cpu", tostring(moe.tensor { true, false }))
    assert.equal(" 2.5000\nmoe.Tensor f32 [] cpu", tostring(moe.tensor(2.5)))
  end)

  it("names what carries the gradient", function()
    local w = moe.ones(2, { requires_grad = true })
    assert.is_truthy(tostring(w):find("requires_grad", 1, true))
    assert.is_truthy(tostring(w + 1):find("cpu grad=add", 1, true))
  end)

  it("never has more than 12 lines, whatever the shape", function()
    for _, shape in ipairs { { 10 }, { 11 }, { 1000 }, { 12, 3 }, { 10, 3 }, { 500, 500 }, { 2, 100, 3 }, { 1, 100, 3 }, { 7, 4, 50 },
      { 3, 4, 5, 6 },
      { 1, 1, 1, 11, 2 }, { 2, 1, 1, 3, 3 } } do
      local t = moe.randn(shape) * 1e-9
      local l = lines(t)
      assert.is_true(#l <= 12, table.concat(shape, "x") .. ": " .. #l .. " lines")
      for i = 1, #l do assert.is_true(utf8.len(l[i]) <= 130) end
      assert.equal("moe.Tensor f32 [" .. table.concat(shape, "×") .. "] cpu", l[#l])
    end
  end)

  it("shows the edges of what is long", function()
    local l = lines(moe.arange(1, 100))
    assert.equal("   1    2    3    4  …   97   98   99  100", l[1])
    l = lines(moe.arange(1, 40):view(20, 2))
    assert.equal(11, #l)
    assert.equal("  1   2", l[1])
    assert.equal(" …", l[6])
    assert.equal(" 39  40", l[10])
  end)

  it("reads strided tensors as they are", function()
    local x = moe.arange(1, 400):view(20, 20)
    assert.equal(tostring(x:t():contiguous()), tostring(x:t()))
    assert.equal(tostring(x:slice(2, 2, 20, 3):contiguous()), tostring(x:slice(2, 2, 20, 3)))
  end)

  it("uses one scale", function()
    local l = lines(moe.tensor { 1.5e-7, -3e-8 })
    assert.equal(" 1e-07 ×", l[1])
    assert.equal("  1.5000  -0.3000", l[2])
    assert.equal(" 1e+20 ×", lines(moe.tensor { 2e20, 1 })[1])
    assert.equal(" 1e-310 ×", lines(moe.tensor({ 2e-310 }, { dtype = "f64" }))[1])
  end)

  it("aligns nan and inf", function()
    local inf = math.huge
    assert.equal(" 1.5000     nan     inf    -inf", lines(moe.tensor { 1.5, 0 / 0, inf, -inf })[1])
    assert.equal("  nan  -inf", lines(moe.tensor { 0 / 0, -inf })[1])
  end)

  it("says what is empty, and prints the first matrices of a higher rank", function()
    assert.equal("moe.Tensor f32 [0×3] cpu", tostring(moe.zeros(0, 3)))
    assert.equal("moe.Tensor f32 [2×0×3] cpu", tostring(moe.zeros(2, 0, 3)))
    local l = lines(moe.arange(1, 12):view(3, 2, 2))
    assert.same({ " [1, {}, {}]", " 1  2", " 3  4", " [2, {}, {}]", " 5  6", " 7  8", " …", "moe.Tensor i64 [3×2×2] cpu" }, l)
  end)
end)
