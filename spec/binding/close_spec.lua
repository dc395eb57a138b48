-- Objects used after they were closed, and variables that close.
local helper = require "spec.helper"
local moe = require "moe"
local doc = require "moe.doc"

local function closed()
  local x = moe.ones(2, 3)
  x:close()
  return x
end

describe("a closed tensor", function()
  it("gives its memory back at once", function()
    collectgarbage()
    local before = moe.memory().live
    local x = moe.zeros(1000, 1000)
    x:close()
    assert.equal(before, moe.memory().live)
  end)

  it("may be closed again", function()
    local x = closed()
    x:close()
    x:close()
  end)

  it("says so when it is used", function()
    local x = closed()
    for _, f in ipairs {
      function() return x:sum() end, function() return moe.add(x, 1) end, function() return x + 1 end, function() return 1 + x end,
      function() return x.shape end, function() return x[1] end, function() x[1] = 0 end, function() return #x end,
      function() return x:item() end, function() return x:totable() end, function() return -x end, function() return x:backward() end,
      function() return moe.cat({ moe.ones(2, 3), x }, 1) end, function() return x:size(1) end,
    } do
      assert.truthy(helper.error_of(f):find("closed", 1, true), helper.error_of(f))
    end
  end)

  it("can be printed", function() assert.truthy(tostring(closed()):find("closed", 1, true)) end)

  it("is refused, not followed, by every method", function()
    local class
    for _, pair in ipairs(doc.classes()) do
      if pair[1] == "moe.Tensor" then class = pair[2] end
    end
    for name, f in pairs(class) do
      if type(f) == "function" and not name:match "^__" and name ~= "close" and name ~= "free" then
        local ok, message = pcall(f, closed())
        assert.truthy(ok or type(message) == "string", name)
      end
    end
  end)

  it("does not take its views with it", function()
    local x = moe.tensor { { 1, 2 }, { 3, 4 } }
    local row = x[2]
    x:close()
    assert.close({ 3, 4 }, row)
  end)

  it("does not take the graph with it", function()
    local x = moe.tensor({ 2.0 }, { requires_grad = true })
    local h = x * x
    local y = h * x
    h:close()
    y:sum():backward()
    assert.close({ 12 }, x.grad)
  end)
end)

describe("a variable that closes", function()
  it("frees the tensor at the end of its block", function()
    collectgarbage()
    local before = moe.memory().live
    do
      local x <close> = moe.zeros(1000, 100)
      assert.truthy(x:numel() == 100000)
    end
    assert.equal(before, moe.memory().live)
  end)

  it("frees it when an error passes", function()
    collectgarbage()
    local before = moe.memory().live
    pcall(function()
      local x <close> = moe.zeros(1000, 100)
      error(x.dtype)
    end)
    assert.equal(before, moe.memory().live)
  end)
end)

describe("a host", function()
  it("may open and close states as often as it likes", function()
    local core = assert(package.searchpath("moe.core", package.cpath))
    local program = core:gsub("moe/core%.%w+$", "reopen_check")
    local file = io.open(program)
    if not file then return pending "reopen_check is not built (cmake -DMOE_BUILD_CHECKS=ON)" end
    file:close()
    local pipe = assert(io.popen(("LUA_PATH='%s' LUA_CPATH='%s' '%s' 2>&1"):format(package.path, package.cpath, program)))
    local text = pipe:read "a"
    assert.truthy(pipe:close(), text)
    assert.matches("20 states opened and closed", text)
  end)
end)
