-- The ground of the recipes: text, base lines, training, comparing.
require "spec.helper"
local moe = require "moe"
local recipe = require "moe.recipe"

describe("moe.recipe", function()
  local text = recipe.text { kind = "generated", size = 5000 }
  local small = { text = text, d_model = 16, num_heads = 2, num_experts = 4, intermediate_size = 16, seq_len = 16, batch_size = 4,
    steps = 6, eval_steps = 2 }

  it("generates the same text from the same seed", function()
    local other = recipe.text { kind = "generated", size = 5000, seed = 2 }
    local again = moe.data.text { text = text:decode(text.train:ids()) .. text:decode(text.val:ids()) }
    assert.equal(5000, #again)
    assert.is_true(text:decode(text.train:ids(1, 200)) ~= other:decode(other.train:ids(1, 200)))
    local same, kind = recipe.text { kind = "generated", size = 5000 }
    assert.equal(text, same)
    assert.equal("generated", kind)
  end)

  it("trains to the bit from a seed, and counts what works for a token", function()
    local a, b = recipe.train("topk", small), recipe.train("topk", small)
    assert.same(a.losses, b.losses)
    assert.equal(a.val_loss, b.val_loss)
    assert.equal(6, #a.losses)
    -- two of four experts of [2, 16, 16] weights in each of two layers rest
    assert.equal(a.parameters - 2 * 2 * (2 * 16 * 16), a.active_parameters)
    local dense = recipe.train("dense", small)
    assert.equal(dense.parameters, dense.active_parameters)
  end)

  it("compares by the mean over seeds", function()
    local seen = {}
    small.seeds = { 1, 2 }
    small.report = function(name, seed) seen[#seen + 1] = name .. seed end
    local rows = recipe.compare({ "dense", "topk" }, small)
    small.seeds, small.report = nil, nil
    assert.same({ "dense1", "dense2", "topk1", "topk2" }, seen)
    local a, b = rows[2].runs[1].val_loss, rows[2].runs[2].val_loss
    assert.is_true(math.abs(rows[2].val_loss - (a + b) / 2) < 1e-12)
    assert.is_true(math.abs(rows[2].spread - math.abs(a - b) / math.sqrt(2)) < 1e-12)
  end)

  it("names what it does not know", function()
    assert.error_matches(function() recipe.train "topkk" end, "there is no recipe 'topkk'")
    assert.error_matches(function() recipe.build(3) end, "wanted a recipe or the name of one, got a number")
    assert.error_matches(function() recipe.train("topk", { step = 3 }) end, "unknown option 'step'")
  end)
end)
