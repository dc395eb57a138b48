local moe = require "moe"
local helper = require "spec.helper"

local function made(o)
  moe.manual_seed(5)
  o.d_model = o.d_model or 3
  o.experts = o.experts or moe.experts.mlp { intermediate_size = 4, d_out = 2 }
  return moe.multi_gate(o)
end

-- Expert e alone, by a routing of its own.
local function alone(m, x, e)
  local n = x:size(1)
  return m.experts(x, moe.routing.topk(moe.full({ n, 1 }, e, { dtype = "i64" }), nil, m.num_experts))
end

describe("moe.multi_gate", function()
  it("mixes what each gate sees", function()
    local m = made { num_tasks = 3, shared = 1, groups = { { 1, 3 }, { 2 } }, per_group = 2, own = 1 }
    assert.equal(8, m.num_experts)
    local visible = { { 1, 2, 3, 6 }, { 1, 4, 5, 7 }, { 1, 2, 3, 8 } }
    local x = moe.randn(5, 3)
    local ys, routings = m(x)
    for t, list in ipairs(visible) do
      local g = x:matmul(m.gates[t].weight:t()):softmax(-1)
      local want = moe.zeros(5, 2)
      for i, e in ipairs(list) do want = want + alone(m, x, e) * g:narrow(2, i, 1) end
      assert.close(want, ys[t], { rtol = 1e-5, atol = 1e-6 })
      local load = {}
      for e = 1, 8 do load[e] = 0 end
      for _, e in ipairs(list) do load[e] = 5 end
      assert.same(load, routings[t]:load():totable())
      assert.close(moe.ones(5), routings[t].probs:sum(-1), { rtol = 1e-5 })
    end
  end)

  it("with one task is a layer of dense gates", function()
    local m = made { num_tasks = 1, shared = 4, dtype = "f64", experts = moe.experts.swiglu { intermediate_size = 5 } }
    local x = moe.randn(2, 6, 3, { dtype = "f64" })
    local layer = moe.layer {
      d_model = 3, num_experts = 4, experts = m.experts,
      router = function(rows) return moe.routing.dense(rows:matmul(m.gates[1].weight:t()):softmax(-1)) end,
    }
    assert.close(layer(x), m(x)[1], { rtol = 1e-10, atol = 1e-12 })
  end)

  it("works each expert once", function()
    local calls = {}
    local list = {}
    for e = 1, 4 do
      list[e] = function(xe)
        calls[e] = (calls[e] or 0) + xe:size(1)
        return xe
      end
    end
    local m = made { visible = { { 1, 2 }, { 2, 3 }, { 4, 2, 1 } }, experts = list }
    local x = moe.randn(7, 3)
    for _, y in ipairs(m(x)) do assert.close(x, y, { rtol = 1e-5, atol = 1e-6 }) end
    assert.same({ 7, 7, 7, 7 }, calls)
  end)

  it("gives gates and experts inputs of their own, as stacked levels want", function()
    local m = made { visible = { { 1, 2 }, { 1, 3 } }, gate_input = { 2, 3 }, expert_input = { 1, 2, 3 } }
    local a, b, c = moe.randn(4, 3), moe.randn(4, 3), moe.randn(4, 3)
    local ys = m { a, b, c }
    local g = c:matmul(m.gates[2].weight:t()):softmax(-1)
    local want = alone(m, a, 1) * g:narrow(2, 1, 1) + alone(m, c, 3) * g:narrow(2, 2, 1)
    assert.close(want, ys[2], { rtol = 1e-5, atol = 1e-6 })
  end)

  it("has gradients, and scores by sigmoid where told", function()
    for _, score in ipairs { "softmax", "sigmoid" } do
      local m = made { num_tasks = 2, shared = 2, own = 1, dtype = "f64", score = score, gate_bias = true }
      local x = moe.randn(3, 3, { dtype = "f64" })
      local w = moe.randn(3, 2, { dtype = "f64" })
      assert.is_true(moe.gradcheck(function(xs)
        local ys, routings = m(xs)
        return (ys[1] * w):sum() + (ys[2] * ys[2]):sum() + routings[1].probs:square():sum()
      end, { x }))
      for name, p in m:named_parameters() do assert.is_true(p.requires_grad, name) end
      assert.equal(2 * (3 * 3 + 3) + m.experts:num_parameters(), m:num_parameters())
      if score == "sigmoid" then
        assert.close((x:matmul(m.gates[1].weight:t()) + m.gates[1].bias):sigmoid(), select(2, m(x))[1].probs:narrow(2, 1, 3))
      end
    end
  end)

  it("gives experts that one gate sees a private weight", function()
    local x = moe.randn(5, 3)
    local m = made { visible = { { 1, 2, 3 }, { 2, 4 }, { 2 } }, self_gate = true }
    local _, routings = m(x)
    local g = x:matmul(m.gates[1].weight:t()):softmax(-1)
    local s = x:matmul(m.self_gates[1].weight:t()):softmax(-1) -- two of its own
    assert.close(g + moe.cat({ s:narrow(2, 1, 1), moe.zeros(5, 1), s:narrow(2, 2, 1) }, 2), routings[1].probs:narrow(2, 1, 3),
      { rtol = 1e-5 })
    local single = x:matmul(m.gates[2].weight:t()):softmax(-1):narrow(2, 2, 1) + x:matmul(m.self_gates[2].weight:t()):sigmoid()
    assert.close(single, routings[2].probs:narrow(2, 4, 1), { rtol = 1e-5 })
    assert.is_nil(m.self_gates[3])
  end)

  it("names what is wrong", function()
    local function says(message, f) assert.matches(message, helper.error_of(f)) end
    says("multi_gate: option 'num_tasks' must be at least 1, got nil", function() made { shared = 2 } end)
    says("task 1 sees no expert", function() made { num_tasks = 2 } end)
    says("groups%[1%] names task 3, wanted 1 to 2", function() made { num_tasks = 2, shared = 1, groups = { { 3 } } } end)
    says("visible%[1%] names expert 0, wanted numbers from 1", function() made { visible = { { 0 } } } end)
    says("'own' must not be negative", function() made { num_tasks = 1, own = -1 } end)
    says("gate_input%[1%] is nil", function() made { visible = { { 1 } }, gate_input = {} } end)
    local m = made { visible = { { 1 } }, gate_input = { 2 } }
    says("gate 1 takes input 2, but there are 1", function() m(moe.randn(2, 3)) end)
    says("input 1 is %[2, 4%], wanted %[.., 3%]", function() m(moe.randn(2, 4)) end)
    says("argument 1 must be a tensor or a list of them, got a number", function() m(3) end)
  end)
end)

