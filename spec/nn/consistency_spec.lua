local moe = require "moe"
local helper = require "spec.helper"

local consistency = moe.loss.consistency
local function f64(t) return moe.tensor(t, { dtype = "f64" }) end

describe("moe.loss.consistency", function()
  it("is half the sum of both divergences, by hand", function()
    -- p = (1/2, 1/2), q = (3/4, 1/4)
    local a, b = f64 { { 0, 0 }, { 5, 5 } }, f64 { { math.log(3), 0 }, { 7, 7 } }
    local kl = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    local back = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert.close({ (kl + back) / 2, 0 }, consistency(a, b, { reduction = "none" }), { rtol = 1e-12, atol = 1e-15 })
    assert.close((kl + back) / 2, consistency(a, b, { reduction = "sum" }):item(), { rtol = 1e-12 })
    assert.close((kl + back) / 4, consistency(a, b):item(), { rtol = 1e-12 })
    assert.close(consistency(a, b):item(), consistency(b, a):item(), { rtol = 1e-12 })
    -- rows of padding do not count
    assert.close((kl + back) / 2, consistency(a, b, { mask = moe.tensor { true, false } }):item(), { rtol = 1e-12 })
    assert.equal(0, consistency(a, b, { mask = moe.tensor { false, false } }):item())
  end)

  it("is 0 where predictions agree, and more elsewhere, in any shape", function()
    moe.manual_seed(1)
    local a = moe.randn(3, 4, 5)
    assert.close(0, consistency(a, a + 3):item(), { atol = 1e-6 })
    assert.same({ 3, 4 }, consistency(a, moe.randn(3, 4, 5), { reduction = "none" }).shape)
    assert.is_true(consistency(a, moe.randn(3, 4, 5), { reduction = "none" }):min():item() > 0)
  end)

  it("has the gradient that differences show, into both", function()
    moe.manual_seed(1)
    assert(moe.gradcheck(consistency, { moe.randn({ 3, 4 }, { dtype = "f64" }), moe.randn({ 3, 4 }, { dtype = "f64" }) }))
  end)

  it("names what is wrong", function()
    assert.matches("one shape %[.., classes%], got %[2, 3%] and %[2, 4%]", helper.error_of(consistency, moe.ones(2, 3), moe.ones(2, 4)))
    assert.matches("argument 2 must be a tensor of logits, got a number", helper.error_of(consistency, moe.ones(2, 3), 1))
    assert.matches("'reduction' must be one of", helper.error_of(consistency, moe.ones(2), moe.ones(2), { reduction = "max" }))
  end)
end)
