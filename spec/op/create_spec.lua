-- Creation of tensors: shapes, types, sequences, leaves, bad arguments.
local helper = require "spec.helper"
local moe = require "moe"

local function shape_of(t) return { table.unpack(t.shape) } end

describe("creation", function()
  it("takes sizes one by one or as a list, in every type", function()
    for _, dtype in ipairs { "bool", "u8", "i32", "i64", "f16", "bf16", "f32", "f64" } do
      local z, o = moe.zeros(2, 3, { dtype = dtype }), moe.ones({ 2, 3 }, { dtype = dtype })
      assert.equal(dtype, z.dtype)
      assert.close({ { 0, 0, 0 }, { 0, 0, 0 } }, z)
      assert.close({ { 1, 1, 1 }, { 1, 1, 1 } }, o)
    end
    assert.equal("f32", moe.zeros(1).dtype)
    assert.same({}, shape_of(moe.zeros({})))
    assert.same({ 0, 4 }, shape_of(moe.zeros(0, 4)))
    assert.same({ 2, 5 }, shape_of(moe.empty(2, 5)))
    assert.close({ { 0.5, 0.5 } }, moe.full({ 1, 2 }, 0.5))
    assert.equal("i64", moe.full({ 2 }, 7, { dtype = "i64" }).dtype)
  end)

  it("copies shape and type of another tensor", function()
    local x = moe.tensor({ { 1, 2, 3 }, { 4, 5, 6 } }, { dtype = "f64" })
    for _, name in ipairs { "zeros_like", "ones_like", "rand_like", "randn_like" } do
      local y = moe[name](x:t())
      assert.same({ 3, 2 }, shape_of(y))
      assert.equal("f64", y.dtype)
      assert.equal("f32", moe[name](x, { dtype = "f32" }).dtype)
    end
    assert.close({ { 9, 9, 9 }, { 9, 9, 9 } }, x:full_like(9))
    assert.is_false(moe.zeros_like(moe.ones(2, { requires_grad = true })).requires_grad)
  end)

  it("makes leaves", function()
    local w = moe.ones(3, { requires_grad = true })
    assert.is_true(w.requires_grad);
    (w * 2):sum():backward()
    assert.close({ 2, 2, 2 }, w.grad)
    assert.is_true(moe.randn(2, { requires_grad = true }).requires_grad)
    assert.matches("float", helper.error_of(moe.zeros, 3, { dtype = "i64", requires_grad = true }))
  end)

  it("arange includes its end, as Lua's for", function()
    assert.same({ 1, 2, 3, 4, 5 }, moe.arange(5):totable())
    assert.equal("i64", moe.arange(5).dtype)
    assert.same({}, moe.arange(0):totable())
    for _, c in ipairs { { 2, 5 }, { 5, 2 }, { 0, 10, 3 }, { 5, 1, -2 }, { -3, 3, 2 }, { 1, 1 }, { 7, 8, 5 } } do
      local want = {}
      for i = c[1], c[2], c[3] or 1 do want[#want + 1] = i end
      assert.same(want, moe.arange(table.unpack(c)):totable())
    end
    local f = moe.arange(0, 0.3, 0.1)
    assert.equal("f32", f.dtype)
    assert.close({ 0, 0.1, 0.2, 0.3 }, f, { rtol = 1e-6 })
    assert.equal(101, #moe.arange(0, 1, 0.01))
    assert.close({ 1, 2, 3 }, moe.arange(3, { dtype = "bf16" }))
    assert.equal("f64", moe.arange(3, { dtype = "f64" }).dtype)
    local long = moe.arange(50000)
    assert.equal(50000 * 50001 // 2, long:sum():item())
    assert.matches("arange", helper.error_of(moe.arange, 1, 5, 0))
    assert.matches("arange", helper.error_of(moe.arange, 0 / 0))
    assert.matches("arange", helper.error_of(moe.arange, 1, math.huge))
    assert.matches("arange", helper.error_of(moe.arange, 0, 1e300, 1e-300))
  end)

  it("linspace has both ends", function()
    assert.close({ 0, 0.25, 0.5, 0.75, 1 }, moe.linspace(0, 1, 5), { rtol = 0, atol = 0 })
    assert.close({ 3 }, moe.linspace(3, 9, 1))
    assert.same({}, moe.linspace(0, 1, 0):totable())
    local x = moe.linspace(-0.7, 0.9, 1001, { dtype = "f64" }):totable()
    assert.equal(-0.7, x[1])
    assert.equal(0.9, x[1001])
    for i = 1, 1001 do assert.is_true(math.abs(x[i] - (-0.7 + 1.6 * (i - 1) / 1000)) < 1e-14) end
    assert.matches("linspace", helper.error_of(moe.linspace, 0, 1, -2))
  end)

  it("eye", function()
    assert.close({ { 1, 0, 0 }, { 0, 1, 0 }, { 0, 0, 1 } }, moe.eye(3))
    assert.close({ { 1, 0, 0 }, { 0, 1, 0 } }, moe.eye(2, 3))
    assert.close({ { 1, 0 }, { 0, 1 }, { 0, 0 } }, moe.eye(3, 2, { dtype = "i64" }))
    assert.same({ 0, 3 }, shape_of(moe.eye(0, 3)))
    assert.matches("eye", helper.error_of(moe.eye, -1))
  end)

  it("refuses bad sizes, types and options", function()
    assert.matches("zeros.*negative", helper.error_of(moe.zeros, 2, -1))
    assert.matches("zeros", helper.error_of(moe.zeros, { 2, "x" }))
    assert.matches("zeros", helper.error_of(moe.zeros, math.maxinteger, math.maxinteger))
    assert.matches("dtype", helper.error_of(moe.zeros, 2, { dtype = "f31" }))
    assert.matches("did you mean 'dtype'", helper.error_of(moe.zeros, 2, { dtyp = "f32" }))
    assert.has_error(function() moe.zeros(2, { device = "nowhere" }) end)
  end)
end)