describe("moe.nn.batchnorm", function()
  it("normalises by the batch in training, by what it saw in evaluation", function()
    local norm = moe.nn.batchnorm { size = 3, momentum = 0.5 }
    moe.manual_seed(1)
    local x = moe.randn(2, 4, 3) * 2 + 5
    local rows = x:reshape { 8, 3 }
    local y = norm(x):reshape { 8, 3 }
    assert.close({ 0, 0, 0 }, y:mean(1), { atol = 1e-5 })
    assert.close({ 1, 1, 1 }, (y * y):mean(1), { rtol = 1e-3 })
    assert.close(rows:mean(1) * 0.5, norm.running_mean, { rtol = 1e-5 })
    assert.close(rows:var(1) * 0.5 + 0.5, norm.running_var, { rtol = 1e-5 })
    norm:eval()
    assert.close((x - norm.running_mean) / (norm.running_var + 1e-5):sqrt(), norm(x), { rtol = 1e-5, atol = 1e-6 })
    assert.equal(6, norm:num_parameters())
  end)

  it("has gradients, and counts a recomputed forward once", function()
    local norm = moe.nn.batchnorm { size = 2, dtype = "f64" }
    local x, w = moe.randn(5, 2, { dtype = "f64" }), moe.randn(5, 2, { dtype = "f64" })
    assert.is_true(moe.gradcheck(function(xs, a, b)
      rawset(norm, "weight", a)
      rawset(norm, "bias", b)
      return (norm(xs) * w):sum()
    end, { x, norm.weight, norm.bias }))
    local once, twice = moe.nn.batchnorm(2), moe.nn.batchnorm(2)
    local xs = moe.randn(5, 2, { requires_grad = true })
    once(xs)
    moe.checkpoint(function(v) return twice(v):square():sum() end, xs):backward()
    assert.same(once.running_mean:totable(), twice.running_mean:totable())
  end)

  it("names what is wrong", function()
    local function says(message, f) assert.matches(message, helper.error_of(f)) end
    says("batchnorm: 1 row to normalise over in training", function() moe.nn.batchnorm(2)(moe.ones(1, 2)) end)
    says("x is %[2, 3%], wanted %[.., 2%]", function() moe.nn.batchnorm(2)(moe.ones(2, 3)) end)
    says("'size' must be at least 1", function() moe.nn.batchnorm(0) end)
  end)
end)
