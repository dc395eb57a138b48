-- Convolutions over time against plain loops.
local helper = require "spec.helper"
local moe = require "moe"

local function random(rng, shape, dtype)
  return helper.tensor(function() return rng.normal() end, shape, { dtype = dtype or "f64" })
end

-- y[b][o][l] of conv1d by its definition
local function naive(x, w, bias, o)
  local tx, tw, tb = x:totable(), w:totable(), bias and bias:totable()
  local b, cin, t, cout, width = x.shape[1], x.shape[2], x.shape[3], w.shape[1], w.shape[3]
  local per, len = cin // o.groups, (t + 2 * o.padding - o.dilation * (width - 1) - 1) // o.stride + 1
  local y = {}
  for i = 1, b do
    y[i] = {}
    for c = 1, cout do
      y[i][c] = {}
      local first = (c - 1) // (cout // o.groups) * per
      for l = 1, len do
        local s = tb and tb[c] or 0
        for p = 1, per do
          for k = 1, width do
            local at = (l - 1) * o.stride + (k - 1) * o.dilation - o.padding + 1
            s = s + tw[c][p][k] * (tx[i][first + p][at] or 0)
          end
        end
        y[i][c][l] = s
      end
    end
  end
  return y
end

describe("conv1d", function()
  for _, case in ipairs {
    { 2, 3, 8, 4, 3, stride = 1, padding = 0, dilation = 1, groups = 1 },
    { 1, 1, 5, 1, 5, stride = 1, padding = 0, dilation = 1, groups = 1 },
    { 2, 4, 9, 6, 3, stride = 2, padding = 2, dilation = 2, groups = 2 },
    { 3, 4, 7, 4, 2, stride = 1, padding = 1, dilation = 3, groups = 4 },
    { 1, 2, 11, 3, 1, stride = 3, padding = 0, dilation = 1, groups = 1 },
    { 1, 2, 1, 2, 2, stride = 1, padding = 1, dilation = 1, groups = 1 },
  } do
    local b, cin, t, cout, width = table.unpack(case)
    it(("x [%d, %d, %d], weight [%d, %d, %d], stride %d, padding %d, dilation %d, groups %d"):format(b, cin, t, cout, cin // case.groups,
      width, case.stride, case.padding, case.dilation, case.groups), function()
      local rng = helper.random(t)
      local x, w, bias = random(rng, { b, cin, t }), random(rng, { cout, cin // case.groups, width }), random(rng, { cout })
      local options = { stride = case.stride, padding = case.padding, dilation = case.dilation, groups = case.groups }
      local expected = naive(x, w, bias, case)
      assert.close(expected, moe.conv1d(x, w, bias, options), { rtol = 1e-12, atol = 1e-12 })
      assert.close(naive(x, w, nil, case), moe.conv1d(x, w, options), { rtol = 1e-12, atol = 1e-12 })
      for _, v in ipairs(helper.views(x)) do
        assert.close(expected, moe.conv1d(v[2], helper.views(w)[1][2], bias, options), { rtol = 1e-12, atol = 1e-12 })
      end
      assert.close(expected, moe.conv1d(x:to "f32", w:to "f32", bias:to "f32", options), { rtol = 1e-5, atol = 1e-5 })
      moe.gradcheck(function(xi, wi, bi) return moe.conv1d(xi, wi, bi, options) end, { x, w, bias })
    end)
  end

  it("says what is wrong", function()
    local function says(want, ...)
      local message = helper.error_of(moe.conv1d, ...)
      assert.truthy(message:find(want, 1, true), message)
    end
    says("conv1d: channels do not fit: x is [1, 3, 5], weight is [4, 2, 3], groups is 1", moe.zeros { 1, 3, 5 }, moe.zeros { 4, 2, 3 })
    says("conv1d: the window is longer than the input: x is [1, 2, 3] with padding 0, weight is [4, 2, 5] with dilation 1",
      moe.zeros { 1, 2, 3 }, moe.zeros { 4, 2, 5 })
    says("conv1d: bias must be [4]", moe.zeros { 1, 2, 3 }, moe.zeros { 4, 2, 3 }, moe.zeros { 3 })
    says("conv1d: stride, dilation and groups count from 1", moe.zeros { 1, 2, 3 }, moe.zeros { 4, 2, 3 }, { stride = 0 })
    says("conv1d: wants x [batch, channels, time]", moe.zeros { 2, 3 }, moe.zeros { 4, 2, 3 })
  end)
end)

describe("causal_conv1d", function()
  local function reference(x, w, bias, initial, silu)
    local b, t, c, width = x.shape[1], x.shape[2], x.shape[3], w.shape[2]
    local led = moe.cat({ initial or moe.zeros({ b, width - 1, c }, { dtype = x.dtype }), x }, 2)
    local y = moe.conv1d(led:transpose(2, 3), w:unsqueeze(2), bias, { groups = c }):transpose(2, 3)
    if silu then y = y:silu() end
    return y, led:narrow(2, t + 1, width - 1)
  end

  for _, size in ipairs { { 2, 7, 3, 4 }, { 1, 1, 5, 4 }, { 3, 2, 65, 3 }, { 2, 9, 130, 2 }, { 2, 5, 4, 1 }, { 1, 40, 64, 7 } } do
    local b, t, c, width = table.unpack(size)
    it(("is conv1d led by its state: x [%d, %d, %d], width %d"):format(b, t, c, width), function()
      local rng = helper.random(c)
      local x, w, bias, initial = random(rng, { b, t, c }), random(rng, { c, width }), random(rng, { c }), random(rng, { b, width - 1, c })
      for _, activation in ipairs { "none", "silu" } do
        for _, state in ipairs { false, initial } do
          for _, bi in ipairs { false, bias } do
            local options = { activation = activation, initial_state = state or nil, bias = bi or nil }
            local y, last = moe.causal_conv1d(x, w, options)
            local ry, rlast = reference(x, w, bi or nil, state or nil, activation == "silu")
            assert.close(ry, y, { rtol = 1e-12, atol = 1e-12 })
            assert.close(rlast, last, { rtol = 0, atol = 0 })
            local wide = moe.cat({ x, x }, 3):narrow(3, c + 1, c) -- rows of a wider tensor
            assert.close(y, (moe.causal_conv1d(wide, w, options)), { rtol = 0, atol = 0 })
          end
        end
      end
      local f32 = (moe.causal_conv1d(x:to "f32", w:to "f32", bias:to "f32", initial:to "f32", "silu"))
      assert.close((reference(x, w, bias, initial, true)), f32, { rtol = 1e-4, atol = 1e-4 })
    end)

    it(("has that one's gradients: x [%d, %d, %d], width %d"):format(b, t, c, width), function()
      local rng = helper.random(c + 1)
      local inputs = { random(rng, { b, t, c }), random(rng, { c, width }), random(rng, { c }), random(rng, { b, width - 1, c }) }
      local function gradients(f)
        local leaves = {}
        for i, x in ipairs(inputs) do
          leaves[i] = x:detach()
          leaves[i].requires_grad = true
        end
        local y, last = f(leaves[1], leaves[2], leaves[3], leaves[4])
        local weight = helper.tensor(function(i) return math.cos(i) end, y.shape, { dtype = "f64" })
        local loss = (y * weight):sum() + (last * 0.3):square():sum()
        loss:backward()
        local list = {}
        for i, leaf in ipairs(leaves) do list[i] = leaf.grad end
        return list
      end
      local expected = gradients(function(x, w, bias, initial) return reference(x, w, bias, initial, true) end)
      local got = gradients(function(x, w, bias, initial) return moe.causal_conv1d(x, w, bias, initial, "silu") end)
      for i = 1, 4 do
        assert.close(expected[i] or moe.zeros(inputs[i].shape), got[i], { rtol = 1e-11, atol = 1e-11, name = "input " .. i })
      end
    end)
  end

  it("gives the same whole, in pieces and step by step", function()
    local x, w, bias = moe.randn(2, 11, 6), moe.randn(6, 4), moe.randn(6)
    local whole, last = moe.causal_conv1d(x, w, bias, { activation = "silu" })
    for _, cut in ipairs { { 4, 7 }, { 1, 1, 1, 8 }, { 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1 }, { 2, 0, 9 } } do
      local state, at, parts = moe.zeros { 2, 3, 6 }, 1, {}
      for i, n in ipairs(cut) do
        parts[i], state = moe.causal_conv1d(x:narrow(2, at, n), w, bias, state, "silu")
        at = at + n
      end
      assert.close(whole, moe.cat(parts, 2), { rtol = 0, atol = 0 })
      assert.close(last, state, { rtol = 0, atol = 0 })
    end
  end)

  it("gives the same bits for 1 and 2 threads", function()
    local before = moe.threads()
    finally(function() moe.threads(before) end)
    local function run(n)
      moe.threads(n)
      moe.manual_seed(2)
      local x, w, bias = moe.randn(3, 60, 200), moe.randn(200, 4), moe.randn(200)
      for _, t in ipairs { x, w, bias } do t.requires_grad = true end
      local y = moe.causal_conv1d(x, w, bias, { activation = "silu" })
      y:square():sum():backward()
      return { y, x.grad, w.grad, bias.grad }
    end
    local one, two = run(1), run(2)
    for i = 1, 4 do assert.close(one[i], two[i], { rtol = 0, atol = 0 }) end
  end)

  it("knows empty sizes, and says what is wrong", function()
    local y, state = moe.causal_conv1d(moe.zeros { 2, 0, 3 }, moe.zeros { 3, 4 }, { initial_state = moe.ones { 2, 3, 3 } })
    assert.same({ 2, 0, 3 }, y.shape)
    assert.close(moe.ones { 2, 3, 3 }, state)
    local function says(want, ...)
      local message = helper.error_of(moe.causal_conv1d, ...)
      assert.truthy(message:find(want, 1, true), message)
    end
    says("causal_conv1d: wants x [batch, time, channels] and weight [channels, width]: x is [2, 5, 3], weight is [4, 3]",
      moe.zeros { 2, 5, 3 }, moe.zeros { 4, 3 })
    says("causal_conv1d: initial_state must be [2, 3, 3] = [batch, width - 1, channels], got [2, 4, 3]",
      moe.zeros { 2, 5, 3 }, moe.zeros { 3, 4 }, { initial_state = moe.zeros { 2, 4, 3 } })
    says("causal_conv1d: bias must be [3]", moe.zeros { 2, 5, 3 }, moe.zeros { 3, 4 }, moe.zeros { 4 })
  end)
end)
