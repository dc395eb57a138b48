local moe = require "moe"
local pictures = require "moe.recipe.pictures"
local mofme = moe.recipe.mofme

local SIZES <const> = { d_model = 12, num_experts = 4, top_k = 2, intermediate_size = 6 }

describe("recipe mofme", function()
  it("with gamma = 1 and beta = 0 for all experts is the dense network", function()
    moe.manual_seed(1)
    local layer = mofme.layer(SIZES)
    local bank = layer.experts
    moe.no_grad(function()
      bank.gamma:fill_(1)
      bank.beta:fill_(0)
    end)
    local dense = moe.nn.ffn { d_model = 12, intermediate_size = 12, bias = true }
    dense:load_state_dict {
      ["up_proj.weight"] = bank.up_proj, ["up_proj.bias"] = bank.up_bias, ["down_proj.weight"] = bank.down_proj,
      ["down_proj.bias"] = bank.down_bias,
    }
    local x = moe.randn(3, 5, 12)
    assert.close(dense(x), (layer(x)), { rtol = 1e-5, atol = 1e-6 })
  end)

  it("without dropout routes as a plain softmax router does", function()
    moe.manual_seed(2)
    local layer = mofme.layer(setmetatable({ dropout = 0 }, { __index = SIZES }))
    local plain = moe.router.topk { d_model = 12, num_experts = 4, top_k = 2 }
    plain:load_state_dict(layer.router:state_dict())
    local x = moe.randn(9, 12)
    local _, routing = layer(x)
    local wanted = plain:route(x)
    assert.same(wanted.index:totable(), routing.index:totable())
    assert.same(wanted.weight:totable(), routing.weight:totable())
  end)

  it("adds two vectors an expert where a mixture adds a network", function()
    local function count(kind, E)
      return mofme.restorer({ kind = kind, size = 8, d_model = 64, num_layers = 1, num_experts = E, top_k = 2, intermediate_size = 4 })
        :num_parameters()
    end
    assert.equal(6 * (64 + 2 * 8), count("mofme", 8) - count("mofme", 2)) -- with the router's row
    assert.equal(6 * (64 + 2 * 64 * 8 + 64 + 8), count("moe", 8) - count("moe", 2))
  end)

  it("corrupts patches in three ways and tells how far they are from clean", function()
    moe.manual_seed(3)
    local clean = pictures.patches(300, 8)
    local bad = pictures.corrupt(clean, 8)
    assert.close(20, pictures.psnr(clean + 0.1, clean), { rtol = 1e-4 })
    local d = (bad - clean):reshape { 100, 3, 64 }
    assert.is_true(math.abs(d[{ {}, 1 }]:std():item() - 0.15) < 0.01)
    local streaks = (d[{ {}, 2 }] / 0.6):reshape({ 6400 }) -- 0 or 1
    assert.close((streaks - streaks:round()):abs():max(), 0, { atol = 1e-5 })
    local c = clean:reshape({ 100, 3, 64 })
    local hazed = (c + d)[{ {}, 3 }]
    local t = hazed:std(2) / c[{ {}, 3 }]:std(2) -- contrast left
    assert.is_true(t:min():item() > 0.29 and t:max():item() < 0.81)
  end)

  it("restores about as well as a dense network and as a full mixture, with far fewer parameters than that", function()
    local rows = mofme.demo(nil, { seeds = { 1, 2 }, steps = 450 })
    local dense, own, full = rows[1], rows[2], rows[3]
    local text = ("dense %.2f, own %.2f, full %.2f dB"):format(dense[2], own[2], full[2])
    assert.is_true(own[2] > 12.65 + 4, text) -- what the corrupted patches have
    assert.is_true(own[2] > dense[2] - 0.2, text)
    assert.is_true(own[2] > full[2] - 0.8, text)
    assert.is_true(own.parameters < 0.5 * full.parameters)
  end)
end)
