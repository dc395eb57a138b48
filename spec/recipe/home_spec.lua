-- HoME: off, it is MMoE or CGC; on, its experts live, rare tasks keep their own, and all are ordered at least as well.
require "spec.helper"
local moe = require "moe"
local home = require "moe.recipe.home"
local tasks = require "moe.recipe.home_tasks"

local function model(o, seed)
  moe.manual_seed(seed or 3)
  return home.model(setmetatable({ d_in = 5, num_tasks = 4, groups = { { 1, 3 }, { 2, 4 } }, width = 6 }, { __index = o }))
end

-- The tower of task t by hand.
local function tower(m, t, y)
  local list = m.towers[t]
  local h = (y:matmul(list[1].weight:t()) + list[1].bias):relu()
  return h:matmul(list[3].weight:t()) + list[3].bias
end

local function relu_expert(m, e, x)
  local linear = m.tasks.experts[e].linear
  return (x:matmul(linear.weight:t()) + linear.bias):relu()
end

describe("recipe home", function()
  local x = moe.randn(7, 5)

  it("is MMoE or CGC with everything off", function()
    for own = 0, 2 do
      local m = model { own = own, shared = 3 }
      assert.equal(3 + 4 * own, m.tasks.num_experts)
      local logits = m(x)
      for t = 1, 4 do
        local seen = { 1, 2, 3 }
        for i = 1, own do seen[3 + i] = 3 + (t - 1) * own + i end
        local gate = x:matmul(m.tasks.gates[t].weight:t()):softmax(-1)
        local y = moe.zeros(7, 6)
        for i, e in ipairs(seen) do y = y + gate:narrow(2, i, 1) * relu_expert(m, e, x) end
        assert.close(tower(m, t, y), logits:narrow(2, t, 1), { rtol = 1e-5, atol = 1e-6 })
      end
    end
  end)

  it("begins as itself without the feature gate", function()
    local plain, gated = model { shared = 3 }, model { shared = 3, feature_gate = true }
    gated:load_state_dict(plain:state_dict(), { strict = false })
    assert.close(plain(x), gated(x), { rtol = 1e-6 })
  end)

  it("hides a group's experts from the other group", function()
    local m = model { hierarchy = true, norm = true, feature_gate = true, self_gate = true }
    local logits, routings = m(x)
    logits:narrow(2, 1, 1):sum():backward() -- task 1, group 1
    -- shared 1-2; group 1: 3-4, group 2: 5-6; own 7-10
    local meta, level = m.meta.experts, m.tasks.experts
    for _, case in ipairs { { meta, { 5, 6 } }, { level, { 5, 6, 8, 9, 10 } } } do
      for _, e in ipairs(case[2]) do assert.equal(0, case[1][e].linear.weight.grad:abs():sum():item()) end
    end
    for _, case in ipairs { { meta, { 1, 2, 3, 4 } }, { level, { 1, 2, 3, 4, 7 } } } do
      for _, e in ipairs(case[2]) do assert.is_true(case[1][e].linear.weight.grad:abs():sum():item() > 0) end
    end
    assert.same({ 7, 7, 7, 7, 0, 0, 0, 0, 7, 0 }, routings[3]:load():totable())
    -- the private weight is on top of a gate that sums to one
    local own = routings[3].probs:sum(-1) - 1
    assert.is_true(own:min():item() > 0 and own:max():item() < 1)
  end)

  it("orders labels as the area under the curve says", function()
    local function auc(s, y) return tasks.auc(moe.tensor(s), moe.tensor(y)) end
    assert.equal(1, auc({ 1, 2, 3 }, { 0, 0, 1 }))
    assert.equal(0, auc({ 3, 2, 1 }, { 0, 0, 1 }))
    assert.equal(0.5, auc({ 1, 1, 1 }, { 0, 1, 1 }))
    assert.equal(0.625, auc({ 1, 2, 2, 3, 0 }, { 0, 1, 0, 0, 0 })) -- above two, equal to one, below one: 2.5 of 4
  end)

  it("has no dead activations, more weight on rare tasks' own experts, and a mean AUC above MMoE's", function()
    local r = {}
    for _, name in ipairs { "mmoe", "ungated", "home" } do r[name] = home.run(home.variants[name], 1, 150) end
    assert.is_true(math.abs(r.mmoe.parameters / r.home.parameters - 1) < 0.01)
    assert.is_true(r.mmoe.dead > 0.2)
    assert.is_true(r.home.dead < 0.01)
    assert.is_true(r.home.mean > r.mmoe.mean)
    for _, t in ipairs(tasks.rare) do assert.is_true(r.home.own[t] > r.ungated.own[t]) end
  end)
end)
