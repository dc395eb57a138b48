local moe = require "moe"
local helper = require "spec.helper"

local function slurp(path)
  local f = assert(io.open(path, "rb"))
  local s = f:read "a"
  f:close()
  return s
end

local function spill(path, s)
  os.remove(path) -- some file systems flush a file that is cut and written again
  local f = assert(io.open(path, "wb"))
  f:write(s)
  f:close()
end

-- A file with that header (text) and data.
local function build(header, data) return string.pack("<s8", header) .. (data or "") end

describe("safetensors", function()
  local path
  before_each(function() path = helper.temporary ".safetensors" end)
  after_each(function() os.remove(path) end)

  it("keep every type, shape and value", function()
    local all = {
      f64 = moe.tensor({ { 1 / 3, -0.0 }, { 1e300, math.huge } }, { dtype = "f64" }),
      f32 = moe.randn(3, 1, 5),
      f16 = moe.randn(7):cast "f16",
      bf16 = moe.randn(2, 2):cast "bf16",
      i64 = moe.tensor({ math.mininteger, 0, math.maxinteger }, { dtype = "i64" }),
      i32 = moe.tensor({ -2147483648, 2147483647 }, { dtype = "i32" }),
      u8 = moe.tensor({ 0, 255 }, { dtype = "u8" }),
      bool = moe.tensor { true, false, true },
      scalar = moe.tensor(2.5),
      empty = moe.zeros(3, 0, 2),
      ["a name with spaces, \"quotes\", \\ and ünïcödé \n"] = moe.ones(1),
    }
    assert.is_true(moe.io.save(path, all, { k = "v", ["ä\t"] = "" }))
    local got, meta = moe.io.load(path)
    assert.same({ k = "v", ["ä\t"] = "" }, meta)
    for name, t in pairs(all) do
      assert.equal(t.dtype, got[name].dtype)
      assert.same(t.shape, got[name].shape)
      assert.same(t:totable(), got[name]:totable())
      got[name] = nil
    end
    assert.is_nil(next(got))
  end)

  it("take any byte but 0 for true", function()
    spill(path, build('{"a":{"dtype":"BOOL","shape":[4],"data_offsets":[0,4]}}', "\0\1\2\xff"))
    local t = moe.io.load(path).a
    assert.same({ false, true, true, true }, t:totable())
    assert.equal(3, t:cast("f32"):sum():item())
  end)

  it("write views as their values", function()
    local x = moe.arange(1, 24, { dtype = "f32" }):reshape(2, 3, 4)
    local views = {
      t = x:transpose(1, 3), narrow = x:narrow(3, 2, 2), expand = moe.ones(1, 3):expand(4, 3), select = x:select(2, 3),
    }
    assert.is_true(moe.io.save(path, views))
    local got = moe.io.load(path)
    for name, t in pairs(views) do assert.same(t:totable(), got[name]:totable()) end
  end)

  it("agree with the reference implementation to the byte", function()
    local t, meta = moe.io.load "spec/fixture/python.safetensors"
    assert.same({ { 0, 0.25, 0.5 }, { 0.75, 1, 1.25 } }, t["b.weight"]:totable())
    assert.same({ 1, -2, 3 }, t.a:totable())
    assert.same({ { 0.5, -1.5 } }, t.h:cast("f32"):totable())
    assert.equal(3.25, t.d:item())
    assert.same({ 0, 255, 7 }, t.u:totable())
    assert.same({ true, false }, t.t:totable())
    assert.same({ 0, 4 }, t.e.shape)
    assert.same({ format = "np" }, meta)
    assert.is_true(moe.io.save(path, t, meta))
    assert.equal(slurp "spec/fixture/python.safetensors", slurp(path))
  end)

  it("give the same bytes whatever the order of the tables", function()
    local names = {}
    for i = 1, 50 do names[i] = "tensor" .. i * 7 % 50 end
    local function write(from, to, step)
      local t, meta = {}, {}
      for i = from, to, step do
        t[names[i]] = moe.full({ i % 3 }, i)
        meta[names[i]] = tostring(i)
      end
      assert.is_true(moe.io.save(path, t, meta))
      return slurp(path)
    end
    assert.equal(write(1, 50, 1), write(50, 1, -1))
  end)

  it("load chosen names, and tell what they hold without reading", function()
    moe.io.save(path, { a = moe.ones(2), b = moe.zeros(3, 4) })
    local got = moe.io.load(path, { names = { "b" } })
    assert.is_nil(got.a)
    assert.same({ 3, 4 }, got.b.shape)
    local t, message = moe.io.load(path, { names = { "b", "nope" } })
    assert.is_nil(t)
    assert.matches('holds no tensor "nope"', message)
    assert.same({ a = { dtype = "f32", shape = { 2 }, bytes = 8 }, b = { dtype = "f32", shape = { 3, 4 }, bytes = 48 } },
      (moe.io.inspect(path)))
  end)

  it("are valid when empty", function()
    assert.is_true(moe.io.save(path, {}))
    assert.same({}, (moe.io.load(path)))
  end)

  it("raise on misuse", function()
    local save, load = moe.io.save, moe.io.load
    local function wrong(pattern, f, ...)
      local message = helper.error_of(f, ...)
      assert.matches(pattern, message)
    end
    wrong("argument 1 %(path%) must be a file name, got nil", save, nil, {})
    wrong("argument 1 %(path%) is empty", save, "", {})
    wrong("zero byte", save, "a\0b", {})
    wrong("argument 2 %(tensors%) must be a table", save, path, 3)
    wrong('tensors%["x"%] must be a tensor, got the number 3', save, path, { x = 3 })
    wrong("keys of tensors must be strings, got the number 1", save, path, { moe.ones(1) })
    wrong('metadata%["x"%] must be a string', save, path, {}, { x = 3 })
    wrong("cannot name a tensor", save, path, { __metadata__ = moe.ones(1) })
    wrong("cannot name a tensor", save, path, { ["\xff"] = moe.ones(1) })
    wrong("UTF%-8", save, path, {}, { x = "\xff" })
    wrong("unknown option .*did you mean 'names'", load, path, { name = {} })
    wrong("names must be a list", load, path, { names = 3 })
    wrong("names%[1%] must be a string", load, path, { names = { 3 } })
    assert.is_nil(io.open(path))
  end)
end)

