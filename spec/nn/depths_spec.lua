local moe = require "moe"
local helper = require "spec.helper"

local EXACT = { rtol = 1e-11, atol = 1e-12 }
local function rand(...) return moe.randn({ ... }, { dtype = "f64" }) end

local function block_of(d, rope)
  local block = moe.model.block {
    d_model = d, mixer = moe.mixer.attention { d_model = d, num_heads = 2, bias = false, rope = rope },
    ffn = moe.nn.ffn { d_model = d, bias = false },
  }
  block:to "f64"
  return block
end

local function depths(o)
  moe.manual_seed(o.seed or 3)
  o.seed = nil
  o.d_model = 8
  o.block = o.block or block_of(8, o.rope)
  o.rope = nil
  local m = moe.nn.mixture_of_depths(o)
  m:to "f64"
  return m
end

-- A module that counts the positions it is given.
local Counting = moe.nn.module "counting"
function Counting:init(block) self.block, self.rows, self.calls = block, 0, 0 end
function Counting:forward(x, state, ctx)
  self.rows, self.calls, self.ctx = self.rows + x:size(1) * x:size(2), self.calls + 1, ctx
  return self.block(x, state, ctx)
end

describe("mixture of depths", function()
  it("with capacity 1 and weights of 1 is the block, to the bit", function()
    local m = depths { capacity = 1, weight = "none", sampling = "topk" }
    local x = rand(2, 6, 8)
    assert.same(m.block(x):totable(), (m(x)):totable())
    -- gradients too; the router has none, for it decided nothing
    local xs, grads = { x:clone(), x:clone() }, {}
    for i, f in ipairs { m, m.block } do
      xs[i].requires_grad = true
      m:zero_grad()
      ;(f(xs[i])):sin():sum():backward()
      grads[i] = m.block.mixer:parameters()[1].grad:totable()
    end
    assert.close(xs[2].grad, xs[1].grad, EXACT)
    assert.close(grads[2], grads[1], EXACT)
    assert.is_nil(m.router.weight.grad)
  end)

  it("sends the largest scores through the block, in their order, and weighs its update", function()
    for _, weight in ipairs { "score", "sigmoid", "tanh", "none" } do
      local m = depths { capacity = 0.5, weight = weight }
      local x = rand(3, 5, 8) -- 3 of 5: the share is rounded up
      local y, state, routing = m(x)
      assert.is_nil(state)
      assert.equal(9, routing.num_assignments)
      local score = x:linear(m.router.weight):reshape { 3, 5 }
      for b = 1, 3 do
        local s, order = score[b]:totable(), { 1, 2, 3, 4, 5 }
        table.sort(order, function(i, j) return s[i] > s[j] end)
        local kept = { order[1], order[2], order[3] }
        table.sort(kept)
        local index = moe.tensor(kept, { dtype = "i64" })
        local sub = x[b]:index_select(1, index)
        local out = m.block(sub:unsqueeze(1)):squeeze(1)
        local g = ({ score = s, none = { 1, 1, 1, 1, 1 } })[weight] or score[b][weight](score[b]):totable()
        local want = x[b]:totable()
        for i, t in ipairs(kept) do
          local update, from = out[i]:totable(), sub[i]:totable()
          for c = 1, 8 do want[t][c] = from[c] + g[t] * (update[c] - from[c]) end
        end
        assert.close(want, y[b], EXACT)
      end
    end
  end)

  it("calls the block for the chosen alone, and not at all for none", function()
    local inside = Counting(block_of(8))
    local m = depths { block = inside, capacity = 0.25 }
    m(rand(2, 8, 8))
    assert.equal(4, inside.rows)
    m.capacity = 0
    local x = rand(2, 8, 8)
    local y, _, routing = m(x)
    assert.same({ 4, 1, 0 }, { inside.rows, inside.calls, routing.num_assignments })
    assert.same(x:totable(), y:totable())
    m(moe.zeros({ 0, 8, 8 }, { dtype = "f64" }))
    m(moe.zeros({ 2, 0, 8 }, { dtype = "f64" }))
    assert.equal(1, inside.calls)
  end)

  it("never chooses masked tokens, and lets the context follow the chosen", function()
    local inside = Counting(block_of(8))
    local m = depths { block = inside, capacity = 0.5 }
    local x = rand(2, 6, 8)
    local mask = moe.tensor { { 1, 1, 0, 0, 0, 0 }, { 1, 1, 1, 1, 1, 1 } }:ne(0)
    local ctx = { mask = mask, token_ids = moe.arange(1, 12):to "i64":reshape { 2, 6 }, step = 7 }
    local y, _, routing = m(x, nil, ctx)
    assert.equal(5, routing.num_assignments) -- two real tokens, and three of six
    assert.same(x[1]:narrow(1, 3, 4):totable(), y[1]:narrow(1, 3, 4):totable())
    assert.same({ routing.token:totable() }, inside.ctx.token_ids:totable())
    assert.same({ 0, 2, 5 }, inside.ctx.cu_seqlens:totable())
    assert.same({ 7, nil }, { inside.ctx.step, inside.ctx.mask })
    assert.equal(routing, ctx.routings[1])
    -- packed sequences of different lengths attend within their own
    local alone = m.block.block(x[2]:index_select(1, routing.token:narrow(1, 3, 3) - 6):unsqueeze(1))
    local score = x:linear(m.router.weight)
    for i = 1, 3 do
      local t = routing.token:totable()[2 + i] - 6
      assert.close(x[2][t] + (alone[1][i] - x[2][t]) * score[2][t], y[2][t], EXACT)
    end
  end)

  it("chooses within each of the sequences packed one after another", function()
    local m = depths { capacity = 0.5 }
    local x = rand(1, 10, 8)
    local y = m(x, nil, { cu_seqlens = moe.tensor({ 0, 4, 10 }, { dtype = "i64" }) })
    assert.close(m(x:narrow(2, 1, 4)), y:narrow(2, 1, 4), EXACT)
    assert.close(m(x:narrow(2, 5, 6)), y:narrow(2, 5, 6), EXACT)
  end)

  it("learns to tell the chosen: the auxiliary loss is the cross entropy", function()
    local m = depths { capacity = 0.5, aux = 0.3 }
    local x = rand(2, 4, 8)
    local _, _, routing = m(x)
    local r, chosen, want = routing.logits:totable(), {}, 0
    for _, t in ipairs(routing.token:totable()) do chosen[t] = true end
    for t = 1, 8 do
      local p = 1 / (1 + math.exp(-r[t][1]))
      want = want - math.log(chosen[t] and p or 1 - p) / 8
    end
    assert.close(0.3 * want, routing:aux("depths"), { rtol = 1e-9 })
  end)

  for _, sampling in ipairs { "router", "predictor", "threshold" } do
    it("decides each token by itself outside of training, so that a state continues: " .. sampling, function()
      local m = depths { capacity = 0.5, sampling = sampling, rope = true }
      local x = rand(2, 7, 8)
      for _ = 1, 3 do m(x) end
      m:eval()
      local whole, _, routing = m(x)
      assert.is_true(routing.num_assignments > 0 and routing.num_assignments < 14)
      local state, parts = m:state(2), {}
      for t = 1, 7 do parts[t], state = m(x:narrow(2, t, 1), state) end
      assert.close(whole, moe.cat(parts, 2), EXACT)
      if sampling == "threshold" then -- of the same scores, the same are above their running least
        assert.equal(8, routing.num_assignments)
      end
    end)
  end

  it("passes the gradient check, the router included", function()
    for _, sampling in ipairs { "router", "predictor" } do
      local m = depths { capacity = 0.5, weight = "sigmoid", sampling = sampling, aux = 0.2, seed = 5 }
      local x = rand(2, 3, 8)
      x.requires_grad = true
      local inputs = { x, m.router.weight, m.block.mixer:parameters()[1] }
      if sampling == "predictor" then inputs[1] = m.predictor[1].weight end -- x itself is detached there
      assert(moe.gradcheck(function()
        local y, _, routing = m(x)
        return y:sin():sum() + routing:aux()
      end, inputs))
    end
  end)

  it("stands for a layer of a language model", function()
    moe.manual_seed(1)
    local lm = moe.model.lm { vocab_size = 9, d_model = 8, num_layers = 2, num_heads = 2, max_seq_len = 8 }
    lm.layers[2] = moe.nn.mixture_of_depths { block = lm.layers[2], d_model = 8, capacity = 0.5, aux = 1 }
    local ids = moe.randint(1, 9, { 2, 6 })
    local logits = lm(ids)
    assert.is_true(lm:aux():item() > 0.1)
    ;(logits:sum() + lm:aux()):backward()
    for name, p in lm:named_parameters() do assert.truthy(p.grad, name) end
    lm:eval()
    local whole, state, parts = lm(ids), lm:state(2), {}
    for t = 1, 6 do parts[t], state = lm(ids:narrow(2, t, 1), nil, state) end
    assert.close(whole, moe.cat(parts, 2), { rtol = 1e-4, atol = 1e-5 })
  end)

  it("says what is wrong", function()
    local function says(want, f, ...)
      local message = helper.error_of(f, ...)
      assert.truthy(message:find(want, 1, true), message)
    end
    says("mixture_of_depths: option 'block' is missing", moe.nn.mixture_of_depths, { d_model = 8 })
    says("did you mean 'capacity'", moe.nn.mixture_of_depths, { d_model = 8, block = block_of(8), capacit = 1 })
    local m = depths {}
    says("x must be [batch, time, 8], got [2, 8]", m, rand(2, 8))
    says("the router's score is NaN", m, rand(1, 2, 8) / 0 * 0)
    m.capacity = 2
    says("capacity must be a share in [0, 1], got 2", m, rand(1, 2, 8))
    local wrong = moe.nn.lambda(function() return rand(1, 1, 3) end)
    says("the block gave [1, 1, 3] for x [2, 1, 8]", depths { capacity = 0.5, block = wrong }, rand(2, 2, 8))
  end)
end)
