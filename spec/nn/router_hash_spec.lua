local moe = require "moe"
local helper = require "spec.helper"

local function hash(o)
  o.d_model, o.num_experts = o.d_model or 4, o.num_experts or 6
  return moe.router.hash(o)
end

-- How many ids each expert has.
local function shares(router, weight)
  local load = {}
  for e = 1, router.num_experts do load[e] = 0 end
  for id, row in ipairs(router.table:totable()) do
    local seen = {}
    for _, e in ipairs(row) do
      assert.is_nil(seen[e])
      seen[e], load[e] = true, load[e] + (weight and weight[id] or 1)
    end
  end
  return load
end

describe("moe.router.hash", function()
  it("sends a token where its id's hash says, whatever it holds", function()
    local ids = moe.tensor({ { 3, 1, 3 }, { 7, 7, 2 } }, { dtype = "i64" })
    for _, method in ipairs { "random", "balanced", "modulo" } do
      local router = hash { vocab_size = 7, top_k = 2, method = method }
      local routing = router:route(moe.randn(6, 4), { token_ids = ids })
      local rows, index = router.table:totable(), routing.index:totable()
      for t, id in ipairs { 3, 1, 3, 7, 7, 2 } do assert.same(rows[id], index[t]) end
      assert.close(moe.full({ 12 }, 0.5), routing.weight)
    end
    assert.same({ { 1, 4 }, { 2, 5 }, { 3, 6 }, { 4, 1 } }, hash { vocab_size = 4, top_k = 2, method = "modulo" }.table:totable())
  end)

  it("evens out the ids, or their frequencies", function()
    local router = hash { vocab_size = 50, top_k = 2, method = "balanced" }
    for _, n in ipairs(shares(router)) do assert.is_true(n == 16 or n == 17) end
    -- the largest are as many as there are experts: greedy is exact where the rest fills up
    local counts = { 6, 1, 1, 2, 4, 1, 5, 3, 3, 2, 1, 1 }
    assert.same({ 10, 10, 10 }, shares(hash { vocab_size = 12, num_experts = 3, method = "balanced", frequencies = counts }, counts))
    -- heavy tails: no expert beyond the heaviest id and the mean
    local zipf, total = {}, 0
    for id = 1, 200 do
      zipf[id] = 1000 // id
      total = total + zipf[id]
    end
    local even = shares(hash { vocab_size = 200, method = "balanced", frequencies = moe.tensor(zipf) }, zipf)
    local random = shares(hash { vocab_size = 200 }, zipf)
    assert.is_true(math.max(table.unpack(even)) <= math.max(1000, total / 6 + 1))
    assert.is_true(math.max(table.unpack(random)) > math.max(table.unpack(even)))
  end)

  it("is the same from the same seed, whatever the generator drew", function()
    moe.manual_seed(1)
    local a = hash { vocab_size = 30, top_k = 2 }
    moe.randn(3)
    assert.same(a.table:totable(), hash { vocab_size = 30, top_k = 2 }.table:totable())
    assert.not_same(a.table:totable(), hash { vocab_size = 30, top_k = 2, seed = 2 }.table:totable())
    for _, n in ipairs(shares(hash { vocab_size = 3000 })) do assert.is_true(math.abs(n - 500) < 100) end
  end)

  it("works in a layer and a language model, saved and loaded", function()
    local model = moe.model.lm {
      vocab_size = 11, d_model = 8, num_layers = 2, num_heads = 2, max_seq_len = 5, ffn = "moe",
      moe = { num_experts = 4, router = moe.router.hash { vocab_size = 11 }, experts = moe.experts.mlp { intermediate_size = 8 } },
    }
    local ids = moe.randint(1, 11, 2, 5)
    model(ids):sum():backward()
    local layer = model.layers[1].ffn
    local other = moe.router.hash { d_model = 8, num_experts = 4, vocab_size = 11, seed = 5 }
    other:load_state_dict(layer.router:state_dict())
    assert.same(layer.router.table:totable(), other.table:totable())
    assert.same(layer.router.table:index_select(1, ids:reshape { -1 }):totable(), model.routings[1].index:totable())
  end)

  it("leaves masked tokens out and takes a table and a forced choice", function()
    local router = hash { table = { 2, 5, { 1, 3 } } }
    local routing = router:route(moe.randn(3, 4), {
      token_ids = moe.tensor({ 3, 0, 1 }, { dtype = "i64" }), mask = moe.tensor { 1, 0, 1 }:gt(0),
    })
    assert.same({ 1, 2, 3 }, routing.expert:totable())
    assert.close({ 0.5, 1, 0.5 }, routing.weight)
    local forced = moe.tensor({ { 6 }, { 6 }, { 1 } }, { dtype = "i64" })
    local ids = moe.tensor({ 1, 1, 1 }, { dtype = "i64" })
    assert.same({ 1, 6, 6 }, router:route(moe.randn(3, 4), { token_ids = ids, choice = forced }).expert:totable())
  end)

  it("names what is wrong", function()
    local function says(message, f) assert.matches(message, helper.error_of(f)) end
    says("router.hash: option 'vocab_size' is missing", function() hash {} end)
    says("top_k is 7, but there are 6 experts", function() hash { vocab_size = 3, top_k = 7 } end)
    says("there are 2 frequencies, but vocab_size is 3", function()
      hash { vocab_size = 3, method = "balanced", frequencies = { 1, 2 } }
    end)
    says("the frequency of id 2 is .*nan, wanted a count", function()
      hash { vocab_size = 2, method = "balanced", frequencies = { 1, 0 / 0 } }
    end)
    says("unknown option 'vocabsize' %(did you mean 'vocab_size'", function() hash { vocabsize = 3 } end)
    says("ctx.token_ids is a nil", function() hash { vocab_size = 3 }:route(moe.randn(2, 4), {}) end)
    says("ctx.token_ids has the id 4, wanted 1 to 3", function()
      hash { vocab_size = 3 }:route(moe.randn(2, 4), { token_ids = moe.tensor({ 4, 1 }, { dtype = "i64" }) })
    end)
  end)
end)
