local moe = require "moe"
local helper = require "spec.helper"

local EXACT = { rtol = 1e-11, atol = 1e-12 }
local function rand(...) return moe.randn({ ... }, { dtype = "f64" }) end

local function sliced(o)
  moe.manual_seed(1)
  o.in_features, o.out_features, o.num_groups = 6, 9, 3
  local m = moe.nn.sliced_linear(o)
  m:to "f64"
  return m
end

describe("sliced linear layers", function()
  for _, side in ipairs { "in", "out" } do
    it("with every group on is the dense layer: " .. side, function()
      local m, dense, x = sliced { side = side }, moe.nn.linear { in_features = 6, out_features = 9, bias = false }, rand(5, 6)
      dense:to "f64"
      m:copy_from(dense)
      local all = moe.routing.dense(moe.ones({ 5, 3 }, { dtype = "f64" }))
      assert.close(dense(x), m(x, all), EXACT)
    end)

    it("is the masked product: " .. side, function()
      for _, weighted in ipairs { true, false } do
        local m, w, x = sliced { side = side, weighted = weighted }, rand(9, 6), rand(4, 6)
        m:copy_from(w)
        local gates = moe.tensor({ { 0.5, 0, 2 }, { 0, 0, 0 }, { 0, 1.5, 0 }, { 1, 1, 3 } }, { dtype = "f64" })
        local y = m(x, moe.routing.dense(gates))
        local mask = weighted and gates or gates:ne(0):to "f64"
        local want = side == "in" and (x * mask:repeat_interleave(2, 2)):linear(w) or x:linear(w) * mask:repeat_interleave(3, 2)
        assert.close(want, y, EXACT)
      end
    end)

    it("passes the gradient check and reads active slices alone: " .. side, function()
      local m, x = sliced { side = side, weighted = true }, rand(3, 6)
      local gates = moe.tensor({ { 0.5, 0, 2 }, { 0, 0, 1 }, { 1, 0, 0 } }, { dtype = "f64" })
      x.requires_grad, gates.requires_grad = true, true
      assert(moe.gradcheck(function() return m(x, moe.routing.dense(gates)):sin():sum() end, { x, m.weight }))
      m(x, moe.routing.dense(gates)):sin():sum():backward()
      assert.is_true(gates.grad:abs():sum():item() > 0)
      moe.no_grad(function() m.weight[2]:fill_(0 / 0) end)
      assert.is_true(m(x, moe.routing.dense(gates)):isfinite():all():item())
    end)
  end

  it("says what is wrong", function()
    local function says(want, f, ...)
      local message = helper.error_of(f, ...)
      assert.truthy(message:find(want, 1, true), message)
    end
    says("in_features = 5 is no multiple of num_groups = 2", moe.nn.sliced_linear, { in_features = 5, out_features = 4, num_groups = 2 })
    local m = sliced {}
    says("argument 2 must be a routing with lists, got a nil", m, rand(2, 6))
    says("the routing is over 2 groups, wanted 3", m, rand(2, 6), moe.routing.dense(moe.ones(2, 2)))
    says("x must be [2, 6], got [2, 5]", m, rand(2, 5), moe.routing.dense(moe.ones(2, 3)))
  end)
end)
