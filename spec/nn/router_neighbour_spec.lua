local moe = require "moe"
local helper = require "spec.helper"

local EXACT = { rtol = 1e-9, atol = 1e-11 }
local D, E = 4, 5
local function rand(...) return moe.randn({ ... }, { dtype = "f64" }) end

local function router(o)
  moe.manual_seed(9)
  o.d_model, o.num_experts, o.dtype = D, E, "f64"
  return moe.router.neighbour(o)
end

-- Gates [T][E] of one sequence, in plain Lua. real: list of booleans or nil.
local function reference(m, x, causal, real)
  local X, W, Ws = x:totable(), m.weight:totable(), m.similarity:totable()
  local T, own, G = #X, {}, {}
  local function softmax(v)
    local sum, out = 0, {}
    for i, a in pairs(v) do
      out[i] = math.exp(a)
      sum = sum + out[i]
    end
    for i in pairs(v) do out[i] = out[i] / sum end
    return out
  end
  for t = 1, T do
    local logits = {}
    for e = 1, E do
      logits[e] = 0
      for i = 1, D do logits[e] = logits[e] + W[e][i] * X[t][i] end
    end
    own[t] = softmax(logits)
  end
  for t = 1, T do
    local s = {}
    for j = 1, causal and t or T do
      if not real or real[j] then
        s[j] = 0
        for a = 1, D do
          for b = 1, D do s[j] = s[j] + X[t][a] * Ws[a][b] * X[j][b] end
        end
        s[j] = s[j] / m.temperature
      end
    end
    s = softmax(s)
    G[t] = {}
    for e = 1, E do
      G[t][e] = 0
      for j, w in pairs(s) do G[t][e] = G[t][e] + w * own[j][e] end
    end
  end
  return G
end

