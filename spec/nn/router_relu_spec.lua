local moe = require "moe"
local helper = require "spec.helper"

local function router(o)
  o.d_model, o.num_experts = o.d_model or 5, o.num_experts or 6
  moe.manual_seed(3)
  return moe.router.relu(o)
end

describe("moe.router.relu", function()
  it("opens the gates above zero", function()
    local m = router { bias = true }
    local x = moe.randn(12, 5)
    local routing = m:route(x)
    local gates = (x:matmul(m.weight:t()) + m.bias):relu()
    assert.close(gates, routing.gate)
    assert.equal(gates:gt(0):to("i64"):sum():item(), routing.num_assignments)
    assert.close(gates / (gates:sum(-1, true) + 1e-20), routing.probs, { rtol = 1e-4 })
    local sums = moe.zeros(12):index_add(1, routing.token, routing.weight)
    assert.close(gates:sum(-1), sums, { rtol = 1e-5 })
  end)

  it("may leave a token without an expert", function()
    local m = router { bias = true }
    m.bias:detach():fill_(-100)
    local layer = moe.layer { d_model = 5, num_experts = 6, router = m, experts = moe.experts.mlp { intermediate_size = 4 } }
    local y, routing = layer(moe.randn(3, 5))
    assert.equal(0, routing.num_assignments)
    assert.same(moe.zeros(3, 5):totable(), y:totable())
    assert.same(moe.zeros(3, 6):totable(), routing.probs:totable())
    assert.equal(0, m:route(moe.randn(0, 5)).num_assignments)
  end)

  it("has no jump where a gate shuts, and checked gradients on both sides of it", function()
    local o = { dtype = "f64", bias = true, num_experts = 3 }
    local layer = moe.layer { d_model = 5, num_experts = 3, router = router(o), dtype = "f64",
      experts = moe.experts.swiglu { intermediate_size = 3 } }
    local x = moe.randn(1, 5, { dtype = "f64" })
    local m = layer.router
    local open = x:linear(m.weight):neg():detach():reshape { -1 } -- the bias at which every gate is just shut
    local function out(shift)
      m.bias:detach():copy_(open + shift)
      return (layer(x))
    end
    assert.close(moe.zeros(1, 5), out(0), { atol = 1e-15 })
    -- continuous: the output goes to zero with the gates
    local previous = math.huge
    for _, shift in ipairs { 1e-1, 1e-3, 1e-6, 1e-9 } do
      local size = out(shift):abs():sum():item()
      assert.is_true(size > 0 and size < previous and size < 100 * shift)
      previous = size
    end
    for _, shifts in ipairs { { 0.01, 0.01, 0.01 }, { -0.01, 0.01, -0.01 }, { -0.01, -0.01, -0.01 } } do
      moe.gradcheck(function(z, w, b)
        rawset(m, "weight", w)
        rawset(m, "bias", b)
        local y, routing = layer(z)
        return y, routing.gate
      end, { x, m.weight:detach():clone(), (open + moe.tensor(shifts, { dtype = "f64" })):detach() })
    end
  end)

  it("leaves masked tokens and experts alone, and takes back a choice", function()
    local x, m = moe.randn(4, 5), router {}
    local mask = moe.tensor { true, false, true, true }
    local routing = m:route(x, { mask = mask, expert_mask = moe.tensor { true, false, true, true, true, true } })
    assert.equal(0, routing:load():totable()[2])
    assert.equal(0, routing.gate[2]:sum():item())
    local plain = m:route(x)
    local forced = m:route(x, { choice = moe.tensor({ { 1 }, { 2 }, { 0 }, { 4 } }, { dtype = "i64" }) })
    assert.close({ plain.gate[1][1], plain.gate[2][2], 0, plain.gate[4][4] }, forced.gate:sum(-1))
  end)

  it("names what is wrong", function()
    local m = router {}
    local x = moe.randn(3, 5)
    x[{ 1, 1 }] = 0 / 0
    assert.matches("router.relu: the logits of token 1 hold NaN", helper.error_of(function() m:route(x) end))
    assert.matches("unknown option 'top_k'", helper.error_of(function() router { top_k = 2 } end))
    assert.matches("num_experts' is missing", helper.error_of(function() moe.router.relu { d_model = 4 } end))
  end)
end)
