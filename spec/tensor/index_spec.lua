-- x[key] and x[key] = value.
local helper = require "spec.helper"
local moe = require "moe"

local function raises(message, f)
  local ok, err = pcall(f)
  assert.is_false(ok)
  assert.is_truthy(err:find(message, 1, true), ("wanted '%s' in: %s"):format(message, err))
end

describe("x[key]", function()
  local x
  before_each(function() x = moe.arange(1, 24):to("f32"):view(4, 6) end)

  it("counts from 1 and from the end", function()
    assert.same({ 7, 8, 9, 10, 11, 12 }, x[2]:totable())
    assert.same({ 19, 20, 21, 22, 23, 24 }, x[-1]:totable())
    assert.equal(x:storage_id(), x[2]:storage_id())
    assert.equal(9, x[2][3])
    assert.equal(9, x[2.0][3.0])
    assert.equal(9, x[{ 2, 3 }])
    assert.equal("float", math.type(x[2][3]))
  end)

  it("gives Lua values of the tensor's type", function()
    assert.equal("integer", math.type(moe.tensor({ 1 << 60 }, { dtype = "i64" })[1]))
    assert.equal(1 << 60, moe.tensor({ 1 << 60 }, { dtype = "i64" })[1])
    assert.equal(true, moe.tensor({ false, true })[2])
    assert.equal(1.5, moe.tensor({ 1.5 }, { dtype = "bf16" })[1])
  end)

  it("takes ranges, all, new dims", function()
    assert.same({ { 8, 10 }, { 14, 16 } }, x[{ { 2, 3 }, { 2, 4, 2 } }]:totable())
    assert.same({ 3, 9, 15, 21 }, x[{ {}, 3 }]:totable())
    assert.same({ 1, 4, 1, 6 }, x[{ "newaxis", {}, "newaxis" }].shape)
    assert.same({ 6, 12, 18, 24 }, x[{ "...", -1 }]:totable())
    assert.same({ { 13, 14, 15, 16, 17, 18 } }, x[{ { 3 } }]:totable())
    assert.same({ 0, 6 }, x[{ { 2, 1 } }].shape)
    assert.same(x:totable(), x[{}]:totable())
  end)

  it("takes rows by number and by mask", function()
    local rows = moe.tensor({ 4, 1, 4 }, { dtype = "i64" })
    assert.same({ x[4]:totable(), x[1]:totable(), x[4]:totable() }, x[rows]:totable())
    assert.same({ { 6, 1 }, { 12, 7 }, { 18, 13 }, { 24, 19 } }, x[{ {}, moe.tensor({ 6, 1 }, { dtype = "i32" }) }]:totable())
    assert.same({ 2, 2, 6 }, x[moe.tensor({ { 1, 2 }, { 3, 4 } }, { dtype = "u8" })].shape)
    assert.same({ 21, 22, 23, 24 }, x[x:gt(20)]:totable())
    assert.same({ x[2]:totable(), x[4]:totable() }, x[moe.tensor { false, true, false, true }]:totable())
    assert.same({ { 1, 6 }, { 19, 24 } },
      x[{ moe.tensor { true, false, false, true }, { 1, 6, 5 } }]:totable())
  end)

  it("lets gradients through", function()
    local w = helper.tensor(function(i) return 0.1 * i end, { 4, 5 }, { dtype = "f64" })
    moe.gradcheck(function(v)
      return v[2], v[{ {}, { 1, 5, 2 } }], v[{ "newaxis", 3 }], v[moe.tensor({ 2, 2, 4 }, { dtype = "i64" })], v[w:gt(1)]
    end, { w })
  end)

  it("explains what is wrong", function()
    raises("position 5 is outside of dim 1 of size 4", function() return x[5] end)
    raises("position -7 is outside of dim 1 of size 6", function() return x[1][-7] end)
    raises("count from 1", function() return x[0] end)
    raises("must be an integer", function() return x[1.5] end)
    raises("3 keys for a tensor of shape [4, 6]", function() return x[{ 1, 1, 1 }] end)
    raises("wanted a position", function() return x[{ true }] end)
    raises("wanted a position", function() return x[print] end)
    raises("index 7 is outside of 1..6", function() return x[{ {}, moe.tensor({ 1, 7 }, { dtype = "i64" }) }] end)
    raises("index 0 is outside of 1..4", function() return x[moe.tensor({ 0 }, { dtype = "i64" })] end)
    raises("a mask of shape [3]", function() return x[moe.tensor { true, true, false }] end)
    raises("bool for a mask; got f32", function() return x[moe.ones(2)] end)
    raises("only one key", function() return x[{ moe.tensor({ 1 }, { dtype = "i64" }), moe.tensor({ 1 }, { dtype = "i64" }) }] end)
    raises("count from 1", function() return x[{ { 0, 2 } }] end)
    raises("got the field", function() return x[{ dim = 1 }] end)
  end)
end)

