-- Indexing against plain loops: duplicates, strides, types, bounds, and the same sums for any number of threads.
local helper = require "spec.helper"
local moe = require "moe"

local function raises(message, f)
  local ok, err = pcall(f)
  assert.is_false(ok)
  assert.is_truthy(err:find(message, 1, true), ("wanted '%s' in: %s"):format(message, err))
end

local function index(t, dtype) return moe.tensor(t, { dtype = dtype or "i64" }) end

-- n random positions of 1..top
local function positions(n, top, seed)
  local r, t = helper.random(seed or 1), {}
  for i = 1, n do t[i] = r(top) end
  return t
end

local function numbers(shape, seed)
  local r = helper.random(seed or 2)
  return helper.tensor(function() return r.normal() end, shape, { dtype = "f64" })
end

describe("rows by number", function()
  it("are taken from any dim of any layout", function()
    for _, x in ipairs { numbers { 3, 5, 4 }, numbers({ 4, 5, 3 }):permute(3, 2, 1), numbers({ 3, 5, 8 }):slice(3, 1, 8, 2) } do
      local k = { 5, 1, 5, 2 }
      local y = x:index_select(2, index(k))
      assert.same({ 3, 4, 4 }, y.shape)
      for a = 1, 3 do for b = 1, 4 do for c = 1, 4 do assert.equal(x[a][k[b]][c], y[a][b][c]) end end end
    end
  end)

  it("take every type, and every type of position", function()
    for _, dtype in ipairs { "f32", "f64", "bf16", "f16", "i64", "i32", "u8", "bool" } do
      local x = moe.tensor({ { 1, 0 }, { 1, 1 }, { 0, 1 } }, { dtype = dtype })
      for _, kind in ipairs { "i64", "i32", "u8" } do
        assert.close({ { 0, 1 }, { 1, 0 } }, x:index_select(1, index({ 3, 1 }, kind)):to "f32")
      end
    end
  end)

  it("add up duplicates in order, the same for any number of threads", function()
    local n, k, d = 40, 3000, 33
    local list, src, x = positions(k, n), numbers({ k, d }):to "f32", numbers({ n, d }, 3):to "f32"
    moe.threads(1)
    local y = x:index_add(1, index(list), src)
    for _, t in ipairs { 2, 3 } do
      moe.threads(t)
      assert.same(y:totable(), x:index_add(1, index(list), src):totable())
    end
    local want, s = x:to("f64"):totable(), src:totable()
    for i = 1, k do for j = 1, d do want[list[i]][j] = want[list[i]][j] + s[i][j] end end
    assert.close(want, y, { rtol = 1e-4, atol = 1e-4 })
    -- the path for few elements has the same sums in the same order
    local few = x:index_add(1, index(table.move(list, 1, 300, 1, {})), src:narrow(1, 1, 300))
    local padded = moe.zeros(k, d)
    padded[{ { 1, 300 } }] = src:narrow(1, 1, 300)
    local rest = table.move(list, 1, 300, 1, {})
    for i = 301, k do rest[i] = n + 1 end
    local more = moe.cat({ x, moe.zeros(1, d) }):index_add(1, index(rest), padded):narrow(1, 1, n)
    assert.same(few:totable(), more:totable())
  end)

  it("add in all middle layouts and number types", function()
    local x, src = numbers { 3, 4, 5 }, numbers { 3, 6, 5 }
    local list = positions(6, 4)
    local want = x:totable()
    for a = 1, 3 do for b = 1, 6 do for c = 1, 5 do want[a][list[b]][c] = want[a][list[b]][c] + src[a][b][c] end end end
    assert.close(want, x:index_add(2, index(list), src), { rtol = 1e-12 })
    assert.close(want, x:permute(3, 1, 2):index_add(3, index(list), src:permute(3, 1, 2)):permute(2, 3, 1), { rtol = 1e-12 })
    assert.same({ 3, 0, 5 }, moe.zeros(3, { dtype = "i32" }):index_add(1, index { 1, 3, 1 }, index { 1, 5, 2 }):totable())
    -- bf16 sums are taken in f32: 256 + 1 + 1 + 1 + 1 would stay 256
    local b = moe.full({ 1 }, 256, { dtype = "bf16" }):index_add(1, index { 1, 1, 1, 1 }, moe.ones(4, { dtype = "bf16" }))
    assert.equal(260, b[1])
  end)

  it("are copied, filled, in place and not, through strides", function()
    local x = moe.zeros(3, 4)
    x:t():index_copy_(1, index { 4, 2, 4 }, moe.tensor { { 1, 1, 1 }, { 2, 2, 2 }, { 3, 3, 3 } })
    assert.same({ { 0, 2, 0, 3 }, { 0, 2, 0, 3 }, { 0, 2, 0, 3 } }, x:totable()) -- the last one stays
    x:select(1, 2):index_fill_(1, index { 1, 3 }, 9)
    assert.same({ 9, 2, 9, 3 }, x[2]:totable())
    local y = x:index_fill(1, index { 1 }, 0)
    assert.same({ 0, 2, 0, 3 }, x[1]:totable())
    assert.same({ 0, 0, 0, 0 }, y[1]:totable())
    x:index_add_(1, index { 1, 1, 1 }, x) -- the source is the target
    assert.same({ 9, 8, 9, 12 }, x[1]:totable())
  end)

  it("look up embeddings, whose gradient sums over repeats and skips padding", function()
    local w = numbers { 7, 3 }
    w.requires_grad = true
    local ids = index { { 1, 7, 2 }, { 2, 2, 1 } }
    local y = moe.embedding(w, ids, 2)
    assert.same({ 2, 3, 3 }, y.shape)
    assert.close(w:detach()[7], y:detach()[1][2])
    y:sum():backward()
    assert.same({ { 2, 2, 2 }, { 0, 0, 0 }, { 0, 0, 0 }, { 0, 0, 0 }, { 0, 0, 0 }, { 0, 0, 0 }, { 1, 1, 1 } }, w.grad:totable())
    assert.same({ 0, 3 }, moe.embedding(w, moe.zeros(0, { dtype = "i64" })).shape)
    raises("embedding: index 8 is outside of 1..7, dim 1 of [7, 3]", function() moe.embedding(w, index { 1, 8 }) end)
    raises("embedding: index 0 is outside of 1..7", function() moe.embedding(w, index { 0 }) end)
    raises("padding_idx 8", function() moe.embedding(w, ids, 8) end)
    raises("weight must be [rows, features], got [3]", function() moe.embedding(moe.ones(3), ids) end)
  end)

  it("explain what is wrong, and then have written nothing", function()
    local x = moe.zeros(3, 4)
    raises("index 4 is outside of 1..3, dim 1 of [3, 4]", function() x:index_add_(1, index { 1, 4 }, moe.ones(2, 4)) end)
    assert.equal(0, x:sum():item())
    raises("with dim 1 = 2, the number of positions; got [3, 4]", function() x:index_add(1, index { 1, 2 }, moe.ones(3, 4)) end)
    raises("index must have one dimension", function() x:index_select(1, index { { 1 } }) end)
    raises("i64, i32 or u8", function() x:index_select(1, moe.ones(2)) end)
    raises("the dimension is empty", function() moe.zeros(0, 2):index_select(1, index { 1 }) end)
  end)
end)

