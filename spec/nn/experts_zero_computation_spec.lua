local moe = require "moe"
local helper = require "spec.helper"

describe("moe.experts.zero_computation", function()
  local E, d = 7, 4
  local function made(o, bank)
    moe.manual_seed(3)
    o.d_model, o.num_experts, o.dtype = d, o.num_experts or E, "f64"
    table.insert(o, 1, bank or moe.experts.mlp { intermediate_size = 5, dtype = "f64" })
    return moe.experts.zero_computation(o)
  end

  local function softmax2(a, b)
    local m = math.max(a, b)
    a, b = math.exp(a - m), math.exp(b - m)
    return a / (a + b), b / (a + b)
  end

  it("is the weighted sum of work, nothing, copies and constants", function()
    local bank = made { zero = 1, copy = 1, constant = 2 }
    local x, gates = moe.randn(9, d, { dtype = "f64" }), moe.rand(9, E, { dtype = "f64" })
    gates = gates * moe.rand(9, E):gt(0.4):to "f64"
    local y = bank(x, moe.routing.dense(gates))
    local work = bank.bank(x, moe.routing.dense(gates:narrow(2, 1, 3):contiguous())):totable()
    local g, w, v, rows = gates:totable(), bank.constant_weight:totable(), bank.constant_value:totable(), x:totable()
    for t, row in ipairs(rows) do
      for i = 1, d do work[t][i] = work[t][i] + g[t][5] * row[i] end
      for c = 1, 2 do
        local a, b = 0, 0
        for i = 1, d do a, b = a + w[2 * c - 1][i] * row[i], b + w[2 * c][i] * row[i] end
        a, b = softmax2(a, b)
        for i = 1, d do work[t][i] = work[t][i] + g[t][5 + c] * (a * row[i] + b * v[c][i]) end
      end
    end
    assert.close(work, y, { rtol = 1e-9, atol = 1e-12 })
  end)

  it("shows the kernel only what works", function()
    local seen
    local counting = moe.experts.map(function(xe, e)
      seen[e] = xe:size(1)
      return xe * 2
    end)
    seen = {}
    local bank = moe.experts.zero_computation { counting, zero = 1, copy = 1, d_model = d, num_experts = 4 }
    local index = moe.tensor({ { 1, 3 }, { 4, 2 }, { 3, 4 }, { 0, 2 } }, { dtype = "i64" })
    local x = moe.randn(4, d)
    local y = bank(x, moe.routing.topk(index, nil, 4))
    assert.same({ 1, 2 }, seen)
    assert.close(x * moe.tensor { { 2 }, { 3 }, { 1 }, { 2 } }, y)
  end)

  it("has gradients", function()
    local bank = made { zero = 1, copy = 2, constant = 1 }
    local x, gates = moe.randn(5, d, { dtype = "f64" }), moe.rand(5, E, { dtype = "f64" }) + 0.1
    local w = moe.randn(5, d, { dtype = "f64" })
    assert.is_true(moe.gradcheck(function(xs, gs, cw, cv)
      rawset(bank, "constant_weight", cw)
      rawset(bank, "constant_value", cv)
      return (bank(xs, moe.routing.dense(gs)) * w):sum()
    end, { x, gates, bank.constant_weight, bank.constant_value }))
  end)

  it("fits a layer with capacity and masks, and a soft routing", function()
    local layer = moe.layer {
      d_model = d, num_experts = 8, router = moe.router.topk { top_k = 2 }, capacity_factor = 1,
      experts = moe.experts.zero_computation { moe.experts.swiglu { intermediate_size = 3 }, zero = 1, copy = 1, constant = 1 },
    }
    local x = moe.randn(2, 6, d)
    local y, routing = layer(x, { mask = moe.tensor { { 1, 1, 1, 1, 1, 0 }, { 1, 1, 1, 1, 1, 1 } }:gt(0) })
    assert.same({ 2, 6, d }, y.shape)
    assert.same({ 0, 0, 0, 0 }, y[1][6]:totable())
    assert.equal(8, routing.num_experts)
    assert.equal(5, layer.experts.num_working)
    y:sum():backward()
    for name, p in layer:named_parameters() do assert.is_true(p.grad ~= nil, name) end
    -- one slot an expert: the copy gives its slot back
    local bank = moe.experts.zero_computation { moe.experts.mlp { intermediate_size = 3 }, copy = 1, d_model = d, num_experts = 2 }
    local dispatch, combine = moe.rand(5, 2, 1), moe.zeros(5, 2, 1)
    combine[{ {}, 2, 1 }] = 1
    local rows = moe.randn(5, d)
    local slot = (dispatch[{ {}, 2 }] * rows):sum(1, true):expand { 5, d }
    assert.close(slot, bank(rows, moe.routing.soft(dispatch, combine)), { rtol = 1e-5, atol = 1e-6 })
  end)

  it("names what is wrong", function()
    local function says(message, f) assert.matches(message, helper.error_of(f)) end
    says("wants a bank of moe.experts first, got a nil", function() moe.experts.zero_computation { zero = 1 } end)
    says("of 2 experts 3 do no work, which leaves %-1 for the bank", function() made { zero = 3, num_experts = 2 } end)
    says("'copy' must not be negative", function() made { copy = -1 } end)
    says("unknown option 'constants' %(did you mean 'constant'", function() made { constants = 1 } end)
    says("the bank's d_out is 3, but what is copied has d_model = 4", function()
      made({ copy = 1 }, moe.experts.mlp { intermediate_size = 2, d_out = 3, dtype = "f64" })
    end)
    says("wants a routing over 7 experts, got none", function() made { copy = 1 }(moe.randn(2, d)) end)
  end)
end)
