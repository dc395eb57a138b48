-- The graph and the engine: accumulation, several roots, in-place changes, deep chains, second derivatives.
require "spec.helper"
local moe = require "moe"

local function leaf(...) return moe.randn(..., { dtype = "f64", requires_grad = true }) end

describe("backward", function()
  it("adds into .grad, over calls and over uses", function()
    local x = leaf(3)
    local y = x * 2 + x * 3
    y:sum():backward()
    assert.close({ 5, 5, 5 }, x.grad)
    local z = x * 4
    z:sum():backward()
    assert.close({ 9, 9, 9 }, x.grad)
    x.grad = nil
    assert.is_nil(x.grad)
  end)

  it("gives .grad memory of its own", function()
    local a, b = leaf(2), leaf(2)
    local g = moe.ones(2, { dtype = "f64" })
    moe.backward(a + b, g)
    a.grad:mul_(10)
    assert.close({ 1, 1 }, b.grad)
    assert.close({ 1, 1 }, g)
  end)

  it("walks several roots at once", function()
    local x = leaf(2)
    moe.backward({ (x * x):sum(), (x * 3):sum() })
    assert.close((x * 2 + 3):totable(), x.grad)
  end)

  it("sums into an expanded gradient without changing shared memory", function()
    local x = leaf(3)
    local s = x * 1
    local loss = s:sum() + (s * 2):sum() + s:sum()
    loss:backward()
    assert.close({ 4, 4, 4 }, x.grad)
  end)

  it("frees what was saved, and says so the second time", function()
    local x = leaf(2)
    local y = (x * x):sum()
    y:backward()
    assert.error_matches(function() y:backward() end, "freed by an earlier backward %(pass retain_graph = true")
    local z = (x * x):sum()
    z:backward({ retain_graph = true })
    z:backward()
    assert.close((x * 6):totable(), x.grad)
  end)

  it("refuses what has no gradient, and a vector without one given", function()
    assert.error_matches(function() moe.ones(1):backward() end, "backward: the tensor has no gradient")
    assert.error_matches(function() leaf(2):backward() end, "backward: a gradient must be given for a tensor of shape %[2%]")
    assert.error_matches(function() leaf(2):backward(moe.ones(3)) end, "backward: the gradient has shape %[3%], the tensor %[2%]")
    assert.error_matches(function() leaf(2):backward(nil, { retain = true }) end, "backward: unknown option 'retain'")
  end)

  it("does not recurse: a chain of 100,000 operations", function()
    local x = moe.ones(2, { requires_grad = true })
    local y = x
    for _ = 1, 100000 do y = y + 1 end
    y:sum():backward()
    assert.close({ 1, 1 }, x.grad)
  end)

  it("notices that a saved value was changed in place", function()
    local x = leaf(3)
    local y = x * 1
    local z = (y * y):sum()
    y:add_(1)
    assert.error_matches(function() z:backward() end, "'mul' needs for its gradient was changed in place")
  end)

  it("follows an in-place change that nothing needed the old value for", function()
    local x = leaf(3)
    local y = x * 2
    y:add_(1)
    y:mul_(3)
    y:sum():backward()
    assert.close({ 6, 6, 6 }, x.grad)
    local e = x * 1
    e:exp_() -- keeps its result, not its argument
    x.grad = nil
    e:sum():backward()
    assert.close(x:detach():exp():totable(), x.grad)
  end)

  it("refuses in-place changes of leaves, of views under recording, and of expanded tensors", function()
    local x = leaf(3)
    assert.error_matches(function() x:add_(1) end, "add_: a leaf that requires a gradient")
    moe.no_grad(function() x:add_(1) end)
    local y = x * 1
    assert.error_matches(function() y:view(3, 1):add_(1) end, "add_: a view cannot be changed in place")
    assert.error_matches(function() moe.ones(1):expand(4):add_(1) end, "add_: an expanded tensor")
  end)
end)

describe("moe.grad", function()
  it("leaves .grad alone and answers nil for what was not used", function()
    local x, y, unused = leaf(2), leaf(2), leaf(2)
    local gx, gy, gu = moe.grad((x * y):sum(), { x, y, unused })
    assert.close(y:totable(), gx)
    assert.close(x:totable(), gy)
    assert.is_nil(gu)
    assert.is_nil(x.grad)
  end)

  it("answers for results in the middle of the graph", function()
    local x = leaf(2)
    local h = x * 3
    local g = moe.grad((h * h):sum(), h)
    assert.close((h * 2):totable(), g)
  end)

  it("takes gradients of the outputs", function()
    local x = leaf(2)
    local g = moe.grad(x * 2, x, { grad_outputs = moe.tensor({ 1, 10 }, { dtype = "f64" }) })
    assert.close({ 2, 20 }, g)
  end)

  it("builds second derivatives under create_graph", function()
    local x = moe.tensor({ 0.3, -1.2, 2 }, { dtype = "f64", requires_grad = true })
    local g = moe.grad((x * x * x):sum(), x, { create_graph = true })
    local h = moe.grad(g:sum(), x)
    assert.close((x * 6):totable(), h)
    -- exp keeps its own result: the second derivative goes through it
    local e = moe.grad(x:exp():sum(), x, { create_graph = true })
    assert.close(x:detach():exp():totable(), moe.grad(e:sum(), x))
    local t = moe.grad(x:tanh():sum(), x, { create_graph = true })
    local want = {}
    for i, v in ipairs(x:totable()) do
      local y = (math.exp(2 * v) - 1) / (math.exp(2 * v) + 1)
      want[i] = -2 * y * (1 - y * y)
    end
    assert.close(want, moe.grad(t:sum(), x), { rtol = 1e-12, atol = 1e-12 })
  end)
end)

describe("recording", function()
  it("is off in no_grad, on in enable_grad, and back after an error", function()
    local x = leaf(2)
    assert.falsy(moe.no_grad(function() return (x * 2).requires_grad end))
    assert.truthy(moe.no_grad(function() return moe.enable_grad(function() return (x * 2).requires_grad end) end))
    assert.falsy(pcall(moe.no_grad, function() error "x" end))
    assert.truthy(moe.is_grad_enabled())
    assert.same({ 1, nil, 3, n = 3 }, table.pack(moe.no_grad(function() return 1, nil, 3 end)))
  end)

  it("refuses an operation without a gradient rather than answering zeros", function()
    local x = leaf(4)
    for _, row in ipairs(moe.core.ops()) do
      assert.truthy(row.differentiable ~= nil)
    end
    assert.error_matches(function() return moe.rand(3, { requires_grad = true }):argmax():backward() end, "no gradient")
    assert.falsy(x:gt(0).requires_grad)
  end)
end)

describe("autocast", function()
  it("takes products in bf16 and gives f32 gradients", function()
    local x, w = moe.randn(4, 8), moe.randn(8, 3, { requires_grad = true })
    local y = moe.autocast("bf16", function() return x:matmul(w) end)
    assert.equal("bf16", y.dtype)
    assert.close(x:to("bf16"):to("f32"):matmul(w:detach():to("bf16"):to("f32")), y:to("f32"), { rtol = 1e-2, atol = 1e-2 })
    y:sum():backward()
    assert.equal("f32", w.grad.dtype)
    assert.equal("f32", x:matmul(w).dtype)
    assert.error_matches(function() moe.autocast("i64", print) end, "autocast: argument 1")
  end)
end)
