local moe = require "moe"
local helper = require "spec.helper"

local EXACT = { rtol = 1e-6, atol = 1e-7 }

local function layer_of(o)
  moe.manual_seed(1)
  o.d_model, o.num_experts = 5, 4
  o.experts = o.experts or moe.experts.swiglu { intermediate_size = 3 }
  o.router = o.router or moe.router.topk { top_k = 2 }
  return moe.layer(o)
end

-- The layer with only these experts to choose from.
local function limited(layer, x, keep)
  local mask = {}
  for e = 1, layer.num_experts do mask[e] = 0 end
  for _, e in ipairs(keep) do mask[e] = 1 end
  return layer(x, { expert_mask = moe.tensor(mask):ne(0) })
end

describe("layer:prune", function()
  for name, o in pairs {
    topk = {}, ["selection bias"] = { bias_update_rate = 0.1 },
    biases = { experts = moe.experts.mlp { intermediate_size = 4, bias = true } },
    ["router network"] = { router = moe.router.mlp { top_k = 2, hidden_size = 4 } }, -- as wide as there are experts
  } do
    it("is the layer that may choose the kept alone: " .. name, function()
      local layer, x = layer_of(o), moe.randn(6, 5)
      if layer.router.expert_bias then layer.router.expert_bias:copy_(moe.randn(4) * 0.01) end
      local want = limited(layer, x, { 1, 3, 4 }):detach()
      local before = layer:num_parameters()
      assert.equal(layer, layer:prune { 1, 3, 4 })
      assert.is_true(layer:num_parameters() < before)
      assert.equal(3, layer.num_experts)
      local y, routing = layer(x)
      assert.close(want, y, EXACT)
      assert.equal(3, #layer:stats().load)
      ;(y:sum() + routing:aux()):backward()
      for parameter, p in layer:named_parameters() do assert.truthy(p.grad, parameter) end
      layer:after_step()
    end)
  end

  it("lets top_k fall with the experts", function()
    local layer = layer_of {}
    layer:prune { 2 }
    assert.equal(1, layer.router.top_k)
    assert.same({ 6, 5 }, layer(moe.randn(6, 5)).shape)
  end)

  it("works for heads", function()
    moe.manual_seed(2)
    local m = moe.mixer.mixture_of_attention { d_model = 6, num_experts = 4, top_k = 2, head_dim = 3 }
    local x = moe.randn(2, 4, 6)
    local want = m(x, nil, { expert_mask = moe.tensor { 0, 1, 0, 1 }:ne(0) }):detach()
    m:prune { 2, 4 }
    assert.close(want, (m(x)), EXACT)
  end)

  it("says what is wrong and leaves the layer as it was", function()
    local layer = layer_of {}
    local function says(want, f, ...)
      local message = helper.error_of(f, ...)
      assert.truthy(message:find(want, 1, true), message)
    end
    says("must be a list of the experts to keep", layer.prune, layer, {})
    says("the list must ascend within 1 .. 4, its entry 2 is 5", layer.prune, layer, { 1, 5 })
    says("its entry 2 is 1", layer.prune, layer, { 1, 1 })
    says("argument 1 must be how many experts to add, got 0", layer.extend, layer, 0)
    says("did you mean 'freeze'", layer.extend, layer, 1, { freez = true })
    says("a router that is a function has no rows", moe.layer.prune, layer_of { router = function() end }, { 1 })
    assert.equal(4, layer.num_experts)
    assert.same({ 2, 5 }, layer(moe.randn(2, 5)).shape)
  end)
end)

describe("layer:extend", function()
  for _, freeze in ipairs { true, false } do
    it("gives the same as before where the new experts are left out, frozen: " .. tostring(freeze), function()
      local layer, x = layer_of { balance = { moe.loss.switch(0.1) }, bias_update_rate = 0.1 }, moe.randn(6, 5)
      local want = layer(x):detach()
      layer:extend(2, { freeze = freeze })
      assert.equal(6, layer.num_experts)
      assert.close(want, limited(layer, x, { 1, 2, 3, 4 }), EXACT)
      local before = {}
      for name, p in layer.experts:named_parameters() do before[name] = p:detach():clone() end
      local optimizer = moe.optim.adamw(layer, { lr = 0.1, weight_decay = 0.1 })
      for _ = 1, 3 do
        local y, routing = layer(x)
        optimizer:zero_grad()
        ;(y:square():sum() + routing:aux()):backward()
        optimizer:step()
        layer:after_step()
      end
      for name, p in layer.experts:named_parameters() do
        local moved = (p - before[name]):abs():sum():item() > 0
        assert.equal(not (freeze and name:find "banks%.1"), moved, name)
      end
    end)
  end

  it("goes on after a frozen one, and can be pruned", function()
    local layer, x = layer_of {}, moe.randn(7, 5)
    layer:extend(1, { freeze = true }):extend(2)
    assert.equal(7, layer.num_experts)
    local want = limited(layer, x, { 2, 3, 5, 6 }):detach()
    layer:prune { 2, 3, 5, 6 }
    assert.close(want, (layer(x)), EXACT)
    assert.is_false(layer.experts.banks[1].gate_up_proj.requires_grad)
  end)
end)

describe("router.mlp", function()
  it("is A relu(B x) before the steps of topk", function()
    moe.manual_seed(3)
    local router = moe.router.mlp { d_model = 5, num_experts = 4, top_k = 2, hidden_size = 3, noise = "learned" }
    router:eval()
    local x = moe.randn(6, 5)
    local logits = x:linear(router.hidden_weight):relu():linear(router.weight)
    local routing = router:route(x)
    assert.close(logits, routing.logits)
    assert.close(logits:softmax(-1), routing.probs)
    assert.same({ 4, 3 }, router.noise_weight.shape)
    assert.truthy(helper.error_of(moe.router.mlp, { d_model = 5, num_experts = 4, hidden_size = 0 }):find("hidden_size", 1, true))
  end)
end)
