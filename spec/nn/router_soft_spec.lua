local moe = require "moe"
local helper = require "spec.helper"

local EXACT = { rtol = 1e-9, atol = 1e-11 }
local function rand(...) return moe.randn({ ... }, { dtype = "f64" }) end

local function layer_of(o, bank)
  moe.manual_seed(7)
  return moe.layer {
    d_model = 5, num_experts = 3, dtype = "f64", router = moe.router.soft(o),
    experts = bank or moe.experts.swiglu { intermediate_size = 4, bias = true },
  }
end

-- The paper's formula over the rows of one sequence, in plain Lua: y [T][d].
local function reference(layer, x)
  local router, slots = layer.router, layer.router.slots
  local X, W, E = x:totable(), router.weight:totable(), 3
  local T, d, S = #X, #X[1], #W
  local function unit(row)
    if not router.scale then return row end
    local sum, out = 1e-6, {}
    for i = 1, d do sum = sum + row[i] ^ 2 end
    for i = 1, d do out[i] = row[i] / math.sqrt(sum) end
    return out
  end
  local scale = router.scale and router.scale:item() or 1
  local e, colsum, rowsum = {}, {}, {}
  for t = 1, T do
    e[t] = {}
    local u = unit(X[t])
    for s = 1, S do
      local w, sum = unit(W[s]), 0
      for i = 1, d do sum = sum + u[i] * w[i] end
      e[t][s] = math.exp(scale * sum)
      rowsum[t] = (rowsum[t] or 0) + e[t][s]
      colsum[s] = (colsum[s] or 0) + e[t][s]
    end
  end
  local y = {}
  for t = 1, T do
    y[t] = {}
    for i = 1, d do y[t][i] = 0 end
  end
  for s = 1, S do
    local slot = {}
    for i = 1, d do
      slot[i] = 0
      for t = 1, T do slot[i] = slot[i] + e[t][s] / colsum[s] * X[t][i] end
    end
    local n = (s - 1) // slots + 1
    assert(n <= E)
    local out = layer.experts(moe.tensor({ slot }, { dtype = "f64" }),
      moe.routing.topk(moe.tensor({ { n } }, { dtype = "i64" }), nil, E)):totable()[1]
    for t = 1, T do
      for i = 1, d do y[t][i] = y[t][i] + e[t][s] / rowsum[t] * out[i] end
    end
  end
  return y
end

describe("moe.router.soft", function()
  it("is the formula of the paper, normalised or not", function()
    for _, o in ipairs { { slots = 1 }, { slots = 3 }, { slots = 2, normalize = false } } do
      local layer = layer_of(o)
      if layer.router.scale then layer.router.scale:detach():fill_(1.7) end
      local x = rand(6, 5)
      assert.close(reference(layer, x), (layer(x)), EXACT)
    end
  end)

  it("mixes each sequence of a batch by itself", function()
    local layer = layer_of { slots = 2 }
    local x = rand(3, 4, 5)
    local y, routing = layer(x)
    for b = 1, 3 do assert.close(reference(layer, x[b]), y[b], EXACT) end
    assert.same({ 3, 4, 3, 2 }, routing.dispatch.shape)
    assert.close(moe.ones({ 3, 3, 2 }, { dtype = "f64" }), routing.dispatch:sum(2), EXACT)
    assert.close(moe.ones({ 12 }, { dtype = "f64" }), routing.probs:sum(-1), EXACT)
    assert.equal(12, routing.num_tokens)
    assert.equal(18, routing.num_assignments)
  end)

  it("does not care about the order of tokens", function()
    local layer = layer_of { slots = 2 }
    local x = rand(7, 5)
    local order = moe.tensor({ 3, 1, 7, 2, 6, 4, 5 }, { dtype = "i64" })
    assert.close((layer(x)):index_select(1, order), (layer(x:index_select(1, order))), EXACT)
  end)

  it("gives masked tokens nothing and takes nothing from them", function()
    local layer = layer_of { slots = 2 }
    local x = rand(2, 5, 5)
    local mask = moe.tensor { { true, true, false, true, false }, { false, false, false, false, false } }
    local y = layer(x, { mask = mask })
    local real = moe.tensor({ 1, 2, 4 }, { dtype = "i64" })
    assert.close((layer(x[1]:index_select(1, real))), y[1]:index_select(1, real), EXACT)
    assert.equal(0, y[1][3]:abs():sum():item() + y[1][5]:abs():sum():item())
    -- a sequence of padding alone: zeros, and gradients that are numbers
    assert.equal(0, y[2]:abs():sum():item())
    local leaf = x:detach()
    leaf.requires_grad = true;
    (layer(leaf, { mask = mask })):sum():backward()
    assert.equal(0, leaf.grad[2]:abs():sum():item())
    assert.is_true(leaf.grad[1][1]:abs():sum():item() > 0)
    for _, p in ipairs(layer:parameters()) do assert.is_true(p.grad:isfinite():all():item()) end
  end)

  it("has the gradient that differences show", function()
    for _, o in ipairs { { slots = 2 }, { slots = 1, normalize = false } } do
      local layer = layer_of(o, moe.experts.mlp { intermediate_size = 3, act = "tanh" })
      local router = layer.router
      for _, shape in ipairs { { 4, 5 }, { 2, 3, 5 } } do
        assert(moe.gradcheck(function(x, w, scale)
          router.weight = w
          if scale then router.scale = scale end
          return (layer(x))
        end, { rand(table.unpack(shape)), router.weight, router.scale }))
      end
    end
  end)

  it("costs by its slots: as many experts as you like", function()
    -- 12 slots in all, as 2 experts of 6 or 12 of 1
    for _, E in ipairs { 2, 12 } do
      local layer = moe.layer { d_model = 5, num_experts = E, router = moe.router.soft { slots = 12 // E },
        experts = moe.experts.mlp { intermediate_size = 4 } }
      assert.equal(12, select(2, layer(moe.randn(9, 5))).num_assignments)
    end
  end)

  it("takes no tokens", function()
    for _, shape in ipairs { { 0, 5 }, { 2, 0, 5 }, { 0, 3, 5 } } do
      assert.same(shape, (layer_of { slots = 2 }(moe.zeros(shape, { dtype = "f64" }))).shape)
    end
  end)

  it("names what is wrong", function()
    assert.matches("router.soft: option 'slots' must be at least 1", helper.error_of(moe.router.soft, { slots = 0 }))
    assert.matches("unknown option 'slot' %(did you mean 'slots'", helper.error_of(moe.router.soft, { slot = 2 }))
    assert.matches("description without weights", helper.error_of(function() moe.router.soft {}:route(moe.ones(2, 5)) end))
    local router = moe.router.soft { d_model = 5, num_experts = 2 }
    assert.matches("ctx.shape is {2, 4}, but there are 6 tokens",
      helper.error_of(function() router:route(moe.ones(6, 5), { shape = { 2, 4 } }) end))
  end)
end)
