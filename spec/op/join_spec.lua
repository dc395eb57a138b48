-- Joining, repeating, turning and padding against plain loops.
local helper = require "spec.helper"
local moe = require "moe"

local function raises(message, f)
  local ok, err = pcall(f)
  assert.is_false(ok)
  assert.is_truthy(err:find(message, 1, true), ("wanted '%s' in: %s"):format(message, err))
end

local function arange(...)
  local n = 1
  for _, s in ipairs { ... } do n = n * s end
  return moe.arange(1, n):to("f32"):view(...)
end

describe("cat and stack", function()
  it("join along any dim, strided parts and empty ones too", function()
    local a, b = arange(2, 3), arange(3, 4):t():narrow(1, 1, 3):t() -- [2, 3], [3, 3]
    assert.same({ { 1, 2, 3 }, { 4, 5, 6 }, { 1, 2, 3 }, { 5, 6, 7 }, { 9, 10, 11 } }, moe.cat({ a, moe.zeros(0, 3), b }):totable())
    assert.same({ { 1, 2, 3, 1 }, { 4, 5, 6, 5 } }, moe.cat({ a, b[{ { 1, 2 }, { 1 } }] }, -1):totable())
    assert.same({ { { 1, 2, 3 }, { 4, 5, 6 } }, { { 0, 0, 0 }, { 0, 0, 0 } } }, moe.stack({ a, moe.zeros(2, 3) }):totable())
    assert.same({ 2, 3, 2 }, moe.stack({ a, a }, -1).shape)
    assert.same({ 2 }, moe.stack({ moe.tensor(1), moe.tensor(2) }).shape)
  end)

  it("meet in a common type, and give each part its own gradient type", function()
    local a, b = moe.ones(2, { dtype = "bf16", requires_grad = true }), moe.ones(1, { dtype = "f64", requires_grad = true })
    local y = moe.cat { a, b }
    assert.equal("f64", y.dtype)
    y = y * moe.tensor({ 1, 2, 3 }, { dtype = "f64" })
    y:sum():backward()
    assert.equal("bf16", a.grad.dtype)
    assert.close({ 1, 2 }, a.grad:to "f32")
    assert.close({ 3 }, b.grad)
    assert.equal("i64", moe.cat({ moe.zeros(1, { dtype = "i64" }), moe.zeros(1, { dtype = "u8" }) }).dtype)
  end)

  it("join the same tensor with itself", function()
    local a = moe.ones(2, { requires_grad = true })
    moe.cat({ a, a, a }):sum():backward()
    assert.same({ 3, 3 }, a.grad:totable())
  end)

  it("explain what is wrong", function()
    raises("no tensors are given", function() moe.cat({}) end)
    raises("tensor 1 is [2, 3], tensor 2 is [2, 4]", function() moe.cat { moe.ones(2, 3), moe.ones(2, 4) } end)
    raises("tensor 1 is [2, 3], tensor 2 is [6]", function() moe.cat { moe.ones(2, 3), moe.ones(6) } end)
    raises("hint: stack", function() moe.cat { moe.tensor(1) } end)
    raises("stack: shapes differ", function() moe.stack { moe.ones(2), moe.ones(3) } end)
    raises("dim 3 is out of range", function() moe.cat({ moe.ones(2, 3) }, 3) end)
  end)
end)

describe("repeats", function()
  it("tile whole tensors", function()
    local x, r = arange(2, 1, 3), { 2, 3, 1, 2 }
    local y = x:tile(r)
    assert.same({ 2, 6, 1, 6 }, y.shape)
    for a = 1, 2 do for b = 1, 6 do for d = 1, 6 do assert.equal(x[(b - 1) % 2 + 1][1][(d - 1) % 3 + 1], y[a][b][1][d]) end end end
    assert.same({ 0, 3 }, arange(1, 3):tile(0, 1).shape)
    raises("fewer dims", function() x:tile(2) end)
    raises("cannot be repeated", function() moe.ones(2):tile(-1) end)
    raises("too large", function() moe.ones(1, 1):tile(1 << 40, 1 << 40) end)
  end)

  it("repeat single positions", function()
    assert.same({ { 1, 1, 2, 2 }, { 3, 3, 4, 4 } }, arange(2, 2):repeat_interleave(2, 2):totable())
    assert.same({ { 1, 2 }, { 1, 2 }, { 3, 4 }, { 3, 4 } }, arange(2, 2):repeat_interleave(2, 1):totable())
    assert.same({ 1, 1, 2, 2, 3, 3, 4, 4 }, arange(2, 2):repeat_interleave(2):totable())
    assert.same({ 0, 2 }, arange(2, 2):repeat_interleave(0, 1).shape)
    assert.same({ 5, 5, 5 }, moe.tensor(5):repeat_interleave(3):totable())
  end)
end)

