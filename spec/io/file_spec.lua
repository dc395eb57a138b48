local moe = require "moe"
local helper = require "spec.helper"

describe("files", function()
  local dir
  before_each(function()
    dir = helper.temporary ".d"
    assert(moe.io.make_dir(dir))
  end)
  after_each(function() os.execute("rm -rf '" .. dir .. "'") end)

  it("are written whole, listed, read and removed", function()
    assert.is_true(moe.io.make_dir(dir .. "/a/b"))
    assert.is_true(moe.io.make_dir(dir .. "/a/b"))
    assert.is_true(moe.io.write(dir .. "/x", "one\0two"))
    assert.is_true(moe.io.write(dir .. "/x", "three"))
    assert.equal("three", moe.io.read(dir .. "/x"))
    assert.same({ "a", "x" }, moe.io.list(dir))
    assert.equal("directory", moe.io.kind(dir .. "/a"))
    assert.equal("file", moe.io.kind(dir .. "/x"))
    assert.is_nil(moe.io.kind(dir .. "/y"))
    assert.is_true(moe.io.remove(dir .. "/x"))
    assert.is_true(moe.io.remove(dir .. "/x"))
    assert.same({ "a" }, moe.io.list(dir))
    local t, message = moe.io.read(dir .. "/x")
    assert.is_nil(t)
    assert.matches("No such file", message)
    t, message = moe.io.read("spec/run.sh", 10)
    assert.is_nil(t)
    assert.matches("more than the 10", message)
    assert.is_nil((moe.io.list(dir .. "/x")))
    assert.is_nil((moe.io.make_dir "spec/run.sh/x"))
  end)

  it("that are links keep being links", function()
    moe.io.write(dir .. "/real", "1")
    assert(os.execute(("ln -s real '%s/link'"):format(dir)))
    assert.is_true(moe.io.write(dir .. "/link", "2"))
    assert.equal("2", moe.io.read(dir .. "/real"))
    assert(os.execute(("test -L '%s/link'"):format(dir)))
  end)

  it("survive a disk that is full", function()
    -- a limit on the size of files stands for the disk: writes fail the same way
    local script = dir .. "/full.lua"
    moe.io.write(script, [[
      local moe = require "moe"
      local dir = ...
      local ok, message = moe.io.save(dir .. "/t.safetensors", { a = moe.zeros(1000000) })
      assert(ok == nil and message:find "cannot write", tostring(message))
      ok, message = moe.io.write(dir .. "/text", ("x"):rep(1 << 20))
      assert(ok == nil and message:find "cannot write", tostring(message))
      print "fine"
    ]])
    moe.io.save(dir .. "/t.safetensors", { a = moe.ones(3) })
    moe.io.write(dir .. "/text", "old")
    local p = io.popen(("trap '' XFSZ; ulimit -f 8; LUA_PATH='%s' LUA_CPATH='%s' lua5.4 '%s' '%s' 2>&1"):format(
      package.path, package.cpath, script, dir))
    assert.equal("fine\n", p:read "a")
    p:close()
    assert.same({ 1, 1, 1 }, moe.io.load(dir .. "/t.safetensors").a:totable())
    assert.equal("old", moe.io.read(dir .. "/text"))
    assert.same({ "full.lua", "t.safetensors", "text" }, moe.io.list(dir)) -- nothing half-written stays
  end)

  it("refuse a place that cannot be written", function()
    local ok, message = moe.io.write(dir .. "/no/such/place", "x")
    assert.is_nil(ok)
    assert.matches("No such file", message)
    ok, message = moe.io.write(dir, "x")
    assert.is_nil(ok)
    assert.matches("is a directory", message)
  end)
end)
