local moe = require "moe"
local domains = require "moe.recipe.domains"
local mov = moe.recipe.mov

local F64 <const> = { dtype = "f64" }

describe("recipe mov", function()
  local base -- trained once for the file
  local function the_base()
    base = base or domains.base { num_layers = 2, steps = 120 }
    return base
  end

  it("starts as the base, whatever its experts are", function()
    local ids = moe.randint(1, 256, { 2, 20 })
    local wanted = the_base().model(ids)
    for _, kind in ipairs { "mov", "molora" } do
      for _, E in ipairs { 1, 4 } do
        local model = mov.adapt(the_base().fresh(), { kind = kind, num_experts = E })
        assert.close(wanted, model(ids), { rtol = 1e-4, atol = 1e-4 })
      end
    end
  end)

  it("with one expert is IA3 of keys, values and hidden activations, and LoRA", function()
    moe.manual_seed(1)
    local model = mov.adapt(the_base().fresh(), { kind = "mov", num_experts = 1 })
    local x = moe.randn(2, 7, 48)
    local ffn, attention = model.layers[1].ffn, model.layers[1].mixer
    assert.equal(2 * (96 + 48 + 48), model:num_parameters(true)) -- vectors, no router
    local l = ffn.scale.experts.vectors
    moe.no_grad(function()
      for _, p in ipairs(model:parameters()) do
        if p.requires_grad then p:normal_(1, 0.5) end
      end
    end)
    local h = x:linear(ffn.base.up_proj.weight):gelu()
    assert.same((h * l[1]):linear(ffn.base.down_proj.weight):totable(), (ffn(x)):totable())
    -- IA3 of keys and values is attention whose rows of the projection are scaled
    local scaled = moe.nn.attention { d_model = 48, num_heads = 4, rope = true, bias = false }
    local state, ones = attention.base:state_dict(), moe.ones(48)
    local rows = moe.cat { ones, attention.key.experts.vectors[1], attention.value.experts.vectors[1] }
    state["qkv_proj.weight"] = state["qkv_proj.weight"] * rows:detach():unsqueeze(2)
    scaled:load_state_dict(state)
    assert.close(scaled(x), attention(x), { rtol = 1e-4, atol = 1e-5 })

    local lora = mov.adapt(the_base().fresh(), { kind = "molora", num_experts = 1, rank = 3 }).layers[2].ffn
    moe.no_grad(function() lora.up.experts.lora_B:normal_() end)
    assert.close(x:linear(lora.up:merge()), lora.up(x), { rtol = 1e-4, atol = 1e-4 })
  end)

  it("merges vectors, then scales: the same as the mix of the experts' outputs", function()
    moe.manual_seed(2)
    local E, d = 5, 16
    local bank = moe.experts.ia3 { d_model = d, num_experts = E, dtype = "f64" }
    moe.no_grad(function() bank.vectors:normal_() end)
    local s, a = moe.randn(9, E, F64):softmax(-1), moe.randn(9, d, F64)
    local wanted = 0
    for e = 1, E do wanted = wanted + s:narrow(2, e, 1) * (a * bank.vectors[e]) end
    assert.close(wanted, bank(a, moe.routing.dense(s)), { rtol = 0, atol = 1e-12 })
  end)

  it("routes every token to all experts, by a softmax", function()
    moe.manual_seed(3)
    local model = mov.adapt(the_base().fresh(), { kind = "mov", num_experts = 4 })
    local router = model.layers[1].ffn.scale.router
    local x = moe.randn(6, 48)
    assert.close(x:linear(router.weight):softmax(-1), router:route(x):gates(), { rtol = 1e-5, atol = 1e-6 })
  end)

  it("with four vectors reaches a lower loss than with one on a mix of four tasks, the base unchanged to the bit", function()
    local before = the_base().model:state_dict()
    for name, t in pairs(before) do before[name] = t:clone() end
    local rows = mov.run { base = the_base(), kinds = { { "mov", 1 }, { "mov", 4 } }, seeds = { 1, 2 }, steps = 60, lr = 0.03 }
    assert.is_true(rows[2].val_loss < 0.97 * rows[1].val_loss, ("%g, %g"):format(rows[1].val_loss, rows[2].val_loss))
    assert.is_true(rows[2].trained < 0.12)
    local tuned = rows[2].models[1]
    for i, block in ipairs(tuned.layers) do
      for _, name in ipairs { "qkv_proj.weight", "o_proj.weight" } do
        assert.same(before[("layers.%d.mixer.%s"):format(i, name)]:totable(), block.mixer.base:state_dict()[name]:totable())
      end
      for _, name in ipairs { "up_proj.weight", "down_proj.weight" } do
        assert.same(before[("layers.%d.ffn.%s"):format(i, name)]:totable(), block.ffn.base:state_dict()[name]:totable())
      end
    end
    assert.same(before["embed.weight"]:totable(), tuned.embed.weight:totable())
    assert.same(before["head.weight"]:totable(), tuned.head.weight:totable())
  end)
end)
