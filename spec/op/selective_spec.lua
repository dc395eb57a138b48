-- selective_scan against plain loops, in pieces, packed, on one thread and two.
local helper = require "spec.helper"
local moe = require "moe"

-- The recurrence step by step, from plain operations: everything is differentiable.
local function reference(a)
  local batch, time, ch = table.unpack(a.u.shape)
  local n = a.A:size(2)
  local groups = #a.B.shape == 4 and a.B:size(3) or 1
  local function spread(t) -- [batch, groups, n] of one time -> [batch, channels, n]
    return t:reshape { batch, groups, 1, n }:expand { batch, groups, ch // groups, n }:reshape { batch, ch, n }
  end
  local h, out = a.state or moe.zeros({ batch, ch, n }, { dtype = a.u.dtype }), {}
  for t = 1, time do
    local dt, u = a.delta:select(2, t), a.u:select(2, t)
    if a.bias then dt = dt + a.bias end
    if a.softplus then dt = dt:softplus() end
    dt = dt:unsqueeze(3)
    h = (dt * a.A):exp() * h + dt * spread(a.B:select(2, t)) * u:unsqueeze(3)
    local y = (h * spread(a.C:select(2, t))):sum(3)
    if a.D then y = y + a.D * u end
    if a.z then y = y * a.z:select(2, t):silu() end
    out[t] = y
  end
  return moe.stack(out, 2), h
end

local function run(a)
  return moe.selective_scan(a.u, a.delta, a.A, a.B, a.C, { D = a.D, z = a.z, delta_bias = a.bias, delta_softplus = a.softplus,
    state = a.state, cu_seqlens = a.packed })
end

local function arguments(o)
  local function leaf(...) return moe.randn({ ... }, { dtype = o.dtype or "f64", requires_grad = true }) end
  local B, T, D, N, G = o.batch, o.time, o.channels, o.states, o.groups
  local a = { u = leaf(B, T, D), delta = leaf(B, T, D), softplus = o.softplus ~= false }
  a.A = (-moe.rand({ D, N }, { dtype = o.dtype or "f64" }) * 2):detach()
  a.A.requires_grad = true
  a.B = G and leaf(B, T, G, N) or leaf(B, T, N)
  a.C = G and leaf(B, T, G, N) or leaf(B, T, N)
  if o.all then
    a.D, a.z, a.bias, a.state = leaf(D), leaf(B, T, D), leaf(D), leaf(B, D, N)
  end
  return a
end

local LEAVES = { "u", "delta", "A", "B", "C", "D", "z", "bias", "state" }

local function assert_same(a, wanted, got, tolerance)
  assert.close(wanted[1], got[1], tolerance)
  assert.close(wanted[2], got[2], tolerance)
  local list, names = {}, {}
  for _, name in ipairs(LEAVES) do
    if a[name] then
      list[#list + 1] = a[name]
      names[#names + 1] = name
    end
  end
  local gy, gh = moe.randn(wanted[1].shape, { dtype = wanted[1].dtype }), moe.randn(wanted[2].shape, { dtype = wanted[2].dtype })
  local function grads(r) return table.pack(moe.grad({ (r[1] * gy):sum() + (r[2] * gh):sum() }, list)) end
  local want, have = grads(wanted), grads(got)
  for i, name in ipairs(names) do
    assert.close(want[i], have[i], { rtol = tolerance.rtol, atol = tolerance.atol, name = "gradient of " .. name })
  end
end

describe("selective_scan", function()
  local cases = {
    { batch = 2, time = 7, channels = 5, states = 3 },
    { batch = 1, time = 33, channels = 8, states = 16, all = true }, -- one chunk and one position more
    { batch = 2, time = 100, channels = 37, states = 4, all = true },
    { batch = 3, time = 1, channels = 16, states = 1, all = true },
    { batch = 1, time = 64, channels = 24, states = 2, groups = 3, all = true },
    { batch = 2, time = 40, channels = 40, states = 16, groups = 2, all = true },
    { batch = 1, time = 12, channels = 4, states = 5, softplus = false },
  }
  for _, o in ipairs(cases) do
    it(("agrees with loops: %d x %d, %d channels, %d states%s%s"):format(o.batch, o.time, o.channels, o.states,
      o.groups and ", groups" or "", o.all and ", all options" or ""), function()
      moe.manual_seed(o.time)
      local a = arguments(o)
      assert_same(a, { reference(a) }, { run(a) }, { rtol = 1e-9, atol = 1e-9 })
    end)
  end

  it("agrees in f32, on channels that fill whole vectors and more", function()
    moe.manual_seed(2)
    local a = arguments { batch = 2, time = 50, channels = 80, states = 16, all = true, dtype = "f32" }
    assert_same(a, { reference(a) }, { run(a) }, { rtol = 2e-4, atol = 2e-3 })
  end)

  it("goes on from a state: in pieces and step by step as in one call", function()
    moe.manual_seed(3)
    local a = arguments { batch = 2, time = 70, channels = 20, states = 16, all = true }
    local y, last = run(a)
    for _, sizes in ipairs { { 35, 35 }, { 1, 69 }, { 40, 0, 30 } } do
      local state, parts, at = a.state, {}, 1
      for i, n in ipairs(sizes) do
        local function cut(t) return t:narrow(2, at, n) end
        parts[i], state = run { u = cut(a.u), delta = cut(a.delta), A = a.A, B = cut(a.B), C = cut(a.C), D = a.D, z = cut(a.z),
          bias = a.bias, softplus = true, state = state }
        at = at + n
      end
      assert.close(y, moe.cat(parts, 2), { rtol = 1e-12, atol = 1e-12 })
      assert.close(last, state, { rtol = 1e-12, atol = 1e-12 })
    end
  end)

  it("keeps packed sequences apart, to the bit, with the gradients of each alone", function()
    moe.manual_seed(4)
    local a = arguments { batch = 1, time = 90, channels = 18, states = 4, all = true, dtype = "f32" }
    local bounds = { 0, 33, 33, 40, 90 }
    a.state = moe.randn({ 4, 18, 4 }, { requires_grad = true })
    a.packed = moe.tensor(bounds, { dtype = "i64" })
    local y, last = run(a)
    local gy, gl = moe.randn(1, 90, 18), moe.randn(4, 18, 4)
    local gu, gA, gs = moe.grad({ (y * gy):sum() + (last * gl):sum() }, { a.u, a.A, a.state })
    local sumA = moe.zeros(18, 4)
    for i = 1, 4 do
      local at, n = bounds[i] + 1, bounds[i + 1] - bounds[i]
      local function cut(t) return t:narrow(2, at, n) end
      local one = { u = cut(a.u), delta = cut(a.delta), A = a.A, B = cut(a.B), C = cut(a.C), D = a.D, z = cut(a.z), bias = a.bias,
        softplus = true, state = a.state:narrow(1, i, 1) }
      local yi, li = run(one)
      assert.same(cut(y):totable(), yi:totable())
      assert.same(last:narrow(1, i, 1):totable(), li:totable())
      local gui, gAi, gsi = moe.grad({ (yi * cut(gy)):sum() + (li * gl:narrow(1, i, 1)):sum() }, { one.u, a.A, one.state })
      if n > 0 then assert.close(gui, cut(gu), { rtol = 1e-5, atol = 1e-6 }) end
      assert.close(gsi, gs:narrow(1, i, 1), { rtol = 1e-5, atol = 1e-6 })
      sumA = sumA + gAi
    end
    assert.close(sumA, gA, { rtol = 1e-4, atol = 1e-5 })
  end)

  it("does not carry NaN from one sequence into another", function()
    moe.manual_seed(5)
    local a = arguments { batch = 2, time = 5, channels = 3, states = 2, dtype = "f32" }
    local clean = run(a)
    a.u = a.u:detach():clone()
    a.u[1][2][1] = 0 / 0
    local y = run(a)
    assert.same(clean[2]:totable(), y[2]:totable())
    local first = y[1]:totable()
    assert.is_true(first[2][1] ~= first[2][1] and first[5][1] ~= first[5][1] and first[5][2] == first[5][2])
  end)

  it("gives the same bits on one thread and on two", function()
    local threads = moe.threads()
    local function all(n)
      moe.threads(n)
      moe.manual_seed(6)
      local a = arguments { batch = 2, time = 200, channels = 96, states = 16, all = true, dtype = "f32" }
      local y, last = run(a)
      local out = { y:totable(), last:totable() }
      local leaves = { a.u, a.delta, a.A, a.B, a.C, a.D, a.z, a.bias, a.state }
      for i, g in ipairs { moe.grad({ y:square():sum() }, leaves) } do out[i + 2] = g:totable() end
      return out
    end
    local one, two = all(1), all(2)
    moe.threads(threads)
    assert.same(one, two)
  end)

  it("keeps chunk boundaries for the backward, not every state", function()
    moe.manual_seed(7)
    local a = arguments { batch = 1, time = 1024, channels = 64, states = 16, dtype = "f32" }
    collectgarbage()
    local before = moe.memory().live
    local y, last = run(a)
    local held = moe.memory().live - before
    assert.is_true(held < 4 * (2 * 1024 * 64 + 1024 // 32 * 64 * 16) + 65536, held) -- y (and its slack), boundaries
    assert.is_true(y.requires_grad and last.requires_grad)
  end)

  it("names what is wrong", function()
    local f = moe.selective_scan
    local u, A, B = moe.randn(2, 4, 6), moe.randn(6, 3), moe.randn(2, 4, 3)
    local function int(t) return moe.tensor(t, { dtype = "i64" }) end
    local packed = { moe.randn(1, 4, 6), moe.randn(1, 4, 6), A, moe.randn(1, 4, 3), moe.randn(1, 4, 3) }
    local function with(cu) return function() f(packed[1], packed[2], packed[3], packed[4], packed[5], { cu_seqlens = cu }) end end
    local faults = {
      { "u is %[2, 4, 6%], A is %[5, 3%]", function() f(u, u, moe.randn(5, 3), B, B) end },
      { "B is a f32 tensor %[2, 4, 2%], wanted floats %[2, 4, 3%]", function() f(u, u, A, moe.randn(2, 4, 2), B) end },
      { "delta is a f32 tensor %[2, 4%], wanted floats %[2, 4, 6%]", function() f(u, moe.randn(2, 4), A, B, B) end },
      { "its 4 groups do not divide the 6 channels", function() f(u, u, A, moe.randn(2, 4, 4, 3), B) end },
      { "state is a f32 tensor %[2, 6, 4%], wanted floats %[2, 6, 3%]", function() f(u, u, A, B, B, { state = moe.zeros(2, 6, 4) }) end },
      { "element 2 is 3", with(int { 0, 3 }) },
      { "element 3 is 2", with(int { 0, 3, 2, 4 }) },
      { "packs sequences into a batch of 1, but u has a batch of 2", function() f(u, u, A, B, B, { cu_seqlens = int { 0, 4 } }) end },
    }
    for _, case in ipairs(faults) do assert.matches(case[1], helper.error_of(case[2])) end
  end)
end)