describe("x[key] = value", function()
  local x
  before_each(function() x = moe.zeros(3, 4) end)

  it("writes numbers, tables and tensors", function()
    x[2] = 5
    x[{ 1, { 2, 3 } }] = { 1, 2 }
    x[{ {}, 4 }] = moe.tensor({ 7, 8, 9 }, { dtype = "i64" })
    x[3][1] = 0.5
    x[{ 3, 2 }] = true
    assert.same({ { 0, 1, 2, 7 }, { 5, 5, 5, 8 }, { 0.5, 1, 0, 9 } }, x:totable())
    x[{}] = 3
    assert.same({ 3, 3, 3, 3 }, x[1]:totable())
    x[{ {}, { 1, 4, 3 } }] = moe.tensor { { 1 }, { 2 }, { 3 } } -- broadcast over columns
    assert.same({ { 1, 3, 3, 1 }, { 2, 3, 3, 2 }, { 3, 3, 3, 3 } }, x:totable())
  end)

  it("writes exact integers", function()
    local i = moe.zeros(2, 2, { dtype = "i64" })
    i[{ 1, 1 }] = (1 << 60) + 1
    i[2] = { (1 << 60) + 3, 2 }
    assert.equal((1 << 60) + 1, i[1][1])
    assert.equal((1 << 60) + 3, i[2][1])
  end)

  it("writes by mask and by rows", function()
    x[moe.tensor({ 3, 1 }, { dtype = "i64" })] = moe.tensor { { 1, 1, 1, 1 }, { 2, 2, 2, 2 } }
    assert.same({ { 2, 2, 2, 2 }, { 0, 0, 0, 0 }, { 1, 1, 1, 1 } }, x:totable())
    x[x:eq(2)] = -1
    x[x:eq(1)] = moe.tensor { 4, 5, 6, 7 }
    x[{ 2, moe.tensor({ 4, 2 }, { dtype = "i64" }) }] = 9
    x[{ {}, moe.tensor { true, false, false, false } }] = { { 10 }, { 20 }, { 30 } }
    assert.same({ { 10, -1, -1, -1 }, { 20, 9, 0, 9 }, { 30, 5, 6, 7 } }, x:totable())
  end)

  it("handles a source that overlaps the target", function()
    local y = moe.arange(1, 6)
    y[{ { 2, 6 } }] = y[{ { 1, 5 } }]
    assert.same({ 1, 1, 2, 3, 4, 5 }, y:totable())
  end)

  it("is refused where autograd would miss it", function()
    local w = moe.ones(3, { requires_grad = true })
    raises("takes part in autograd", function() w[1] = 2 end)
    raises("takes part in autograd", function() (w * 2)[1] = 2 end)
    raises("would lose", function() x[1] = moe.ones(4, { requires_grad = true }) end)
    moe.no_grad(function() w[1] = 2 end)
    assert.same({ 2, 1, 1 }, w:totable())
  end)

  it("is seen by a backward that needs the old value", function()
    local w, a = moe.ones(3, { requires_grad = true }), moe.ones(3)
    local y = (w * a):sum()
    a[2] = 5
    assert.is_false((pcall(function() y:backward() end)))
  end)

  it("explains what is wrong", function()
    raises("position 4 is outside of dim 1 of size 3", function() x[4] = 1 end)
    raises("a value of shape [2] does not fit into a place of shape [4]", function() x[1] = { 1, 2 } end)
    raises("the value must be", function() x[1] = "a" end)
    raises("the value must be", function() x[1] = nil end)
    raises("share memory", function() moe.zeros(1):expand(3)[2] = 1 end)
    raises("outside of 1..3", function() x[moe.tensor({ 9 }, { dtype = "i64" })] = 1 end)
  end)
end)
