local moe = require "moe"
local helper = require "spec.helper"

describe("moe.router.lookahead", function()
  local function layers(n, o)
    moe.manual_seed(1)
    local list = {}
    for i = 1, n do
      list[i] = moe.layer {
        d_model = 4, num_experts = 3, router = moe.router.lookahead(o or {}), experts = moe.experts.mlp { intermediate_size = 5 },
      }
    end
    return list
  end

  it("chooses for the next layer, by the tokens of its own", function()
    local l, x, ctx = layers(3), moe.randn(6, 4), {}
    local y1, r1 = l[1](x, ctx)
    local y2, r2 = l[2](y1, ctx)
    local _, r3 = l[3](y2, ctx)
    assert.close(x:matmul(l[1].router.weight:t()), r1.logits, { rtol = 1e-5, atol = 1e-6 })
    assert.close(x:matmul(l[1].router.next_weight:t()), r2.logits, { rtol = 1e-5, atol = 1e-6 })
    assert.close(y1:matmul(l[2].router.next_weight:t()), r3.logits, { rtol = 1e-5, atol = 1e-6 })
    local _, index = r2.logits:topk(2)
    assert.same(index:totable(), r2.index:totable())
  end)

  it("gets the gradient of the layer that uses the choice", function()
    local l, x, ctx = layers(2), moe.randn(6, 4), {}
    local y = l[1](x, ctx)
    l[2](y:detach(), ctx):pow(2):sum():backward()
    assert.is_true(l[1].router.next_weight.grad:abs():sum():item() > 0)
    assert.is_nil(l[1].router.weight.grad)
    assert.is_nil(l[2].router.weight.grad)
  end)

  it("works in a language model, and in one layer is topk", function()
    moe.manual_seed(2)
    local model = moe.model.lm {
      vocab_size = 9, d_model = 8, num_layers = 3, num_heads = 2, max_seq_len = 4, ffn = "moe",
      moe = { num_experts = 4, router = moe.router.lookahead { top_k = 1 }, experts = moe.experts.mlp { intermediate_size = 8 } },
    }
    model(moe.randint(1, 9, 2, 4)):sum():backward()
    local r = model.routings
    for i = 2, 3 do assert.same(r[i - 1].next_logits:totable(), r[i].logits:totable()) end
    local own = moe.router.lookahead { d_model = 8, num_experts = 4, ahead = false }
    local plain = moe.router.topk { d_model = 8, num_experts = 4 }
    plain:load_state_dict(own:state_dict())
    local x = moe.randn(5, 8)
    assert.same(plain:route(x).weight:totable(), own:route(x).weight:totable())
  end)

  it("uses its own where the choice does not fit, unless it has none", function()
    local l, ctx = layers(2), {}
    l[1](moe.randn(6, 4), ctx)
    local x = moe.randn(2, 4)
    local _, r = l[2](x, ctx)
    assert.close(x:matmul(l[2].router.weight:t()), r.logits, { rtol = 1e-5, atol = 1e-6 })
    local none = layers(1, { own = false })[1]
    assert.matches("lookahead.*the layer before chose for %[6, 3%] tokens and experts, wanted %[2, 3%]",
      helper.error_of(function()
        local shared = {}
        l[1](moe.randn(6, 4), shared)
        none(x, shared)
      end))
    assert.matches("no layer before this one has chosen", helper.error_of(function() none(x) end))
    assert.matches("nothing to learn", helper.error_of(function() moe.router.lookahead { own = false, ahead = false } end))
    assert.matches("unknown option 'noise'", helper.error_of(function() moe.router.lookahead { noise = 1 } end))
  end)
end)
