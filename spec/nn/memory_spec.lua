-- Memories behind product keys, experts of one unit, hashed n-grams.
require "spec.helper"
local moe = require "moe"

local function sizes(o, more)
  local out = { d_model = 12, num_keys = 6, top_k = 5, heads = 2, key_dim = 8, dtype = "f64" }
  for k, v in pairs(o or {}) do out[k] = v end
  for k, v in pairs(more or {}) do out[k] = v end
  return out
end

describe("nn.product_keys", function()
  for _, norm in ipairs { "batch", "layer", "none" } do
    it("chooses the best of all slots, query_norm = " .. norm, function()
      moe.manual_seed(1)
      local keys = moe.nn.product_keys(sizes { query_norm = norm, num_keys = 9, top_k = 20 })
      local x = moe.randn(11, 12, { dtype = "f64" })
      local all = keys:all_scores(x)
      assert.same({ 11, 2, 81 }, all.shape)
      local score, index = keys(x)
      local best, slot = all:topk(20)
      assert.close(best, score, { rtol = 1e-10, atol = 1e-12 })
      assert.same(slot:totable(), index:totable())
    end)
  end

  for _, rank in ipairs { 1, 3 } do
    it("has the gradient of the whole scores at the chosen slots, rank " .. rank, function()
      moe.manual_seed(2)
      local keys = moe.nn.product_keys(sizes { rank = rank })
      local x = moe.randn(7, 12, { dtype = "f64", requires_grad = true })
      local score, index = keys(x)
      local whole = keys:all_scores(x):gather(3, index)
      assert.close(whole, score, { rtol = 1e-10, atol = 1e-12 })
      local c = moe.randn(7, 2, 5, { dtype = "f64" })
      local wanted = keys:parameters()
      wanted[#wanted + 1] = x
      local got, want = { moe.grad((score * c):sum(), wanted) }, { moe.grad((whole * c):sum(), wanted) }
      for i = 1, #wanted do assert.close(want[i], got[i], { rtol = 1e-9, atol = 1e-12 }) end
    end)
  end

  it("with a core of rank 1 finds most of the best slots, and the best of its pairs", function()
    moe.manual_seed(3)
    local keys = moe.nn.product_keys(sizes { rank = 3, num_keys = 24, top_k = 8 })
    local x = moe.randn(80, 12, { dtype = "f64" })
    local all = keys:all_scores(x)
    local score, index = keys(x)
    local least = all:topk(8):amin(3, true)
    local recall = all:gather(3, index):ge(least):to("f64"):mean():item()
    assert.is_true(recall > 0.9, recall)
    local sorted = score:sort(-1, true)
    assert.close(sorted, score, { rtol = 1e-12 })
    for t = 1, 3 do -- each slot once
      local seen = {}
      for _, s in ipairs(index[t][1]:totable()) do
        assert.is_nil(seen[s])
        seen[s] = true
      end
    end
  end)

  it("has a loss of the core's lesser singular values", function()
    local keys = moe.nn.product_keys(sizes { rank = 2 })
    moe.no_grad(function() keys.core:copy_(moe.tensor { { 3, 0 }, { 0, 0.5 } }) end)
    assert.close(0.25, keys:core_loss():item(), { rtol = 1e-12 })
    assert.close(0.09, keys:core_loss(0.2):item(), { rtol = 1e-12 })
    moe.manual_seed(5)
    local c = moe.randn(2, 2, { dtype = "f64" })
    moe.gradcheck(function(core)
      keys.core = core
      return keys:core_loss(0.01)
    end, { c })
    assert.equal(0, moe.nn.product_keys(sizes()):core_loss():item())
  end)

  it("refuses what it cannot do", function()
    assert.error_matches(function() moe.nn.product_keys(sizes { key_dim = 7 }) end, "'key_dim' must be even, got 7")
    assert.error_matches(function() moe.nn.product_keys(sizes { top_k = 37 }) end, "top_k is 37, wanted 1 to 36")
    assert.error_matches(function() moe.nn.product_keys(sizes { top_k = 7, rank = 2 }) end, "top_k is 7, wanted 1 to 6")
    assert.error_matches(function() moe.nn.product_keys(sizes { num_key = 7 }) end, "did you mean 'num_keys'")
  end)
end)

describe("nn.product_key_memory", function()
  for _, score in ipairs { "softmax", "sigmoid", "relu", "identity" } do
    it("is the weighted sum of the best values, " .. score, function()
      moe.manual_seed(6)
      local m = moe.nn.product_key_memory(sizes { score = score })
      local x = moe.randn(2, 4, 12, { dtype = "f64" })
      local y = m(x)
      assert.same({ 2, 4, 12 }, y.shape)
      local best, slot = m.keys:all_scores(x:reshape { 8, 12 }):topk(5)
      local weight = score == "softmax" and best:softmax(-1) or score == "identity" and best or best[score](best)
      local gates = moe.zeros({ 8, 2, 36 }, { dtype = "f64" }):scatter_add(3, slot, weight:detach()):sum(2)
      assert.close(gates:matmul(m.values):reshape(y.shape), y, { rtol = 1e-10, atol = 1e-12 })
    end)
  end

  it("trains as with a dense gradient, when every row is read", function()
    -- 2 heads x 18 slots of 36 for 30 tokens: all are read
    local runs = {}
    for i, dense in ipairs { false, true } do
      moe.manual_seed(8)
      local m = moe.nn.product_key_memory(sizes { top_k = 30, value_dim = 5 })
      local x, target = moe.randn(30, 12, { dtype = "f64" }), moe.randn(30, 12, { dtype = "f64" })
      local opt = moe.optim.adamw(m, { lr = 0.05 })
      if dense then m.values:register_hook(function(g) return g end) end -- a hook sees a dense gradient
      for _ = 1, 5 do
        opt:zero_grad()
        moe.loss.mse(m(x), target):backward()
        assert.equal(dense, m.values.grad_rows == nil)
        opt:step { clip = 0.1 }
      end
      runs[i] = m:state_dict()
    end
    for name, t in pairs(runs[1]) do assert.close(runs[2][name], t, { rtol = 1e-11, atol = 1e-13 }) end
  end)

  it("gives nothing to masked tokens and takes nothing from them; empty input is empty", function()
    moe.manual_seed(9)
    local m = moe.nn.product_key_memory(sizes { query_norm = "layer" })
    local x = moe.randn(4, 12, { dtype = "f64" })
    local mask = moe.tensor({ true, false, true, true })
    local y = m(x, { mask = mask })
    assert.same(m(x)[1]:totable(), y[1]:totable())
    assert.equal(0, y[2]:abs():sum():item())
    m(x, { mask = moe.tensor { false, false, false, false } }):sum():backward()
    assert.same({ 0, 12 }, m.values.grad_values.shape)
    assert.same({ 0, 12 }, m(moe.zeros({ 0, 12 }, { dtype = "f64" })).shape)
    assert.error_matches(function() m(moe.zeros(2, 5)) end, "product_key_memory: x is %[2, 5%], wanted %[.., 12%]")
    assert.error_matches(function() m "x" end, "argument 1 %(x%) must be a tensor, got a string")
  end)
end)

describe("nn.peer", function()
  it("is the layer of one-unit networks that the product-key router chooses", function()
    moe.manual_seed(10)
    local layer = moe.layer {
      d_model = 12, num_experts = 36, dtype = "f64",
      router = moe.router.product_key { top_k = 5, heads = 2, key_dim = 8 },
      experts = moe.experts.mlp { intermediate_size = 1, act = "gelu" },
    }
    local peer = moe.nn.peer(sizes { act = "gelu" })
    peer.keys:load_state_dict(layer.router.keys:state_dict())
    moe.no_grad(function()
      peer.down_embed:copy_(layer.experts.up_proj:reshape { 36, 12 })
      peer.up_embed:copy_(layer.experts.down_proj:reshape { 36, 12 })
    end)
    local x = moe.randn(3, 4, 12, { dtype = "f64", requires_grad = true })
    local y, routing = layer(x)
    assert.equal(12 * 10, routing.num_assignments)
    assert.equal(36, routing.num_experts)
    assert.close(y, peer(x), { rtol = 1e-10, atol = 1e-12 })
    local c = moe.randn(3, 4, 12, { dtype = "f64" })
    local want = { moe.grad((layer(x) * c):sum(), { x, layer.experts.up_proj, layer.experts.down_proj }) }
    local got = { moe.grad((peer(x) * c):sum(), { x, peer.down_embed, peer.up_embed }) }
    assert.close(want[1], got[1], { rtol = 1e-9, atol = 1e-12 })
    assert.close(want[2]:reshape { 36, 12 }, got[2], { rtol = 1e-9, atol = 1e-12 })
    assert.close(want[3]:reshape { 36, 12 }, got[3], { rtol = 1e-9, atol = 1e-12 });
    (peer(x) * c):sum():backward()
    assert.is_truthy(peer.down_embed.grad_rows)
    assert.same(peer.down_embed.grad_rows:totable(), peer.up_embed.grad_rows:totable())
  end)

  it("expands values by one projection", function()
    moe.manual_seed(11)
    local peer = moe.nn.peer(sizes { value_dim = 4, act = "relu" })
    local x = moe.randn(5, 12, { dtype = "f64" })
    local index, weight = peer:choice(x)
    local h = x:linear(peer.in_proj.weight)
    local y = moe.zeros({ 5, 4 }, { dtype = "f64" })
    for t = 1, 5 do
      for k = 1, 10 do
        local s = index[t][k]
        y[t] = y[t] + (peer.down_embed:detach()[s] * h[t]:detach()):sum():relu() * weight:detach()[t][k] * peer.up_embed:detach()[s]
      end
    end
    assert.close(y:linear(peer.out_proj.weight), peer(x), { rtol = 1e-10, atol = 1e-12 })
  end)

  it("of a million experts reads and updates a few", function()
    moe.manual_seed(12)
    local peer = moe.nn.peer { d_model = 8, num_keys = 1024, top_k = 4, heads = 1, value_dim = 2 }
    assert.same({ 1048576, 2 }, peer.up_embed.shape)
    local opt = moe.optim.sgd(peer, { lr = 0.1 })
    peer(moe.randn(3, 8)):sum():backward()
    assert.is_true(peer.up_embed.grad_rows:numel() <= 12)
    opt:step()
  end)
end)

describe("router.product_key", function()
  it("wants a square number of experts, and has a description's bind", function()
    assert.error_matches(function() moe.router.product_key { d_model = 4, num_experts = 10 } end, "num_experts is 10, wanted a square")
    local r = moe.router.product_key { top_k = 2 }
    assert.error_matches(function() r:route(moe.zeros(1, 4)) end, "without weights")
    assert.equal(4, r:bind({ d_model = 4, num_experts = 16 }):route(moe.randn(2, 4), {}).num_assignments)
  end)
end)

describe("nn.ngram_memory", function()
  local function memory(o)
    local given = { d_model = 6, vocab_size = 10, table_size = 20, heads = 2, embed_dim = 3, dtype = "f64", kernel_size = 3 }
    for k, v in pairs(o or {}) do given[k] = v end
    return moe.nn.ngram_memory(given)
  end
  local function rms(x, w) return x * (x:square():mean(-1, true) + 1e-6):rsqrt() * w end

  it("gates the rows of its n-grams and mixes them over time", function()
    moe.manual_seed(13)
    local m = memory()
    moe.no_grad(function() m.conv:normal_() end)
    local ids, h = moe.randint(1, 10, 2, 7), moe.randn(2, 7, 6, { dtype = "f64" })
    local y = m(h, { token_ids = ids })
    local e = m.tables:index_select(1, m:rows(ids):reshape { -1 }):reshape { 2, 7, 12 }
    local k, v = e:linear(m.key_proj.weight), e:linear(m.value_proj.weight)
    local gate = (rms(h, m.query_norm.weight) * rms(k, m.key_norm.weight)):sum(-1, true) / math.sqrt(6)
    local u = gate:sigmoid() * v
    local n, want = rms(u, m.value_norm.weight):detach(), moe.zeros({ 2, 7, 6 }, { dtype = "f64" })
    for t = 1, 7 do -- taps 3 (max_ngram) apart, the last one now
      local sum = moe.zeros({ 2, 6 }, { dtype = "f64" })
      for tap = 0, 2 do
        if t - 3 * tap >= 1 then sum = sum + n:select(2, t - 3 * tap) * m.conv:detach():select(2, 3 - tap) end
      end
      want:select(2, t):copy_(u:detach():select(2, t) + sum:silu())
    end
    assert.close(want, y, { rtol = 1e-10, atol = 1e-12 })
    moe.gradcheck(function(x, c)
      m.conv = c
      return m(x, { token_ids = ids })
    end, { h, m.conv:detach() })
  end)

  it("sees no later token", function()
    moe.manual_seed(14)
    local m = memory()
    moe.no_grad(function() m.conv:normal_() end)
    local ids, h = moe.randint(1, 10, 1, 8), moe.randn(1, 8, 6, { dtype = "f64" })
    local short = m(h:narrow(2, 1, 5), { token_ids = ids:narrow(2, 1, 5) })
    assert.close(short, m(h, { token_ids = ids }):narrow(2, 1, 5), { rtol = 1e-12, atol = 1e-14 })
  end)

  it("takes rows fetched before, and leaves other rows and ids that are the same alone", function()
    moe.manual_seed(15)
    local canonical = {}
    for i = 1, 10 do canonical[i] = (i - 1) % 5 + 1 end
    local m = memory { canonical = canonical }
    local ids = moe.tensor({ { 1, 2, 7, 3 } }, { dtype = "i64" })
    local same = moe.tensor({ { 6, 7, 2, 8 } }, { dtype = "i64" })
    assert.same(m:rows(ids):totable(), m:rows(same):totable())
    local h = moe.randn(1, 4, 6, { dtype = "f64" })
    local resident = m(h, { token_ids = ids })
    assert.same(resident:totable(), m(h, { ngram_rows = { [m] = m:fetch(ids) } }):totable())
    resident:sum():backward()
    local read = {}
    for _, r in ipairs(m:rows(ids):reshape({ -1 }):totable()) do read[r] = true end
    for _, r in ipairs(m.tables.grad_rows:totable()) do assert.is_true(read[r]) end
    assert.are_not.same(m:rows(ids):totable(), memory({ canonical = canonical, seed = 2 }):rows(ids):totable())
    assert.is_truthy(m:state_dict().canonical)
  end)

  it("refuses what it cannot do", function()
    local m = memory()
    assert.error_matches(function() m(moe.zeros(2, 3, 6)) end, "ctx.token_ids %[batch, time%] is missing")
    assert.error_matches(function() m(moe.zeros(2, 6)) end, "%[batch, time, 6%], got %[2, 6%]")
    assert.error_matches(function() m(moe.zeros(2, 3, 6), { token_ids = moe.randint(1, 9, 2, 4) }) end,
      "rows of %[2, 4%] tokens do not fit")
    assert.error_matches(function() memory { canonical = { 1, 2 } } end, "canonical has 2 ids, vocab_size is 10")
    assert.error_matches(function() memory { canonical = { 1, 2, 3, 4, 5, 6, 7, 8, 9, 11 } } end,
      "canonical%[10%] is 11, wanted an id of 1..10")
    assert.error_matches(function() memory { max_ngram = 1 } end, "'max_ngram' must be at least 2")
    local none = { token_ids = moe.zeros({ 0, 3 }, { dtype = "i64" }) }
    assert.same({ 0, 3, 6 }, m(moe.zeros({ 0, 3, 6 }, { dtype = "f64" }), none).shape)
  end)
end)