describe("moe.router.neighbour", function()
  it("mixes the decisions of similar tokens, then chooses", function()
    for _, causal in ipairs { true, false } do
      local m = router { top_k = 2, causal = causal, temperature = 0.8 }
      m.similarity:detach():copy_(rand(D, D))
      local x = rand(3, 6, D)
      local routing = m:route(x:reshape { 18, D }, { shape = { 3, 6 } })
      for b = 1, 3 do assert.close(reference(m, x[b], causal), routing.probs:narrow(1, 6 * b - 5, 6), EXACT) end
      local wanted, index = routing.probs:topk(2)
      assert.same(index:totable(), routing.index:totable())
      local sums = moe.zeros({ 18 }, { dtype = "f64" }):index_add(1, routing.token, routing.weight)
      assert.close(moe.ones({ 18 }, { dtype = "f64" }), sums, EXACT)
      assert.close(wanted / wanted:sum(-1, true), routing.gate, EXACT)
    end
  end)

  it("with a rank has the gates of the product of both factors", function()
    local whole, low = router { top_k = 2 }, router { top_k = 2, rank = 2 }
    assert.same({ D, 2 }, low.similarity_query.shape)
    moe.no_grad(function()
      low.similarity_query:copy_(rand(D, 2))
      low.similarity_key:copy_(rand(D, 2))
      low.weight:copy_(whole.weight)
      whole.similarity:copy_(low.similarity_query:matmul(low.similarity_key:t()))
    end)
    local x = rand(6, D)
    assert.close(whole:route(x, {}).probs, low:route(x, {}).probs, EXACT)
    assert.matches("'rank' must be at least 1 and at most d_model, got 9", helper.error_of(function() router { rank = 9 } end))
  end)

  it("with each token its only neighbour is plain token choice, to the bit", function()
    for _, k in ipairs { 1, 2 } do
      moe.manual_seed(2)
      local m = moe.router.neighbour { d_model = D, num_experts = E, top_k = k, source = "attention" }
      local plain = moe.router.topk { d_model = D, num_experts = E, top_k = k }
      plain.weight:detach():copy_(m.weight:detach())
      local x = moe.randn(200, D)
      local eye = moe.eye(50):unsqueeze(1):expand { 4, 50, 50 }
      local a, b = m:route(x, { shape = { 4, 50 }, attention_map = eye }), plain:route(x)
      assert.same(b.index:totable(), a.index:totable())
      assert.same(b.weight:totable(), a.weight:totable())
      assert.same(b.probs:totable(), a.probs:totable())
      -- so does a similarity that falls off at once, of tokens as long as each other
      local s = router { top_k = k, temperature = 1e-4 }
      local u = rand(30, D)
      u = u / (u * u):sum(-1, true):sqrt()
      assert.close(u:linear(s.weight):softmax(-1), s:route(u).probs, EXACT)
    end
  end)

  it("follows an attention map, the mean over its heads", function()
    local m = router { source = "attention" }
    local x = rand(2, 4, D)
    local map = rand(2, 3, 4, 4):exp():tril()
    map = map / map:sum(-1, true)
    local rows = x:reshape { 8, D }
    local routing = m:route(rows, { shape = { 2, 4 }, attention_map = map })
    local own = x:linear(m.weight):softmax(-1)
    assert.close(map:mean(2):matmul(own):reshape { 8, E }, routing.probs, EXACT)
    assert.same(routing.probs:totable(), m:route(rows, { shape = { 2, 4 }, attention_map = map:mean(2) }).probs:totable())
    -- what lies in the future is taken out of a map that sees it
    local full = rand(2, 4, 4):exp()
    local kept = full:tril()
    assert.close((kept / kept:sum(-1, true)):matmul(own):reshape { 8, E },
      m:route(rows, { shape = { 2, 4 }, attention_map = full }).probs, EXACT)
  end)

  it("knows nothing of the future", function()
    local m = router {}
    local x = rand(1, 6, D)
    local y = x:clone()
    y[1]:narrow(1, 4, 3):add_(1)
    local a, b = m:route(x:reshape { 6, D }, { shape = { 1, 6 } }).probs, m:route(y:reshape { 6, D }, { shape = { 1, 6 } }).probs
    assert.close(a:narrow(1, 1, 3), b:narrow(1, 1, 3), { rtol = 0, atol = 1e-15 })
    assert.is_true((a - b):narrow(1, 4, 3):abs():min():item() > 0)
  end)

  it("has no masked neighbours", function()
    local m = router { causal = false }
    local x = rand(5, D)
    local real = { true, false, true, true, false }
    local routing = m:route(x, { mask = moe.tensor(real) })
    local wanted = reference(m, x, false, real)
    for t = 1, 5 do
      assert.close(real[t] and wanted[t] or { 0, 0, 0, 0, 0 }, routing.probs[t], EXACT)
    end
    assert.equal(4, routing.masked)
    local map = router { source = "attention", causal = false }
    local none = map:route(x, { mask = moe.zeros({ 5 }, { dtype = "bool" }), attention_map = moe.ones(1, 5, 5) })
    assert.equal(0, none.probs:abs():sum():item())
  end)

  it("has the gradient that differences show", function()
    local m = router { top_k = E } -- all are chosen: no jump
    assert(moe.gradcheck(function(x, w, ws)
      m.weight, m.similarity = w, ws
      local routing = m:route(x, { shape = { 2, 3 } })
      return routing.gate, routing.probs
    end, { rand(6, D), m.weight, m.similarity }))
    local a = router { top_k = E, source = "attention" }
    assert(moe.gradcheck(function(map) return a:route(rand(6, D), { shape = { 2, 3 }, attention_map = map }).probs end,
      { rand(2, 2, 3, 3):exp():detach() }, { seed = 1 }))
  end)

  it("takes no tokens, and half precision", function()
    local m = router {}
    assert.equal(0, m:route(rand(0, D)).num_assignments)
    assert.equal(0, m:route(rand(0, D), { shape = { 2, 0 } }).num_assignments)
    local half = moe.router.neighbour { d_model = D, num_experts = E }
    assert.equal("f32", half:route(moe.randn(3, D):to "bf16").probs.dtype)
  end)

  it("names what is wrong", function()
    assert.matches("top_k is 6, but there are 5 experts", helper.error_of(router, { top_k = 6 }))
    assert.matches("norm_topk_prob with top_k = 1", helper.error_of(router, { top_k = 1, norm_topk_prob = true }))
    assert.matches("'temperature' must be positive", helper.error_of(router, { temperature = -1 }))
    local m = router { source = "attention" }
    assert.matches("needs ctx.attention_map, a tensor %[1, heads, 3, 3%]", helper.error_of(function() m:route(rand(3, D)) end))
    assert.matches("ctx.attention_map is %[1, 2, 3, 4%], wanted %[1, 3, 3%]",
      helper.error_of(function() m:route(rand(3, D), { attention_map = rand(1, 2, 3, 4) }) end))
  end)
end)
