-- Memory and the collector: loops that never call collectgarbage stay flat, cycles die, deep graphs do not recurse.
local helper = require "spec.helper"
local moe = require "moe"

local function live()
  collectgarbage()
  collectgarbage()
  return moe.memory().live
end

describe("memory", function()
  it("counts what lives and forgets what is collected", function()
    local before = live()
    local x = moe.zeros(1000, 100) -- luacheck: ignore
    assert.truthy(moe.memory().live >= before + 400000)
    assert.truthy(moe.memory().peak >= moe.memory().live)
    x = nil -- luacheck: ignore
    assert.equal(before, live())
  end)

  it("of a view lasts as long as the view", function()
    local before = live()
    local row = moe.ones(1000, 100)[7]
    assert.truthy(live() >= before + 400000)
    assert.close(100, row:sum():item())
    row = nil -- luacheck: ignore
    assert.equal(before, live())
  end)

  for _, mode in ipairs { "generational", "incremental" } do
    it("stays flat over a training loop without collectgarbage, " .. mode, function()
      local old = collectgarbage(mode)
      finally(function() collectgarbage(old) end)
      local before = live()
      local w = moe.randn(64, 256, { requires_grad = true })
      local x = moe.randn(1024, 64)
      -- a step makes about 6 MB: uncollected, 300 of them would be 1.8 GB
      local peak, half = 0, nil
      for step = 1, 300 do
        local loss = (x:matmul(w):silu() * 2):sum()
        loss:backward()
        w.grad = nil
        peak = math.max(peak, moe.memory().live - before)
        if step == 150 then half = helper.resident() end
      end
      assert.truthy(peak < 400e6, ("live memory grew to %.1f MB"):format(peak / 1e6))
      if half and not helper.sanitize then
        assert.truthy(helper.resident() - half < 64e6, "the resident size still grew in the second half")
      end
    end)
  end

  it("frees what backward saved, at once", function()
    local w = moe.randn(512, 512, { requires_grad = true })
    local h = w
    for _ = 1, 8 do h = h:silu() end
    local loss = h:sum()
    collectgarbage()
    h = nil -- luacheck: ignore
    collectgarbage()
    local before = moe.memory().live
    loss:backward()
    assert.truthy(moe.memory().live <= before - 6 * 512 * 512 * 4 + w:numel() * 4,
      "the activations of eight calls outlived backward")
  end)

  it("is freed by moe.scope at its end, but for what it returns", function()
    local before = live()
    local kept = moe.scope(function()
      local a = moe.ones(1000, 1000)
      local b = a + 1
      return (b * 2):sum()
    end)
    -- no collection in between
    assert.truthy(moe.memory().live < before + 1e5)
    assert.close(4e6, kept:item())
  end)
end)

describe("a graph", function()
  it("of 100,000 calls goes backward and is released", function()
    local n = helper.sanitize and 20000 or 100000
    local x = moe.tensor({ 1.5 }, { dtype = "f64" })
    x.requires_grad = true
    local y = x
    for _ = 1, n do y = y + 1e-3 end
    y:sum():backward()
    assert.close(1, x.grad[1])
    y = nil -- luacheck: ignore
    collectgarbage()
    collectgarbage()
  end)

  it("of 100,000 calls that nobody walks is released too", function()
    local before = live()
    do
      local x = moe.ones(1, { requires_grad = true })
      local y = x
      for _ = 1, helper.sanitize and 20000 or 100000 do y = y * 1.0 end
      assert.truthy(y.requires_grad)
    end
    assert.equal(before, live())
  end)
end)

describe("cycles through Lua closures", function()
  it("of a hook that holds its own tensor are collected", function()
    local weak = setmetatable({}, { __mode = "k" })
    local before = live()
    for _ = 1, 50 do
      local x = moe.zeros(100, { requires_grad = true })
      x:register_hook(function(g)
        if x == nil then return nil end
        return g
      end)
      weak[x] = true
    end
    assert.equal(before, live())
    assert.is_nil(next(weak))
  end)

  it("of a custom function that holds its result are collected", function()
    local before = live()
    for _ = 1, 50 do
      local y
      local double = moe.fn {
        forward = function(_, x) return x * 2 end,
        backward = function(_, g)
          if y == nil then return nil end
          return g * 2
        end,
      }
      y = double(moe.ones(100, { requires_grad = true }))
      assert.truthy(y.requires_grad)
    end
    assert.equal(before, live())
  end)
end)

describe("the module", function()
  it("can be loaded twice in one state", function()
    local first = moe
    package.loaded["moe"] = nil
    local again = require "moe"
    package.loaded["moe"] = first
    assert.close({ 2, 3 }, again.tensor { 1, 2 } + first.tensor { 1, 1 })
  end)
end)
