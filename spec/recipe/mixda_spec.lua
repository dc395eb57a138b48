local moe = require "moe"
local domains = require "moe.recipe.domains"
local mixda = moe.recipe.mixda

local function shake(model)
  for _, p in ipairs(model:parameters()) do
    if p.requires_grad then moe.nn.init.normal_(p:detach(), 0, 0.3) end
  end
  return model
end

describe("recipe mixda", function()
  local base -- trained once for the file
  local function the_base()
    base = base or domains.base { num_layers = 2, steps = 250 }
    return base
  end

  it("with adapters that are zero is the base to the bit, in both stages", function()
    local x = moe.randint(1, 256, { 2, 9 })
    local wanted = the_base().fresh()(x):totable()
    local one, two = mixda.add_adapters(the_base().fresh()), mixda.add_adapters(the_base().fresh())
    assert.same(wanted, one(x):totable())
    assert.same(wanted, mixda.mix { base = the_base(), models = { one, two } }(x):totable())
  end)

  it("retains by the mean square of what adapters add", function()
    local model = shake(mixda.add_adapters(the_base().fresh()))
    local ids, sum = moe.randint(1, 256, { 2, 9 }), 0
    local x = model.embed(ids)
    for _, block in ipairs(model.layers) do
      local h = x + (block.mixer(block.norm1(x)))
      local before, after = block.ffn.ffn(block.norm2(h)), block.ffn(block.norm2(h))
      sum = sum + (after - before):square():sum():item() / 18
      x = h + after
    end
    assert.close(sum / 2, mixda.retain(model, ids):item(), { rtol = 1e-4 })
    assert.equal(0, mixda.retain(mixda.add_adapters(the_base().fresh()), ids):item())
  end)

  it("mixes by a softmax of the token, none being a choice, beside a task adapter", function()
    local models = { shake(mixda.add_adapters(the_base().fresh())), shake(mixda.add_adapters(the_base().fresh())) }
    local mix = mixda.mix { base = the_base(), models = models }
    local layer, x = mix.layers[2].ffn, moe.randn(5, 48)
    local g = x:linear(layer.router.weight):softmax(-1)
    local want = the_base().model.layers[2].ffn(x)
    for d = 1, 2 do want = want + models[d].layers[2].ffn.adapter(x) * g:narrow(2, d, 1) end
    assert.close(want, layer(x), { rtol = 1e-4, atol = 1e-4 })
    local trained = {}
    for name, p in mix.layers[1].ffn:named_parameters() do
      if p.requires_grad then trained[#trained + 1] = name end
    end
    table.sort(trained)
    assert.same({ "router.weight", "shared.down_bias", "shared.down_proj", "shared.up_bias", "shared.up_proj" }, trained)
  end)

  it("learns domains without forgetting, and a gate that picks the right adapter", function()
    local names, models, texts = { "ledger", "code" }, {}, {}
    local general = domains.loss(the_base().model, the_base().text)
    for d, name in ipairs(names) do
      texts[d] = domains.text(name)
      models[d] = mixda.learn { base = the_base(), text = texts[d] }
      local before, after = domains.loss(the_base().model, texts[d]), domains.loss(models[d], texts[d])
      assert.is_true(after < 0.6 * before, ("%s: %.2f from %.2f"):format(name, after, before))
      local kept = domains.loss(models[d], the_base().text)
      assert.is_true(kept < 1.01 * general, ("%s: general text %.4f from %.4f"):format(name, kept, general))
    end
    -- without the retain loss the same training forgets
    local careless = mixda.learn { base = the_base(), text = texts[2], lambda = 0 }
    assert.is_true(domains.loss(careless, the_base().text) > 2 * general)
    local mix = mixda.mix { base = the_base(), models = models }
    local first = mix.layers[1].ffn.experts.up_proj:clone()
    domains.tune(mix, domains.text "prose ledger code", { steps = 100 })
    assert.same(first:totable(), mix.layers[1].ffn.experts.up_proj:totable())
    for d, name in ipairs(names) do
      local g = domains.gates(mix, texts[d])
      assert.is_true(g[d] > 0.5, ("%s: gates %.2f %.2f %.2f"):format(name, g[1], g[2], g[3]))
    end
  end)
end)
