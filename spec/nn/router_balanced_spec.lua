local moe = require "moe"
local helper = require "spec.helper"

local function balanced(o)
  o.d_model, o.num_experts = 5, 4
  moe.manual_seed(3)
  return moe.router.balanced(o)
end

describe("moe.router.balanced", function()
  local function tokens(n)
    moe.manual_seed(9)
    return moe.randn(n, 5) + moe.tensor { 1, -1, 2, 0, 1 } -- leans, so that the greedy choice is uneven
  end

  it("gives every expert its tokens by the exact assignment, and weights by the logits alone", function()
    for k = 1, 3 do
      local m = balanced { method = "assignment", top_k = k, bias = true }
      local x = tokens(40)
      local routing = m:route(x)
      assert.same({ 10 * k, 10 * k, 10 * k, 10 * k }, routing:load():totable())
      local logits = x:matmul(m.weight:t()) + m.bias
      local index = moe.balanced_assignment(logits:detach(), { top_k = k })
      assert.same(index:totable(), routing.index:totable())
      assert.close(logits:sigmoid():gather(2, index):sum(), routing.weight:sum(), { rtol = 1e-5 })
      assert.close(moe.ones(40), routing.probs:sum(-1), { rtol = 1e-5 })
      m:eval()
      local _, greedy = logits:topk(k)
      assert.same(greedy:totable(), m:route(x).index:totable())
      assert.is_true(m:route(x):max_over_mean() > (k < 3 and 1.3 or 1.1))
    end
  end)

  it("evens out the choices by Sinkhorn's prices, the better the lower the temperature", function()
    local x, gap = tokens(400), {}
    for i, temperature in ipairs { 1, 0.05 } do
      local m = balanced { temperature = temperature, iterations = 100, score = "softmax" }
      local routing = m:route(x)
      local logits = (x:matmul(m.weight:t()) / temperature):detach()
      local _, index = (logits + moe.sinkhorn_price(logits, { iterations = 100 })):topk(1)
      assert.same(index:totable(), routing.index:totable())
      assert.close((logits * temperature):softmax(-1), routing.probs, { rtol = 1e-4, atol = 1e-6 })
      gap[i] = routing:max_over_mean()
      m:eval()
      assert.is_true(m:route(x):max_over_mean() > gap[i])
    end
    assert.is_true(gap[2] < 1.05)
    assert.is_true(gap[2] < gap[1])
  end)

  it("has the gradient of the chosen scores", function()
    for _, o in ipairs { { top_k = 1 }, { top_k = 2, score = "softmax", norm_topk_prob = true, method = "assignment" } } do
      o.dtype = "f64"
      local m = balanced(o)
      local x = tokens(6):to "f64"
      local w = moe.arange(1, 6 * o.top_k):to "f64"
      local forced = m:route(x).index -- differences must not change the choice
      local ok, report = moe.gradcheck(function(weight, xs)
        local keep = m.weight
        rawset(m, "weight", weight)
        local routing = m:route(xs, { choice = forced })
        rawset(m, "weight", keep)
        return (routing.weight * w):sum()
      end, { m.weight, x })
      assert.is_true(ok, report);
      (m:route(x).weight * w):sum():backward()
      local loss = m.weight.grad:clone()
      m.weight.grad = nil;
      (m:route(x, { choice = forced }).weight * w):sum():backward()
      assert.close(m.weight.grad, loss, { rtol = 1e-12 })
    end
  end)

  it("counts only the tokens that take part, in a layer too", function()
    local layer = moe.layer {
      d_model = 5, num_experts = 4, router = moe.router.balanced { method = "assignment" },
      experts = moe.experts.mlp { intermediate_size = 3 },
    }
    local mask = moe.arange(1, 30):le(20)
    local _, routing = layer(tokens(30), { mask = mask })
    assert.same({ 5, 5, 5, 5 }, routing:load():totable())
    assert.equal(10, routing.masked)
    local y = layer(moe.zeros(0, 5))
    assert.same({ 0, 5 }, y.shape)
  end)

  it("names what is wrong", function()
    local function says(message, f) assert.matches(message, helper.error_of(f)) end
    says("'temperature' must be above 0, got 0", function() balanced { temperature = 0 } end)
    says("'top_k' must be at least 1", function() balanced { top_k = 0 } end)
    says("top_k is 5, but there are 4 experts", function() balanced { top_k = 5 } end)
    says("'iterations' must be at least 1", function() balanced { iterations = 0 } end)
    says("cuts the router off", function() balanced { norm_topk_prob = true } end)
    says("must be one of sinkhorn, assignment", function() balanced { method = "auction" } end)
    local layer = moe.layer {
      d_model = 5, num_experts = 4, router = moe.router.balanced { method = "assignment" },
      experts = moe.experts.mlp { intermediate_size = 3 },
    }
    local x = tokens(4)
    says("balanced.*the score of token 1 for expert 1 is NaN", function() layer(x * (0 / 0)) end)
    assert.same({ 1, 1, 1, 1 }, select(2, layer(x)):load():totable())
    says("for expert 2 is infinite", function() layer(x, { expert_mask = moe.tensor { 1, 0, 1, 1 }:gt(0) }) end)
  end)
end)
