-- poly_relu and poly_norm against their formulas made of elementary operations, forward and backward; the modules of them.
local helper = require "spec.helper"
local moe = require "moe"

-- a's column i, to be multiplied with x
local function term(a, i) return a:narrow(-1, i, 1) end

local reference = {
  poly_relu = function(x, a)
    local z, y, p = x:relu(), x * 0, moe.ones_like(x)
    for i = 1, a:size(-1) do
      y = y + term(a, i) * p
      p = p * z
    end
    return y
  end,
  poly_norm = function(x, a, eps)
    local y, p = term(a, 1) + x * 0, x
    for i = 2, a:size(-1) do
      y = y + term(a, i) * p / (p:square():mean(-1, true) + eps):sqrt()
      p = p * x
    end
    return y
  end,
}

local shapes = { -- of x, of a
  { { 3, 5 }, { 4 } }, { { 3, 5 }, { 3, 4 } }, { { 2, 3, 7 }, { 2, 3, 3 } }, { { 2, 3, 7 }, { 5 } }, { { 6 }, { 4 } },
  { { 2, 700 }, { 2, 4 } }, { { 300, 33 }, { 4 } }, { { 4, 256 }, { 2 } }, { { 5, 3 }, { 1 } }, { { 2, 257 }, { 16 } },
}

