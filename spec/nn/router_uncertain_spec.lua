local moe = require "moe"
local helper = require "spec.helper"

local function router(o)
  local all = { d_model = 8, num_experts = 4, top_k = 2 }
  for k, v in pairs(o or {}) do all[k] = v end
  return moe.router.uncertain(all)
end

describe("moe.router.uncertain", function()
  it("without dropout is the topk router to the bit", function()
    moe.manual_seed(1)
    local own, plain = router { dropout = 0, bias = true }, moe.router.topk { d_model = 8, num_experts = 4, top_k = 2, bias = true }
    plain:load_state_dict(own:state_dict())
    local x = moe.randn(11, 8)
    local a, b = own:route(x), plain:route(x)
    assert.same(b.index:totable(), a.index:totable())
    assert.same(b.weight:totable(), a.weight:totable())
    assert.same(b.probs:totable(), a.probs:totable())
  end)

  it("divides the mean of the passes by what their variance says", function()
    moe.manual_seed(2)
    local r = router { dropout = 0.5, samples = 5 }
    local x = moe.randn(6, 8)
    moe.manual_seed(3)
    local mean, variance = r:spread(x)
    moe.manual_seed(3)
    local z = {}
    local dropped = moe.stack({ x, x, x, x, x }, 1):dropout(0.5)
    for m = 1, 5 do z[m] = dropped[m]:matmul(r.weight:t()) end
    local all = moe.stack(z, 1)
    assert.close(all:mean(1), mean, { rtol = 1e-5, atol = 1e-6 })
    assert.close(all:var(1, false, 0), variance, { rtol = 1e-4, atol = 1e-6 })
    moe.manual_seed(3)
    assert.close(mean / (1 + math.pi / 8 * variance):sqrt(), r:affinity(x), { rtol = 1e-5, atol = 1e-6 })
  end)

  it("tells the variance of dropout: p / (1 - p) sum of (w x)^2", function()
    moe.manual_seed(4)
    local r = router { dropout = 0.25, samples = 4000 }
    local x = moe.randn(3, 8)
    local mean, variance = r:spread(x)
    local wanted = (x:square():matmul(r.weight:square():t())) * (0.25 / 0.75)
    assert.close(wanted, variance, { rtol = 0.15, atol = 0.005 })
    assert.close(x:matmul(r.weight:t()), mean, { rtol = 0.2, atol = 0.05 })
  end)

  it("lets gradients through to x and to its weights", function()
    local r = router { dropout = 0.3 }
    local x = moe.randn(5, 8):requires_grad_()
    local routing = r:route(x)
    routing.weight:narrow(1, 1, 3):sum():backward()
    assert.is_true(x.grad:abs():sum():item() > 0)
    assert.is_true(r.weight.grad:abs():sum():item() > 0)
  end)

  it("may be plain in evaluation", function()
    local r = router { dropout = 0.5, in_eval = false }
    local x = moe.randn(5, 8)
    r:eval()
    assert.same(x:linear(r.weight):totable(), r:affinity(x):totable())
    r = router { dropout = 0.5 }
    r:eval()
    assert.is_true((r:affinity(x) - r:affinity(x)):abs():max():item() > 0)
  end)

  it("sits in a layer, takes no token, and names what is wrong", function()
    local layer = moe.layer {
      d_model = 8, num_experts = 4, router = moe.router.uncertain { top_k = 1 }, experts = moe.experts.mlp { intermediate_size = 4 },
    }
    layer(moe.randn(2, 3, 8)):sum():backward()
    assert.same({ 0, 8 }, (layer(moe.zeros(0, 8))).shape)
    assert.matches("dropout=0.1, samples=4", tostring(layer.router))
    assert.matches("'dropout' must be in %[0, 1%), got 1", helper.error_of(router, { dropout = 1 }))
    assert.matches("'samples' must be at least 2, got 1", helper.error_of(router, { samples = 1 }))
    assert.matches("unknown option 'sample' %(did you mean 'samples'", helper.error_of(router, { sample = 1 }))
    assert.matches("top_k is 9, but there are 4", helper.error_of(router, { top_k = 9 }))
  end)
end)
