local moe = require "moe"
local helper = require "spec.helper"

local EXACT = { rtol = 1e-9, atol = 1e-11 }
local D, E = 4, 3
local function rand(...) return moe.randn({ ... }, { dtype = "f64" }) end

local function layer_of(o)
  moe.manual_seed(11)
  return moe.layer {
    d_model = D, num_experts = E, dtype = "f64", router = moe.router.mixture_of_tokens(o),
    experts = moe.experts.mlp { intermediate_size = 6, act = "tanh" },
  }
end

local function expert(layer, e, row) -- [1, D] -> [1, D]
  return layer.experts(row, moe.routing.topk(moe.tensor({ { e } }, { dtype = "i64" }), nil, E))
end

-- The paper's formula, group by group: x [B, T, D] -> list of lists of rows.
local function reference(layer, x, G, temperature)
  local B, T = x:size(1), x:size(2)
  local y = moe.zeros({ B, T, D }, { dtype = "f64" })
  for first = 1, B, G do
    for t = 1, T do
      for e = 1, E do
        local w, sum = {}, 0
        for g = 1, G do
          w[g] = math.exp((x[first + g - 1][t] * layer.router.weight[e]:detach()):sum():item() / temperature)
          sum = sum + w[g]
        end
        local mixed = moe.zeros({ 1, D }, { dtype = "f64" })
        for g = 1, G do mixed = mixed + x[first + g - 1][t]:unsqueeze(1) * (w[g] / sum) end
        local out = expert(layer, e, mixed):detach()
        for g = 1, G do y[first + g - 1][t]:add_(out:squeeze(1) * (w[g] / sum)) end
      end
    end
  end
  return y
end

describe("moe.router.mixture_of_tokens", function()
  it("is the formula of the paper", function()
    for _, case in ipairs { { 4, nil, 1 }, { 4, 2, 0.7 }, { 6, 3, 2 }, { 2, 5, 1 } } do
      local B, G, temperature = table.unpack(case)
      local layer = layer_of { group_size = G, temperature = temperature }
      local x = rand(B, 3, D)
      local y, routing = layer(x)
      assert.close(reference(layer, x, math.min(G or B, B), temperature), y, EXACT)
      assert.equal(B // math.min(G or B, B) * 3 * E, routing.num_assignments)
      assert.same({ B, 3, E, 1 }, routing.dispatch.shape)
      assert.close(moe.ones({ B * 3 }, { dtype = "f64" }), routing.probs:sum(-1), EXACT)
    end
  end)

  it("with groups of one is the sum of all experts", function()
    local layer = layer_of { group_size = 1 }
    local x = rand(2, 3, D)
    local all = moe.routing.dense(moe.ones({ 6, E }, { dtype = "f64" }))
    local wanted = layer.experts(x:reshape { 6, D }, all):reshape { 2, 3, D }
    assert.close(wanted, (layer(x)), EXACT)
    -- x without a batch is one example
    assert.close(wanted[2], (layer(x[2])), EXACT)
  end)

  it("never mixes times: the gradient of a time is 0 at all others", function()
    local layer = layer_of {}
    local x = rand(3, 5, D)
    for t = 1, 5 do
      x.requires_grad = true
      local y = layer(x)
      local g = moe.grad(y:select(2, t):sin():sum(), x)
      for s = 1, 5 do
        local size = g:select(2, s):abs():max():item()
        if s == t then assert.is_true(size > 1e-4) else assert.equal(0, size) end
      end
      -- while all examples of the group take part
      assert.is_true(g:select(2, t):abs():sum(-1):min():item() > 0)
    end
  end)

  it("at a temperature near 0 gives each expert the one token that wants it most", function()
    local layer = layer_of { temperature = 1e-6 }
    local x = rand(4, 2, D)
    local y = layer(x)
    local logits = x:linear(layer.router.weight) -- [4, 2, E]
    local _, best = logits:max(1)
    local wanted = moe.zeros({ 4, 2, D }, { dtype = "f64" })
    for t = 1, 2 do
      for e = 1, E do
        local b = best[t][e]
        b = type(b) == "number" and b or b:item()
        wanted[b][t]:add_(expert(layer, e, x[b][t]:unsqueeze(1)):detach():squeeze(1))
      end
    end
    assert.close(wanted, y, EXACT)
  end)

  it("follows a schedule of the temperature, and keeps the last without a step", function()
    local layer = layer_of { temperature = function(step) return 1 / step end }
    local plain = layer_of {}
    local x = rand(4, 2, D)
    assert.close((plain(x)), (layer(x)), EXACT)
    local fourth = layer(x, { step = 4 })
    plain.router.temperature = 0.25
    assert.close((plain(x)), fourth, EXACT)
    assert.close(fourth, (layer(x)), EXACT)
  end)

  it("leaves masked tokens out", function()
    local layer = layer_of {}
    local x = rand(4, 2, D)
    local mask = moe.tensor { { true, false }, { true, false }, { true, false }, { false, false } }
    local leaf = x:detach()
    leaf.requires_grad = true
    local y = layer(leaf, { mask = mask })
    assert.close((layer(x:narrow(1, 1, 3))):select(2, 1), y:narrow(1, 1, 3):select(2, 1), EXACT)
    assert.equal(0, y[4]:abs():sum():item() + y:select(2, 2):abs():sum():item())
    y:sum():backward()
    assert.is_true(leaf.grad:isfinite():all():item())
    assert.equal(0, leaf.grad:select(2, 2):abs():sum():item())
  end)

  it("has the gradient that differences show", function()
    local layer = layer_of { group_size = 2, temperature = 0.5 }
    assert(moe.gradcheck(function(x, w)
      layer.router.weight = w
      return (layer(x))
    end, { rand(4, 2, D), layer.router.weight }))
  end)

  it("takes no tokens", function()
    for _, shape in ipairs { { 0, D }, { 2, 0, D }, { 0, 3, D } } do
      assert.same(shape, (layer_of {}(moe.zeros(shape, { dtype = "f64" }))).shape)
    end
  end)

  it("names what is wrong", function()
    local make = moe.router.mixture_of_tokens
    assert.matches("'group_size' must be at least 1", helper.error_of(make, { group_size = 0 }))
    assert.matches("'temperature' must be positive, got 0", helper.error_of(make, { temperature = 0 }))
    assert.matches("a batch of 6 examples is no multiple of group_size = 4",
      helper.error_of(function() layer_of { group_size = 4 }(rand(6, 2, D)) end))
    local m = moe.ones(4, 2, 3, 1)
    assert.matches("across = 3 wants %[B, T, E, slots%] with B a multiple of it, got %[4, 2, 3, 1%]",
      helper.error_of(moe.routing.soft, m, m, { across = 3 }))
  end)
end)
