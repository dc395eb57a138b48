-- Custom functions, checkpoints, hooks and scopes: Lua closures in the graph.
require "spec.helper"
local moe = require "moe"

local square = moe.fn {
  forward = function(ctx, x)
    ctx.x = x
    return x * x
  end,
  backward = function(ctx, g) return g * ctx.x * 2 end,
}

describe("moe.fn", function()
  it("is differentiated by its own backward", function()
    local x = moe.tensor({ 1, 2, 3 }, { requires_grad = true })
    square(square(x)):sum():backward()
    assert.close({ 4, 32, 108 }, x.grad)
  end)

  it("agrees with central differences", function()
    assert.truthy(moe.gradcheck(square, { moe.randn(2, 3, { dtype = "f64", requires_grad = true }) }))
  end)

  it("takes and gives several tensors, and other values", function()
    local f = moe.fn {
      forward = function(ctx, a, k, b)
        ctx.k = k
        return a * k, b + 1, "kept"
      end,
      backward = function(ctx, ga, gb) return ga and ga * ctx.k, gb end,
    }
    local a, b = moe.ones(2, { requires_grad = true }), moe.ones(2, { requires_grad = true })
    local x, y, word = f(a, 5, b)
    assert.equal("kept", word)
    local loss = x:sum() + y:sum() * 3
    loss:backward()
    assert.close({ 5, 5 }, a.grad)
    assert.close({ 3, 3 }, b.grad)
    b.grad = nil
    f(a, 2, b):sum():backward() -- the second output is not used
    assert.is_nil(b.grad)
  end)

  it("that hands out its arguments leaves them as they are", function()
    local pass = moe.fn { forward = function(_, a, b) return a, b end, backward = function(_, ga, gb) return ga, gb end }
    local a, b = moe.ones(2, { requires_grad = true }), moe.ones(2)
    local x, y = pass(a, b)
    assert.falsy(b.requires_grad)
    assert.truthy(a.is_leaf and b.is_leaf)
    local loss = (x * y * 3):sum()
    loss:backward()
    assert.close({ 3, 3 }, a.grad)
  end)

  it("passes errors of its closures on unchanged", function()
    local f = moe.fn { forward = function(_, x) return x * 1 end, backward = function() error({ code = 7 }) end }
    local x = moe.ones(1, { requires_grad = true })
    local ok, e = pcall(function() f(x):sum():backward() end)
    assert.falsy(ok)
    assert.equal(7, e.code)
    local g = moe.fn { forward = function(_, y) return y * 1 end, backward = function() return 3 end }
    assert.error_matches(function() g(x):sum():backward() end, "custom backward must return a tensor or nil for input 1")
    local h = moe.fn { forward = function(_, y) return y * 1 end, backward = function() return moe.ones(7) end }
    assert.error_matches(function() h(x):sum():backward() end, "gave a gradient f32 %[7%] for its input 1, which is f32 %[1%]")
    assert.error_matches(function() moe.fn { forward = print } end, "fn: wants a table")
  end)

  it("is collected with its cycles", function()
    collectgarbage()
    collectgarbage()
    local before = moe.memory().live
    for _ = 1, 50 do
      local x = moe.zeros(1000, { requires_grad = true })
      local y
      local f = moe.fn { forward = function(_, a) return a * 1 end, backward = function(_, g) return g, y end }
      y = f(x) -- the closure holds its own result
    end
    collectgarbage()
    collectgarbage()
    assert.equal(before, moe.memory().live)
  end)
end)

describe("moe.checkpoint", function()
  it("gives the same numbers and gradients, parameters included", function()
    local w = moe.randn(4, 4, { requires_grad = true })
    local x = moe.randn(3, 4, { requires_grad = true })
    local function f(a) return a:matmul(w):silu():dropout(0.5) end
    moe.manual_seed(3)
    local plain = f(x)
    plain:sum():backward()
    local gx, gw = x.grad, w.grad
    x.grad, w.grad = nil, nil
    moe.manual_seed(3)
    local again = moe.checkpoint(f, x)
    moe.rand(5) -- the masks are replayed from where they were drawn
    assert.close(plain, again, { rtol = 0, atol = 0 })
    again:sum():backward()
    assert.close(gx, x.grad)
    assert.close(gw, w.grad)
  end)

  it("puts the random state back when its second run fails", function()
    local runs = 0
    local x = moe.ones(2, { requires_grad = true })
    local y = moe.checkpoint(function(a)
      runs = runs + 1
      if runs == 2 then error "no" end
      return a:dropout(0.5)
    end, x)
    moe.manual_seed(9)
    local seed = moe.rng_state()
    assert.falsy(pcall(function() y:sum():backward() end))
    assert.equal(seed, (moe.rng_state()))
    assert.falsy(moe.recomputing())
  end)

  it("works when only captured parameters want a gradient", function()
    local w = moe.ones(3, { requires_grad = true })
    moe.checkpoint(function(a) return a * w end, moe.tensor { 1, 2, 3 }):sum():backward()
    assert.close({ 1, 2, 3 }, w.grad)
  end)
end)

describe("hooks", function()
  it("see and replace gradients, of leaves and of results", function()
    local x = moe.ones(2, { requires_grad = true })
    local h = x * 3
    local seen
    h:register_hook(function(g) seen = g:totable() end)
    local id = x:register_hook(function(g) return g * 10 end)
    local both = h * 2 + h
    both:sum():backward()
    assert.same({ 3, 3 }, seen) -- complete: both uses are in
    assert.close({ 90, 90 }, x.grad)
    assert.truthy(x:remove_hook(id))
    assert.falsy(x:remove_hook(id))
    x.grad = nil
    local twice = x * 2
    twice:sum():backward()
    assert.close({ 2, 2 }, x.grad)
  end)

  it("may not change the shape", function()
    local x = moe.ones(2, { requires_grad = true })
    x:register_hook(function() return moe.ones(3) end)
    assert.error_matches(function() (x * 2):sum():backward() end, "hook: returned a gradient of shape %[3%] where %[2%] was given")
  end)
end)

describe("moe.scope", function()
  it("closes what was made inside but what it returns", function()
    local inner
    local kept, list = moe.scope(function()
      local a = moe.ones(3)
      inner = a
      return a * 2, { a + 1 }
    end)
    assert.close({ 2, 2, 2 }, kept)
    assert.close({ 2, 2, 2 }, list[1])
    assert.error_matches(function() return inner + 1 end, "closed tensor")
    assert.falsy(pcall(moe.scope, function() error "x" end))
    assert.close({ 1 }, moe.ones(1)) -- nothing is noted any more
  end)
end)
