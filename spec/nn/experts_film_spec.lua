-- Experts that are vectors: modulation of one network (film), scaling of activations (ia3), and the mixing of vectors.
local moe = require "moe"
local helper = require "spec.helper"

local F64 <const> = { dtype = "f64" }
local exact <const> = { rtol = 1e-10, atol = 1e-10 }

local function choose(T, E, k)
  local w, i = moe.router_topk(moe.randn(T, E, F64), { top_k = k })
  w = w:detach():requires_grad_()
  return moe.routing.topk(i, w, E), w, i
end

-- Every kind of routing over T tokens and E experts, and the weights [T, E] of it.
local function kinds(T, E)
  local gates = moe.rand(T, E, F64):requires_grad_()
  local few, w, index = choose(T, E, 1)
  local by_expert = moe.tensor({ { 1, 2 }, { 3, 0 }, { 3, 1 } }, { dtype = "i64" })
  local list = { { "dense", moe.routing.dense(gates), gates, gates } }
  local matrix = 0
  for e = 1, E do matrix = matrix + w * index:eq(e):to "f64" * moe.one_hot(moe.tensor({ e }, { dtype = "i64" }), E, "f64") end
  list[2] = { "top-1", few, matrix, w }
  if E == 3 then
    local we = moe.rand(3, 2, F64):requires_grad_()
    local m = moe.zeros(T, 3, F64)
    for e = 1, 3 do
      for c = 1, 2 do
        local t = math.tointeger(by_expert[e][c])
        if t > 0 then
          local at = moe.zeros(T, 3, F64)
          at[t][e] = 1
          m = m + at * we:narrow(1, e, 1):narrow(2, c, 1)
        end
      end
    end
    list[3] = { "expert choice", moe.routing.experts(by_expert, we, T), m, we }
  end
  return list
end

describe("routing:mix, routing:gates and routing:total", function()
  it("are products with the matrix of weights, gradients included", function()
    moe.manual_seed(1)
    for _, sizes in ipairs { { 6, 3 }, { 5, 40 } } do
      local T, E = sizes[1], sizes[2]
      for _, case in ipairs(kinds(T, E)) do
        local routing, matrix, weights = case[2], case[3], case[4]
        local v = moe.randn(E, 7, F64):requires_grad_()
        assert.close(matrix, routing:gates(), exact)
        assert.close(matrix:sum(2), routing:total(), exact)
        local y, wanted = routing:mix(v), matrix:matmul(v)
        assert.close(wanted, y, exact)
        local a = { moe.grad((wanted:square()):sum(), { v, weights }, { retain_graph = true }) }
        local b = { moe.grad((y:square()):sum(), { v, weights }, { retain_graph = true }) }
        for i = 1, 2 do assert.close(a[i], b[i], { rtol = 1e-9, atol = 1e-9, name = case[1] }) end
      end
    end
  end)

  it("count an assignment without a weight as 1, and a lost one as nothing", function()
    local index = moe.tensor({ { 1, 2 }, { 2, 0 }, { 1, 2 } }, { dtype = "i64" })
    local routing = moe.routing.topk(index, nil, 2, { mask = moe.tensor { true, true, false } })
    assert.close({ { 1, 1 }, { 0, 1 }, { 0, 0 } }, routing:gates())
    assert.close({ 2, 1, 0 }, routing:total())
    assert.close({ { 3 }, { 2 }, { 0 } }, routing:mix(moe.tensor { { 1.0 }, { 2 } }))
  end)

  it("name what is wrong", function()
    local routing = moe.routing.topk(moe.ones({ 2, 1 }, { dtype = "i64" }), nil, 3)
    assert.matches("routing:mix: argument 1 must be a tensor %[3, n%], .* got %[2, 4%]",
      helper.error_of(routing.mix, routing, moe.ones(2, 4)))
    assert.matches("got a number", helper.error_of(routing.mix, routing, 2))
  end)
end)

