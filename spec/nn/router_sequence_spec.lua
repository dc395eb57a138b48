local moe = require "moe"
local helper = require "spec.helper"

local EXACT = { rtol = 1e-10, atol = 1e-12 }
local D, E = 4, 6
local function rand(...) return moe.randn({ ... }, { dtype = "f64" }) end

local function router(o)
  moe.manual_seed(4)
  o.d_model, o.num_experts, o.dtype = D, E, "f64"
  return moe.router.sequence(o)
end

-- Summary of tokens rows[1 .. n] with real[t] ~= false.
local function summary(rows, from, upto, real)
  local sum, n, first, last = { 0, 0, 0, 0 }, 0, nil, nil
  for t = 1, upto do
    if not real or real[t] then
      n, first, last = n + 1, first or rows[t], rows[t]
      for i = 1, D do sum[i] = sum[i] + rows[t][i] end
    end
  end
  if from == "first" then return first or rows[1] elseif from == "last" then return last or rows[1] end
  for i = 1, D do sum[i] = sum[i] / math.max(n, 1) end
  return sum
end

describe("moe.router.sequence", function()
  it("routes all tokens of a sequence by its summary, masked tokens left out", function()
    local real = { { true, true, false, true, true }, { false, true, true, false, false }, { true, true, true, true, true } }
    for _, mask in ipairs { false, real } do
      for _, from in ipairs { "mean", "first", "last", "running" } do
        local m = router { top_k = 2, from = from }
        local x = rand(3, 5, D)
        local routing = m:route(x:reshape { 15, D }, { shape = { 3, 5 }, mask = mask and moe.tensor(mask):reshape { 15 } or nil })
        local index, gate = routing.index:totable(), routing.gate:totable()
        for b, rows in ipairs(x:totable()) do
          for t = 1, 5 do
            local s = summary(rows, from, from == "running" and t or 5, mask and real[b])
            local one = m.router:route(moe.tensor({ s }, { dtype = "f64" }))
            local at = 5 * (b - 1) + t
            if not mask or real[b][t] then
              assert.same(one.index[1]:totable(), index[at])
              assert.close(one.gate[1], gate[at], EXACT)
              assert.close(one.probs[1], routing.probs[at], EXACT)
            end
          end
        end
        assert.equal(mask and 2 * 11 or 30, routing.num_assignments)
      end
    end
  end)

  it("decides once, with one draw of noise a sequence, by any router", function()
    local m = router { router = moe.router.topk { top_k = 1, noise = 2.0 } }
    local index = m:route(rand(24, D), { shape = { 4, 6 } }).index:totable()
    for b = 0, 3 do
      for t = 2, 6 do assert.same(index[6 * b + 1], index[6 * b + t]) end
    end
    local drawn = router { router = moe.router.random { draw = "token" } }:route(rand(24, D), { shape = { 4, 6 } }).index:totable()
    for b = 0, 3 do
      for t = 2, 6 do assert.same(drawn[6 * b + 1], drawn[6 * b + t]) end
    end
  end)

  it("with running means knows nothing of the future", function()
    local m = router { from = "running" }
    local x = rand(6, D)
    local y = x:clone()
    y:narrow(1, 4, 3):add_(1)
    assert.same(m:route(x).probs:narrow(1, 1, 3):totable(), m:route(y).probs:narrow(1, 1, 3):totable())
  end)

  it("has the gradient that differences show", function()
    for _, from in ipairs { "mean", "last", "running" } do
      local m = router { top_k = E, from = from }
      local mask = moe.tensor { true, false, true, true, true, false }
      assert(moe.gradcheck(function(x, w)
        m.router.weight = w
        return m:route(x, { shape = { 2, 3 }, mask = mask }).weight
      end, { rand(6, D), m.router.weight }))
    end
  end)

  it("takes a forced choice, a balance loss, no tokens, and sequences of padding", function()
    local m = router { top_k = 2 }
    local choice = moe.tensor({ { 1, 2 }, { 1, 2 }, { 5, 6 }, { 5, 6 } }, { dtype = "i64" })
    local routing = m:route(rand(4, D), { shape = { 2, 2 }, choice = choice })
    assert.same(choice:totable(), routing.index:totable())
    assert.is_true(moe.loss.switch(1)(routing):item() > 0)
    assert.equal(0, m:route(rand(0, D), { shape = { 2, 0 } }).num_assignments)
    for _, from in ipairs { "mean", "first", "last", "running" } do
      local none = router { from = from }:route(rand(4, D), { shape = { 2, 2 }, mask = moe.zeros({ 4 }, { dtype = "bool" }) })
      assert.equal(0, none.num_assignments)
    end
  end)

  it("names what is wrong", function()
    assert.matches("not both", helper.error_of(router, { top_k = 2, router = moe.router.topk {} }))
    assert.matches("'from' must be one of mean, first, last, running", helper.error_of(router, { from = "middle" }))
    assert.matches("not by a soft routing",
      helper.error_of(function() router { router = moe.router.soft {} }:route(rand(4, D), { shape = { 2, 2 } }) end))
  end)
end)
