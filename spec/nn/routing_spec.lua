local moe = require "moe"
local helper = require "spec.helper"

local function i64(t) return moe.tensor(t, { dtype = "i64" }) end
local function f64(t) return moe.tensor(t, { dtype = "f64" }) end

-- Sorted by expert, then token, then place: what every constructor must arrive at.
local function expected_lists(entries, experts)
  table.sort(entries, function(a, b)
    if a[2] ~= b[2] then return a[2] < b[2] end
    if a[1] ~= b[1] then return a[1] < b[1] end
    return a[3] < b[3]
  end)
  local token, expert, source, offsets, at = {}, {}, {}, {}, 1
  for i, e in ipairs(entries) do token[i], expert[i], source[i] = e[1], e[2], e[3] end
  for e = 1, experts do
    offsets[e] = at
    while at <= #entries and entries[at][2] == e do at = at + 1 end
  end
  offsets[experts + 1] = at
  return token, expert, source, offsets
end

local function check_lists(routing, entries)
  local token, expert, source, offsets = expected_lists(entries, routing.num_experts)
  assert.equal(#entries, routing.num_assignments)
  assert.same(token, routing.token:totable())
  assert.same(expert, routing.expert:totable())
  assert.same(source, routing.source:totable())
  assert.same(offsets, routing.offsets:totable())
end

describe("moe.routing", function()
  it("sorts the choices of tokens by expert and keeps the order of tokens", function()
    local r = moe.routing.topk(i64 { { 2, 1 }, { 3, 2 }, { 0, 3 }, { 2, 1 } }, f64 { { .6, .4 }, { .7, .3 }, { .5, .5 }, { .9, .1 } }, 4)
    assert.same({ 1, 4, 1, 2, 4, 2, 3 }, r.token:totable())
    assert.same({ 1, 1, 2, 2, 2, 3, 3 }, r.expert:totable())
    assert.same({ 1, 3, 6, 8, 8 }, r.offsets:totable())
    assert.close({ .4, .1, .6, .3, .9, .7, .5 }, r.weight)
    assert.same({ 2, 3, 2, 0 }, r:load():totable())
    assert.close({ .5, 1.8, 1.2, 0 }, r:importance(), { atol = 1e-6 })
    assert.equal(4, r.num_tokens)
    assert.equal(4, r.num_experts)
    assert.equal(1, r.unassigned)
    assert.equal(0, r.dropped)
    local n, which = r:dead()
    assert.equal(1, n)
    assert.same({ 4 }, which)
  end)

  it("agrees with a plain sort on random lists of any length, with few and with a million experts", function()
    local r = helper.random(3)
    for _, case in ipairs { { 0, 1, 3 }, { 1, 1, 1 }, { 17, 3, 5 }, { 40, 2, 5000 }, { 9, 4, 1000000 }, { 300, 4, 7 }, { 64, 1, 2048 } } do
      local T, k, E = table.unpack(case)
      local index, entries = {}, {}
      for t = 1, T do
        index[t] = {}
        for j = 1, k do
          local e = r() < 0.2 and 0 or r(1, E)
          index[t][j] = e
          if e > 0 then entries[#entries + 1] = { t, e, (t - 1) * k + j } end
        end
      end
      local it_ = T > 0 and i64(index) or moe.zeros({ 0, k }, { dtype = "i64" })
      local routing = moe.routing.topk(it_, nil, E)
      if E <= 5000 then
        check_lists(routing, entries)
      else
        local token, expert, source = expected_lists(entries, 1)
        assert.same(token, routing.token:totable())
        assert.same(expert, routing.expert:totable())
        assert.same(source, routing.source:totable())
      end
    end
  end)

  it("takes the nonzeros of a dense matrix of gates, any number a token", function()
    local g = f64 { { 0, .5, .25 }, { 0, 0, 0 }, { 1, 0, 0 }, { .1, .2, .3 } }
    g.requires_grad = true
    local routing = moe.routing.dense(g)
    check_lists(routing, { { 1, 2, 2 }, { 1, 3, 3 }, { 3, 1, 7 }, { 4, 1, 10 }, { 4, 2, 11 }, { 4, 3, 12 } })
    assert.close({ 1, .1, .5, .2, .25, .3 }, routing.weight)
    local y = routing:combine(f64 { { 1 }, { 2 }, { 3 }, { 4 }, { 5 }, { 6 } })
    assert.close({ { 2.75 }, { 0 }, { 1 }, { .2 + .8 + 1.8 } }, y)
    y:sum():backward()
    assert.close({ { 0, 3, 5 }, { 0, 0, 0 }, { 1, 0, 0 }, { 2, 4, 6 } }, g.grad)
  end)

  it("takes the choices of experts, and lists them in order of token", function()
    local routing = moe.routing.experts(i64 { { 5, 2 }, { 2, 0 }, { 1, 3 } }, f64 { { .5, .2 }, { .9, 7 }, { .1, .3 } }, 5)
    check_lists(routing, { { 5, 1, 1 }, { 2, 1, 2 }, { 2, 2, 3 }, { 1, 3, 5 }, { 3, 3, 6 } })
    assert.close({ .2, .5, .9, .1, .3 }, routing.weight)
    assert.close({ { .1 }, { 1.1 }, { .3 }, { 0 }, { .5 } }, routing:combine(moe.ones({ 5, 1 }, { dtype = "f64" })))
  end)

  it("leaves masked tokens out of everything", function()
    local mask = moe.tensor { true, false, true }
    local index, weight = i64 { { 1, 2 }, { 1, 2 }, { 2, 1 } }, f64 { { 1, 2 }, { 3, 4 }, { 5, 6 } }
    local routing = moe.routing.topk(index, weight, 2, { mask = mask })
    check_lists(routing, { { 1, 1, 1 }, { 1, 2, 2 }, { 3, 2, 5 }, { 3, 1, 6 } })
    assert.equal(2, routing.masked)
    assert.same({ 2, 2 }, routing:load():totable())
    assert.equal(2, moe.routing.dense(f64 { { 1, 1 }, { 1, 1 }, { 0, 0 } }, { mask = mask }).num_assignments)
    assert.equal(3, moe.routing.experts(i64 { { 1, 2 }, { 3, 1 } }, nil, 3, { mask = mask }).num_assignments)
  end)

  it("mixes softly, over all tokens or within each sequence", function()
    moe.manual_seed(5)
    local x = moe.randn(6, 3, { dtype = "f64" })
    local d3, c3 = moe.rand(6, 2, 2, { dtype = "f64" }), moe.rand(6, 2, 2, { dtype = "f64" })
    local routing = moe.routing.soft(d3, c3)
    assert.equal(6, routing.num_tokens)
    assert.equal(4, routing.num_assignments)
    assert.same({ 1, 1, 2, 2 }, routing.expert:totable())
    local bank = moe.experts.map(function(xe, e) return xe * e end)
    local slots = moe.einsum("tes,td->esd", { d3, x }) * f64 { { { 1 } }, { { 2 } } }
    assert.close(moe.einsum("tes,esd->td", { c3, slots }), bank(x, routing))
    -- two sequences of three tokens: no token of one reaches the other
    local d4, c4 = d3:reshape { 2, 3, 2, 2 }, c3:reshape { 2, 3, 2, 2 }
    local y = bank(x, moe.routing.soft(d4, c4))
    for b = 1, 2 do
      local part = bank(x:narrow(1, 3 * b - 2, 3), moe.routing.soft(d4[b], c4[b]))
      assert.close(part, y:narrow(1, 3 * b - 2, 3))
    end
  end)

  describe("limit", function()
    local index = i64 { { 1 }, { 1 }, { 2 }, { 1 }, { 1 } }
    local weight = f64 { { .5 }, { .9 }, { .1 }, { .7 }, { .9 } }

    it("keeps the largest weights, the earlier of equals, and says what went", function()
      local full = moe.routing.topk(index, weight, 2)
      local routing = full:limit(2, "probs")
      check_lists(routing, { { 2, 1, 2 }, { 5, 1, 5 }, { 3, 2, 3 } })
      assert.equal(2, routing.dropped)
      assert.same({ 1, 4 }, routing.dropped_token:totable())
      assert.same({ 1, 1 }, routing.dropped_expert:totable())
      assert.same({ 4, 1 }, routing:demand():totable())
      assert.same({ 2, 1 }, routing:load():totable())
      assert.close({ .9, .9, .1 }, routing.weight)
      assert.equal(4, full:limit(1).dropped + full:limit(3).dropped)
      local equal = moe.routing.topk(index, nil, 2):limit(2)
      assert.same({ 1, 2, 3 }, equal.token:totable())
    end)

    it("keeps the first tokens", function()
      local routing = moe.routing.topk(index, weight, 2):limit(3, "position")
      assert.same({ 1, 2, 4, 3 }, routing.token:totable())
      assert.close({ { .5 }, { .9 }, { .1 }, { .7 }, { 0 } }, routing:combine(moe.ones({ 4, 1 }, { dtype = "f64" })))
      local none = moe.routing.topk(index, weight, 2):limit(0)
      assert.equal(0, none.num_assignments)
      assert.close(moe.zeros(5, 2, { dtype = "f64" }), none:combine(moe.zeros({ 0, 2 }, { dtype = "f64" })))
    end)
  end)

  it("gathers, combines and multiplies by group with right gradients", function()
    moe.manual_seed(2)
    local index = i64 { { 1, 3 }, { 3, 0 }, { 3, 1 }, { 1, 3 }, { 0, 0 } }
    local x, w = moe.randn(5, 3, { dtype = "f64" }), moe.rand(5, 2, { dtype = "f64" })
    local m, b = moe.randn(4, 2, 3, { dtype = "f64" }), moe.randn(4, 2, { dtype = "f64" })
    assert.is_true(moe.gradcheck(function(X, W, M, B)
      local routing = moe.routing.topk(index, W, 4)
      local rows = routing:gather(X)
      return routing:combine(routing:linear(rows, M, B)), routing:combine(rows, false), routing.weight
    end, { x, w, m, b }))
    local routing = moe.routing.topk(index, w, 4)
    local rows = routing:gather(x)
    assert.close(x[4], rows[3])
    local y = routing:linear(rows, m, b)
    assert.close(m[3]:matmul(x[2]) + b[3], y[routing.offsets[3] + 1])
  end)

  it("measures the load in closed form", function()
    local even = moe.routing.topk(i64 { { 1, 2 }, { 3, 4 } }, nil, 4)
    assert.close(math.log(4), even:entropy())
    assert.close(1, even:max_over_mean())
    local one = moe.routing.topk(i64 { { 2 }, { 2 }, { 2 } }, nil, 4)
    assert.equal(0, one:entropy())
    assert.close(4, one:max_over_mean())
    assert.equal(3, (one:dead()))
    local empty = moe.routing.topk(moe.zeros({ 0, 2 }, { dtype = "i64" }), nil, 4)
    assert.equal(0, empty:entropy())
    assert.equal(1, empty:max_over_mean())
    one.probs = moe.full({ 3, 4 }, 0.25)
    assert.close(math.log(4), one:token_entropy(), { rtol = 1e-5 })
  end)

  it("adds up auxiliary losses", function()
    local r = moe.routing.topk(i64 { { 1 } }, nil, 1)
    assert.equal(0, r:aux():item())
    r:add_aux("a", moe.tensor(2)):add_aux("b", 3):add_aux("a", moe.tensor(1))
    assert.equal(6, r:aux():item())
    assert.equal(3, r:aux("a"):item())
    assert.is_nil(r:aux "c")
  end)

  it("reads well and takes fields of one's own", function()
    local r = moe.routing.topk(i64 { { 1, 2 }, { 2, 0 } }, nil, 3)
    assert.matches("2 tokens %-> 3 experts, 3 assignments", tostring(r))
    assert.matches("1 2 0", tostring(r))
    r.temperature = 0.7
    assert.equal(0.7, r.temperature)
    assert.matches("field 'expert' cannot be set", helper.error_of(function() r.expert = 1 end))
    assert.same({ token = { 1, 1, 2 }, expert = { 1, 2, 2 }, weight = { 1, 1, 1 }, offsets = { 1, 2, 4, 4 }, num_tokens = 2,
      num_experts = 3 }, r:totable())
    r:close()
    assert.matches("closed", tostring(r))
    assert.matches("closed", helper.error_of(function() return r:load() end))
  end)

  it("holds the closures behind its weights", function()
    local twice = moe.fn { forward = function(_, a) return a * 2 end, backward = function(_, g) return g * 2 end }
    local w = f64 { { 1 }, { 2 } }
    w.requires_grad = true
    local routing = moe.routing.topk(i64 { { 1 }, { 1 } }, twice(w), 1)
    collectgarbage()
    collectgarbage()
    local y = routing:combine(f64 { { 3 }, { 5 } })
    collectgarbage()
    y:sum():backward()
    assert.close({ { 6 }, { 10 } }, w.grad)
  end)

  it("names what is wrong", function()
    local cases = {
      { "index %[1, 2%] is 4; wanted 1 to 3, or 0 for none", function() return moe.routing.topk(i64 { { 1, 4 } }, nil, 3) end },
      { "index %[1, 1%] is %-1", function() return moe.routing.topk(i64 { { -1, 1 } }, nil, 3) end },
      { "weight is %[1, 1%], but index is %[1, 2%]", function() return moe.routing.topk(i64 { { 1, 2 } }, f64 { { 1 } }, 3) end },
      { "wanted integers", function() return moe.routing.topk(f64 { { 1 } }, nil, 3) end },
      { "num_experts", function() return moe.routing.topk(i64 { { 1 } }) end },
      { "num_experts must be at least 1", function() return moe.routing.topk(i64 { { 0 } }, nil, 0) end },
      { "mask is", function() return moe.routing.topk(i64 { { 1 } }, nil, 3, { mask = moe.tensor { true, false } }) end },
      { "unknown option 'maks' %(did you mean 'mask'", function() return moe.routing.topk(i64 { { 1 } }, nil, 3, { maks = 1 }) end },
      { "option 'probs' must be a tensor %[1, 3%]",
        function() return moe.routing.topk(i64 { { 1 } }, nil, 3, { probs = moe.ones(2, 2) }) end },
      { "gates is", function() return moe.routing.dense(i64 { { 1 } }) end },
      { "index %[1, 1%] is 9", function() return moe.routing.experts(i64 { { 9 } }, nil, 3) end },
      { "routing.soft: dispatch is", function() return moe.routing.soft(moe.ones(2, 2), moe.ones(2, 2)) end },
      { "fixed number of slots", function() return moe.routing.soft(moe.ones(2, 2, 1), moe.ones(2, 2, 1)):limit(1) end },
      { "capacity must not be negative", function() return moe.routing.topk(i64 { { 1 } }, nil, 1):limit(-1) end },
      { "the priority is a f32 tensor %[2%], wanted floats %[1%]", function()
        return moe.routing.topk(i64 { { 1 } }, nil, 1):limit(1, moe.ones(2))
      end },
      { "unknown drop policy", function() return moe.routing.topk(i64 { { 1 } }, nil, 1):limit(1, "random") end },
      { "wanted floats %[2, d%]", function() return moe.routing.topk(i64 { { 1 }, { 1 } }, nil, 1):gather(moe.ones(3, 2)) end },
      { "wanted floats %[1, n, 4%]",
        function() return moe.routing.topk(i64 { { 1 } }, nil, 1):linear(moe.ones(1, 4), moe.ones(1, 2, 3)) end },
    }
    for _, case in ipairs(cases) do assert.matches(case[1], helper.error_of(case[2])) end
  end)
end)