for name, f in pairs(reference) do
  describe(name, function()
    for _, dtype in ipairs { "f64", "f32" } do
      for _, s in ipairs(shapes) do
        it(("of x %s with a %s in %s"):format(table.concat(s[1], "x"), table.concat(s[2], "x"), dtype), function()
          moe.manual_seed(#s[1] + s[2][#s[2]])
          local o = { dtype = dtype, requires_grad = true }
          local x, a = moe.randn(s[1], o), moe.randn(s[2], o)
          local g = moe.randn(s[1], { dtype = dtype })
          local xw, aw = x:detach():to "f64", a:detach():to "f64"
          xw.requires_grad, aw.requires_grad = true, true
          local y, wanted = moe[name](x, a, table.unpack(name == "poly_norm" and { 1e-3 } or {})), f(xw, aw, 1e-3)
          y:backward(g)
          wanted:backward(g:to "f64")
          -- beside the largest value: of a sum to the power 15 its small results keep less
          local e = dtype == "f64" and 1e-11 or 2e-5
          for _, pair in ipairs { { wanted, y }, { xw.grad, x.grad }, { aw.grad, a.grad } } do
            assert.close(pair[1], pair[2], { rtol = 10 * e, atol = e * math.max(1, pair[1]:abs():max():item()) })
          end
        end)
      end
    end

    it("gives gradients of x alone and of a alone", function()
      local x, a = moe.randn(3, 5), moe.randn(4)
      a.requires_grad = true
      moe[name](x, a):sum():backward()
      assert.is_nil(x.grad)
      assert.same({ 4 }, a.grad.shape)
      local y = x:clone():requires_grad_()
      moe[name](y, a:detach()):sum():backward()
      assert.is_true(y.grad:abs():sum():item() > 0)
    end)

    it("keeps x's type, whatever a's is, and NaN", function()
      local x, a = moe.randn(2, 3), moe.tensor { 0.0, 1, 1, 1 }
      assert.equal("bf16", moe[name](x:to "bf16", a).dtype)
      x[1][2] = 0 / 0
      local y = moe[name](x, a)
      assert.is_true(y[1]:isnan():any():item())
      assert.is_false(y[2]:isnan():any():item())
    end)

    it("takes empty sizes", function()
      for _, shape in ipairs { { 0, 3 }, { 3, 0 } } do
        local x, a = moe.zeros(shape, { requires_grad = true }), moe.ones({ 4 }, { requires_grad = true })
        local y = moe[name](x, a)
        assert.same(shape, y.shape)
        y:sum():backward()
        assert.close({ 0, 0, 0, 0 }, a.grad)
      end
    end)

    it("names what is wrong", function()
      local x = moe.ones(3, 5)
      for _, case in ipairs {
        { "a is %[2, 4%], x is %[3, 5%]", x, moe.ones(2, 4) },
        { "a is %[1, 3, 4%]", x, moe.ones(1, 3, 4) },
        { "1 to 16 terms .* got 17", x, moe.ones(17) },
        { "got 0", x, moe.ones(0) },
        { "must be floating, got i64", moe.ones({ 3 }, { dtype = "i64" }), moe.ones(4) },
        { "no dimension", moe.tensor(1), moe.ones(4) },
        { "argument 2", x, 3 },
      } do
        local message = helper.error_of(moe[name], case[2], case[3])
        assert.matches(case[1], message)
        assert.matches("^" .. name, (message:gsub("^%S+:%d+: ", "")))
      end
    end)
  end)
end

describe("poly_relu", function()
  it("with a = (0, 1, 0, 0) is relu to the bit, forward and backward, powers that overflow included", function()
    local x = moe.tensor { { -2, -0.5, 0, 0.3, 7, 1e25 } }
    x.requires_grad = true
    local y = x:poly_relu(moe.tensor { 0.0, 1, 0, 0 })
    local z = x:detach():requires_grad_()
    y:sum():backward()
    z:relu():sum():backward()
    assert.same(z:detach():relu():totable(), y:totable())
    assert.same(z.grad:totable(), x.grad:totable())
  end)
end)

describe("poly_norm", function()
  it("does not care for the size of x where eps is small beside it, up to the largest numbers", function()
    moe.manual_seed(3)
    local x, a = moe.randn(4, 40), moe.tensor { 0.1, 0.5, -0.3, 0.7 }
    local y = x:poly_norm(a)
    for _, s in ipairs { 8.0, 4096.0, 2.0 ^ 100 } do assert.close(y, (x * s):poly_norm(a), { rtol = 1e-4, atol = 1e-4 }) end
    local big = (x * 2.0 ^ 100):requires_grad_()
    local g = moe.randn(4, 40)
    big:poly_norm(a):backward(g)
    x.requires_grad = true
    x:poly_norm(a):backward(g)
    assert.close(x.grad, big.grad * 2.0 ^ 100, { rtol = 1e-3, atol = 1e-3 })
  end)

  it("of zeros is a_0", function()
    local x = moe.zeros({ 2, 3 }, { requires_grad = true })
    local y = x:poly_norm(moe.tensor { 0.25, 1, 1, 1 })
    assert.close({ { 0.25, 0.25, 0.25 }, { 0.25, 0.25, 0.25 } }, y)
    y:sum():backward()
    assert.close({ { 1000, 1000, 1000 }, { 1000, 1000, 1000 } }, x.grad, { rtol = 1e-5 }) -- 1 / sqrt(eps)
  end)

  it("refuses a negative eps", function()
    assert.matches("eps must not be negative", helper.error_of(moe.poly_norm, moe.ones(3), moe.ones(2), -1))
  end)

  it("says that it has no second derivative", function()
    local x = moe.randn({ 3 }, { requires_grad = true })
    assert.matches("poly_norm: has no second derivative",
      helper.error_of(moe.grad, { x:poly_norm(moe.ones(3)):sum() }, { x }, { create_graph = true }))
  end)
end)

describe("moe.nn.poly_relu and moe.nn.poly_norm", function()
  it("start with equal weights of the powers and learn them", function()
    for _, name in ipairs { "poly_relu", "poly_norm" } do
      local m = moe.nn[name]()
      assert.close({ 0, 1 / 3, 1 / 3, 1 / 3 }, m.coefficients, { rtol = 1e-6 })
      assert.same({ 3 }, moe.nn[name](2).coefficients:narrow(1, 1, 3).shape)
      local x = moe.randn(4, 6)
      local y = m(x)
      assert.close(moe[name](x, m.coefficients), y)
      y:square():sum():backward()
      assert.is_true(m.coefficients.grad:abs():min():item() > 0)
      assert.is_false(moe.nn.decays(m.coefficients))
      local other = moe.nn[name] { order = 3 }
      moe.no_grad(function() m.coefficients:add_(1) end)
      other:load_state_dict(m:state_dict())
      assert.close(m(x), other(x))
      assert.matches("order=3", tostring(m))
    end
  end)

  it("are found by the gradient check", function()
    moe.manual_seed(5)
    local m = moe.nn.poly_norm { dtype = "f64", eps = 0.1 }
    assert.is_true(moe.gradcheck(function(x) return m(x) end, { moe.randn({ 2, 4 }, { dtype = "f64" }) }))
  end)

  it("name what is wrong", function()
    assert.matches("'order' must lie in 1..15, got 0", helper.error_of(moe.nn.poly_relu, 0))
    assert.matches("unknown option 'ordre' %(did you mean 'order'", helper.error_of(moe.nn.poly_relu, { ordre = 3 }))
    assert.matches("unknown option 'eps'", helper.error_of(moe.nn.poly_relu, { eps = 3 }))
  end)
end)
