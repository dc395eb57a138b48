-- Narrow experts in large number: many a token (csrc/cpu/experts_fine_real.h), and products of few rows
-- (csrc/cpu/thin_real.h) at every number of rows, held against plain operations.
local helper = require "spec.helper"
local moe = require "moe"
local ref = require "spec.nn.moe_ref"

-- A bank's weights as leaves, wanted gradients and all.
local function weights(o)
  local F = o.gated and 2 * o.I or o.I
  local function leaf(...) return moe.randn({ ... }, { dtype = o.dtype, requires_grad = true }) end
  return {
    gated = o.gated, act = o.act, w_in = leaf(o.E, F, o.d), w_out = leaf(o.E, o.out, o.I),
    b_in = o.bias and leaf(o.E, F) or nil, b_out = o.bias and leaf(o.E, o.out) or nil,
  }
end

-- Every token's k different experts, in no order: index [T, k].
local function choices(T, k, E, random)
  local index = {}
  for t = 1, T do
    local all, row = {}, {}
    for e = 1, E do all[e] = e end
    for i = 1, k do row[i] = table.remove(all, random(#all)) end
    index[t] = row
  end
  return index
end

local function assert_gradients(wanted, got, g, list, tolerance)
  local a, b = table.pack(moe.grad({ (wanted * g):sum() }, list)), table.pack(moe.grad({ (got * g):sum() }, list))
  for i = 1, a.n do assert.close(a[i], b[i], tolerance) end
end

describe("narrow experts", function()
  local random = helper.random(7)
  -- hidden at most 32 and four experts a token and more take the path of their own; 40 tokens are two of its tiles
  local cases = {
    { T = 40, E = 12, k = 5, d = 19, I = 3, out = 17, gated = true, act = "silu" },
    { T = 40, E = 12, k = 12, d = 48, I = 8, out = 50, gated = true, act = "gelu", bias = true },
    { T = 33, E = 70, k = 4, d = 16, I = 1, out = 16, gated = false, act = "relu2", bias = true },
    { T = 1, E = 9, k = 9, d = 5, I = 32, out = 3, gated = false, act = "tanh" },
  }
  for _, o in ipairs(cases) do
    it(("agree with loops over tokens, forward and backward: %d experts, %d a token, hidden %d%s"):format(o.E, o.k, o.I,
      o.bias and ", biases" or ""), function()
      o.dtype = "f64"
      moe.manual_seed(11)
      local p, index = weights(o), choices(o.T, o.k, o.E, random)
      local x = moe.randn(o.T, o.d, { dtype = "f64", requires_grad = true })
      local weight = moe.randn(o.T, o.k, { dtype = "f64", requires_grad = true })
      local g = moe.randn(o.T, o.out, { dtype = "f64" })
      local routing = moe.routing.topk(moe.tensor(index, { dtype = "i64" }), weight, o.E)
      local leaves = { x, weight, p.w_in, p.w_out, p.b_in, p.b_out }
      local y = moe.core._sparse.ffn(x, p.w_in, p.w_out, p.b_in, p.b_out, routing, o.act, o.gated)
      local wanted = ref.experts(p, x, ref.choices(index, weight))
      assert.close(wanted, y, { rtol = 1e-10, atol = 1e-10 })
      assert_gradients(wanted, y, g, leaves, { rtol = 1e-9, atol = 1e-9 })
    end)
  end

  it("leave tokens without an expert at zero, and experts without a token without gradient", function()
    moe.manual_seed(2)
    local p = weights { E = 8, I = 4, d = 6, out = 6, gated = true, act = "silu" }
    local x = moe.randn(3, 6, { requires_grad = true })
    local index = moe.tensor({ { 1, 2, 3, 4, 5, 6 }, { 0, 0, 0, 0, 0, 0 }, { 6, 5, 4, 3, 2, 1 } }, { dtype = "i64" })
    local y = moe.core._sparse.ffn(x, p.w_in, p.w_out, nil, nil, moe.routing.topk(index, nil, 8), "silu", true)
    assert.close(moe.zeros(6), y[2])
    y:sum():backward()
    assert.close(moe.zeros(6), x.grad[2])
    for e = 1, 8 do assert.equal(e <= 6, p.w_in.grad[e]:abs():sum():item() > 0) end
  end)

  it("may have a token twice at one expert", function()
    moe.manual_seed(3)
    local p = weights { E = 2, I = 4, d = 6, out = 6, gated = true, act = "silu" }
    local x = moe.randn(3, 6)
    local twice = moe.routing.topk(moe.tensor({ { 1, 1, 2, 2 }, { 2, 2, 2, 2 }, { 1, 2, 1, 2 } }, { dtype = "i64" }), nil, 2)
    local y = moe.core._sparse.ffn(x, p.w_in, p.w_out, nil, nil, twice, "silu", true)
    local one, two = ref.experts(p, x, { { 1, 1 }, { 2, 1 }, { 3, 1 } }), ref.experts(p, x, { { 1, 2 }, { 2, 2 }, { 3, 2 } })
    assert.close(one[1] * 2 + two[1] * 2, y[1], { rtol = 1e-4, atol = 1e-5 })
    assert.close(two[2] * 4, y[2], { rtol = 1e-4, atol = 1e-5 })
  end)

  it("give the same bits on one thread and on two", function()
    local threads = moe.threads()
    local function run(n)
      moe.threads(n)
      moe.manual_seed(4)
      local p = weights { E = 64, I = 8, d = 96, out = 96, gated = true, act = "silu", bias = true }
      local x = moe.randn(700, 96, { requires_grad = true })
      local routing = moe.routing.topk(moe.router.uniform_choice(700, 16, 64), moe.rand(700, 16), 64)
      local y = moe.core._sparse.ffn(x, p.w_in, p.w_out, p.b_in, p.b_out, routing, "silu", true)
      y:square():sum():backward()
      return { y:totable(), x.grad:totable(), p.w_in.grad:totable(), p.w_out.grad:totable(), p.b_in.grad:totable(), p.b_out.grad:totable() }
    end
    local one, two = run(1), run(2)
    moe.threads(threads)
    assert.same(one, two)
  end)

  it("hold no list of rows: the memory of a forward does not grow with the experts a token", function()
    moe.manual_seed(5)
    local function peak(k)
      local p = weights { E = 64, I = 4, d = 256, out = 256, gated = true, act = "silu" }
      local x = moe.randn(256, 256)
      local routing = moe.routing.topk(moe.router.uniform_choice(256, k, 64), nil, 64)
      collectgarbage()
      return moe.no_grad(function()
        moe.reset_peak_memory()
        local before = moe.memory().live
        moe.core._sparse.ffn(x, p.w_in, p.w_out, nil, nil, routing, "silu", true)
        return moe.memory().peak - before
      end)
    end
    assert.equal(peak(8), peak(64))
  end)
end)

describe("products of few rows", function()
  -- every number of rows around the blocks of the kernels, odd sizes, one expert with all rows
  for _, dtype in ipairs { "f32", "f64" } do
    it("agree with plain products at every number of rows, " .. dtype, function()
      moe.manual_seed(6)
      local sizes = { { 37, 21, 5 }, { 64, 48, 32 }, { 7, 130, 67 } } -- d, hidden, d_out
      for _, s in ipairs(sizes) do
        local p = weights { E = 1, I = s[2], d = s[1], out = s[3], gated = true, act = "silu", bias = true, dtype = dtype }
        for _, rows in ipairs { 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 159, 160, 161, 200 } do
          local x = moe.randn(rows, s[1], { dtype = dtype, requires_grad = true })
          local g = moe.randn(rows, s[3], { dtype = dtype })
          local routing = moe.routing.topk(moe.full({ rows, 1 }, 1, { dtype = "i64" }), nil, 1)
          local leaves = { x, p.w_in, p.w_out, p.b_in, p.b_out }
          local y = moe.core._sparse.ffn(x, p.w_in, p.w_out, p.b_in, p.b_out, routing, "silu", true)
          local h = x:linear(p.w_in[1], p.b_in[1])
          local wanted = (h:narrow(2, 1, s[2]):silu() * h:narrow(2, s[2] + 1, s[2])):linear(p.w_out[1], p.b_out[1])
          local tol = dtype == "f64" and { rtol = 1e-10, atol = 1e-10 } or { rtol = 2e-4, atol = 2e-3 }
          assert.close(wanted, y, tol)
          assert_gradients(wanted, y, g, leaves, tol)
        end
      end
    end)
  end
end)
