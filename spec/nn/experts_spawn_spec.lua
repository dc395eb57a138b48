local moe = require "moe"
local helper = require "spec.helper"

local function bank(kind, n, o)
  o = o or {}
  o.d_model, o.num_experts, o.intermediate_size = o.d_model or 5, n, o.intermediate_size or 4
  return moe.experts[kind](o)
end

describe("moe.experts.spawn", function()
  it("copies one expert into all, in place", function()
    for _, kind in ipairs { "mlp", "swiglu" } do
      local b = bank(kind, 3, { bias = true })
      local before, second = {}, {}
      for name, p in b:named_parameters() do before[name], second[name] = p, p[2]:totable() end
      assert.equal(b, moe.experts.spawn(b, { expert = 2 }))
      for name, p in b:named_parameters() do
        assert.equal(before[name], p)
        for e = 1, 3 do assert.same(second[name], p[e]:totable()) end
      end
    end
  end)

  it("gives a layer the output of the one expert while the gates sum to 1", function()
    local one, many = bank("swiglu", 1), bank("swiglu", 6)
    moe.experts.spawn(many, { from = one })
    local layer = moe.layer { d_model = 5, num_experts = 6, experts = many, router = moe.router.dense_to_sparse { threshold = 0 } }
    local x = moe.randn(7, 5)
    local y, routing = layer(x)
    assert.equal(42, routing.num_assignments)
    assert.close(one(x), y, { rtol = 1e-4, atol = 1e-6 })
  end)

  it("moves matrices by noise and masks them, each expert by itself, and leaves biases alone", function()
    moe.manual_seed(3)
    local o = { bias = true, d_model = 60, intermediate_size = 50 }
    local one, many = bank("mlp", 1, o), bank("mlp", 2, o)
    moe.experts.spawn(many, { from = one, noise = 0.5 })
    local gap = many.up_proj:detach() - one.up_proj:detach()
    for e = 1, 2 do assert.close(0.5, gap[e]:std():item() / one.up_proj:detach():std():item(), { rtol = 0.05 }) end
    assert.is_true((gap[1] - gap[2]):abs():amax():item() > 0.01)
    assert.same(one.up_bias[1]:totable(), many.up_bias[2]:totable())
    moe.experts.spawn(many, { from = one, mask = 0.3 })
    local zero = many.down_proj:detach():eq(0)
    assert.close(0.3, zero:to("f32"):mean():item(), { atol = 0.03 })
    assert.same(moe.where(zero, 0, one.down_proj:detach()):totable(), many.down_proj:detach():totable())
    assert.not_same(zero[1]:totable(), zero[2]:totable())
    assert.same(one.down_bias[1]:totable(), many.down_bias[2]:totable())
  end)

  it("names what is wrong", function()
    local b = bank("mlp", 2)
    for _, case in ipairs {
      { "argument 1 must be a bank of experts, got a number", function() moe.experts.spawn(3) end },
      { "there is no expert 3 among 2", function() moe.experts.spawn(b, { expert = 3 }) end },
      { "'mask' must be in %[0, 1%], got 2", function() moe.experts.spawn(b, { mask = 2 }) end },
      { "'noise' must not be negative, got %-1", function() moe.experts.spawn(b, { noise = -1 }) end },
      { "'from' must be a bank of the same class", function() moe.experts.spawn(b, { from = bank("swiglu", 1) }) end },
      { "parameter up_proj is %[2, 4, 5%], but %[1, 9, 5%] in the bank", function()
        moe.experts.spawn(b, { from = bank("mlp", 1, { intermediate_size = 9 }) })
      end },
    } do
      assert.matches(case[1], helper.error_of(case[2]))
    end
  end)
end)