describe("gather and scatter", function()
  -- calls f(i, j, k) for all positions of a shape of three
  local function each(s, f) for i = 1, s[1] do for j = 1, s[2] do for k = 1, s[3] do f(i, j, k) end end end end

  it("agree with loops along every dim", function()
    for dim = 1, 3 do
      local shape, ishape = { 4, 5, 6 }, { 3, 4, 6 }
      ishape[dim] = 7
      local x, src = numbers(shape), numbers(ishape, 5)
      local ids = helper.tensor(positions(ishape[1] * ishape[2] * ishape[3], shape[dim]), ishape, { dtype = "i64" })
      local layouts = {
        { x, ids, src },
        { x:permute(3, 1, 2):contiguous():permute(2, 3, 1), ids:transpose(1, 3):contiguous():transpose(1, 3), src },
      }
      for _, l in ipairs(layouts) do
        local y, put, add = l[1]:gather(dim, l[2]), l[1]:scatter(dim, l[2], l[3]), l[1]:scatter_add(dim, l[2], l[3])
        local want_put, want_add = x:totable(), x:totable()
        each(ishape, function(i, j, k)
          local at = { i, j, k }
          at[dim] = ids[i][j][k]
          assert.equal(x[at[1]][at[2]][at[3]], y[i][j][k])
          want_put[at[1]][at[2]][at[3]] = src[i][j][k]
          want_add[at[1]][at[2]][at[3]] = want_add[at[1]][at[2]][at[3]] + src[i][j][k]
        end)
        assert.same(want_put, put:totable())
        assert.close(want_add, add, { rtol = 1e-12, atol = 1e-12 })
      end
    end
  end)

  it("take one element a row", function()
    local x, list = numbers { 2, 5, 4 }, positions(10, 4)
    local ids = index(list):view(2, 5, 1)
    local y, z = x:gather(3, ids), x:scatter_add(3, ids, moe.ones(2, 5, 1, { dtype = "f64" }))
    for i = 1, 2 do for j = 1, 5 do
      local at = ids[i][j][1]
      assert.equal(x[i][j][at], y[i][j][1])
      for k = 1, 4 do assert.close(x[i][j][k] + (k == at and 1 or 0), z[i][j][k]) end
    end end
  end)

  it("move whole rows for an index that is expanded", function()
    local x, list = numbers { 6, 9 }, positions(11, 6)
    local wide = index(list):view(11, 1):expand(11, 9)
    assert.same(x:index_select(1, index(list)):totable(), x:gather(1, wide):totable())
    local src = numbers { 11, 9 }
    assert.same(x:index_add(1, index(list), src):totable(), x:scatter_add(1, wide, src):totable())
    assert.close(x:index_add(1, index(list), src), x:scatter_add(1, wide:contiguous(), src), { rtol = 1e-12 })
  end)

  it("give the same sums for any number of threads", function()
    local ids = helper.tensor(positions(200 * 300, 50), { 200, 300 }, { dtype = "i64" })
    local src = numbers({ 200, 300 }):to "f32"
    local results = {}
    for t = 1, 3 do
      moe.threads(t)
      results[t] = { moe.zeros(50, 300):scatter_add(1, ids, src):totable(), moe.zeros(200, 50):scatter_add(2, ids, src):totable(),
        moe.zeros(50, 300):scatter(1, ids, src):totable() }
    end
    assert.same(results[1], results[2])
    assert.same(results[1], results[3])
  end)

  it("write one number, in place", function()
    local x = moe.zeros(2, 3)
    assert.equal(x, x:scatter_(2, index { { 3 }, { 1 } }, 1))
    assert.same({ { 0, 0, 1 }, { 1, 0, 0 } }, x:totable())
  end)

  it("take positions out of the tensor that they write to", function()
    local x = index { 2, 3, 1 }
    assert.same({ 1 << 40, 1 << 40, 1 << 40 }, x:scatter_(1, x, 1 << 40):totable())
    x = index { 3, 1, 2 }
    assert.same({ 7, 7, 7 }, x:index_fill_(1, x, 7):totable())
    x = index { 3, 1, 2 }
    assert.same({ 4, 3, 5 }, x:index_add_(1, x, x):totable()) -- 3 + 1, 1 + 2, 2 + 3
    x = index { 3, 1, 2 }
    assert.same({ 1, 2, 3 }, x:index_copy_(1, x, x):totable())
    x = index { 3, 1, 2 }
    x[x] = 1 << 40
    assert.equal(1 << 40, x[2])
  end)

  it("take empty positions", function()
    assert.same({ 0, 3 }, moe.ones(2, 3):gather(1, moe.zeros(0, 3, { dtype = "i64" })).shape)
    assert.same({ { 1, 1 } }, moe.ones(1, 2):scatter_add(1, moe.zeros(0, 2, { dtype = "i64" }), moe.ones(0, 2)):totable())
  end)

  it("explain what is wrong", function()
    local x = moe.zeros(2, 3)
    raises("gather: index 4 is outside of 1..3, dim 2 of [2, 3]", function() x:gather(2, index { { 1 }, { 4 } }) end)
    raises("gather: index -1 is outside", function() x:gather(2, index { { -1 } }) end)
    raises("scatter_add_: index 3 is outside of 1..2", function() x:scatter_add_(1, index { { 1, 3 } }, moe.ones(1, 2)) end)
    assert.equal(0, x:sum():item())
    raises("no size above x's", function() x:gather(2, moe.ones(3, 1, { dtype = "i64" })) end)
    raises("must have the shape of index", function() x:scatter(2, index { { 1 } }, moe.ones(2, 2)) end)
  end)

  it("have second derivatives", function()
    local x = numbers { 3, 4 }
    x.requires_grad = true
    local ids = index { { 1, 1, 3 }, { 2, 4, 4 } }
    local g = moe.grad((x:gather(2, ids) ^ 3):sum(), x, { create_graph = true })
    local gg = moe.grad(g:sum(), x)
    local count = moe.zeros(3, 4, { dtype = "f64" }):scatter_add(2, ids, moe.ones(2, 3, { dtype = "f64" }))
    assert.close(count * 6 * x:detach(), gg, { rtol = 1e-12 })
  end)
end)

