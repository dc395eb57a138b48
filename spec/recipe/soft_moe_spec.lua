-- Soft MoE: the formula as one einsum, its symmetry, its cost, and pictures beside token choice and expert choice.
local moe = require "moe"
require "spec.helper"
local lab = require "moe.recipe.lab"
local soft = require "moe.recipe.soft_moe"

local EXACT = { rtol = 1e-9, atol = 1e-11 }
local O = { d_model = 6, num_experts = 3, slots = 6, intermediate_size = 5, dtype = "f64" }

local function layer_of(o)
  moe.manual_seed(3)
  return soft.soft(setmetatable(o or {}, { __index = O }))
end

-- The paper's algorithm for x [B, T, d]; experts one by one.
local function by_einsum(layer, x)
  local phi, d = layer.router.weight, x:size(3)
  local function unit(t) return t / ((t * t):sum(-1, true) + 1e-6):sqrt() end
  local logits = moe.einsum("btd,sd->bts", { unit(x), unit(phi) * layer.router.scale })
  local slots = moe.einsum("bts,btd->bsd", { logits:softmax(2), x })
  local out, n = {}, layer.router.slots
  for e = 1, 3 do
    local rows = slots:narrow(2, (e - 1) * n + 1, n):reshape { -1, d }
    local h = rows:linear(layer.experts.up_proj[e]):gelu()
    out[e] = h:linear(layer.experts.down_proj[e]):reshape { x:size(1), n, d }
  end
  return moe.einsum("bts,bsd->btd", { logits:softmax(3), moe.cat(out, 2) })
end

describe("recipe soft_moe", function()
  it("is the paper's einsum, gradients too", function()
    local layer = layer_of()
    local x, g = moe.randn({ 2, 7, 6 }, { dtype = "f64" }), moe.randn({ 2, 7, 6 }, { dtype = "f64" })
    x.requires_grad = true
    local y, wanted = layer(x), by_einsum(layer, x)
    assert.close(wanted, y, EXACT)
    local inputs = { x, layer.router.weight, layer.router.scale, layer.experts.up_proj, layer.experts.down_proj }
    local got, expected = { moe.grad((y * g):sum(), inputs) }, { moe.grad((wanted * g):sum(), inputs) }
    for i = 1, #inputs do assert.close(expected[i], got[i], { rtol = 1e-8, atol = 1e-10 }) end
    assert(moe.gradcheck(function(u) return (layer(u)) end, { moe.randn({ 1, 4, 6 }, { dtype = "f64" }) }))
  end)

  it("knows no order of tokens", function()
    local layer = layer_of()
    local x = moe.randn({ 2, 7, 6 }, { dtype = "f64" })
    local order = moe.tensor({ 5, 2, 7, 1, 3, 6, 4 }, { dtype = "i64" })
    assert.close((layer(x)):index_select(2, order), (layer(x:index_select(2, order))), EXACT)
  end)

  it("does the same work for any number of experts that share its slots", function()
    local x = moe.randn({ 2, 7, 6 }, { dtype = "f64" })
    for _, E in ipairs { 1, 2, 3, 6 } do
      local _, routing = layer_of { num_experts = E } (x)
      assert.equal(12, routing.num_assignments) -- 6 slots a sequence
      assert.equal(0, routing.dropped)
    end
  end)

  it("classifies pictures better than token choice and expert choice with as many expert rows", function()
    local right = {}
    for name, make in pairs { soft = soft.soft, topk = soft.rivals.topk, expert_choice = soft.rivals.expert_choice } do
      right[name] = {}
      for seed = 1, 2 do
        local model
        right[name][seed], model = soft.train(make, { steps = 400, seed = seed })
        local s = model.blocks[1].ffn:stats()
        assert.equal(s.tokens, s.assignments) -- one row a token in each of the three
      end
    end
    assert.is_true(lab.mean(right.soft) > lab.mean(right.topk))
    assert.is_true(lab.mean(right.soft) > lab.mean(right.expert_choice))
  end)
end)
