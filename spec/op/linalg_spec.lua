-- The singular value decomposition: what it must satisfy, values known in closed form, and bad input.
local helper = require "spec.helper"
local moe = require "moe"

local function rebuild(U, S, V) return (U * S:unsqueeze(-2)):matmul(V:transpose(-1, -2)) end

local function identity_like(k, batch, dtype)
  local eye = moe.eye(k, { dtype = dtype })
  return batch and eye:expand { batch, k, k } or eye
end

describe("svd", function()
  for _, dtype in ipairs { "f64", "f32" } do
    local near = dtype == "f64" and { rtol = 0, atol = 1e-12 } or { rtol = 0, atol = 3e-5 }
    it("rebuilds matrices of every form from orthonormal columns and falling values, " .. dtype, function()
      moe.manual_seed(1)
      for _, size in ipairs { { 1, 1 }, { 1, 5 }, { 5, 1 }, { 4, 4 }, { 7, 3 }, { 3, 7 }, { 60, 4 }, { 4, 60 }, { 40, 33 } } do
        local m, n = table.unpack(size)
        local k = math.min(m, n)
        local x = moe.randn(m, n, { dtype = dtype })
        local U, S, V = moe.svd(x)
        assert.same({ m, k }, U.shape)
        assert.same({ k }, S.shape)
        assert.same({ n, k }, V.shape)
        assert.equal(dtype, S.dtype)
        assert.close(x, rebuild(U, S, V), near)
        assert.close(identity_like(k, nil, dtype), U:t():matmul(U), near)
        assert.close(identity_like(k, nil, dtype), V:t():matmul(V), near)
        local s = S:totable()
        for i = 1, k do
          assert.is_true(s[i] >= 0 and (i == 1 or s[i] <= s[i - 1]))
          local column = U:narrow(2, i, 1):reshape({ -1 }):totable()
          assert.is_true(math.max(table.unpack(column)) >= -math.min(table.unpack(column)))
        end
        assert.close(x:square():sum():sqrt(), S:square():sum():sqrt(), { rtol = 1e-5 }) -- the Frobenius norm
      end
    end)
  end

  it("of a rotated stretch: its values and its axes", function()
    local a, b = math.rad(30), math.rad(-70)
    local U0 = moe.tensor({ { math.cos(a), -math.sin(a) }, { math.sin(a), math.cos(a) } }, { dtype = "f64" })
    local V0 = moe.tensor({ { math.cos(b), -math.sin(b) }, { math.sin(b), math.cos(b) } }, { dtype = "f64" })
    local U, S, V = moe.svd(rebuild(U0, moe.tensor({ 5, 2 }, { dtype = "f64" }), V0))
    assert.close({ 5, 2 }, S, { rtol = 1e-14 })
    assert.close(U0, U, { rtol = 0, atol = 1e-14 }) -- U0's largest elements are positive, as the rule of signs has it
    assert.close(V0, V, { rtol = 0, atol = 1e-14 })
  end)

  it("of matrices of known values", function()
    local _, S = moe.svd(moe.tensor { { 0, 3, 0 }, { -7, 0, 0 }, { 0, 0, 0.5 } })
    assert.close({ 7, 3, 0.5 }, S, { rtol = 1e-6 })
    local U, one, V = moe.svd(moe.tensor({ 3, -4 }, { dtype = "f64" }):reshape { 2, 1 }:matmul(moe.tensor({ 2, 1, 2 }, { dtype = "f64" })
      :reshape { 1, 3 }))
    assert.close({ 15, 0 }, one, { rtol = 1e-14, atol = 1e-14 })
    assert.close({ -0.6, 0.8 }, U:narrow(2, 1, 1):reshape { 2 }, { rtol = 1e-14 })
    assert.close({ -2 / 3, -1 / 3, -2 / 3 }, V:narrow(2, 1, 1):reshape { 3 }, { rtol = 1e-14 })
    local _, none = moe.svd(moe.zeros(3, 2))
    assert.same({ 0, 0 }, none:totable())
    -- the golden ratio and its inverse
    local _, phi = moe.svd(moe.tensor({ { 1, 1 }, { 1, 0 } }, { dtype = "f64" }))
    assert.close({ (1 + 5 ^ 0.5) / 2, (5 ^ 0.5 - 1) / 2 }, phi, { rtol = 1e-14 })
  end)

  it("keeps small values beside large ones, and extreme scales", function()
    moe.manual_seed(2)
    local Q = moe.svd(moe.randn(6, 6, { dtype = "f64" }))
    local P = moe.svd(moe.randn(6, 6, { dtype = "f64" }))
    local values = moe.tensor({ 1e6, 1e3, 1, 1e-3, 1e-6, 0 }, { dtype = "f64" })
    local _, S = moe.svd(rebuild(Q, values, P))
    assert.close(values, S, { rtol = 0, atol = 1e-8 }) -- within the rounding of the largest
    for _, scale in ipairs { 1e-150, 1e150 } do
      local _, T = moe.svd(moe.eye(3, { dtype = "f64" }) * scale)
      assert.close({ scale, scale, scale }, T, { rtol = 1e-14 })
    end
  end)

  it("takes each matrix of a batch by itself, on any number of threads", function()
    moe.manual_seed(3)
    local x, before = moe.randn(2, 20, 9, 5), moe.threads()
    moe.threads(1)
    local U, S, V = moe.svd(x)
    moe.threads(2)
    local again = { moe.svd(x) }
    moe.threads(before)
    assert.same({ 2, 20, 9, 5 }, U.shape)
    assert.same({ 2, 20, 5 }, S.shape)
    assert.same({ 2, 20, 5, 5 }, V.shape)
    for i, t in ipairs { U, S, V } do assert.same(t:totable(), again[i]:totable()) end
    for i = 1, 2 do
      for j = 1, 20, 7 do
        local u, s, v = moe.svd(x[i][j])
        assert.same(u:totable(), U[i][j]:totable())
        assert.same(s:totable(), S[i][j]:totable())
        assert.same(v:totable(), V[i][j]:totable())
      end
    end
    assert.same({ 0, 3, 2 }, (moe.svd(moe.zeros { 0, 3, 2 })).shape)
  end)

  it("has no gradient and says so, and takes integers", function()
    local x = moe.randn(3, 2, { requires_grad = true })
    assert.matches("svd: has no gradient", helper.error_of(moe.svd, x))
    for _, t in ipairs { moe.no_grad(moe.svd, x) } do assert.is_false(t.requires_grad) end
    local _, whole = moe.svd(moe.tensor({ { 3, 0 }, { 0, 4 } }, { dtype = "i64" }))
    assert.equal("f32", whole.dtype)
    assert.close({ 4, 3 }, whole)
  end)

  it("names what is wrong", function()
    local bad = moe.zeros(2, 3, 4)
    bad[2][3][1] = 0 / 0
    local cases = {
      { "svd: x is %[3%], wanted %[.., m, n%]", moe.zeros(3) },
      { "svd: x is %[0, 3%], wanted matrices of at least one row and one column", moe.zeros { 0, 3 } },
      { "svd: x is %[2, 3, 0%], wanted matrices of at least one row and one column", moe.zeros { 2, 3, 0 } },
      { "svd: x holds NaN or an infinity %(matrix 2 of 2, row 3, column 1%)", bad },
      { "svd: x holds NaN or an infinity %(matrix 1 of 1, row 1, column 2%)", moe.tensor { { 1, -math.huge } } },
    }
    for _, case in ipairs(cases) do assert.matches(case[1], helper.error_of(moe.svd, case[2])) end
    local _, S = moe.svd(moe.eye(2)) -- usable afterwards
    assert.close({ 1, 1 }, S)
  end)

  it("converges whatever kernel ran before: none leaves the x87 unit unusable", function()
    local x = moe.tensor({ { 1, 2, 3 }, { 4, 5, 7 } }, { dtype = "f64" })
    local _, wanted = moe.svd(x)
    for _, name in ipairs { "amax", "amin", "sum", "std", "norm", "argmax" } do
      local _ = moe[name](moe.randn(33, 17))
      local _, s = moe.svd(x)
      assert.same(wanted:totable(), s:totable(), name)
    end
  end)
end)
