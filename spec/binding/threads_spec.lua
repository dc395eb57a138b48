-- Coroutines of one state, and numbers of worker threads.
local helper = require "spec.helper"
local moe = require "moe"

describe("coroutines", function()
  it("may each build and walk a graph in turns", function()
    local function work(scale)
      return coroutine.create(function()
        local x = moe.tensor({ 1, 2, 3 }, { requires_grad = true, dtype = "f64" })
        local y = x
        for _ = 1, 5 do
          y = y * scale
          coroutine.yield()
        end
        y:sum():backward()
        return x.grad:totable()
      end)
    end
    local a, b = work(2), work(3)
    local ra, rb
    while coroutine.status(a) ~= "dead" or coroutine.status(b) ~= "dead" do
      local ok
      if coroutine.status(a) ~= "dead" then
        ok, ra = coroutine.resume(a)
        assert.is_true(ok)
      end
      if coroutine.status(b) ~= "dead" then
        ok, rb = coroutine.resume(b)
        assert.is_true(ok)
      end
    end
    assert.close({ 32, 32, 32 }, ra)
    assert.close({ 243, 243, 243 }, rb)
  end)

  it("that die with an error leave the state usable", function()
    local co = coroutine.create(function()
      local x = moe.ones(3, { requires_grad = true })
      moe.no_grad(function() error "stop" end)
      return x
    end)
    local ok, message = coroutine.resume(co)
    assert.is_false(ok)
    assert.truthy(message:find("stop", 1, true))
    local x = moe.ones(3, { requires_grad = true })
    assert.is_true((x * 2).requires_grad)
  end)

  it("abandoned inside no_grad do not switch recording off elsewhere", function()
    local co = coroutine.create(function()
      moe.no_grad(function() coroutine.yield() end)
    end)
    coroutine.resume(co) -- may refuse to yield across the call: an ordinary error
    co = nil -- luacheck: ignore
    collectgarbage()
    local x = moe.ones(3, { requires_grad = true })
    assert.is_true((x * 2).requires_grad)
  end)
end)

describe("errors in callbacks", function()
  it("come out as they were raised", function()
    local thrown = { code = 7 }
    local ok, caught = pcall(moe.no_grad, function() error(thrown) end)
    assert.is_false(ok)
    assert.equal(thrown, caught)
    assert.is_true((moe.ones(1, { requires_grad = true }) * 2).requires_grad)
  end)
end)

describe("moe.threads", function()
  it("tells and sets the number", function()
    local before = moe.threads()
    finally(function() moe.threads(before) end)
    moe.threads(2)
    assert.equal(2, moe.threads())
    moe.threads(1)
    assert.equal(1, moe.threads())
  end)

  it("refuses what is no number of threads", function()
    for _, bad in ipairs { -1, 1.5, "many", {} } do
      assert.truthy(helper.error_of(moe.threads, bad):find("threads", 1, true))
    end
  end)

  it("does not change a single bit of a training step", function()
    local before = moe.threads()
    finally(function() moe.threads(before) end)
    local function step(n)
      moe.threads(n)
      moe.manual_seed(5)
      local x, w = moe.randn(300, 200), moe.randn(200, 150, { requires_grad = true })
      local y = (x:matmul(w) * 0.1):softmax(-1)
      local loss = (y * y):sum() + y:mean()
      loss:backward()
      return loss:item(), w.grad:totable()
    end
    local loss1, grad1 = step(1)
    local loss2, grad2 = step(2)
    assert.equal(loss1, loss2)
    assert.close(grad1, grad2, { rtol = 0, atol = 0 })
  end)

  it("does not change what is drawn", function()
    local before = moe.threads()
    finally(function() moe.threads(before) end)
    local function draw(n)
      moe.threads(n)
      moe.manual_seed(11)
      return moe.randn(1000, 101):totable()
    end
    assert.close(draw(1), draw(2), { rtol = 0, atol = 0 })
  end)
end)
