local moe = require "moe"
local helper = require "spec.helper"

local function rand(...) return moe.randn({ ... }, { dtype = "f64", requires_grad = true }) end
local EXACT = { rtol = 1e-12, atol = 1e-13 }

-- p_ij = b_ij prod_{j < k <= last(i)} (1 - b_ik), by the formula; last(i): the newest key that query i sees
local function reference(q, k, v, scale, last, group, allowed)
  local Q, K, V = q:totable(), k:totable(), v:totable()
  local out, left = {}, {}
  for b = 1, #Q do
    out[b], left[b] = {}, {}
    for h = 1, #Q[b] do
      local keys, values = K[b][(h - 1) // group + 1], V[b][(h - 1) // group + 1]
      out[b][h], left[b][h] = {}, {}
      for i, qi in ipairs(Q[b][h]) do
        local y, rest = {}, 1.0
        for c = 1, #values[1] do y[c] = 0.0 end
        for j = last(b, h, i), 1, -1 do
          if not allowed or allowed(i, j) then
            local z = 0.0
            for c, value in ipairs(qi) do z = z + value * keys[j][c] end
            local beta = 1 / (1 + math.exp(-scale * z))
            for c = 1, #y do y[c] = y[c] + rest * beta * values[j][c] end
            rest = rest * (1 - beta)
          end
        end
        out[b][h][i], left[b][h][i] = y, rest
      end
    end
  end
  return out, left
end

describe("moe.stick_breaking", function()
  before_each(function() moe.manual_seed(7) end)

  it("is the double loop over the formula", function()
    local q, k, v = rand(2, 4, 5, 3), rand(2, 2, 7, 3), rand(2, 2, 7, 2)
    for _, diagonal in ipairs { false, true } do
      local want, left = reference(q, k, v, 1 / math.sqrt(3), function(_, _, i) return 7 - 5 + i - (diagonal and 0 or 1) end, 2)
      local y, rest = moe.stick_breaking(q, k, v, { diagonal = diagonal })
      assert.close(want, y, EXACT)
      assert.close(left, rest, EXACT)
    end
  end)

  it("takes a number of keys for each query and a mask", function()
    local q, k, v = rand(1, 2, 4, 3), rand(1, 1, 5, 3), rand(1, 1, 5, 3)
    local seen = moe.tensor({ { { 5, 0, 2, 3 }, { 1, 4, 5, 0 } } }, { dtype = "i64" })
    local counts = seen:totable()
    local function last(b, h, i) return counts[b][h][i] end
    assert.close(reference(q, k, v, 0.4, last, 2), moe.stick_breaking(q, k, v, { seen = seen, scale = 0.4 }), EXACT)
    local mask = moe.tensor({ { 1, 0, 1, 1, 0 }, { 1, 1, 1, 1, 1 }, { 0, 1, 1, 1, 1 }, { 0, 0, 0, 0, 0 } }):ne(0)
    local allowed = mask:totable()
    assert.close(reference(q, k, v, 0.4, last, 2, function(i, j) return allowed[i][j] end),
      moe.stick_breaking(q, k, v, { seen = seen, scale = 0.4, mask = mask }), EXACT)
  end)

  it("hands out no more than the stick, and leaves the rest", function()
    local q, k = rand(1, 1, 30, 4) * 3, rand(1, 1, 30, 4) * 3
    local ones = moe.ones({ 1, 1, 30, 1 }, { dtype = "f64" })
    local sum, rest = moe.stick_breaking(q, k, ones)
    assert.close(ones, sum + rest:unsqueeze(-1), EXACT)
    assert.is_true(sum:amax():item() <= 1 + 1e-12)
    assert.equal(0, sum[1][1][1][1]) -- the first position has nobody before it
  end)

  it("stays exact and finite for scores that saturate", function()
    -- a key that is certain, one that is surely passed over, then 40 that each take their share of the stick
    local q = moe.ones({ 1, 1, 1, 1 }, { requires_grad = true })
    local k = moe.cat({ moe.full({ 1, 1, 1, 1 }, 3e4), moe.full({ 1, 1, 1, 1 }, -3e4), moe.full({ 1, 1, 40, 1 }, -0.5) }, 3)
    local v = moe.zeros(1, 1, 42, 1)
    v:narrow(3, 1, 1):fill_(1)
    local y = moe.stick_breaking(q, k, v, { scale = 1, seen = moe.full({ 1, 1, 1 }, 42):to "i64" })
    assert.close((1 - 1 / (1 + math.exp(0.5))) ^ 40, y:item(), { rtol = 1e-5 })
    -- a certain key in between leaves nothing, however far the logarithm falls
    k:narrow(3, 20, 1):fill_(3e4)
    y = moe.stick_breaking(q, k, v, { scale = 1, seen = moe.full({ 1, 1, 1 }, 42):to "i64" })
    assert.equal(0, y:item())
    y:sum():backward()
    assert.is_true(q.grad:isfinite():all():item())
  end)

  it("passes the gradient check", function()
    local q, k, v = rand(2, 2, 3, 2), rand(2, 1, 4, 2), rand(2, 1, 4, 3)
    assert(moe.gradcheck(function(a, b, c)
      local y, rest = moe.stick_breaking(a, b, c)
      return y:sum() * 0.7 + (y * y):sum() + (rest * rest):sum()
    end, { q, k, v }))
  end)

  it("knows empty keys and says what is wrong", function()
    local y, rest = moe.stick_breaking(rand(1, 2, 3, 4), rand(1, 2, 0, 4), rand(1, 2, 0, 4))
    assert.close(moe.zeros(1, 2, 3, 4), y)
    assert.close(moe.ones(1, 2, 3), rest)
    local function says(want, ...)
      local message = helper.error_of(moe.stick_breaking, ...)
      assert.truthy(message:find(want, 1, true), message)
    end
    says("stick_breaking: q must be a tensor [batch, heads, positions, size], got [2, 3]",
      moe.randn(2, 3), rand(1, 1, 1, 1), rand(1, 1, 1, 1))
    says("do not fit", rand(1, 3, 2, 4), rand(1, 2, 2, 4), rand(1, 2, 2, 4))
    says("did you mean 'scale'", rand(1, 1, 2, 4), rand(1, 1, 2, 4), rand(1, 1, 2, 4), { scal = 1 })
    says("seen must be i64 [1, 1, 2], got i64 [2]", rand(1, 1, 2, 4), rand(1, 1, 2, 4), rand(1, 1, 2, 4),
      { seen = moe.ones({ 2 }, { dtype = "i64" }) })
  end)
end)

describe("moe.mixer.stick_breaking", function()
  it("gives the same in one call, token by token, and packed", function()
    moe.manual_seed(2)
    local m = moe.mixer.stick_breaking { d_model = 8, num_heads = 4, num_kv_heads = 2 }
    local x = moe.randn(2, 7, 8)
    local whole, none = m(x)
    assert.is_nil(none)
    local state, parts = m:state(2), {}
    for t = 1, 7 do parts[t], state = m(x:narrow(2, t, 1), state) end
    assert.close(whole, moe.cat(parts, 2), { rtol = 1e-5, atol = 1e-6 })
    assert.same({ 2, 2, 7, 2 }, state.k.shape)
    local packed = m(x:reshape { 1, 14, 8 }, nil, { cu_seqlens = moe.tensor({ 0, 7, 14 }, { dtype = "i64" }) })
    assert.close(whole, packed:reshape { 2, 7, 8 }, { rtol = 1e-5, atol = 1e-6 })
    assert.close(moe.zeros(2, 8), whole:select(2, 1)) -- nothing to see yet
  end)
end)