describe("masks", function()
  it("fill, select and scatter as loops do", function()
    local x = numbers { 3, 4 }
    local m = x:gt(0)
    local filled, list = x:totable(), {}
    for i = 1, 3 do for j = 1, 4 do
      if m[i][j] then
        list[#list + 1] = x[i][j]
        filled[i][j] = -7
      end
    end end
    assert.same(filled, x:masked_fill(m, -7):totable())
    assert.same(list, x:masked_select(m):totable())
    assert.same(x:totable(), x:masked_fill(m, -7):masked_scatter(m, x:masked_select(m)):totable())
    local turned = x:t():contiguous():t()
    assert.same(list, turned:masked_select(m:t():contiguous():t()):totable())
    local nz = m:nonzero()
    assert.same({ #list, 2 }, nz.shape)
    for r = 1, #list do assert.equal(list[r], x[nz[r][1]][nz[r][2]]) end
  end)

  it("broadcast", function()
    local x = moe.ones(2, 1)
    assert.same({ { 1, -math.huge, 1 }, { 1, -math.huge, 1 } }, x:masked_fill(moe.tensor { false, true, false }, -math.huge):totable())
    assert.same({ 1, 1 }, x:masked_select(moe.tensor { false, true, false }):totable())
    raises("masked_fill_", function() x:masked_fill_(moe.tensor { false, true, false }, 0) end)
    raises("do not broadcast", function() x:masked_fill(moe.ones(3, 3):gt(0), 0) end)
    raises("mask must be bool", function() x:masked_fill(moe.ones(2, 1), 0) end)
    raises("the mask has 2 true elements, src [1] only 1", function() x:masked_scatter(x:gt(0), moe.ones(1)) end)
  end)

  it("fill any type, in place through strides", function()
    for _, dtype in ipairs { "f32", "f64", "bf16", "f16", "i64", "i32", "u8", "bool" } do
      local x = moe.zeros(2, 3, { dtype = dtype })
      x:t():masked_fill_(moe.tensor { { true, false } }, 1)
      assert.close({ { 1, 1, 1 }, { 0, 0, 0 } }, x:to "f32")
    end
  end)

  it("find what is not zero", function()
    assert.same({ { 2 }, { 3 } }, moe.tensor({ 0, 0 / 0, -1 }):nonzero():totable())
    assert.same({ 0, 2 }, moe.zeros(2, 2):nonzero().shape)
    assert.same({ 1, 0 }, moe.tensor(3):nonzero().shape)
    assert.equal("i64", moe.zeros(2):nonzero().dtype)
  end)
end)

describe("counting", function()
  it("makes one-hot rows", function()
    assert.same({ { 0, 1, 0 }, { 1, 0, 0 } }, moe.one_hot(index { 2, 1 }, 3):totable())
    assert.same({ 2, 2, 4 }, moe.one_hot(index { { 2, 1 }, { 4, 1 } }).shape)
    assert.equal("i64", moe.one_hot(index { 1 }).dtype)
    assert.equal("f32", moe.one_hot(index { 1 }, 2, "f32").dtype)
    raises("index 4 is outside of 1..3", function() moe.one_hot(index { 4 }, 3) end)
    raises("index 0 is below 1", function() moe.one_hot(index { 0 }) end)
  end)

  it("counts and weighs", function()
    assert.same({ 1, 0, 3 }, moe.bincount(index { 3, 1, 3, 3 }):totable())
    assert.same({ 1, 0, 0, 0 }, moe.bincount(index { 1 }, 4):totable())
    assert.same({ 0.5, 2.5 }, moe.bincount(index { 2, 1, 2 }, 0, moe.tensor { 1, 0.5, 1.5 }):totable())
    assert.same({ 0 }, moe.bincount(moe.zeros(0, { dtype = "i64" })).shape)
    raises("must have the shape of index", function() moe.bincount(index { 1, 2 }, 0, moe.ones(3)) end)
    raises("below 1", function() moe.bincount(index { -3 }) end)
  end)
end)

describe("tril and triu", function()
  it("agree with loops", function()
    local x = numbers { 2, 4, 3 }
    for diagonal = -5, 5 do
      local low, up = x:tril(diagonal), x:triu(diagonal)
      for b = 1, 2 do for i = 1, 4 do for j = 1, 3 do
        assert.equal(j - i <= diagonal and x[b][i][j] or 0, low[b][i][j])
        assert.equal(j - i >= diagonal and x[b][i][j] or 0, up[b][i][j])
      end end end
    end
    assert.same(x:tril():totable(), x:clone():tril_():totable())
    assert.equal(0, x:triu(math.maxinteger):abs():sum():item())
    assert.same(x:totable(), x:triu(math.mininteger):totable())
    raises("at least 2 dimensions, got [3]", function() moe.ones(3):tril() end)
  end)
end)
