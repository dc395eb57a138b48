-- Out of memory: every allocation of Lua, and every allocation of tensor memory, fails in turn.
local moe = require "moe"

describe("out of memory", function()
  it("of Lua's is an ordinary error that leaks nothing, at every allocation", function()
    local core = assert(package.searchpath("moe.core", package.cpath))
    local program = core:gsub("moe/core%.%w+$", "oom_check")
    local f = io.open(program)
    if not f then
      pending("oom_check is not built (cmake -DMOE_BUILD_CHECKS=ON)")
      return
    end
    f:close()
    local pipe = assert(io.popen(("'%s' '%s' 2>&1"):format(program, package.path)))
    local text = pipe:read "a"
    local ok = pipe:close()
    assert.truthy(ok, text)
    assert.truthy(text:find("snippet 12:"), text)
  end)

  it("of tensor memory is an ordinary error that names the device", function()
    local function work()
      local w = moe.randn(8, 8, { requires_grad = true })
      local y = moe.nn.linear(8, 4)(w:matmul(w):softmax(-1)):silu()
      y:sum():backward()
      return w.grad:sum():item()
    end
    work()
    collectgarbage()
    collectgarbage()
    local base, failures = moe.memory().live, 0
    for n = 1, 500 do
      moe.core.fail_after(n)
      local ok, message = pcall(work)
      moe.core.fail_after(0)
      if ok then break end
      failures = failures + 1
      assert.truthy(tostring(message):find "out of memory on cpu", tostring(message))
      collectgarbage()
      collectgarbage()
      assert.equal(base, moe.memory().live)
    end
    assert.truthy(failures > 10 and failures < 500, tostring(failures))
  end)
end)
