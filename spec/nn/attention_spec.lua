-- The attention layer against plain loops, and its cache of keys and values.
local helper = require "spec.helper" -- luacheck: ignore
local moe = require "moe"
local nn = moe.nn

local function dot(a, b)
  local s = 0
  for i = 1, #a do s = s + a[i] * b[i] end
  return s
end

local function project(x, w, b)
  local y = {}
  for i = 1, #w do y[i] = dot(x, w[i]) + (b and b[i] or 0) end
  return y
end

local function slice(t, first, n) return table.move(t, first, first + n - 1, 1, {}) end

-- Turns the two halves of a head by position * base^(-2i/n), positions counting from 0.
local function rope(v, position, base)
  local half, out = #v // 2, {}
  for i = 1, half do
    local angle = position * base ^ (-2 * (i - 1) / #v)
    local c, s = math.cos(angle), math.sin(angle)
    out[i], out[i + half] = v[i] * c - v[i + half] * s, v[i + half] * c + v[i] * s
  end
  return out
end

local function rms(v, w, eps)
  local square, out = dot(v, v) / #v, {}
  for i = 1, #v do out[i] = v[i] / math.sqrt(square + eps) * w[i] end
  return out
end

-- One sequence x [time][d] through the layer's weights.
local function reference(m, x)
  local heads, kv = m.num_heads, m.num_kv_heads or m.num_heads
  local dim = m.head_dim or m.d_model // heads
  local function values(t) return t and t:totable() end
  local w, b = values(m.qkv_proj.weight), values(m.qkv_proj.bias)
  local ow, ob = values(m.o_proj.weight), values(m.o_proj.bias)
  local qn, kn = values(m.q_norm and m.q_norm.weight), values(m.k_norm and m.k_norm.weight)
  local q, k, v, y = {}, {}, {}, {}
  for t = 1, #x do
    local all = project(x[t], w, b)
    q[t], k[t], v[t] = {}, {}, {}
    local function head(into, first, n, norm, turn)
      for h = 1, n do
        local part = slice(all, (first + h - 1) * dim + 1, dim)
        if norm then part = rms(part, norm, 1e-6) end
        if turn and m.rope then part = rope(part, t - 1, m.rope_base) end
        into[t][h] = part
      end
    end
    head(q, 0, heads, qn, true)
    head(k, heads, kv, kn, true)
    head(v, heads + kv, kv)
  end
  for t = 1, #x do
    local joined = {}
    for h = 1, heads do
      local group = (h - 1) // (heads // kv) + 1
      local score, total, last = {}, 0, m.causal and t or #x
      for s = 1, last do
        score[s] = math.exp(dot(q[t][h], k[s][group]) / math.sqrt(dim))
        total = total + score[s]
      end
      for i = 1, dim do
        local sum = 0
        for s = 1, last do sum = sum + score[s] / total * v[s][group][i] end
        joined[#joined + 1] = sum
      end
    end
    y[t] = project(joined, ow, ob)
  end
  return y
end

local CASES = {
  { d_model = 8, num_heads = 2 },
  { d_model = 8, num_heads = 4, num_kv_heads = 2, bias = false },
  { d_model = 6, num_heads = 3, num_kv_heads = 1, head_dim = 4, rope = true, qkv_bias = false },
  { d_model = 8, num_heads = 2, rope = true, rope_base = 100, qk_norm = true },
  { d_model = 5, num_heads = 1, causal = false },
}

-- A layer in f64 whose biases and gains are not trivial.
local function make(case)
  local given = { dtype = "f64" }
  for k, v in pairs(case) do given[k] = v end
  local m = nn.attention(given)
  for _, p in m:named_parameters() do
    if #p.shape == 1 then nn.init.uniform_(p:detach(), 0.5, 1.5) end
  end
  return m
end

local function text(case)
  local keys = {}
  for k, v in pairs(case) do keys[#keys + 1] = k .. "=" .. tostring(v) end
  table.sort(keys)
  return table.concat(keys, " ")
end

describe("attention", function()
  for _, case in ipairs(CASES) do
    it("equals plain loops: " .. text(case), function()
      moe.manual_seed(1)
      local m = make(case)
      local x = moe.randn(2, 7, case.d_model, { dtype = "f64" })
      local y = m(x)
      assert.close(reference(m, x[1]:totable()), y[1], { rtol = 1e-9, atol = 1e-10 })
      assert.close(reference(m, x[2]:totable()), y[2], { rtol = 1e-9, atol = 1e-10 })
    end)

    it("has gradients: " .. text(case), function()
      moe.manual_seed(2)
      local m = make(case)
      moe.gradcheck(function(x) return m(x) end, { moe.randn(1, 4, case.d_model, { dtype = "f64" }) })
      local x = moe.randn(1, 4, case.d_model, { dtype = "f64" })
      local weights = moe.arange(1, x:numel(), { dtype = "f64" }):reshape(x.shape):sin()
      local function value() return (m(x) * weights):sum() end
      value():backward()
      for name, p in m:named_parameters() do
        local flat = p:detach():reshape(-1)
        local want, eps = {}, 1e-6
        for i = 1, #flat do
          local old = flat[i]
          flat[i] = old + eps
          local up = value():item()
          flat[i] = old - eps
          want[i] = (up - value():item()) / (2 * eps)
          flat[i] = old
        end
        assert.close(want, p.grad:reshape(-1), { rtol = 1e-5, atol = 1e-7 }, name)
      end
    end)

    if case.causal ~= false then
      it("in pieces equals whole: " .. text(case), function()
        moe.manual_seed(3)
        local m = make(case)
        local x = moe.randn(2, 9, case.d_model, { dtype = "f64" })
        local whole = m(x)
        local state, parts, start = m:state(2), {}, 1
        for i, n in ipairs { 3, 1, 1, 4 } do
          parts[i], state = m(x:narrow(2, start, n), state)
          start = start + n
        end
        assert.close(whole, moe.cat(parts, 2), { rtol = 1e-10, atol = 1e-12 })
        local dim = case.head_dim or case.d_model // case.num_heads
        assert.same({ 2, case.num_kv_heads or case.num_heads, 9, dim }, state.k.shape)
      end)

      it("decodes without recording, also from branches: " .. text(case), function()
        moe.manual_seed(5)
        local m = make(case)
        local x = moe.randn(2, 100, case.d_model, { dtype = "f64" })
        local other = moe.randn(2, 3, case.d_model, { dtype = "f64" })
        local whole = m(x)
        moe.no_grad(function()
          local state, parts, kept, before = m:state(2), {}, nil, nil
          for t = 1, 100 do
            parts[t], state = m(x:narrow(2, t, 1), state)
            if t == 40 then kept, before = state, state.k:totable() end
          end
          assert.close(whole, moe.cat(parts, 2), { rtol = 1e-10, atol = 1e-12 })
          -- the state after 40 is still what it was, and may be continued twice
          assert.same(before, kept.k:totable())
          local branch = moe.cat({ x:narrow(2, 1, 40), other }, 2)
          local want = m(branch):narrow(2, 41, 3)
          local first, after = m(other, kept)
          assert.close(want, first, { rtol = 1e-10, atol = 1e-12 })
          assert.close(want, (m(other, kept)), { rtol = 1e-10, atol = 1e-12 })
          assert.same({ 2, case.num_kv_heads or case.num_heads, 43 }, { after.k.shape[1], after.k.shape[2], after.k.shape[3] })
          assert.close(whole:narrow(2, 41, 2), (m(x:narrow(2, 41, 2), kept)), { rtol = 1e-10, atol = 1e-12 })
          assert.close(whole:narrow(2, 100, 1), (m(x:narrow(2, 100, 1), { k = state.k:narrow(3, 1, 99), v = state.v:narrow(3, 1, 99) })),
            { rtol = 1e-10, atol = 1e-12 })
        end)
        -- recording continues from what was made without
        local _, state = moe.no_grad(function() return m(x:narrow(2, 1, 50), m:state(2)) end)
        local y = m(x:narrow(2, 51, 50), state)
        assert.close(whole:narrow(2, 51, 50), y, { rtol = 1e-10, atol = 1e-12 })
        y:sum():backward()
        assert.truthy(m.qkv_proj.weight.grad)
      end)

      it("sees nothing of the future: " .. text(case), function()
        local m = make(case)
        local x = moe.randn(1, 6, case.d_model, { dtype = "f64" })
        local changed = x:clone()
        changed[{ 1, 5 }] = 3
        local a, b = m(x), m(changed)
        assert.same(a:narrow(2, 1, 4):totable(), b:narrow(2, 1, 4):totable())
        assert.is_not.same(a[1][5]:totable(), b[1][5]:totable())
      end)
    end

    it("packed equals one by one: " .. text(case), function()
      moe.manual_seed(6)
      local m = make(case)
      local x = moe.randn(1, 9, case.d_model, { dtype = "f64" })
      local cu = moe.tensor({ 0, 4, 4, 5, 9 }, { dtype = "i32" })
      local want = moe.cat({ m(x:narrow(2, 1, 4)), m(x:narrow(2, 5, 1)), m(x:narrow(2, 6, 4)) }, 2)
      assert.close(want, m(x, nil, { cu_seqlens = cu, step = 1 }), { rtol = 1e-10, atol = 1e-12 })
      for _, bad in ipairs { { 0, 4 }, { 1, 9 }, { 0, 5, 4, 9 }, { 0, 10 }, { 9 } } do
        assert.has_error(function() m(x, nil, { cu_seqlens = moe.tensor(bad, { dtype = "i64" }) }) end)
      end
      assert.has_error(function() m(x, nil, { cu_seqlens = moe.tensor { 0, 9 } }) end)
      assert.has_error(function() m(x, m:state(1), { cu_seqlens = cu }) end)
      assert.has_error(function() m(moe.cat { x, x }, nil, { cu_seqlens = cu }) end)
      assert.has_error(function() m(x, nil, { cu_seqlens = cu, attn_mask = moe.ones(9, 9) }) end)
    end)

    it("with dropout of nothing equals itself: " .. text(case), function()
      moe.manual_seed(4)
      local given = { dropout = 1e-12 }
      for k, v in pairs(case) do given[k] = v end
      local m = make(given)
      local x = moe.randn(2, 5, case.d_model, { dtype = "f64" })
      local heads = case.num_heads
      local keep = moe.rand(2, 1, 5, 5):gt(0.4)
      keep[{ 1, 1, 2 }] = false -- a query that sees nothing
      local added = moe.randn(heads, 5, 5, { dtype = "f64" })
      for _, mask in ipairs { false, keep, added } do
        local wanted = m:eval()(x, mask or nil)
        assert.close(wanted, m:train()(x, mask or nil), { rtol = 1e-9, atol = 1e-10 })
      end
    end)
  end

  it("takes a mask by position, or in a context that holds more", function()
    local m = nn.attention { d_model = 4, num_heads = 2, causal = false }
    local x = moe.randn(1, 3, 4)
    local mask = moe.ones(3, 3):tril():gt(0)
    local causal = nn.attention { d_model = 4, num_heads = 2 }
    causal:load_state_dict(m:state_dict())
    assert.close(causal(x), m(x, mask), { rtol = 1e-5, atol = 1e-6 })
    assert.close(causal(x), m(x, nil, { attn_mask = mask, step = 3, token_ids = {} }), { rtol = 1e-5, atol = 1e-6 })
    assert.close(causal(x), m(x, nil, mask), { rtol = 1e-5, atol = 1e-6 })
    assert.close(m(x), m(x, nil, { step = 3 }), { rtol = 1e-5, atol = 1e-6 })
    assert.close(m(x), m(x, nil, {}), { rtol = 1e-5, atol = 1e-6 })
  end)

  it("drops out in training alone", function()
    moe.manual_seed(5)
    local m = nn.attention { d_model = 8, num_heads = 2, dropout = 0.5 }
    local x = moe.randn(1, 6, 8)
    assert.is_not.same(m(x):totable(), m(x):totable())
    m:eval()
    assert.same(m(x):totable(), m(x):totable())
  end)

  it("lets gradients flow through the state", function()
    local m = make { d_model = 4, num_heads = 2 }
    local x = moe.randn(1, 6, 4, { dtype = "f64", requires_grad = true })
    m(x):square():sum():backward()
    local whole, weight = x.grad:clone(), m.qkv_proj.weight.grad:clone()
    m:zero_grad()
    x.grad = nil
    local a, state = m(x:narrow(2, 1, 4), m:state(1))
    local b = m(x:narrow(2, 5, 2), state)
    ;(a:square():sum() + b:square():sum()):backward()
    assert.close(whole, x.grad, { rtol = 1e-9, atol = 1e-11 })
    assert.close(weight, m.qkv_proj.weight.grad, { rtol = 1e-9, atol = 1e-11 })
  end)

  it("sees a window: whole, in pieces, packed, and with weights that drop out", function()
    for _, causal in ipairs { true, false } do
      moe.manual_seed(8)
      local m = make { d_model = 8, num_heads = 2, num_kv_heads = 1, window = 3, causal = causal, dropout = 1e-12 }
      local plain = make { d_model = 8, num_heads = 2, num_kv_heads = 1, causal = causal }
      plain:load_state_dict(m:state_dict())
      local x = moe.randn(1, 11, 8, { dtype = "f64" })
      local mask = nn.masks.dilated(11, 11, { window = 3, causal = causal })
      local close = { rtol = 1e-9, atol = 1e-10 }
      assert.close(plain(x, mask), m(x), close)
      assert.close(plain(x, mask), m:eval()(x), close)
      local cu = moe.tensor({ 0, 5, 11 }, { dtype = "i64" })
      local parts = moe.cat({ m(x:narrow(2, 1, 5)), m(x:narrow(2, 6, 6)) }, 2)
      assert.close(parts, m(x, nil, { cu_seqlens = cu }), close)
      assert.close(parts, m:train()(x, nil, { cu_seqlens = cu }), close)
      if causal then
        local state, pieces = m:state(1), {}
        for t = 1, 11 do pieces[t], state = m(x:narrow(2, t, 1), state) end
        assert.close(m(x), moe.cat(pieces, 2), close)
      end
    end
  end)

  it("adds a term by distance also where weights drop out", function()
    moe.manual_seed(9)
    local m = make { d_model = 8, num_heads = 2, dropout = 1e-12 }
    local x, relative = moe.randn(2, 6, 8, { dtype = "f64" }), moe.randn(2, 7, { dtype = "f64" })
    local ctx = { relative = relative }
    assert.close(m:eval()(x, nil, ctx), m:train()(x, nil, ctx), { rtol = 1e-9, atol = 1e-10 })
    assert.is_not.same(m(x):totable(), m(x, nil, ctx):totable())
  end)

  it("attends across to a memory", function()
    moe.manual_seed(10)
    local m = make { d_model = 8, num_heads = 2, num_kv_heads = 1, cross = true, qk_norm = true }
    local same = make { d_model = 8, num_heads = 2, num_kv_heads = 1, causal = false, qk_norm = true }
    same:load_state_dict(m:state_dict())
    local x, memory = moe.randn(2, 4, 8, { dtype = "f64" }), moe.randn(2, 6, 8, { dtype = "f64" })
    local close = { rtol = 1e-10, atol = 1e-11 }
    assert.close(same(x), m(x, nil, { memory = x }), close) -- of itself, it is attention within
    -- the rows of a longer sequence, of which the first ones are no keys
    local both, mask = moe.cat({ x, memory }, 2), moe.zeros({ 10, 10 }, { dtype = "bool" })
    mask:narrow(2, 5, 6):fill_(1)
    local wanted = same(both, mask):narrow(2, 1, 4)
    assert.close(wanted, m(x, nil, { memory = memory }), close)
    local state, parts = m:state(2), {}
    for t = 1, 4 do -- the memory is read once
      parts[t], state = m(x:narrow(2, t, 1), state, t == 1 and { memory = memory } or nil)
      assert.equal(6, state.k:size(3))
    end
    assert.close(wanted, moe.cat(parts, 2), close)
    local one, other = x:narrow(1, 1, 1), memory:narrow(1, 1, 1)
    local function counts(t) return moe.tensor(t, { dtype = "i64" }) end
    local packed = m(one, nil, { memory = other, cu_seqlens = counts { 0, 1, 4 }, cu_seqlens_memory = counts { 0, 5, 6 } })
    assert.close(moe.cat({ m(one:narrow(2, 1, 1), nil, { memory = other:narrow(2, 1, 5) }),
      m(one:narrow(2, 2, 3), nil, { memory = other:narrow(2, 6, 1) }) }, 2), packed, close)
    moe.gradcheck(function(a, b) return m(a, nil, { memory = b }) end,
      { moe.randn(1, 2, 8, { dtype = "f64" }), moe.randn(1, 3, 8, { dtype = "f64" }) })
    assert.error_matches(function() m(x) end, "a cross attention wants memory %[batch, positions, 8%] in its context")
    assert.error_matches(function() m(x, nil, { memory = one }) end, "memory must be %[2, positions, 8%], got %[1, 4, 8%]")
    assert.error_matches(function() m(one, nil, { memory = other, cu_seqlens = counts { 0, 4 } }) end, "cu_seqlens_memory")
    assert.has_error(function() nn.attention { d_model = 8, num_heads = 2, cross = true, rope = true } end)
  end)

  it("turns by scaled frequencies", function()
    moe.manual_seed(11)
    local scaling = nn.rope_scaling { rope_type = "llama3", factor = 4, original_max_position_embeddings = 8 }
    local m = make { d_model = 8, num_heads = 1, rope = true, rope_scaling = scaling }
    local x = moe.randn(1, 5, 8, { dtype = "f64" })
    local q, k, v = x:linear(m.qkv_proj.weight, m.qkv_proj.bias):reshape { 1, 5, 3, 8 }:transpose(2, 3):chunk(3, 2)
    local y = moe.attention(q:rope { scaling = scaling }, k:rope { scaling = scaling }, v, { causal = true })
    assert.close(y:reshape { 1, 5, 8 }:linear(m.o_proj.weight, m.o_proj.bias), m(x), { rtol = 1e-10, atol = 1e-11 })
    assert.error_matches(function() nn.attention { d_model = 8, num_heads = 1, rope_scaling = "yarn(factor=2)" } end,
      "original_max_position_embeddings must be given")
  end)

  it("is a mixer too", function()
    local m = require("moe.mixer").attention { d_model = 4, num_heads = 2 }
    assert.same({ 1, 3, 4 }, m(moe.ones(1, 3, 4)).shape)
    assert.equal(4 * 12 + 12 + 16 + 4, m:num_parameters())
  end)

  it("refuses what does not fit", function()
    local m = nn.attention(8, 2)
    assert.error_matches(function() m(moe.ones(2, 8)) end, "x must be %[batch, time, 8%], got %[2, 8%]")
    assert.has_error(function() m(moe.ones(1, 2, 7)) end)
    assert.has_error(function() m(moe.ones(1, 2, 8), { k = moe.ones(1, 2, 3, 4) }) end)
    assert.has_error(function() m(moe.ones(1, 2, 8), { k = moe.ones(1, 2, 3, 4), v = moe.ones(1, 2, 2, 4) }) end)
    assert.error_matches(function() m(moe.ones(1, 2, 8), { k = moe.ones(2, 2, 3, 4), v = moe.ones(1, 2, 3, 4) }) end,
      "state.k must be %[1, 2, time, 4%], got %[2, 2, 3, 4%]")
    assert.error_matches(function() m(moe.ones(1, 2, 8), { k = 3 }) end, "state.k must be a tensor")
    assert.has_error(function() m(moe.ones(1, 2, 8), "state") end)
    assert.has_error(function() m(moe.ones(1, 2, 8), nil, moe.ones(3, 3)) end)
    for _, bad in ipairs { { d_model = 8, num_heads = 3 }, { d_model = 8, num_heads = 4, num_kv_heads = 3 }, { d_model = 8, num_heads = 0 },
      { d_model = 6, num_heads = 2, rope = true }, { d_model = 8, num_heads = 2, dropout = 1 }, { d_model = 8 },
      { d_model = 8, num_heads = 2, head_dim = 0 }, { d_model = 8, num_heads = 2, window = 0 }, { d_model = 1 << 40, num_heads = 1 << 40 },
      { d_model = 8, num_heads = 2, head_dim = 1 << 60 } } do
      assert.has_error(function() nn.attention(bad) end)
    end
  end)
end)
