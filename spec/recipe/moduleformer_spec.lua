local moe = require "moe"
local domains = require "moe.recipe.domains"
local lab = require "moe.recipe.lab"
local recipe = require "moe.recipe.moduleformer"

local SIZES <const> = {
  vocab_size = 256, d_model = 32, num_layers = 2, num_experts = 8, top_k = 2, intermediate_size = 32, max_seq_len = 48,
}

local function train(o, model)
  return lab.train(setmetatable({ model = function(sizes) return recipe.model(setmetatable({ coef = o.coef }, { __index = sizes })) end },
    { __index = recipe }), {
    d_model = 32, num_layers = 2, num_experts = 8, top_k = 2, intermediate_size = 32, seq_len = 48, batch_size = 8, eval_steps = 4,
    steps = o.steps or 250, lr = o.lr or 5e-3, text = o.text,
  }, model)
end

-- Mean entropies over the layers: of the marginal, and of a token's own probabilities.
local function entropies(model, text)
  local batch, ctx, whole, own = text.val:batches { batch_size = 8, seq_len = 48 } (), {}, 0, 0
  model:eval()
  moe.no_grad(function() model(batch.x, ctx) end)
  for _, routing in ipairs(ctx.routings) do
    local p = routing.probs:mean(1)
    whole, own = whole - (p * (p + 1e-30):log()):sum():item(), own + routing:token_entropy()
  end
  return whole / #ctx.routings, own / #ctx.routings
end

-- The loss on a text, with the loads that pruning goes by.
local function measure(model, text)
  recipe.each(model, function(layer) layer:reset_stats() end)
  return domains.loss(model, text)
end

describe("ModuleFormer", function()
  it("attends by sticks: the sum over a position's predecessors is at most 1", function()
    moe.manual_seed(1)
    local mixer = recipe.model(SIZES).layers[1].mixer
    local x = moe.randn(1, 12, 32)
    -- with values of 1 and an identity in place of the output projections, y is the weighted sum of the heads' sticks
    local ones = moe.mixer.mixture_of_attention { d_model = 32, num_experts = 8, head_dim = 16, attention = "stick_breaking" }
    assert.equal(getmetatable(ones), getmetatable(mixer))
    local q, k = moe.randn(1, 2, 12, 16), moe.randn(1, 1, 12, 16)
    local sum, left = moe.stick_breaking(q, k, moe.ones(1, 1, 12, 1))
    assert.close(moe.ones(1, 2, 12), sum:squeeze(-1) + left, { rtol = 1e-5, atol = 1e-6 })
    assert.is_true(left:amin():item() >= -1e-6)
    assert.close(moe.zeros(1, 32), mixer(x):select(2, 1), { atol = 1e-7 }) -- the first position has no predecessor
  end)

  it("spreads the modules and makes each token sure; what one domain does not need is pruned", function()
    local both, prose = domains.text "prose code", domains.text "prose"
    local mutual, plain = train { text = both, coef = 0.05 }, train { text = both, coef = 0 }
    local whole, own = entropies(mutual.model, both)
    local whole0, own0 = entropies(plain.model, both)
    assert.is_true(whole > 0.75 * math.log(8), whole)
    assert.is_true(own < 0.4 * own0, own)
    assert.is_true(whole - own > whole0 - own0 + 0.5)

    local state, losses, left = mutual.model:state_dict(), {}, {}
    for how, concentrate in ipairs { true, false } do
      local model = recipe.model(SIZES)
      model:load_state_dict(state)
      if concentrate then recipe.concentrate(model, 0.3) end
      train({ text = prose, lr = 3e-3 }, model)
      local before = measure(model, prose)
      local was, kept = recipe.prune(model, 0.1)
      assert.equal(32, was)
      losses[how], left[how] = measure(model, prose) - before, kept
    end
    assert.is_true(left[1] <= 18, left[1]) -- of 32
    assert.is_true(losses[1] < 0.05, losses[1])
    assert.is_true(losses[2] > 5 * math.max(losses[1], 0.02), losses[2])
    if os.getenv "MOE_SHOW" then print(whole, own, whole0, own0, losses[1], losses[2], left[1], left[2]) end
  end)

  it("takes new modules for a new domain beside the frozen old ones", function()
    moe.manual_seed(3)
    local model, text = recipe.model(SIZES), domains.text("ledger", { size = 8000 })
    recipe.extend(model, 4)
    local before, moved = {}, {}
    for name, p in model:named_parameters() do before[name] = p:detach():clone() end
    local was = measure(model, text)
    train({ text = text, steps = 60, lr = 0.02 }, model)
    local now = measure(model, text)
    if os.getenv "MOE_SHOW" then print(was, now) end
    assert.is_true(now < was - 0.3, now)
    for name, p in model:named_parameters() do
      if (p - before[name]):abs():sum():item() > 0 then moved[name:gsub("^layers%.%d%.", "")] = true end
    end
    assert.same({
      ["ffn.router.weight"] = true, ["ffn.router.hidden_weight"] = true,
      ["ffn.experts.banks.2.up_proj"] = true, ["ffn.experts.banks.2.down_proj"] = true,
    }, moved)
  end)
end)
