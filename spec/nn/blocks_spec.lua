local moe = require "moe"
local helper = require "spec.helper"

local EXACT = { rtol = 1e-11, atol = 1e-12 }
local function rand(...) return moe.randn({ ... }, { dtype = "f64" }) end
local function i64(t) return moe.tensor(t, { dtype = "i64" }) end

local function block_of(d)
  local block = moe.model.block { d_model = d, mixer = moe.mixer.attention { d_model = d, num_heads = 2, bias = false },
    ffn = moe.nn.ffn { d_model = d, bias = false } }
  block:to "f64"
  return block
end

local function blocks(n, o)
  moe.manual_seed(2)
  o.blocks, o.d_model = {}, 8
  for i = 1, n do o.blocks[i] = block_of(8) end
  local m = moe.nn.mixture_of_blocks(o)
  m:to "f64"
  return m
end

local function fixed(index, n, weight)
  return function() return moe.routing.topk(i64(index), weight, n) end
end

describe("blocks as experts", function()
  it("with one block and a weight of 1 is that block", function()
    for _, per in ipairs { "token", "sequence" } do
      for _, residual in ipairs { true, false } do
        local rows = per == "token" and 10 or 2
        local function router() return moe.routing.topk(moe.ones({ rows, 1 }, { dtype = "i64" }), nil, 1) end
        local m = blocks(1, { per = per, residual = residual, router = router })
        local x = rand(2, 5, 8)
        assert.close(m.experts[1](x), (m(x)), EXACT)
      end
    end
  end)

  it("sends sequences through the blocks chosen for them", function()
    local w = rand(3, 2)
    local m = blocks(3, { per = "sequence", router = fixed({ { 1, 3 }, { 3, 0 }, { 0, 0 } }, 3, w) })
    local x = rand(3, 4, 8)
    local y = m(x)
    local function update(b, e, g) return (m.experts[e](x:narrow(1, b, 1))[1] - x[b]) * g end
    assert.close(x[1] + update(1, 1, w[1][1]) + update(1, 3, w[1][2]), y[1], EXACT)
    assert.close(x[2] + update(2, 3, w[2][1]), y[2], EXACT)
    assert.close(x[3], y[3])
  end)

  it("sends tokens through blocks as shorter sequences, and does not call idle ones", function()
    local m = blocks(3, { residual = false, router = fixed({ { 1 }, { 3 }, { 1 }, { 1 }, { 3 }, { 3 }, { 3 }, { 1 } }, 3) })
    m.experts[2].forward = function() error "called" end
    local x = rand(2, 4, 8)
    local y = m(x)
    for b, by in ipairs { { [1] = { 1, 3, 4 }, [3] = { 2 } }, { [1] = { 4 }, [3] = { 1, 2, 3 } } } do
      for e, at in pairs(by) do
        local index = i64(at)
        assert.close(m.experts[e](x[b]:index_select(1, index):unsqueeze(1))[1], y[b]:index_select(1, index), EXACT)
      end
    end
  end)

  it("learns: router and blocks have gradients that check", function()
    for _, per in ipairs { "token", "sequence" } do
      local m = blocks(3, { per = per, top_k = 2 })
      local x = rand(2, 3, 8)
      x.requires_grad = true
      assert(moe.gradcheck(function(input) return (m(input)):sin():sum() end, { x, m.router.weight, m.experts[1].mixer:parameters()[2] }))
    end
  end)

  it("pools what the router of sequences sees by the mask, and joins losses", function()
    local m = blocks(2, { per = "sequence", balance = { moe.loss.switch(1) } })
    local x = rand(2, 4, 8)
    local mask = moe.tensor { { 1, 1, 0, 0 }, { 0, 0, 0, 0 } }:ne(0)
    local ctx = { mask = mask }
    local y, state, routing = m(x, nil, ctx)
    assert.is_nil(state)
    assert.equal(1, routing.num_assignments)
    assert.close(x[2], y[2])
    assert.close(m.router:route(x[1]:narrow(1, 1, 2):mean(1, true), {}).probs, routing.probs:narrow(1, 1, 1), EXACT)
    assert.equal(1, #ctx.routings)
    assert.truthy(routing:aux("switch"))
  end)

  it("stands for a layer of a language model", function()
    moe.manual_seed(1)
    local lm = moe.model.lm { vocab_size = 9, d_model = 8, num_layers = 3, num_heads = 2, max_seq_len = 8 }
    lm.layers[2] = moe.nn.mixture_of_blocks { blocks = { lm.layers[2], lm.layers[3] }, d_model = 8, pool = "first", per = "sequence",
      balance = { moe.loss.switch(1) } }
    local y = lm(moe.randint(1, 9, { 2, 6 }))
    ;(y:sum() + lm:aux()):backward()
    assert.truthy(lm.layers[2].router.weight.grad)
  end)

  it("says what is wrong", function()
    local function says(want, f, ...)
      local message = helper.error_of(f, ...)
      assert.truthy(message:find(want, 1, true), message)
    end
    says("option 'blocks' is an empty list", moe.nn.mixture_of_blocks, { blocks = {}, d_model = 8 })
    says("block 1 must be a module, got a function", moe.nn.mixture_of_blocks, { blocks = { print }, d_model = 8 })
    says("option 'pool' must be mean, first or a function", moe.nn.mixture_of_blocks,
      { blocks = { block_of(8) }, d_model = 8, pool = "last" })
    says("x must be [batch, time, 8], got [3, 8]", blocks(2, {}), rand(3, 8))
    says("has no state", blocks(2, {}), rand(1, 3, 8), {})
  end)
end)
