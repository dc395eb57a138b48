-- Terms by distance and masks: closed forms, and as an attention sees them.
local helper = require "spec.helper" -- luacheck: ignore
local moe = require "moe"
local nn = moe.nn

local function allowed(mask, rule)
  local t, s = mask:size(1), mask:size(2)
  local got = mask:totable()
  for i = 1, t do
    for j = 1, s do
      assert.equal(rule(i + s - t, j) and true or false, got[i][j] == true or got[i][j] == 1, ("query %d, key %d"):format(i, j))
    end
  end
end

describe("masks", function()
  local masks = nn.masks

  it("say what they are for", function()
    allowed(masks.causal(3, 5), function(i, j) return j <= i end)
    allowed(masks.dilated(7, 9, { window = 3, dilation = 2 }), function(i, j) return j <= i and (i - j) % 2 == 0 and i - j < 6 end)
    allowed(masks.dilated(6, 6, { window = 2, causal = false }), function(i, j) return math.abs(i - j) < 2 end)
    allowed(masks.block(7, 7, 3), function(i, j) return j <= i and (i - 1) // 3 == (j - 1) // 3 end)
    allowed(masks.global(5, 5, 2, false), function(i, j) return i <= 2 or j <= 2 end)
    allowed(masks.packed { 0, 2, 2, 5 }, function(i, j) return (i <= 2) == (j <= 2) end)
    assert.close({ { 0, 1, 1, math.sqrt(2) }, { 1, 0, math.sqrt(2), 1 }, { 1, math.sqrt(2), 0, 1 }, { math.sqrt(2), 1, 1, 0 } },
      masks.grid(2, 2), { rtol = 1e-6 })
    assert.same({ 0, 0 }, masks.bigbird(0).shape)
  end)

  it("BigBird: window, global and as many drawn blocks as asked", function()
    moe.manual_seed(2)
    local n, size = 9, 4
    local mask = masks.bigbird(n * size, { block_size = size, num_random = 2 }):totable()
    local drawn = 0
    for a = 1, n do
      local others = 0
      for b = 1, n do
        local first = mask[(a - 1) * size + 1][(b - 1) * size + 1]
        for i = 1, size do -- blocks are whole
          for j = 1, size do assert.equal(first, mask[(a - 1) * size + i][(b - 1) * size + j]) end
        end
        local fixed = math.abs(a - b) <= 1 or a == 1 or a == n or b == 1 or b == n
        if fixed then assert.is_true(first == true or first == 1)
        elseif first == true or first == 1 then others = others + 1 end
      end
      if a > 1 and a < n then assert.equal(2, others) end
      drawn = drawn + others
    end
    assert.equal(2 * (n - 2), drawn)
    local causal = masks.bigbird(11, { block_size = 3, num_random = 1, causal = true })
    assert.close(causal, causal:logical_and(masks.causal(11)))
    assert.is_true(causal:totable()[11][1] == true or causal:totable()[11][1] == 1) -- the first block is global
  end)

  it("refuse what makes no sense", function()
    for _, bad in ipairs { function() masks.block(3, 3, 0) end, function() masks.causal(-1) end, function() masks.dilated(3, 3) end,
      function() masks.dilated(3, 3, { window = 0 }) end, function() masks.packed { 0, 3, 2 } end,
      function() masks.bigbird(4, { block = 2 }) end } do
      assert.has_error(bad)
    end
    assert.error_matches(function() masks.block(3, 3, 0) end, "masks.block: size must be an integer of at least 1, got 0")
  end)
end)

describe("relative", function()
  local relative = nn.relative

  it("ALiBi: slopes of powers of two and of others", function()
    local bias = relative.alibi { num_heads = 8 }(3)
    for h = 1, 8 do assert.close({ -2 * 2 ^ -h, -2 ^ -h, 0, -2 ^ -h, -2 * 2 ^ -h }, bias[h]) end
    assert.close({ 2 ^ -2, 2 ^ -4, 2 ^ -6, 2 ^ -8, 2 ^ -1, 2 ^ -3 }, -relative.alibi { num_heads = 6 }(2):select(2, 1))
    assert.equal(0, relative.alibi { num_heads = 2 }:num_parameters())
  end)

  it("T5: buckets", function()
    local one = relative.t5 { num_heads = 2, num_buckets = 8, max_distance = 16 }
    -- 4 exact ones, then 4 + floor(4 log(d / 4) / log 4) up to 8
    assert.same({ 8, 8, 8, 7, 7, 6, 5, 5, 4, 3, 2, 1, 1, 1 },
      one:buckets(moe.tensor { -99, -16, -12, -11, -8, -7, -5, -4, -3, -2, -1, 0, 1, 9 }):totable())
    local two = relative.t5 { num_heads = 2, num_buckets = 8, max_distance = 16, bidirectional = true }
    assert.same({ 4, 4, 3, 3, 2, 1, 6, 7, 7, 8, 8 }, two:buckets(moe.tensor { -99, -8, -5, -2, -1, 0, 1, 2, 5, 6, 99 }):totable())
    assert.close(one.weight:t():index_select(2, moe.tensor({ 3, 2, 1, 1, 1 }, { dtype = "i64" })), one(3))
  end)

  it("decay: factors of the weights", function()
    assert.close({ { 0.25, 0.5, 1, 0.5, 0.25 } }, relative.decay { num_heads = 1, gamma = 0.5 }(3):exp(), { rtol = 1e-6 })
    assert.close({ 31 / 32, 63 / 64 }, relative.decay { num_heads = 2 }(2):exp():select(2, 1), { rtol = 1e-6 })
  end)

  it("Gaussian mixtures: their sum, its gradient, and none when they are wide", function()
    local m = relative.gaussian { num_heads = 2, components = 2, width = 1 }
    m.log_a:detach():copy_(moe.tensor { { 0, math.log(0.5) }, { math.log(2), -1 } })
    local function value(d, a, b) return math.log(a * math.exp(-d * d / 2) + b * math.exp(-d * d / 8)) end
    local e = math.exp(-1)
    assert.close({ { value(1, 1, 0.5), value(0, 1, 0.5), value(1, 1, 0.5) }, { value(1, 2, e), value(0, 2, e), value(1, 2, e) } }, m(2),
      { rtol = 1e-5, atol = 1e-6 })
    assert.same({ 2, 6, 6 }, m(nn.masks.grid(2, 3)).shape)
    local wide = relative.gaussian { num_heads = 1, width = 1e9 }
    assert.close(moe.zeros(1, 9), wide(5), { rtol = 0, atol = 1e-12 })
    m:to "f64"
    moe.gradcheck(function(a, s)
      m.log_a, m.log_s = a, s
      return m(3)
    end, { moe.randn(2, 2, { dtype = "f64" }), moe.randn(2, 2, { dtype = "f64" }) })
  end)

  for _, name in ipairs { "alibi", "t5", "decay", "gaussian" } do
    it("is the mask that it stands for, whole, in pieces and packed: " .. name, function()
      moe.manual_seed(7)
      local attention = nn.attention { d_model = 8, num_heads = 2, dtype = "f64" }
      local term = relative[name] { num_heads = 2 }:to "f64"
      local m = relative.attention(attention, term)
      local x = moe.randn(1, 9, 8, { dtype = "f64", requires_grad = true })
      local key = moe.arange(1, 9):reshape { 1, 9 }
      local mask = term(key - key:t())
      local whole, wanted = m(x), attention(x, mask)
      assert.close(wanted, whole, { rtol = 1e-10, atol = 1e-11 })
      for _, p in ipairs { { whole }, { wanted } } do
        m:zero_grad()
        x.grad = nil
        p[1]:square():sum():backward()
        p.grads = { x.grad }
        for _, t in m:named_parameters() do p.grads[#p.grads + 1] = t.grad end
        if p[1] == whole then mask = p.grads
        else
          for i, g in ipairs(mask) do assert.close(p.grads[i], g, { rtol = 1e-9, atol = 1e-10 }) end
        end
      end
      local state, parts, at = m:state(1), {}, 1
      for i, n in ipairs { 4, 1, 1, 3 } do
        parts[i], state = m(x:narrow(2, at, n), state)
        at = at + n
      end
      assert.close(whole, moe.cat(parts, 2), { rtol = 1e-10, atol = 1e-11 })
      local packed = m(x, nil, { cu_seqlens = moe.tensor({ 0, 4, 9 }, { dtype = "i64" }) })
      assert.close(moe.cat({ m(x:narrow(2, 1, 4)), m(x:narrow(2, 5, 5)) }, 2), packed, { rtol = 1e-10, atol = 1e-11 })
    end)
  end

  it("refuses what makes no sense", function()
    assert.error_matches(function() relative.alibi {} end, "option 'num_heads' is missing")
    assert.error_matches(function() relative.alibi { num_heads = 2 }(0) end, "takes a count of positions or a tensor of distances, got 0")
    assert.error_matches(function() relative.decay { num_heads = 2, gamma = { 0.5, 2 } } end, "gamma of head 2 must lie in %(0, 1%], got 2")
    assert.has_error(function() relative.t5 { num_heads = 1, num_buckets = 8, max_distance = 3 } end)
    assert.has_error(function() relative.attention(nn.attention(4, 2)) end)
  end)
end)