describe("a bad safetensors file gives nil and a message:", function()
  local path = helper.temporary ".safetensors"
  teardown(function() os.remove(path) end)
  local deep = ("["):rep(100000)
  local one = '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
  local function entry(text) return '{"a":' .. text .. "}" end
  local function two(b1, e1, b2, e2)
    return build(('{"a":{"dtype":"U8","shape":[%d],"data_offsets":[%d,%d]},"b":{"dtype":"U8","shape":[%d],"data_offsets":[%d,%d]}}')
      :format(e1 - b1, b1, e1, e2 - b2, b2, e2), "12345678")
  end
  local corpus = {
    { "an empty file", "", "shorter than" },
    { "half a head", "\1\2\3", "shorter than" },
    { "a header longer than the file", string.pack("<I8", 1000) .. "{}", "header of 1000 bytes" },
    { "a header of 2^64 - 1 bytes", ("\xff"):rep(8) .. "{}", "header of 18446744073709551615 bytes" },
    { "no header", string.pack("<I8", 0), "does not begin with" },
    { "a list as header", build "[]", "does not begin with" },
    { "a header after space", build " {}", "does not begin with" },
    { "an unfinished header", build "{", "JSON" },
    { "text after the header's value", build "{} x", "text after the value" },
    { "deep JSON", build('{"a":' .. deep .. "}"), "nested too deeply" },
    { "deep JSON objects", build(('{"a":'):rep(100000)), "nested too deeply" },
    { "duplicate names",
      build('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        .. '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "1234"), "duplicate key \"a\"" },
    { "duplicate names behind an escape",
      build('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        .. '"\\u0061":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "1234"), "duplicate key" },
    { "duplicate keys inside", build(entry '{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}', "1234"), "duplicate key" },
    { "bad UTF-8", build('{"\xff":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "1234"), "invalid UTF%-8" },
    { "an overlong form", build('{"\xc0\xaf":1}'), "invalid UTF%-8" },
    { "a surrogate", build('{"\xed\xa0\x80":1}'), "invalid UTF%-8" },
    { "a lone surrogate escape", build('{"\\ud800":1}'), "lone surrogate" },
    { "a bad escape", build('{"\\x":1}'), "bad escape" },
    { "a control character", build('{"\n":1}'), "control character" },
    { "a string without end", build '{"abc', "unfinished string" },
    { "an entry that is a number", build(entry "3"), "not an object" },
    { "an entry that is a list", build(entry "[]"), "not an object" },
    { "an entry without dtype", build(entry '{"shape":[1],"data_offsets":[0,4]}', "1234"), "exactly dtype" },
    { "an entry with more", build(entry '{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}', "1234"), "exactly dtype" },
    { "an unknown dtype", build(entry '{"dtype":"F33","shape":[1],"data_offsets":[0,4]}', "1234"), 'unknown dtype "F33"' },
    { "a dtype with a zero byte", build(entry '{"dtype":"F32\\u0000","shape":[1],"data_offsets":[0,4]}', "1234"), "unknown dtype" },
    { "a dtype that is a number", build(entry '{"dtype":3,"shape":[1],"data_offsets":[0,4]}', "1234"), "dtype is not a string" },
    { "a negative size", build(entry '{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}', "1234"), "shape is not" },
    { "a fractional size", build(entry '{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}', "1234"), "shape is not" },
    { "a shape of 17 dimensions",
      build(entry('{"dtype":"F32","shape":[' .. ("1,"):rep(16) .. '1],"data_offsets":[0,4]}'), "1234"), "at most 16" },
    { "a size beyond 64 bits", build(entry '{"dtype":"F32","shape":[99999999999999999999],"data_offsets":[0,4]}', "1234"), "shape is not" },
    { "a shape whose product overflows", build(entry '{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}'), "too large" },
    { "a shape whose product overflows to the right number",
      build(entry '{"dtype":"U8","shape":[4294967296,4294967296,0],"data_offsets":[0,0]}'), "too large" },
    { "a shape too large for its data", build(entry '{"dtype":"F32","shape":[2],"data_offsets":[0,4]}', "1234"), "take 8 bytes.*hold 4" },
    { "offsets beyond the file", build(entry '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}', "123"), "outside" },
    { "offsets of 2^63 - 1",
      build(entry '{"dtype":"U8","shape":[1],"data_offsets":[9223372036854775806,9223372036854775807]}', "1"), "outside" },
    { "offsets the wrong way round", build(entry '{"dtype":"F32","shape":[1],"data_offsets":[4,0]}', "1234"), "outside" },
    { "one offset", build(entry '{"dtype":"F32","shape":[1],"data_offsets":[0]}', "1234"), "not a pair" },
    { "three offsets", build(entry '{"dtype":"F32","shape":[1],"data_offsets":[0,4,4]}', "1234"), "not a pair" },
    { "overlapping data", two(0, 5, 4, 8), "overlap" },
    { "a hole", two(0, 3, 4, 8), "hole" },
    { "a hole at the start", two(1, 4, 4, 8), "hole" },
    { "data that belong to nothing", two(0, 3, 3, 7), "1 bytes after the last tensor" },
    { "trailing garbage", build(one, "12345"), "1 bytes after" },
    { "data of no tensor", build("{}", "1"), "1 bytes after" },
    { "metadata that is a list", build '{"__metadata__":[]}', "__metadata__ is not an object" },
    { "metadata with a number", build '{"__metadata__":{"a":1}}', "something else than strings" },
    { "numbers that never end", build('{"a":' .. ("1"):rep(1000) .. "}"), "too long" },
    { "a number out of range", build '{"a":1e999}', "out of range" },
    { "a number with a leading zero", build '{"a":01}', "'}' expected" },
    { "a plus sign", build '{"a":+1}', "value expected" },
    { "NaN", build '{"a":NaN}', "value expected" },
    { "a comment", build '{/**/}', "string expected" },
    { "a trailing comma", build '{"a":1,}', "string expected" },
    { "single quotes", build "{'a':1}", "string expected" },
  }
  for _, case in ipairs(corpus) do
    it(case[1], function()
      spill(path, case[2])
      local t, message = moe.io.load(path)
      assert.is_nil(t)
      assert.matches(case[3], message)
      assert.is_truthy(message:find(path, 1, true))
    end)
  end

  it("a type that we do not have, when it is asked for", function()
    spill(path, build('{"a":{"dtype":"I16","shape":[1],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}}', "123"))
    local t, message = moe.io.load(path)
    assert.is_nil(t)
    assert.matches('"a": dtype I16 is not supported', message)
    assert.same({ 51 }, moe.io.load(path, { names = { "b" } }).b:totable())
    assert.equal("I16", moe.io.inspect(path).a.dtype)
  end)

  it("no file, a directory, a device, an unreadable place", function()
    for _, bad in ipairs { "/nonexistent/x", "spec", "/dev/zero", "spec/run.sh/x" } do
      local t, message = moe.io.load(bad)
      assert.is_nil(t)
      assert.is_truthy(message:find(bad, 1, true))
      local ok
      ok, message = moe.io.save(bad, { a = moe.ones(1) })
      assert.is_nil(ok)
      assert.is_truthy(message:find(bad, 1, true), message)
    end
  end)

  it("every truncation", function()
    moe.io.save(path, { a = moe.ones(3), b = moe.zeros(2, 2):cast "f16" }, { x = "y" })
    local whole = slurp(path)
    for n = 0, #whole - 1 do
      spill(path, whole:sub(1, n))
      local t, message = moe.io.load(path)
      assert.is_nil(t)
      assert.is_string(message)
    end
  end)

  it("thousands of flipped bytes: an answer each time, and never a wrong one about sizes", function()
    moe.io.save(path, { a = moe.ones(3), ["b.c"] = moe.zeros(2, 2):cast "f16", e = moe.zeros(0, 5) }, { x = "y\n" })
    local whole = slurp(path)
    local r = helper.random(7)
    local header = 8 + string.unpack("<I8", whole)
    local good = 0
    for _ = 1, helper.sanitize and 1000 or 5000 do
      local s = whole
      for _ = 1, r(3) do
        local at = r(4) == 1 and r(#s) or r(header)
        local kind = r(4)
        local byte = kind == 1 and string.char(r(0, 255)) or ('{}[]",:0123456789.eE-\\u \0\xff'):sub(r(27)):sub(1, 1)
        if kind == 2 then s = s:sub(1, at - 1) .. s:sub(at + 1)
        elseif kind == 3 then s = s:sub(1, at) .. byte .. s:sub(at + 1)
        else s = s:sub(1, at - 1) .. byte .. s:sub(at + 1) end
      end
      spill(path, s)
      local t, message = moe.io.load(path)
      if t then
        good = good + 1
        local bytes = 0
        for name, x in pairs(moe.io.inspect(path)) do
          bytes = bytes + x.bytes
          assert.same(x.shape, t[name].shape)
        end
        assert.equal(#s - 8 - string.unpack("<I8", s), bytes)
      else
        assert.is_string(message)
      end
    end
    assert.is_true(good > 10) -- values and names may change and leave a valid file
  end)
end)
