require "spec.helper"
local moe = require "moe"
local engram = require "moe.recipe.engram"
local lab = require "moe.recipe.lab"

local SIZES <const> = {
  d_model = 32, num_layers = 2, num_heads = 2, num_experts = 16, top_k = 2, intermediate_size = 32, batch_size = 8, seq_len = 64,
  max_seq_len = 64, eval_steps = 10,
}

local function sizes(more)
  local o = {}
  for k, v in pairs(SIZES) do o[k] = v end
  for k, v in pairs(more or {}) do o[k] = v end
  return o
end

-- The recipe with a share of its inactive parameters in the memory.
local function with(share)
  return { model = function(o) return engram.model(setmetatable({ share = share }, { __index = o })) end }
end

describe("Engram", function()
  it("moves parameters from experts to tables and keeps their number and the experts at work", function()
    local base = engram.model(sizes { vocab_size = 65, share = 0 })
    for _, share in ipairs { 0.25, 0.5, 0.75, 1 } do
      local o = sizes { vocab_size = 65, share = share }
      local s, model = engram.split(o), engram.model(o)
      assert.equal(2 + math.floor((1 - share) * 14 + 0.5), s.num_experts)
      assert.equal(s.num_experts, model.layers[1].ffn.num_experts)
      local memory = model.layers[2].memory
      local gone = 2 * (16 - s.num_experts) * 2 * 32 * 32
      assert.is_true(math.abs(memory.tables:numel() - gone) < 0.06 * gone) -- primes lie above the size wanted
      assert.is_true(math.abs(model:num_parameters() / base:num_parameters() - 1) < 0.05)
    end
    for _, block in ipairs(base.layers) do assert.is_nil(block.memory) end
  end)

  it("is causal, reads the tables that its tokens name, and rows fetched ahead give the same output", function()
    moe.manual_seed(2)
    local model = engram.model(sizes { vocab_size = 20, share = 0.5 })
    model:eval()
    local ids = moe.randint(1, 20, 2, 16)
    local resident = model(ids)
    local ctx = { ngram_rows = engram.prefetch(model, ids) }
    assert.same(resident:totable(), model(ids, ctx):totable())
    assert.close(resident:narrow(2, 1, 9), model(ids:narrow(2, 1, 9)), { rtol = 1e-5, atol = 1e-6 })
    ctx.ngram_rows = nil
    model(ids, ctx):sum():backward()
    local memory = model.layers[2].memory
    local named = {}
    for _, r in ipairs(memory:rows(ids):reshape({ -1 }):totable()) do named[r] = true end
    local rows = memory.tables.grad_rows:totable()
    assert.is_true(#rows > 0 and #rows < memory.tables:size(1))
    for _, r in ipairs(rows) do assert.is_true(named[r]) end
  end)

  it("beats experts alone at equal parameters", function()
    local text = lab.text { size = 300000 }
    local o = { text = text, steps = 200 }
    local moe_alone = lab.train(with(0), sizes(o))
    local half = lab.train(with(0.5), sizes(o))
    assert.is_true(half.val_loss < 0.93 * moe_alone.val_loss, ("%.4f, experts alone %.4f"):format(half.val_loss, moe_alone.val_loss))
  end)
end)
