-- BigMac: what travels is narrow, and nothing else is lost.
require "spec.helper"
local moe = require "moe"
local recipe = require "moe.recipe"
local bigmac = require "moe.recipe.bigmac"
local helper = require "spec.helper"

describe("recipe bigmac", function()
  local sizes = { d_model = 16, num_experts = 8, top_k = 3, intermediate_size = 8, dtype = "f64" }

  it("gives on several machines what it gives on one, and sends r / d of the bytes", function()
    moe.manual_seed(4)
    local layer, usual = bigmac.layer(sizes), bigmac.usual.layer(sizes)
    usual.router:load_state_dict(layer.router:state_dict()) -- the same choices
    local x = moe.randn(24, 16, { dtype = "f64" })
    for _, l in ipairs { layer, usual } do
      local y = l(x)
      for _, ranks in ipairs { 1, 2, 4 } do assert.close(y, (bigmac.parallel(l, x, ranks)), { rtol = 1e-10, atol = 1e-12 }) end
    end
    local _, none = bigmac.parallel(layer, x, 1)
    assert.equal(0, none)
    for _, ranks in ipairs { 2, 4 } do
      local _, low = bigmac.parallel(layer, x, ranks)
      local _, high = bigmac.parallel(usual, x, ranks)
      assert.equal(4 * low, high) -- r = d / 4
      -- counted by hand: rows whose expert lies elsewhere, twice
      local rows = 0
      for t, choice in ipairs(layer.router:route(x, {}).index:totable()) do
        for _, e in ipairs(choice) do
          if (t - 1) // (24 // ranks) ~= (e - 1) // (8 // ranks) then rows = rows + 1 end
        end
      end
      assert.equal(rows * 16 * 8 * 2, high)
    end
  end)

  it("has the parameters of the usual layer, and is it where nothing descends", function()
    for _, rank in ipairs { 2, 4, 8 } do
      local o = setmetatable({ rank = rank, d_model = 32, num_experts = 16 }, { __index = sizes })
      assert.equal(bigmac.usual.layer(o):num_parameters(), bigmac.layer(o):num_parameters())
    end
    local layer = bigmac.layer(setmetatable({ rank = 16 }, { __index = sizes }))
    local usual = moe.layer {
      d_model = 16, num_experts = 8, dtype = "f64", router = moe.router.topk { top_k = 3 },
      experts = moe.experts.mlp { intermediate_size = layer.experts.bank.intermediate_size },
    }
    moe.no_grad(function()
      layer.experts.descend.weight:copy_(moe.eye(16))
      layer.experts.ascend.weight:copy_(moe.eye(16))
    end)
    usual.router:load_state_dict(layer.router:state_dict())
    usual.experts:load_state_dict(layer.experts.bank:state_dict())
    local x = moe.randn(2, 5, 16, { dtype = "f64" })
    assert.close(usual(x), layer(x), { rtol = 1e-10, atol = 1e-12 })
  end)

  it("learns a text as well as the usual layer of equal parameters", function()
    local o = {
      d_model = 64, num_experts = 16, top_k = 4, intermediate_size = 16, num_heads = 4, batch_size = 8, seq_len = 64, steps = 150,
      seeds = { 1, 2 },
    }
    local rows = recipe.compare({ "bigmac", bigmac.usual }, o)
    assert.equal(rows[2].parameters, rows[1].parameters)
    assert.is_true(rows[1].val_loss < 1.02 * rows[2].val_loss)
    assert.is_true(rows[1].val_loss < 2.8)
  end)

  it("names what is wrong", function()
    assert.matches("bigmac: rank is 20, wanted 1 to d_model = 16", helper.error_of(function()
      bigmac.layer(setmetatable({ rank = 20 }, { __index = sizes }))
    end))
    assert.matches("24 tokens and 8 experts cannot be cut into 3", helper.error_of(function()
      bigmac.parallel(bigmac.layer(sizes), moe.randn(24, 16, { dtype = "f64" }), 3)
    end))
  end)
end)