describe("flip and roll", function()
  it("agree with loops, for every size of element", function()
    for _, dtype in ipairs { "f32", "f64", "bf16", "i32", "u8" } do
      local x = arange(3, 4, 2):to(dtype)
      local f, r = x:flip(1, 3), x:roll({ 1, -5 }, { 1, 2 })
      for i = 1, 3 do for j = 1, 4 do for k = 1, 2 do
        assert.equal(x[4 - i][j][3 - k], f[i][j][k])
        assert.equal(x[(i - 2) % 3 + 1][(j - 1 + 5) % 4 + 1][k], r[i][j][k])
      end end end
    end
    assert.same({ { 6, 1, 2 }, { 3, 4, 5 } }, arange(2, 3):roll(1):totable())
    assert.same({ { 2, 1 }, { 4, 3 } }, arange(2, 2):t():t():flip(2):totable())
    assert.same({ { 2, 1 }, { 4, 3 } }, arange(2, 2):roll({ 1 }, { 2 }):totable())
    assert.same({ 0, 2 }, moe.zeros(0, 2):flip():roll(3).shape)
    assert.same({ 0, 2 }, moe.zeros(0, 2):roll({ 1 }, { 1 }).shape)
    assert.same({ { 2 }, { 1 } }, arange(2, 1):roll({ math.mininteger + 1, 0 }, { 1, 2 }):totable())
    raises("each dim needs one", function() arange(2, 2):roll({ 1, 2 }) end)
    raises("dim 3 is out of range", function() arange(2, 2):roll({ 1 }, { 3 }) end)
  end)
end)

describe("pad", function()
  it("adds constants, and cuts with negative sizes", function()
    local x = arange(2, 2)
    assert.same({ { 0, 1, 2 }, { 0, 3, 4 } }, x:pad({ 1, 0 }):totable())
    assert.same({ { 9, 9 }, { 1, 2 }, { 3, 4 } }, x:pad({ 0, 0, 1, 0 }, "constant", 9):totable())
    assert.same({ { 2, 7 }, { 4, 7 } }, x:pad({ -1, 1 }, { value = 7 }):totable())
    assert.same({ 2, 0 }, x:pad({ -1, -1 }).shape)
    assert.same({ { -math.huge } }, moe.zeros(0, 1):pad({ 0, 0, 1, 0 }, { value = -math.huge }):totable())
  end)

  it("reflects and replicates", function()
    local x = arange(4)
    assert.same({ 3, 2, 1, 2, 3, 4, 3, 2, 1 }, x:pad({ 2, 3 }, "reflect"):totable())
    assert.same({ 1, 1, 1, 2, 3, 4, 4 }, x:pad({ 2, 1 }, "replicate"):totable())
    assert.same({ { 2, 1, 2 }, { 4, 3, 4 } }, arange(2, 2):pad({ 1, 0 }, "reflect"):totable())
  end)

  it("explains what is wrong", function()
    local x = arange(2, 3)
    raises("wanted {left, right}", function() x:pad({ 1 }) end)
    raises("wanted {left, right}", function() x:pad({ 1, 1, 1, 1, 1, 1 }) end)
    raises("too large for dim 2 of x [2, 3] in this mode", function() x:pad({ 3, 0 }, "reflect") end)
    raises("takes more than dim 2", function() x:pad({ -4, 9 }) end)
    raises("no possible size", function() x:pad({ -3, -3 }) end)
    raises("too large", function() x:pad({ 1 << 61, 0 }) end)
    raises("must be one of constant, reflect, replicate", function() x:pad({ 1, 1 }, "edge") end)
  end)
end)

describe("gradients of joins at sizes the examples do not have", function()
  it("agree with differences", function()
    local x = helper.tensor(function(i) return math.sin(i) end, { 3, 4 }, { dtype = "f64" })
    moe.gradcheck(function(v)
      return v:pad({ 3, 2, 1, 2 }, "reflect"), v:pad({ -1, 2, 0, -1 }, "replicate"), v:tile(2, 2, 3), v:repeat_interleave(4, 2),
        v:roll({ 1, 2, 1 }, { 1, 2, 1 }), v:t():flip(1)
    end, { x })
  end)
end)