describe("moe.experts.film", function()
  local function film(o)
    local all = { d_model = 5, num_experts = 3, intermediate_size = 6, d_out = 4, act = "silu", spread = 0.5, dtype = "f64" }
    for k, v in pairs(o or {}) do all[k] = v end
    return moe.experts.film(all)
  end

  it("is the weighted sum of the shared network under every expert's modulation", function()
    moe.manual_seed(2)
    for _, o in ipairs { {}, { bias = false }, { shift = false }, { act = moe.nn.poly_norm { dtype = "f64", eps = 0.01 } } } do
      local bank = film(o)
      local x = moe.randn(6, 5, F64):requires_grad_()
      for _, case in ipairs(kinds(6, 3)) do
        local wanted = 0
        local h = x:linear(bank.up_proj, bank.up_bias)
        h = bank.act and bank.act(h) or h:silu()
        for e = 1, 3 do
          local m = h * bank.gamma[e]
          if bank.beta then m = m + bank.beta[e] end
          wanted = wanted + m:linear(bank.down_proj, bank.down_bias) * case[3]:narrow(2, e, 1)
        end
        local y = bank(x, case[2])
        assert.close(wanted, y, exact)
        local inputs = bank:parameters()
        inputs[#inputs + 1], inputs[#inputs + 2] = x, case[4]
        local a = { moe.grad(wanted:square():sum(), inputs, { retain_graph = true }) }
        local b = { moe.grad(y:square():sum(), inputs, { retain_graph = true }) }
        for i = 1, #inputs do assert.close(a[i], b[i], { rtol = 1e-8, atol = 1e-8, name = case[1] }) end
      end
    end
  end)

  it("with gamma = 1 and beta = 0, as it starts, is the dense network, for any weights that sum to one", function()
    moe.manual_seed(3)
    local bank = film { spread = 0 }
    assert.close(moe.ones(3, 6, F64), bank.gamma)
    assert.close(moe.zeros(3, 6, F64), bank.beta)
    local x = moe.randn(8, 5, F64)
    local dense = x:linear(bank.up_proj, bank.up_bias):silu():linear(bank.down_proj, bank.down_bias)
    local w, i = moe.router_topk(moe.randn(8, 3, F64), { top_k = 2, norm_topk_prob = true })
    assert.close(dense, bank(x, moe.routing.topk(i, w, 3)), { rtol = 1e-12, atol = 1e-12 })
    local one = film { num_experts = 1, spread = 0 }
    local y = x:linear(one.up_proj, one.up_bias):silu():linear(one.down_proj, one.down_bias)
    assert.same(y:totable(), one(x):totable()) -- one expert: to the bit
  end)

  it("adds 2 I parameters an expert", function()
    local function count(E) return moe.experts.film({ d_model = 8, intermediate_size = 10, num_experts = E }):num_parameters() end
    assert.equal(20 * 7, count(8) - count(1))
  end)

  it("works on the slots of a soft routing, and in a layer", function()
    local layer = moe.layer { d_model = 6, num_experts = 3, experts = moe.experts.film { intermediate_size = 4, spread = 0.3 } }
    layer(moe.randn(2, 5, 6)):square():sum():backward()
    for _, key in ipairs { "gamma", "beta", "up_proj", "down_bias" } do
      assert.is_true(layer.experts[key].grad:abs():sum():item() > 0)
    end
    local soft = moe.rand(7, 3, 2)
    local D, C = soft:softmax(1), soft:reshape({ 7, 6 }):softmax(2):reshape { 7, 3, 2 }
    local bank, x = layer.experts, moe.randn(7, 6)
    local wanted = 0
    for e = 1, 3 do
      local h = D:select(2, e):t():matmul(x):linear(bank.up_proj, bank.up_bias):gelu() * bank.gamma[e] + bank.beta[e]
      wanted = wanted + C:select(2, e):matmul(h:linear(bank.down_proj, bank.down_bias))
    end
    assert.close(wanted, bank(x, moe.routing.soft(D, C)), { rtol = 1e-4, atol = 1e-5 })
  end)

  it("names what is wrong", function()
    assert.matches("the network is shared: give moe.nn.poly_norm%(%)", helper.error_of(film, { act = "poly_norm" }))
    assert.matches("3 experts need a routing", helper.error_of(film(), moe.ones(2, 5, F64)))
    local two = moe.routing.topk(moe.ones({ 2, 1 }, { dtype = "i64" }), nil, 2)
    assert.matches("must be a tensor %[2, n%]", helper.error_of(film(), moe.ones(2, 5, F64), two))
  end)
end)

describe("moe.experts.ia3", function()
  it("merges the vectors and then scales, which is to mix the scaled activations", function()
    moe.manual_seed(4)
    local bank = moe.experts.ia3 { d_model = 5, num_experts = 3, dtype = "f64" }
    moe.no_grad(function() bank.vectors:normal_() end)
    local x = moe.randn(6, 5, F64):requires_grad_()
    for _, case in ipairs(kinds(6, 3)) do
      local wanted = 0
      for e = 1, 3 do wanted = wanted + x * bank.vectors[e] * case[3]:narrow(2, e, 1) end
      local y = bank(x, case[2])
      assert.close(wanted, y, exact)
      local inputs = { x, bank.vectors, case[4] }
      local a = { moe.grad(wanted:square():sum(), inputs, { retain_graph = true }) }
      local b = { moe.grad(y:square():sum(), inputs, { retain_graph = true }) }
      for i = 1, 3 do assert.close(a[i], b[i], { rtol = 1e-9, atol = 1e-9 }) end
    end
  end)

  it("of one expert is IA3, and starts as the identity", function()
    local bank = moe.experts.ia3 { d_model = 4 }
    local x = moe.randn(2, 3, 4)
    assert.same(x:totable(), bank(x):totable())
    assert.equal(4, bank:num_parameters())
    assert.is_false(moe.nn.decays(bank.vectors))
    assert.matches("1 x 4", tostring(bank))
  end)

  it("binds in a layer, and names what is wrong", function()
    local layer = moe.layer { d_model = 4, num_experts = 3, experts = moe.experts.ia3() }
    assert.same({ 3, 4 }, layer.experts.vectors.shape)
    assert.matches("unknown option 'dmodel' %(did you mean 'd_model'", helper.error_of(moe.experts.ia3, { dmodel = 3 }))
    assert.matches("3 experts need a routing", helper.error_of(layer.experts, moe.ones(2, 4)))
    assert.matches("description without weights", helper.error_of(moe.experts.ia3(), moe.ones(2, 4)))
  end)
end)
