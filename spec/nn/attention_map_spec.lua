local moe = require "moe"
local helper = require "spec.helper"

local function rand(...) return moe.randn({ ... }, { dtype = "f64" }) end

local function attention(o)
  moe.manual_seed(6)
  o.d_model, o.num_heads, o.dtype = 16, 4, "f64"
  return moe.nn.attention(o)
end

-- What attention does with its weights: map x values, projected.
local function apply(a, x, map)
  local kv, batch, time = a.num_kv_heads or 4, x:size(1), x:size(2)
  local values = x:linear(a["qkv_proj.weight"], a["qkv_proj.bias"]):reshape { batch, time, 4 + 2 * kv, 4 }:transpose(2, 3)
    :narrow(2, 4 + kv + 1, kv)
  if kv < 4 then values = values:repeat_interleave(4 // kv, 2) end
  return map:matmul(values):transpose(2, 3):reshape { batch, time, 16 }:linear(a["o_proj.weight"], a["o_proj.bias"])
end

local CASES = {
  {}, { num_kv_heads = 2 }, { rope = true, rope_base = 100, qk_norm = true, num_kv_heads = 1 }, { bias = false, causal = false },
}

describe("moe.mixer.attention_weights", function()
  it("are those with which the attention attends", function()
    for _, o in ipairs(CASES) do
      local a = attention(o)
      local x = rand(2, 5, 16)
      local map = moe.mixer.attention_weights(a, x)
      assert.same({ 2, 4, 5, 5 }, map.shape)
      assert.close(moe.ones({ 2, 4, 5 }, { dtype = "f64" }), map:sum(-1), { rtol = 1e-12 })
      assert.close(a(x), apply(a, x, map), { rtol = 1e-9, atol = 1e-11 })
      -- with masks of either kind
      for _, mask in ipairs { rand(5, 5), moe.eye(5, { dtype = "f64" }):gt(0):logical_or(moe.rand(5, 5):gt(0.5)) } do
        local masked = moe.mixer.attention_weights(a, x, nil, { attn_mask = mask })
        assert.close(a(x, nil, { attn_mask = mask }), apply(a, x, masked), { rtol = 1e-9, atol = 1e-11 })
      end
    end
  end)

  it("know windows, terms by distance and a memory", function()
    local a = attention { window = 2, rope = true, rope_scaling = "linear(factor=2)" }
    local x, ctx = rand(2, 5, 16), { relative = rand(4, 5) }
    assert.close(a(x, nil, ctx), apply(a, x, moe.mixer.attention_weights(a, x, nil, ctx)), { rtol = 1e-9, atol = 1e-11 })
    local cross = attention { cross = true }
    local own = attention { causal = false }
    own:load_state_dict(cross:state_dict())
    assert.close(moe.mixer.attention_weights(own, x), moe.mixer.attention_weights(cross, x, nil, { memory = x }), { rtol = 1e-12 })
    local memory = rand(2, 3, 16)
    local map = moe.mixer.attention_weights(cross, x, nil, { memory = memory })
    assert.same({ 2, 4, 5, 3 }, map.shape)
    local _, state = cross(x, cross:state(2), { memory = memory })
    assert.close(map, moe.mixer.attention_weights(cross, x, state), { rtol = 1e-12 })
    assert.error_matches(function() moe.mixer.attention_weights(cross, x) end, "wants memory")
  end)

  it("of a continued sequence are the later rows of the whole", function()
    for _, o in ipairs(CASES) do
      if o.causal ~= false then
        local mixer = moe.mixer.with_map(attention(o))
        local x, whole, part = rand(2, 5, 16), {}, {}
        local y = mixer(x, nil, whole)
        local _, state = mixer(x:narrow(2, 1, 3), mixer:state(2), {})
        local z = mixer(x:narrow(2, 4, 2), state, part)
        assert.close(whole.attention_map:narrow(3, 4, 2), part.attention_map, { rtol = 1e-12, atol = 1e-14 })
        assert.close(y:narrow(2, 4, 2), z, { rtol = 1e-10, atol = 1e-12 })
      end
    end
  end)

  it("have a gradient", function()
    local a = attention { rope = true }
    assert(moe.gradcheck(function(x) return moe.mixer.attention_weights(a, x) end, { rand(1, 3, 16) }))
  end)

  it("reach a router through the model", function()
    local seen
    local model = moe.model.lm {
      vocab_size = 7, d_model = 8, num_layers = 1, num_heads = 2, max_seq_len = 6,
      mixer = function() return moe.mixer.with_map(moe.nn.attention { d_model = 8, num_heads = 2 }) end,
      ffn = function()
        return moe.layer {
          d_model = 8, num_experts = 3, experts = moe.experts.mlp { intermediate_size = 4 },
          router = function(x, ctx)
            seen = ctx.attention_map
            return moe.routing.topk(moe.router.uniform_choice(x:size(1), 1, 3), nil, 3)
          end,
        }
      end,
    }
    model(moe.randint(1, 7, { 3, 6 }))
    assert.same({ 3, 2, 6, 6 }, seen.shape)
  end)

  it("leave the attention alone where nobody asks", function()
    local a = attention {}
    local x = rand(2, 5, 16)
    assert.same(a(x):totable(), moe.mixer.with_map(a)(x):totable())
    assert.same(a(x):totable(), (moe.mixer.with_map(a)(x, nil, {})):totable())
  end)

  it("name what is wrong", function()
    assert.matches("must be a moe.nn.attention, got a table", helper.error_of(moe.mixer.with_map, {}))
    assert.matches("must be a moe.nn.attention", helper.error_of(moe.mixer.with_map, moe.nn.linear(2, 2)))
    assert.matches("argument 2 %(x%) must be a tensor", helper.error_of(moe.mixer.attention_weights, attention {}, rand(2, 16)))
    assert.matches("packed sequences", helper.error_of(moe.mixer.attention_weights, attention {}, rand(1, 4, 16), nil,
      { cu_seqlens = moe.tensor({ 0, 4 }, { dtype = "i64" }) }))
  end)
end)
