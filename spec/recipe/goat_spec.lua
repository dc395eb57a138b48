local moe = require "moe"
local helper = require "spec.helper"
local domains = require "moe.recipe.domains"
local goat = moe.recipe.goat

-- A tuned linear layer [m, n] in f64, started by the recipe, and the weight it was made from.
local function started(m, n, o)
  local W = moe.randn(m, n, { dtype = "f64" })
  local linear = moe.experts.lora_linear { base = W, num_experts = o.num_experts, top_k = o.top_k, rank = o.rank }
  return goat.start(linear, o), W
end

describe("recipe goat", function()
  it("starts each expert from a segment of the singular values", function()
    moe.manual_seed(1)
    local linear, W = started(9, 7, { num_experts = 3, rank = 2, rho = 4, eta = 0.5 })
    local bank, keep = linear.experts, W:clone()
    assert.close(math.sqrt(3 * 0.5 * 7 / 2), bank.scale)
    local U, S, V = moe.svd(W)
    for e = 1, 3 do
      local first = (e - 1) * 2 + 1 -- segments of two: seven values over three experts
      local part = (U:narrow(2, first, 2) * S:narrow(1, first, 2)):matmul(V:narrow(2, first, 2):t())
      assert.close(part / 4, bank:delta(e):detach(), { rtol = 0, atol = 1e-12 })
      -- both factors carry the root of the values
      assert.close(bank.lora_B[e]:norm(2, 1), bank.lora_A[e]:norm(2, 2), { rtol = 1e-12 })
    end
    assert.same(keep:totable(), W:totable()) -- the weight it came from is not written
  end)

  it("is the frozen layer under an even gate", function()
    moe.manual_seed(2)
    local linear, W = started(8, 12, { num_experts = 4, rank = 2 })
    local x = moe.randn(5, 12, { dtype = "f64" })
    local even = moe.routing.dense(moe.full({ 5, 4 }, 0.25, { dtype = "f64" }))
    assert.close(x:linear(W), linear.experts(x, even), { rtol = 0, atol = 1e-12 })
    -- and in expectation over evenly drawn pairs of experts
    local sum, n = 0, 0
    for a = 1, 4 do
      for b = a + 1, 4 do
        local index = moe.tensor({ a, b }, { dtype = "i64" }):expand { 5, 2 }
        sum, n = sum + linear.experts(x, moe.routing.topk(index, moe.full({ 5, 2 }, 0.5, { dtype = "f64" }), 4)), n + 1
      end
    end
    assert.close(x:linear(W), sum / n, { rtol = 0, atol = 1e-12 })
    -- while a single expert is not the layer
    local one = moe.routing.topk(moe.ones({ 5, 1 }, { dtype = "i64" }), nil, 4)
    assert.is_true((linear.experts(x, one) - x:linear(W)):abs():max():item() > 0.01)
  end)

  it("takes a linear layer with a bias too, and says when segments are too short", function()
    local base = moe.nn.linear(8, 6)
    local W, x = base.weight:detach():clone(), moe.randn(3, 8)
    local wanted = base(x)
    local linear = goat.start(moe.experts.lora_linear { base = base, num_experts = 2, rank = 3 })
    assert.close(wanted, linear.experts(x, moe.routing.dense(moe.full({ 3, 2 }, 0.5))), { rtol = 0, atol = 1e-5 })
    assert.is_true((base.weight - W):abs():max():item() > 0.001)
    assert.matches("goat: rank 4, but a segment has 3 singular values", helper.error_of(function()
      goat.start(moe.experts.lora_linear { base = moe.nn.linear(8, 6), num_experts = 2, rank = 4 })
    end))
  end)

  it("in equal steps at an equal rate is better than a start at zero, and nearer to full tuning", function()
    local base = domains.base()
    local result = goat.run { base = base, starts = { "zero", "goat", "full" }, seeds = { 1, 2 }, steps = 60, lr = 0.003 }
    local zero, own, full = result.zero, result.goat, result.full
    local figures = ("goat %.4f, zero %.4f, full %.4f"):format(own.val_loss, zero.val_loss, full.val_loss)
    for i = 1, 2 do assert.is_true(own.losses[i] < 0.97 * zero.losses[i], figures) end
    assert.is_true(full.val_loss < own.val_loss, figures)
    assert.is_true(own.val_loss - full.val_loss < 0.7 * (zero.val_loss - full.val_loss), figures)
  end)
end)
