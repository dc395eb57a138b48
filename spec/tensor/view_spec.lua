-- Views: shapes and elements against plain Lua, shared storage, errors with shapes, second derivatives.
local helper = require "spec.helper"
local moe = require "moe"

local function arange(...)
  local shape, n = { ... }, 1
  for _, s in ipairs(shape) do n = n * s end
  return moe.arange(1, n):to("f32"):view(shape)
end

local function raises(message, f)
  local ok, err = pcall(f)
  assert.is_false(ok)
  assert.is_truthy(err:find(message, 1, true), ("wanted '%s' in: %s"):format(message, err))
end

describe("a view", function()
  it("shares the storage of its tensor", function()
    local x = arange(4, 6)
    for _, v in ipairs {
      x:view(24), x:reshape(2, 12), x:flatten(), x:t(), x:transpose(1, 2), x:permute(2, 1), x:select(1, 2),
      x:narrow(2, 2, 3), x:slice(2, 1, 6, 2), x:expand(2, 4, 6), x:unsqueeze(1), x:squeeze(), x:diagonal(),
      x:unfold(1, 2), x:movedim(1, 2), x:detach(), (x:chunk(2)), (x:split(1)), (x:unbind()), x:unflatten(2, 2, 3),
    } do
      assert.equal(x:storage_id(), v:storage_id())
    end
    x:select(1, 2):fill_(0)
    assert.equal(0, x[2][3])
    assert.not_equal(x:storage_id(), x:t():reshape(24):storage_id())
  end)

  it("infers one size", function()
    assert.same({ 4, 3, 2 }, arange(4, 6):view(4, -1, 2).shape)
    assert.same({ 0, 3 }, moe.zeros(0, 6):view(-1, 3).shape)
    assert.same({ 1, 1 }, moe.zeros(1):view(1, 1).shape)
    assert.same({ 2, 4, 3 }, arange(8, 3):unflatten(1, -1, 4).shape)
  end)

  it("keeps row-major order wherever strides allow", function()
    local x = arange(2, 3, 4, 5)
    local y = x:permute(1, 3, 4, 2) -- dims 2 and 3 still run evenly
    local v = y:view(2, 20, 3)
    assert.same(y:reshape(-1):totable(), v:reshape(-1):totable())
    raises("needs a copy", function() y:view(2, 60) end)
    assert.same(y:contiguous():view(2, 60):totable(), y:reshape(2, 60):totable())
    assert.same(y:contiguous():flatten(2, 3):totable(), y:flatten(2, 3):totable())
  end)

  it("selects, narrows and slices as loops do", function()
    local x = arange(3, 7)
    for i = 1, 3 do
      for j = 1, 7 do
        assert.equal((i - 1) * 7 + j, x:select(1, i):select(1, j):item())
        assert.equal((i - 1) * 7 + j, x:select(2, j - 8):select(1, i - 4):item())
      end
    end
    assert.same({ 9, 10, 11 }, x:select(1, 2):narrow(1, 2, 3):totable())
    assert.same({ 13, 14 }, x:select(1, 2):narrow(1, -2, 2):totable())
    assert.same({ 2, 5 }, x:select(1, 1):slice(1, 2, 6, 3):totable())
    assert.same({ 1, 4, 7 }, x:select(1, 1):slice(1, 1, -1, 3):totable())
    assert.same({ 3, 0 }, x:narrow(2, 8, 0).shape)
    assert.same({ 3, 0 }, x:slice(2, 4, 3).shape)
  end)

  it("takes diagonals and windows as loops do", function()
    local x = arange(3, 5)
    for offset = -4, 6 do
      local want = {}
      for i = 1, 3 do
        local j = i + offset
        if j >= 1 and j <= 5 then want[#want + 1] = (i - 1) * 5 + j end
      end
      assert.same(want, x:diagonal(offset):totable())
    end
    local w = arange(9):unfold(1, 4, 2)
    assert.same({ { 1, 2, 3, 4 }, { 3, 4, 5, 6 }, { 5, 6, 7, 8 } }, w:totable())
    assert.same({ 0 }, x:diagonal(math.maxinteger).shape)
    assert.same({ 0 }, x:diagonal(math.mininteger).shape)
  end)

  it("divides into parts", function()
    local x = arange(7, 2)
    local sizes = {}
    for i, p in ipairs { x:chunk(3) } do sizes[i] = #p end
    assert.same({ 3, 3, 1 }, sizes)
    sizes = {}
    for i, p in ipairs { x:split({ 2, 0, 5 }) } do sizes[i] = #p end
    assert.same({ 2, 0, 5 }, sizes)
    assert.equal(4, select("#", x:split(2)))
    assert.equal(2, select("#", x:unbind(-1)))
    raises("do not add up", function() x:split({ 2, 3 }) end)
    raises("results: at most 64", function() moe.zeros(100):unbind() end)
  end)

  it("keeps a gradient when some parts are not used", function()
    local x = moe.randn(6, 2, { requires_grad = true, dtype = "f64" })
    local _, b = x:chunk(3)
    b:sum():backward()
    assert.same({ { 0, 0 }, { 0, 0 }, { 1, 1 }, { 1, 1 }, { 0, 0 }, { 0, 0 } }, x.grad:totable())
  end)

  it("moves dims", function()
    local x = arange(2, 3, 4, 5)
    assert.same({ 4, 2, 3, 5 }, x:movedim(3, 1).shape)
    assert.same({ 3, 5, 2, 4 }, x:movedim({ 1, 3 }, { 3, 4 }).shape)
    assert.same({ 5, 2, 4, 3 }, x:permute(4, 1, 3, -3).shape)
    local p = x:permute(4, 1, 3, 2)
    for a = 1, 2 do for b = 1, 3 do for c = 1, 4 do for d = 1, 5 do assert.equal(x[a][b][c][d], p[d][a][c][b]) end end end end
  end)

  it("goes up to 16 dimensions", function()
    local x = moe.zeros(2)
    for _ = 1, 15 do x = x:unsqueeze(1) end
    assert.equal(16, #x.shape)
    raises("more than 16 dimensions", function() x:unsqueeze(1) end)
    raises("16", function() moe.zeros(1):view(1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1) end)
    assert.equal(1, #x:squeeze().shape)
  end)

  it("explains what is wrong, counting from 1", function()
    local x = arange(3, 4)
    raises("view: [5, 2] does not hold the 12 elements of shape [3, 4]", function() x:view(5, 2) end)
    raises("only one size may be -1", function() x:view(-1, -1) end)
    raises("size -2 of dim 2 is negative", function() x:view(6, -2) end)
    raises("not determined", function() moe.zeros(0, 3):view(0, -1) end)
    raises("select: position 4 is outside of dim 1 of size 3 (x is [3, 4])", function() x:select(1, 4) end)
    raises("select: position -5 is outside of dim 2 of size 4", function() x:select(2, -5) end)
    raises("count from 1", function() x:select(1, 0) end)
    raises("count from 1", function() x:select(0, 1) end)
    raises("dim 3 is out of range", function() x:select(3, 1) end)
    raises("narrow: 3 elements from position 3 do not fit dim 2 of size 4", function() x:narrow(2, 3, 3) end)
    raises("do not fit", function() x:narrow(2, 3, math.maxinteger) end)
    raises("runs backwards", function() x:slice(2, 4, 2) end)
    raises("step must be at least 1", function() x:slice(2, 1, 4, -1) end)
    raises("x of shape [3, 4] cannot become [6, 4]", function() x:expand(6, 4) end)
    raises("cannot become", function() x:expand(4) end)
    raises("dim 1 appears twice", function() x:permute(1, 1) end)
    raises("2 dimensions", function() x:permute(1) end)
    raises("at most 2 dimensions, got [1, 3, 4]", function() x:unsqueeze(1):t() end)
    raises("windows of 5 do not fit dim 2 of size 4", function() x:unfold(2, 5) end)
    raises("too large", function() moe.zeros(1, 1):expand(1 << 40, 1 << 40) end)
    raises("without dimensions", function() moe.tensor(1):select(1, 1) end)
  end)

  it("detaches from the graph", function()
    local x = moe.ones(3, { requires_grad = true })
    assert.is_false((x * 2):detach().requires_grad)
  end)

  it("has second derivatives", function()
    local x = helper.tensor(function(i) return 0.3 * i end, { 3, 4 }, { dtype = "f64" })
    x.requires_grad = true
    for name, f in pairs {
      select = function(v) return v:select(2, 3) end,
      slice = function(v) return v:slice(2, 1, 4, 2) end,
      diagonal = function(v) return v:diagonal(1) end,
      unfold = function(v) return v:unfold(2, 3, 1) end,
      split = function(v) local a = v:split(2, 2) return a end,
      expand = function(v) return v:unsqueeze(1):expand(2, 3, 4) end,
      permute = function(v) return v:permute(2, 1):reshape(6, 2) end,
    } do
      -- y = sum(view(x)^3): dy/dx = n * 3 x^2, and its own sum has the derivative n * 6 x
      local g = moe.grad((f(x) ^ 3):sum(), x, { create_graph = true })
      local gg = moe.grad(g:sum(), x)
      local count = moe.grad(f(x):sum(), x)
      assert.close((count * 3 * x:detach() ^ 2), g:detach(), { rtol = 1e-10 })
      assert.close((count * 6 * x:detach()), gg, { rtol = 1e-10 }, name)
    end
  end)
end)
