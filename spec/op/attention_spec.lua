-- attention against PyTorch, against softmax(q k^T) v composed of other operations, and on its edges: blocks, masks,
-- rows that see nothing, groups of heads, layouts.
local helper = require "spec.helper"
local moe = require "moe"

local function leaf(values, opts)
  local t = type(values) == "userdata" and values:detach():clone() or moe.tensor(values, { dtype = opts and opts.dtype or "f64" })
  t.requires_grad = true
  return t
end

-- The textbook form. mask: bool or added; causal aligned at the end. Rows that see nothing give 0.
local function composed(q, k, v, opts)
  opts = opts or {}
  local h, hkv, t, s = q.shape[2], k.shape[2], q.shape[3], k.shape[3]
  if h ~= hkv then
    k, v = k:repeat_interleave(h // hkv, 2), v:repeat_interleave(h // hkv, 2)
  end
  local scores = q:matmul(k:transpose(3, 4)) * (opts.scale or 1 / math.sqrt(q.shape[4]))
  local seen = moe.ones({ t, s }, { dtype = "bool" })
  if opts.causal then seen = moe.ones({ t, s }):tril(s - t):to "bool" end
  if opts.allowed then seen = seen:logical_and(opts.allowed) end
  if opts.relative then
    local entries = opts.relative.shape[#opts.relative.shape]
    local stands = helper.tensor(opts.stands, { t, 1 }, { dtype = "i64" })
    local place = (moe.arange(1, s):to "i64" - stands + (entries + 1) // 2):clamp(1, entries):reshape(-1)
    scores = scores + opts.relative:index_select(-1, place):reshape { -1, t, s }
  end
  if opts.mask and opts.mask.dtype == "bool" then seen = seen:logical_and(opts.mask) end
  if opts.mask and opts.mask.dtype ~= "bool" then scores = scores + opts.mask end
  seen = seen:expand(scores.shape)
  local weights = scores:masked_fill(seen:logical_not(), -1e30):softmax(-1)
  weights = weights * seen:to(weights.dtype)
  return weights:matmul(v)
end

local function random(rng, shape, dtype)
  return helper.tensor(function() return rng.normal() end, shape, { dtype = dtype or "f64" })
end

-- Results and gradients of attention and of the composed form, for one weight of the result.
local function compare(q, k, v, opts, tolerance)
  local inputs = { q, k, v, [5] = opts.relative }
  local mask = opts.mask
  if mask and mask.dtype ~= "bool" then inputs[4] = mask end
  local function run(f)
    local x = {}
    for i, t in pairs(inputs) do
      x[i] = t:detach()
      x[i].requires_grad = true
    end
    local how = { mask = x[4] or mask, causal = opts.causal or false, scale = opts.scale, relative = x[5] }
    if f == composed then
      how.allowed, how.stands = opts.allowed, opts.stands
    else
      how.window, how.cu_seqlens, how.cu_seqlens_k = opts.window, opts.cu_seqlens, opts.cu_seqlens_k
    end
    local y = f(x[1], x[2], x[3], how)
    local w = helper.tensor(function(i) return math.sin(i * 1.7) end, y.shape, { dtype = y.dtype })
    local loss = (y * w):sum()
    loss:backward()
    local result = { y = y }
    for i, name in ipairs { "dq", "dk", "dv", "dmask", "drelative" } do result[name] = x[i] and x[i].grad end
    return result
  end
  local expected, got = run(composed), run(moe.attention)
  for name, t in pairs(expected) do
    local scale = math.max(1, t:abs():max():item())
    assert.close(t, got[name], { rtol = tolerance, atol = tolerance * scale, name = name })
  end
end

describe("attention", function()
  for name, case in pairs(helper.fixture "attention") do
    it("agrees with PyTorch: " .. name, function()
      local q, k, v, mask = leaf(case.q), leaf(case.k), leaf(case.v), nil
      if case.dmask then mask = leaf(case.mask)
      elseif case.mask then mask = moe.tensor(case.mask, { dtype = "bool" }) end
      local y = moe.attention(q, k, v, { mask = mask, causal = case.causal, scale = case.scale })
      local loss = (y * moe.tensor(case.g, { dtype = "f64" })):sum()
      loss:backward()
      local close = { rtol = 1e-8, atol = 2e-9 }
      assert.close(case.y, y, close)
      assert.close(case.dq, q.grad, close)
      assert.close(case.dk, k.grad, close)
      assert.close(case.dv, v.grad, close)
      if case.dmask then assert.close(case.dmask, mask.grad, close) end
    end)
  end

  -- blocks are of 64 queries and 256 keys: sizes below, at, above and far above
  for _, size in ipairs {
    { b = 2, h = 3, hkv = 3, t = 5, s = 7, d = 4, dv = 6 }, { b = 1, h = 2, hkv = 1, t = 64, s = 64, d = 8, dv = 8 },
    { b = 1, h = 2, hkv = 2, t = 65, s = 257, d = 4, dv = 4 }, { b = 1, h = 4, hkv = 2, t = 130, s = 130, d = 6, dv = 2 },
    { b = 1, h = 1, hkv = 1, t = 70, s = 600, d = 4, dv = 3 }, { b = 1, h = 2, hkv = 2, t = 1, s = 300, d = 4, dv = 4 },
    { b = 2, h = 2, hkv = 1, t = 90, s = 20, d = 4, dv = 4 }, { b = 1, h = 1, hkv = 1, t = 3, s = 1, d = 1, dv = 1 },
  } do
    local title = ("b%d h%d/%d t%d s%d d%d dv%d"):format(size.b, size.h, size.hkv, size.t, size.s, size.d, size.dv)
    local rng = helper.random(size.t * 1000 + size.s)
    local function qkv(dtype)
      return random(rng, { size.b, size.h, size.t, size.d }, dtype), random(rng, { size.b, size.hkv, size.s, size.d }, dtype),
        random(rng, { size.b, size.hkv, size.s, size.dv }, dtype)
    end

    it("is the composed form, gradients included: " .. title, function()
      for _, dtype in ipairs { "f64", "f32" } do
        local tolerance = dtype == "f64" and 1e-11 or 3e-5
        local q, k, v = qkv(dtype)
        compare(q, k, v, {}, tolerance)
        compare(q, k, v, { scale = -0.8 }, tolerance)
        if size.t <= size.s then compare(q, k, v, { causal = true }, tolerance) end
      end
    end)

    it("takes masks, with rows that see nothing: " .. title, function()
      for _, dtype in ipairs { "f64", "f32" } do
        local tolerance = dtype == "f64" and 1e-11 or 3e-5
        local q, k, v = qkv(dtype)
        local keep = helper.tensor(function() return rng() < 0.6 end, { size.t, size.s }, { dtype = "bool" })
        keep:select(1, (size.t + 1) // 2):fill_(0)
        compare(q, k, v, { mask = keep }, tolerance)
        compare(q, k, v, { mask = keep, causal = true }, tolerance)
        compare(q, k, v, { causal = true }, tolerance) -- with t > s the first queries see nothing
        local per_key = helper.tensor(function(i) return i % 3 ~= 0 end, { size.b, 1, 1, size.s }, { dtype = "bool" })
        compare(q, k, v, { mask = per_key }, tolerance)
        compare(q, k, v, { mask = random(rng, { size.h, size.t, size.s }, dtype) }, tolerance)
        compare(q, k, v, { mask = random(rng, { size.h, 1, 1 }, dtype), causal = true }, tolerance)
      end
    end)
  end

  it("gives zeros and zero gradients to a query that sees no key", function()
    local q, k, v = leaf(moe.randn(1, 1, 3, 4)), leaf(moe.randn(1, 1, 2, 4)), leaf(moe.randn(1, 1, 2, 4))
    local y = moe.attention(q, k, v, { causal = true }) -- query 1 of 3 sees keys up to 0
    assert.close({ 0, 0, 0, 0 }, y[1][1][1], { rtol = 0, atol = 0 })
    assert.close(v[1][1][1], y[1][1][2])
    y:sum():backward()
    assert.close({ 0, 0, 0, 0 }, q.grad[1][1][1], { rtol = 0, atol = 0 })
    for _, x in ipairs { q, k, v } do assert.is_true(x.grad:isfinite():all():item()) end
    local blind = moe.attention(q, k, v, { mask = moe.zeros({ 3, 2 }, { dtype = "bool" }) })
    assert.close(moe.zeros { 1, 1, 3, 4 }, blind, { rtol = 0, atol = 0 })
  end)

  it("stays finite where scores are large", function()
    local q, k = moe.full({ 1, 1, 2, 4 }, 300), moe.full({ 1, 1, 3, 4 }, 300)
    local v = moe.tensor { { { { 1 }, { 2 }, { 6 } } } }
    assert.close({ { { { 3 }, { 3 } } } }, moe.attention(q, k, v), { rtol = 1e-6 })
    assert.close({ { { { 3 }, { 3 } } } }, moe.attention(q, -k, v), { rtol = 1e-6 })
  end)

  it("gives heads that were split out of [b, t, h d] back in that layout, without a copy", function()
    local x = moe.randn(2, 5, 12)
    local heads = x:reshape({ 2, 5, 3, 4 }):transpose(2, 3)
    local y = moe.attention(heads, heads, heads, { causal = true })
    assert.close(moe.attention(heads:contiguous(), heads:contiguous(), heads:contiguous(), { causal = true }), y)
    assert.same({ 2, 3, 5, 4 }, y.shape)
    assert.is_true(y:transpose(2, 3):is_contiguous())
  end)

  it("is the same whole and token by token", function()
    local q, k, v = moe.randn(1, 2, 9, 4), moe.randn(1, 2, 9, 4), moe.randn(1, 2, 9, 4)
    local whole = moe.attention(q, k, v, { causal = true })
    for t = 1, 9 do
      local step = moe.attention(q:narrow(3, t, 1), k:narrow(3, 1, t), v:narrow(3, 1, t), { causal = true })
      assert.close(whole:narrow(3, t, 1), step, { rtol = 1e-5, atol = 1e-6 })
    end
  end)

  it("gives the same bits for 1 and 2 threads", function()
    local before = moe.threads()
    finally(function() moe.threads(before) end)
    local function run(n)
      moe.threads(n)
      moe.manual_seed(4)
      local q, k, v = moe.randn(3, 4, 150, 16), moe.randn(3, 2, 300, 16), moe.randn(3, 2, 300, 16)
      for _, x in ipairs { q, k, v } do x.requires_grad = true end
      local y = moe.attention(q, k, v, { causal = true })
      y:square():sum():backward()
      return { y = y, dq = q.grad, dk = k.grad, dv = v.grad }
    end
    local one, two = run(1), run(2)
    for name in pairs(one) do assert.close(one[name], two[name], { rtol = 0, atol = 0, name = name }) end
  end)

  it("lets each query see its own number of keys", function()
    moe.manual_seed(3)
    local function make(...) return leaf(moe.randn({ ... }, { dtype = "f64" })) end
    for _, causal in ipairs { false, true } do
      local q, k, v = make(2, 4, 150, 3), make(2, 2, 140, 3), make(2, 2, 140, 2)
      local seen = moe.randint(-3, 150, { 2, 4, 150 }) -- negative and beyond the last key: none and all
      seen:narrow(3, 65, 64):fill_(0) -- a whole block that sees nothing
      local mask = moe.arange(1, 140):to "i64":reshape { 1, 1, 1, 140 }:le(seen:unsqueeze(-1))
      local g = moe.randn(2, 4, 150, 2):to "f64"
      local results = {}
      for i, how in ipairs { { causal = causal, seen = seen }, { causal = causal, mask = mask } } do
        q.grad, k.grad, v.grad = nil, nil, nil
        local y = moe.attention(q, k, v, how)
        ;(y * g):sum():backward()
        results[i] = { y:detach(), q.grad, k.grad, v.grad }
      end
      for i = 1, 4 do assert.close(results[2][i], results[1][i], { rtol = 1e-11, atol = 1e-12 }) end
    end
  end)

  -- of a query at key `stands(i)` of sequence `of(i)`: what the options say in other words
  local function rule(t, s, causal, window, cu, cu_k)
    cu, cu_k = cu or { 0, t }, cu_k or cu or { 0, s }
    local function number(list, i)
      for n = #list, 2, -1 do
        if i > list[n - 1] and i <= list[n] then return n end
      end
    end
    local function stands(i) return cu_k[number(cu, i)] - cu[number(cu, i)] + i end
    local function allowed(i, j)
      local far = stands(i) - j
      return number(cu, i) == number(cu_k, j) and (not causal or far >= 0) and math.abs(far) < (window or math.huge)
    end
    return stands, allowed
  end

  for _, case in ipairs {
    { t = 5, s = 5, window = 1 }, { t = 70, s = 90, window = 7 }, { t = 150, s = 150, window = 64 }, { t = 70, s = 300, window = 33 },
    { t = 3, s = 5, window = 100 }, { t = 9, s = 9, cu = { 0, 4, 4, 5, 9 } }, { t = 200, s = 200, cu = { 0, 1, 70, 133, 200 } },
    { t = 200, s = 200, cu = { 0, 100, 200 }, window = 20 }, { t = 60, s = 70, cu = { 0, 50, 60 }, cu_k = { 0, 5, 70 } },
    { t = 1, s = 300, window = 40 }, { t = 6, s = 300, cu = { 0, 2, 4, 6 }, cu_k = { 0, 0, 290, 300 } },
  } do
    local title = ("t%d s%d window %s, packed %s"):format(case.t, case.s, case.window, case.cu and table.concat(case.cu, " "))
    it("sees what window and cu_seqlens say: " .. title, function()
      local rng = helper.random(case.t)
      for _, causal in ipairs { true, false } do
        local stands, may = rule(case.t, case.s, causal, case.window, case.cu, case.cu_k)
        local allowed = {}
        for i = 1, case.t do
          allowed[i] = {}
          for j = 1, case.s do allowed[i][j] = may(i, j) end
        end
        allowed = moe.tensor(allowed, { dtype = "bool" })
        local function packed(list) return list and moe.tensor(list, { dtype = "i64" }) end
        for _, dtype in ipairs { "f64", "f32" } do
          local q, k, v = random(rng, { 1, 4, case.t, 6 }, dtype), random(rng, { 1, 2, case.s, 6 }, dtype),
            random(rng, { 1, 2, case.s, 5 }, dtype)
          local opts = { causal = causal, window = case.window, cu_seqlens = packed(case.cu), cu_seqlens_k = packed(case.cu_k),
            stands = stands, allowed = allowed }
          compare(q, k, v, opts, dtype == "f64" and 1e-11 or 3e-5)
          if dtype == "f64" then
            for _, shape in ipairs { { 4, 2 * case.s + 1 }, { 1, 7 }, { 1 } } do -- beyond the ends, the ends
              opts.relative = random(rng, shape, dtype)
              compare(q, k, v, opts, 1e-11)
            end
          end
        end
      end
    end)
  end

  it("takes masks with holes of whole blocks", function()
    moe.manual_seed(6)
    local rng = helper.random(6)
    for _, mask in ipairs {
      moe.nn.masks.bigbird(300, { block_size = 20, num_random = 1 }), moe.nn.masks.block(300, 300, 70, false),
      moe.nn.masks.dilated(300, 300, { window = 4, dilation = 30, causal = false }), moe.zeros({ 300, 300 }, { dtype = "bool" }),
    } do
      local q, k, v = random(rng, { 1, 2, 300, 3 }), random(rng, { 1, 1, 300, 3 }), random(rng, { 1, 1, 300, 2 })
      compare(q, k, v, { mask = mask }, 1e-11)
      compare(q, k, v, { mask = mask, causal = true }, 1e-11)
    end
  end)

  it("adds up the keys of few heads in parts, in the same order for 1 and 2 threads", function()
    local before = moe.threads()
    finally(function() moe.threads(before) end)
    local rng = helper.random(5)
    local q, k, v = random(rng, { 1, 2, 1100, 4 }, "f32"), random(rng, { 1, 1, 1100, 4 }, "f32"), random(rng, { 1, 1, 1100, 4 }, "f32")
    local relative = random(rng, { 2, 41 }, "f32")
    compare(q, k, v, { causal = true, relative = relative, stands = function(i) return i end }, 3e-5)
    local results = {}
    for n = 1, 2 do
      moe.threads(n)
      local x = { q:detach(), k:detach(), v:detach(), relative:detach() }
      for i = 1, 4 do x[i].requires_grad = true end
      moe.attention(x[1], x[2], x[3], { causal = true, relative = x[4] }):square():sum():backward()
      results[n] = { x[1].grad, x[2].grad, x[3].grad, x[4].grad }
    end
    for i = 1, 4 do assert.close(results[1][i], results[2][i], { rtol = 0, atol = 0 }) end
  end)

  it("keeps what is not a number where it is seen", function()
    local nan <const> = 0 / 0
    for _, dtype in ipairs { "f32", "f64" } do
      local rng = helper.random(8)
      for i, broken in ipairs { "q", "k", "v", "g" } do
        local x = {}
        for _, name in ipairs { "q", "k", "v", "g" } do x[name] = random(rng, { 1, 1, 20, 3 }, dtype) end
        local cu = moe.tensor({ 0, 9, 20 }, { dtype = "i64" })
        local function run()
          for _, name in ipairs { "q", "k", "v" } do
            x[name].requires_grad, x[name].grad = true, nil
          end
          local y = moe.attention(x.q, x.k, x.v, { causal = true, cu_seqlens = cu })
          y:backward(x.g)
          return { y:detach(), x.q.grad, x.k.grad, x.v.grad }
        end
        local whole = run()
        x[broken]:detach()[{ 1, 1, 12 }] = i % 2 == 0 and nan or math.huge
        local got = run()
        for r = 1, 4 do
          assert.close(whole[r]:narrow(3, 1, 9), got[r]:narrow(3, 1, 9), { rtol = 1e-5, atol = 1e-6, name = broken .. r })
        end
        assert.close(whole[1]:narrow(3, 10, 2), got[1]:narrow(3, 10, 2), { rtol = 1e-5, atol = 1e-6, name = broken })
        if broken ~= "g" then assert.is_false(got[1]:isfinite():all():item()) end
      end
    end
  end)

  it("needs memory by length alone, forward and backward", function()
    local function peak(t)
      local q = moe.randn(1, 1, t, 8)
      q.requires_grad = true
      moe.empty_cache()
      moe.reset_peak_memory()
      local before = moe.memory().live
      moe.attention(q, q, q, { causal = true, window = 64 }):sum():backward()
      return moe.memory().peak - before
    end
    local short, long = peak(512), peak(4096)
    assert.is_true(long <= 8.5 * short and long < 4096 * 4096, ("%d and %d bytes"):format(short, long))
  end)

  it("knows empty sizes", function()
    assert.same({ 0, 2, 3, 4 }, moe.attention(moe.zeros { 0, 2, 3, 4 }, moe.zeros { 0, 2, 3, 4 }, moe.zeros { 0, 2, 3, 4 }).shape)
    assert.same({ 1, 2, 0, 4 }, moe.attention(moe.zeros { 1, 2, 0, 4 }, moe.zeros { 1, 2, 3, 4 }, moe.zeros { 1, 2, 3, 4 }).shape)
    assert.close(moe.zeros { 1, 2, 3, 4 }, moe.attention(moe.ones { 1, 2, 3, 4 }, moe.ones { 1, 2, 0, 4 }, moe.ones { 1, 2, 0, 4 }))
    local q = leaf(moe.ones { 1, 2, 3, 4 })
    moe.attention(q, moe.ones({ 1, 2, 0, 4 }, { dtype = q.dtype }), moe.ones({ 1, 2, 0, 4 }, { dtype = q.dtype })):sum():backward()
    assert.close(moe.zeros { 1, 2, 3, 4 }, q.grad)
  end)

  it("says what is wrong", function()
    local function says(want, ...)
      local message = helper.error_of(moe.attention, ...)
      assert.truthy(message:find(want, 1, true), message)
    end
    local function z(...) return moe.zeros { ... } end
    says("attention: q must be [batch, heads, positions, size], got [2, 3, 4]", z(2, 3, 4), z(2, 3, 4), z(2, 3, 4))
    says("q and k differ in size (dim 4): q is [1, 2, 3, 4], k is [1, 2, 3, 5]", z(1, 2, 3, 4), z(1, 2, 3, 5), z(1, 2, 3, 5))
    says("q's heads must be a multiple of k's (dim 2): q is [1, 3, 3, 4], k is [1, 2, 3, 4]", z(1, 3, 3, 4), z(1, 2, 3, 4), z(1, 2, 3, 4))
    says("k and v differ in heads or positions (dims 2 and 3): k is [1, 2, 3, 4], v is [1, 2, 4, 4]",
      z(1, 2, 3, 4), z(1, 2, 3, 4), z(1, 2, 4, 4))
    says("batch sizes differ (dim 1)", z(1, 2, 3, 4), z(2, 2, 3, 4), z(2, 2, 3, 4))
    says("mask is [4, 3], which does not broadcast to [batch, heads, queries, keys] = [1, 2, 3, 3]",
      z(1, 2, 3, 4), z(1, 2, 3, 4), z(1, 2, 3, 4), moe.zeros({ 4, 3 }, { dtype = "bool" }))
    says("mask must be bool (true: may attend) or floating point (added to the scores), got i64",
      z(1, 2, 3, 4), z(1, 2, 3, 4), z(1, 2, 3, 4), moe.zeros({ 3, 3 }, { dtype = "i64" }))
    says("seen must be i64 [batch, heads, queries] = [1, 2, 3], got i64 [1, 3, 2]",
      z(1, 2, 3, 4), z(1, 2, 3, 4), z(1, 2, 3, 4), { seen = moe.zeros({ 1, 3, 2 }, { dtype = "i64" }) })
    says("seen must be i64", z(1, 2, 3, 4), z(1, 2, 3, 4), z(1, 2, 3, 4), { seen = z(1, 2, 3) })
    local function given(opts) return z(1, 2, 3, 4), z(1, 2, 5, 4), z(1, 2, 5, 4), opts end
    local function counts(t) return moe.tensor(t, { dtype = "i64" }) end
    says("window must be at least 1 (a position sees itself), got 0", given { window = 0 })
    says("relative must be floats [heads or 1, 2 n - 1] (the middle: a key at the query's position), got f32 [2, 4]",
      given { relative = z(2, 4) })
    says("got f32 [3, 5]", given { relative = z(3, 5) })
    says("cu_seqlens holds for q and k alike, but q has 3 positions and k has 5: give cu_seqlens_k", given { cu_seqlens = counts { 0, 3 } })
    says("cu_seqlens_k wants cu_seqlens beside it", given { cu_seqlens_k = counts { 0, 5 } })
    says("cu_seqlens must rise from 0 to the 3 positions of q, but its element 3 is 3",
      given { cu_seqlens = counts { 0, 4, 3 }, cu_seqlens_k = counts { 0, 1, 5 } })
    says("cu_seqlens_k must rise from 0 to the 5 positions of k, but its element 1 is 1",
      given { cu_seqlens = counts { 0, 3 }, cu_seqlens_k = counts { 1, 5 } })
    says("cu_seqlens and cu_seqlens_k must be of the same length, got 2 and 3",
      given { cu_seqlens = counts { 0, 3 }, cu_seqlens_k = counts { 0, 1, 5 } })
  end)
end)
