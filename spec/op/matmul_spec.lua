-- Matrix products against plain loops: every transposition, broadcasting, strides, empty sizes, types, threads.
local helper = require "spec.helper"
local moe = require "moe"

-- Nested tables: a [m][k] times b [k][n].
local function product(a, b, m, n, k)
  local c = {}
  for i = 1, m do
    c[i] = {}
    for j = 1, n do
      local s = 0
      for p = 1, k do s = s + a[i][p] * b[p][j] end
      c[i][j] = s
    end
  end
  return c
end

local function random(rng, shape, opts)
  return helper.tensor(function() return rng.normal() end, shape, opts)
end

-- The same values in each way that a matrix may lie in memory.
local layouts = {
  { "contiguous", function(x) return x end },
  { "transposed", function(x) return x:transpose(-1, -2):contiguous():transpose(-1, -2) end },
  { "rows of a wider matrix", function(x)
    local wide = moe.cat({ moe.full(x.shape, 7, { dtype = x.dtype }), x, x }, -1)
    return wide:narrow(-1, x.shape[#x.shape] + 1, x.shape[#x.shape])
  end },
  { "every second column", function(x) return moe.stack({ x, x }, -1):select(-1, 2) end },
}

describe("matmul", function()
  it("is the product of matrices, however both lie in memory", function()
    local rng = helper.random(3)
    for _, size in ipairs { { 1, 1, 1 }, { 3, 4, 5 }, { 1, 6, 7 }, { 7, 1, 6 }, { 5, 6, 1 }, { 1, 1, 9 }, { 17, 19, 33 } } do
      local m, n, k = size[1], size[2], size[3]
      for _, dtype in ipairs { "f64", "f32" } do
        local a, b = random(rng, { m, k }, { dtype = dtype }), random(rng, { k, n }, { dtype = dtype })
        local expected = product(a:totable(), b:totable(), m, n, k)
        local tolerance = dtype == "f64" and { rtol = 1e-12, atol = 1e-12 } or { rtol = 1e-5, atol = 1e-5 }
        for _, la in ipairs(layouts) do
          for _, lb in ipairs(layouts) do
            tolerance.name = ("%dx%dx%d %s, a %s, b %s"):format(m, n, k, dtype, la[1], lb[1])
            local va, vb = la[2](a), lb[2](b)
            assert.close(a, va, { rtol = 0, atol = 0 })
            assert.close(expected, va:matmul(vb), tolerance)
            assert.close(expected, moe.mm(va, vb), tolerance)
          end
        end
      end
    end
  end)

  it("takes rows, columns and batches that an expand repeats", function()
    local rng = helper.random(6)
    local row, column, w = random(rng, { 1, 4 }), random(rng, { 3, 1 }), random(rng, { 4, 5 })
    for _, x in ipairs { row:expand { 3, 4 }, column:expand { 3, 4 }, row:expand { 2, 3, 4 }, row:unsqueeze(1):expand { 2, 3, 4 },
      column:expand { 2, 3, 4 }, moe.tensor(2):expand { 3, 4 } } do
      assert.close(x:contiguous():matmul(w), x:matmul(w))
      assert.close(x:contiguous():matmul(w), moe.linear(x, w:t()))
      assert.close(w:t():matmul(x:contiguous():transpose(-1, -2)), w:t():matmul(x:transpose(-1, -2)))
      assert.close(x:contiguous():transpose(-1, -2):matmul(x:contiguous()), x:transpose(-1, -2):matmul(x))
    end
    local batch = random(rng, { 3, 4 }):unsqueeze(1):expand { 2, 3, 4 }
    assert.close(batch:contiguous():matmul(w), batch:matmul(w))
  end)

  it("broadcasts what comes before the last two dims", function()
    local rng = helper.random(4)
    local cases = {
      { { 2, 3, 4 }, { 4, 5 } }, { { 2, 3, 4 }, { 2, 4, 5 } }, { { 3, 4 }, { 2, 4, 5 } }, { { 2, 1, 3, 4 }, { 5, 4, 2 } },
      { { 1, 3, 4 }, { 6, 4, 2 } }, { { 6, 3, 4 }, { 1, 4, 2 } }, { { 2, 3, 1, 4 }, { 2, 1, 4, 3 } }, { { 3, 1, 2, 2 }, { 1, 4, 2, 2 } },
    }
    for _, case in ipairs(cases) do
      local a, b = random(rng, case[1], { dtype = "f64" }), random(rng, case[2], { dtype = "f64" })
      for kind = 1, #layouts * #layouts do
        local va, vb = layouts[(kind - 1) % #layouts + 1][2](a), layouts[(kind - 1) // #layouts + 1][2](b)
        local y = va:matmul(vb)
        -- one product a pair of the broadcast batches
        local lead = {}
        for d = 1, #y.shape - 2 do lead[d] = y.shape[d] end
        local function whole(x, matrix)
          local shape = { table.unpack(lead) }
          shape[#shape + 1], shape[#shape + 2] = matrix[1], matrix[2]
          return x:expand(shape):contiguous():reshape { -1, matrix[1], matrix[2] }:totable()
        end
        local m, k, n = a.shape[#a.shape - 1], a.shape[#a.shape], b.shape[#b.shape]
        local ta, tb, ty = whole(a, { m, k }), whole(b, { k, n }), y:reshape { -1, m, n }:totable()
        for i = 1, #ty do assert.close(product(ta[i], tb[i], m, n, k), ty[i], { rtol = 1e-12, atol = 1e-12 }) end
      end
    end
  end)

  it("takes a vector for a row on the left and a column on the right, and drops its dim", function()
    local a, v, w = moe.tensor { { 1, 2, 3 }, { 4, 5, 6 } }, moe.tensor { 1, 0, -1 }, moe.tensor { 2, 1 }
    assert.close({ -2, -2 }, a:matmul(v))
    assert.close({ 6, 9, 12 }, w:matmul(a))
    assert.close(2, v:matmul(v))
    assert.same({}, v:dot(v).shape)
    assert.close({ -2, -2 }, moe.mv(a, v))
    assert.close({ { 2, 0, -2 }, { 1, 0, -1 } }, moe.outer(w, v))
    local stack = moe.stack({ a, a * 10 }, 1)
    assert.close({ { -2, -2 }, { -20, -20 } }, stack:matmul(v))
    assert.close({ { 6, 9, 12 }, { 60, 90, 120 } }, w:matmul(stack))
  end)

  it("knows empty sizes: an inner size of 0 gives zeros", function()
    for _, dtype in ipairs { "f32", "f64", "bf16" } do
      assert.close({ { 0, 0 }, { 0, 0 }, { 0, 0 } }, moe.zeros({ 3, 0 }, { dtype = dtype }):matmul(moe.zeros({ 0, 2 }, { dtype = dtype })))
    end
    assert.same({ 0, 2 }, moe.zeros({ 0, 3 }):matmul(moe.zeros { 3, 2 }).shape)
    assert.same({ 4, 0, 2 }, moe.zeros({ 4, 0, 3 }):matmul(moe.zeros { 3, 2 }).shape)
    assert.same({ 0, 4, 2 }, moe.zeros({ 0, 4, 3 }):matmul(moe.zeros { 3, 2 }).shape)
    assert.close(0, moe.zeros({ 0 }):dot(moe.zeros { 0 }))
    assert.close({ 0, 0 }, moe.zeros({ 2, 0 }):matmul(moe.zeros { 0 }))
    assert.close({ { 5, 5 } }, moe.addmm(moe.full({ 1, 2 }, 5), moe.zeros { 1, 0 }, moe.zeros { 0, 2 }))
    assert.close({ { 3, 4 } }, moe.linear(moe.zeros { 1, 0 }, moe.zeros { 2, 0 }, moe.tensor { 3, 4 }))
  end)

  it("gives zeros for an inner size of 0 where fresh memory held anything", function()
    for _ = 1, 3 do
      moe.full({ 40, 40 }, 0 / 0):close()
      assert.close(moe.zeros { 40, 40 }, moe.zeros({ 40, 0 }):matmul(moe.zeros { 0, 40 }), { rtol = 0, atol = 0 })
    end
  end)

  it("never lets old memory into a product", function()
    for _, k in ipairs { 1, 3 } do
      for _, mn in ipairs { { 1, 9 }, { 9, 1 }, { 9, 9 }, { 1, 1 } } do
        moe.full({ mn[1], mn[2] }, 0 / 0):close()
        local y = moe.ones({ mn[1], k }):matmul(moe.ones { k, mn[2] })
        assert.close(moe.full({ mn[1], mn[2] }, k), y, { rtol = 0, atol = 0 })
      end
    end
  end)

  it("multiplies half types in f32 and rounds once", function()
    local a = moe.full({ 1, 300 }, 1, { dtype = "bf16" })
    assert.equal(300, a:matmul(a:transpose(1, 2)):item()) -- a sum kept in bf16 would stop at 256
    assert.equal("bf16", a:matmul(a:transpose(1, 2)).dtype)
    assert.equal("f32", a:matmul(moe.ones { 300, 1 }).dtype)
    assert.equal("f64", a:matmul(moe.ones({ 300, 1 }, { dtype = "f64" })).dtype)
  end)

  it("says what is wrong", function()
    local cases = {
      { "matmul: inner sizes differ: a is [4, 8], b is [7, 3] (a's dim 2 = 8, b's dim 1 = 7)", moe.matmul, { 4, 8 }, { 7, 3 } },
      { "matmul: inner sizes differ: a is [5], b is [2, 4, 3] (a's dim 1 = 5, b's dim 2 = 4)", moe.matmul, { 5 }, { 2, 4, 3 } },
      { "matmul: the dimensions before the last two do not broadcast: a is [2, 3, 4], b is [3, 4, 5]", moe.matmul, { 2, 3, 4 },
        { 3, 4, 5 } },
      { "bmm: wants a with 3 and b with 3 dimensions: a is [3, 4], b is [4, 5]", moe.bmm, { 3, 4 }, { 4, 5 } },
      { "bmm: batch sizes differ: a is [2, 3, 4], b is [1, 4, 5]", moe.bmm, { 2, 3, 4 }, { 1, 4, 5 } },
      { "dot: wants a with 1 and b with 1 dimension", moe.dot, { 3, 4 }, { 4 } },
      { "outer: wants vectors: a is [3, 4], b is [4]", moe.outer, { 3, 4 }, { 4 } },
      { "linear: inner sizes differ: x is [2, 3], weight is [5, 4] (x's dim 2 = 3, weight's dim 2 = 4)", moe.linear, { 2, 3 }, { 5, 4 } },
      { "linear: bias must be [5], one number a row of weight [5, 3], got [4]", moe.linear, { 2, 3 }, { 5, 3 }, { 4 } },
      { "addmm: input is [3, 3], which does not broadcast to the product's [2, 5]", moe.addmm, { 3, 3 }, { 2, 4 }, { 4, 5 } },
      { "matmul: wants tensors of one dimension and more", moe.matmul, {}, { 2 } },
    }
    for _, case in ipairs(cases) do
      local args = {}
      for i = 3, #case do args[i - 2] = moe.zeros(case[i]) end
      local message = helper.error_of(case[2], table.unpack(args))
      assert.truthy(message:find(case[1], 1, true), message)
    end
    local message = helper.error_of(moe.matmul, moe.ones({ 2, 2 }, { dtype = "i64" }), moe.ones { 2, 2 })
    assert.truthy(message:find("matmul: a must be of a floating-point type, got i64", 1, true), message)
  end)
end)

describe("products", function()
  it("addmm scales both parts, and ignores an input scaled by 0", function()
    local input, a, b = moe.tensor { 1, 2 }, moe.tensor { { 1, 2 }, { 3, 4 } }, moe.tensor { { 1, 1 }, { 0, 1 } }
    assert.close({ { 2, 5 }, { 4, 9 } }, moe.addmm(input, a, b))
    assert.close({ { -1.5, -5 }, { -5.5, -13 } }, moe.addmm(input, a, b, 0.5, -2))
    assert.close({ { 1, 3 }, { 3, 7 } }, moe.addmm(moe.full({ 2, 2 }, 0 / 0), a, b, { beta = 0 }))
    assert.close({ { 10, 10 }, { 20, 20 } }, moe.addmm(moe.tensor { { 10 }, { 20 } }, a, b, { alpha = 0 }))
  end)

  it("linear is x w^T + bias for any dims and layouts of x and w", function()
    local rng = helper.random(5)
    local w, bias = random(rng, { 5, 4 }, { dtype = "f64" }), random(rng, { 5 }, { dtype = "f64" })
    for _, shape in ipairs { { 4 }, { 3, 4 }, { 2, 3, 4 }, { 2, 1, 3, 4 } } do
      local x = random(rng, shape, { dtype = "f64" })
      local expected = x:matmul(w:transpose(1, 2)) + bias
      for _, lx in ipairs(helper.views(x)) do
        for _, lw in ipairs(helper.views(w)) do
          assert.close(expected, moe.linear(lx[2], lw[2], bias), { rtol = 1e-12, atol = 1e-12 })
          assert.close(expected - bias, moe.linear(lx[2], lw[2]), { rtol = 1e-12, atol = 1e-12 })
        end
      end
    end
  end)

  it("has second derivatives", function()
    -- L = sum((x w)^2): dL/dx = 2 x w w^T, and the sum of its squares again by w
    local x = moe.tensor({ { 1, 2 }, { 3, -1 } }, { dtype = "f64", requires_grad = true })
    local w = moe.tensor({ { 2, 0 }, { 1, 1 } }, { dtype = "f64", requires_grad = true })
    local function second(times)
      local g = moe.grad({ times(x, w):square():sum() }, { x }, { create_graph = true })
      g = g[1] or g
      local h = moe.grad({ g:square():sum() }, { w })
      return h[1] or h
    end
    local reference = second(function(a, b) -- the product by hand
      return (a:unsqueeze(3) * b:unsqueeze(1)):sum(2)
    end)
    assert.close(reference, second(moe.matmul), { rtol = 1e-12 })
    assert.close(reference, second(function(a, b) return moe.linear(a, b:transpose(1, 2)) end), { rtol = 1e-12 })
    assert.close(reference, second(function(a, b) return moe.einsum("ij,jk->ik", { a, b }) end), { rtol = 1e-12 })
  end)

  it("gives the same bits for 1 and 2 threads, tiles and gradients included", function()
    local before = moe.threads()
    finally(function() moe.threads(before) end)
    local function run(threads)
      moe.threads(threads)
      moe.manual_seed(9)
      local x = moe.randn(3, 171, 130, { requires_grad = true })
      local w = moe.randn(259, 130, { requires_grad = true })
      local b = moe.randn(259, { requires_grad = true })
      local y = moe.linear(x, w, b)
      local z = y:matmul(moe.randn(3, 259, 140)) -- a batch
      local v = y:reshape({ -1, 259 }):matmul(moe.randn(259)) -- a long column
      local loss = z:square():sum() + v:sum()
      loss:backward()
      return { y = y, z = z, v = v, dx = x.grad, dw = w.grad, db = b.grad }
    end
    local one, two = run(1), run(2)
    for name in pairs(one) do assert.close(one[name], two[name], { rtol = 0, atol = 0, name = name }) end
  end)

  it("puts every tile in its place", function()
    -- exact in f32: small integers, so any order of summation gives the same
    local m, n, k = 531, 387, 67
    local a = helper.tensor(function(i) return (i * 7919) % 11 - 5 end, { m, k })
    local b = helper.tensor(function(i) return (i * 104729) % 7 - 3 end, { n, k })
    local bias = helper.tensor(function(i) return i % 13 end, { n })
    local y = moe.linear(a, b, bias):totable()
    local z = a:transpose(1, 2):contiguous():transpose(1, 2):matmul(b:transpose(1, 2)):totable()
    local ta, tb = a:totable(), b:totable()
    local wrong = 0
    for i = 1, m, 5 do
      for j = 1, n, 3 do
        local s = 0
        for p = 1, k do s = s + ta[i][p] * tb[j][p] end
        if z[i][j] ~= s or y[i][j] ~= s + j % 13 then wrong = wrong + 1 end
      end
    end
    assert.equal(0, wrong)
  end)
end)
