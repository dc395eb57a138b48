local moe = require "moe"
local helper = require "spec.helper"

local function spill(path, s)
  local f = assert(io.open(path, "wb"))
  f:write(s)
  f:close()
end

describe("data.text", function()
  it("makes characters into sorted tokens and back", function()
    local t = moe.data.text({ text = "hello, wörld €" }, { level = "chars" })
    assert.same({ " ", ",", "d", "e", "h", "l", "o", "r", "w", "ö", "€" }, t.vocab)
    assert.equal(11, t.vocab_size)
    assert.equal(14, #t)
    local ids = t:encode "hö€"
    assert.equal("i64", ids.dtype)
    assert.same({ 5, 10, 11 }, ids:totable())
    assert.equal("hö€", t:decode(ids))
    assert.equal("lo", t:decode { 6, 7 })
    assert.equal("l", t:decode(6))
    assert.equal("hello, wörld €", t:decode(t.train:ids()))
    assert.equal("wör", t:decode(t.train:ids(8, 10)))
    assert.same({ 0 }, t:encode("").shape)
  end)

  it("makes bytes into tokens", function()
    local t = moe.data.text({ text = "a\0\xff" }, { level = "bytes" })
    assert.equal(256, t.vocab_size)
    assert.same({ 98, 1, 256 }, t.train:ids():totable())
    assert.equal("a\0\xff", t:decode(t.train:ids()))
  end)

  it("holds vocabularies that need two bytes and four bytes a token", function()
    for _, n in ipairs { 300, 70000 } do
      local c = {}
      for i = 1, n do c[i] = utf8.char(0x10000 + i * 7) end
      local s = table.concat(c)
      local t = moe.data.text { text = s }
      assert.equal(n, t.vocab_size)
      assert.equal(s, t:decode(t.train:ids()))
    end
  end)

  it("splits as nanoGPT does", function()
    local t = moe.data.text({ text = ("x"):rep(1115394) }, { split = { 0.9, 0.1 } })
    assert.equal(1003854, #t.train)
    assert.equal(111540, #t.val)
    t = moe.data.text({ text = "abcdefghij" }, { split = { 0.5, 0.3, 0.2 } })
    assert.equal("abcde", t:decode(t.train:ids()))
    assert.equal("fgh", t:decode(t.val:ids()))
    assert.equal("ij", t:decode(t.test:ids()))
    assert.is_nil(moe.data.text({ text = "abc" }).val)
  end)

  it("walks in order: every token but the first is a target once", function()
    local t = moe.data.text({ text = ("abcdefghijk"):rep(3) }, { split = { 0.7, 0.3 } }) -- 23 and 10
    local b = t.train:batches { batch_size = 3, seq_len = 4 }
    for _ = 1, 2 do -- the second pass is like the first
      local xs, ys, shapes = "", "", {}
      for batch in b do
        xs, ys = xs .. t:decode(batch.x), ys .. t:decode(batch.y)
        shapes[#shapes + 1] = batch.x.shape[1]
        assert.equal(batch.x.shape[1] * 4, batch.tokens)
      end
      assert.same({ 3, 2 }, shapes)
      assert.equal(("abcdefghijk"):rep(3):sub(1, 20), xs)
      assert.equal(("abcdefghijk"):rep(3):sub(2, 21), ys)
    end
    local n = 0
    for _ in t.train:batches { batch_size = 3, seq_len = 4, drop_last = true } do n = n + 1 end
    assert.equal(1, n)
    for batch in t.val:batches { batch_size = 1, seq_len = 9 } do -- exactly fits; begins where train ends
      assert.equal(("abcdefghijk"):rep(3):sub(24, 32), t:decode(batch.x))
    end
  end)

  it("draws windows from everywhere, the same for one seed, and nothing of the other part", function()
    local text = {}
    for i = 1, 40 do text[i] = utf8.char(0x4e00 + i) end
    local t = moe.data.text({ text = table.concat(text) }, { split = { 0.5, 0.5 } })
    local seen = {}
    local a = t.val:batches { batch_size = 5, seq_len = 4, random = true, seed = 3 }
    local b = t.val:batches { batch_size = 5, seq_len = 4, random = true, seed = 3 }
    local c = t.val:batches { batch_size = 5, seq_len = 4, random = true, seed = 4 }
    local differ = false
    for _ = 1, 100 do
      local x, y = a(), b()
      assert.same({ 5, 4 }, x.x.shape)
      assert.same(x.x:totable(), y.x:totable())
      differ = differ or t:decode(x.x) ~= t:decode(c().x)
      for i = 1, 5 do
        local row, target = x.x[i]:totable(), x.y[i]:totable()
        for k = 1, 4 do
          assert.equal(row[1] + k - 1, row[k])
          assert.equal(row[k] + 1, target[k])
        end
        seen[row[1]] = (seen[row[1]] or 0) + 1
      end
    end
    assert.is_true(differ)
    for first = 21, 36 do assert.is_true((seen[first] or 0) > 10) end -- 500 draws of 16 places
    for first in pairs(seen) do assert.is_true(first >= 21 and first <= 36) end
  end)

  it("goes on from a state", function()
    local t = moe.data.text { text = ("the quick brown fox "):rep(10) }
    for _, random in ipairs { true, false } do
      local a = t.train:batches { batch_size = 2, seq_len = 8, random = random, seed = 9 }
      for _ = 1, 5 do a() end
      local s = moe.io.json_decode(moe.io.json_encode(a:state()))
      local expected = { a().x:totable(), a().x:totable() }
      local b = t.train:batches { batch_size = 2, seq_len = 8, random = random }
      b:restore(s)
      assert.same(expected, { b().x:totable(), b().x:totable() })
    end
    local l = t.train:batches { batch_size = 2, seq_len = 8 }
    assert.matches("not one of", helper.error_of(l.restore, l, { kind = "random", at = 1, seed = 1 }))
    assert.matches("state's at is %-1", helper.error_of(l.restore, l, { kind = "sequence", at = -1 }))
  end)

  it("reads files and directories in the order of their paths", function()
    local dir = helper.temporary ".d"
    moe.io.make_dir(dir .. "/b")
    moe.io.make_dir(dir .. "/.git")
    spill(dir .. "/c.lua", "third ")
    spill(dir .. "/a.lua", "first ")
    spill(dir .. "/b/x.lua", "second ")
    spill(dir .. "/b/x.txt", "text ")
    spill(dir .. "/b/binary.lua", "a\0b")
    spill(dir .. "/.git/y.lua", "hidden")
    local t = moe.data.text(dir, { pattern = "%.lua$" })
    assert.equal("first second third ", t:decode(t.train:ids()))
    t = moe.data.text(dir)
    assert.equal("first second text third ", t:decode(t.train:ids()))
    t = moe.data.text(dir .. "/b/binary.lua", { level = "bytes" })
    assert.equal(3, #t)
    spill(dir .. "/bad", "ok\xff")
    local none, message = moe.data.text(dir .. "/bad")
    assert.is_nil(none)
    assert.matches("/bad: the text is not UTF%-8: byte 3 is 0xff", message)
    none, message = moe.data.text(dir .. "/nothing")
    assert.is_nil(none)
    assert.matches("No such file", message)
    os.execute("rm -rf '" .. dir .. "'")
  end)

  it("reads a real corpus: tiny Shakespeare, where it lies at hand", function()
    local path = (os.getenv "MOE_DATA" or "../shared/data") .. "/tinyshakespeare.txt"
    local file = io.open(path)
    if not file then return pending(path .. " is not there") end
    file:close()
    local t = assert(moe.data.text(path, { level = "chars", split = { 0.9, 0.1 } }))
    assert.equal(65, t.vocab_size)
    assert.equal(1003854, #t.train)
    assert.equal(111540, #t.val)
    assert.equal("First Citizen:", t:decode(t:encode "First Citizen:"))
  end)

  it("tells what is wrong", function()
    local t = moe.data.text { text = "abc" }
    local function wrong(pattern, f, ...) assert.matches(pattern, helper.error_of(f, ...)) end
    wrong("unknown option 'levle' %(did you mean 'level'", moe.data.text, { text = "a" }, { levle = "chars" })
    wrong("level must be", moe.data.text, { text = "a" }, { level = "words" })
    wrong("add up to 1.1", moe.data.text, { text = "a" }, { split = { 0.9, 0.2 } })
    wrong("split%[2%] must be a number", moe.data.text, { text = "a" }, { split = { 1, 0 } })
    wrong("one to three", moe.data.text, { text = "a" }, { split = {} })
    wrong("must be a path", moe.data.text, 3)
    wrong("the character 'z' is not", t.encode, t, "z")
    wrong("not UTF%-8", t.encode, t, "\xff")
    wrong("token 4 does not lie in 1 .. 3", t.decode, t, { 4 })
    wrong("token 0 does not", t.decode, t, 0)
    wrong("unknown option 'batchsize' %(did you mean 'batch_size'", t.train.batches, t.train, { batchsize = 1, seq_len = 1 })
    wrong("'seq_len' is missing", t.train.batches, t.train, { batch_size = 1 })
    wrong("at least 1, got 0", t.train.batches, t.train, { batch_size = 0, seq_len = 1 })
    wrong("windows of 3 tokens", t.train.batches, t.train, { batch_size = 1, seq_len = 3 })
    wrong("random must be true or false", t.train.batches, t.train, { batch_size = 1, seq_len = 1, random = 1 })
    wrong("does not lie in 1 .. 3", t.train.ids, t.train, 0)
    wrong("lie between", t.tokens.random, t.tokens, 1, 9, 1, 1, 1, 1)
    wrong("lie between", t.tokens.random, t.tokens, 1, 3, 1 << 40, 1, 1, 1)
    wrong("do not fit", t.tokens.sequence, t.tokens, 2, 2, 1)
    wrong("must be a token stream", t.tokens.ids, {}, 1, 1)
  end)
end)

describe("data.batches", function()
  local x = moe.arange(1, 10, { dtype = "f32" }):reshape(5, 2)
  local y = moe.arange(1, 5, { dtype = "i64" })

  it("goes through the rows in order", function()
    local l = moe.data.batches(x, y, { batch_size = 2 })
    for _ = 1, 2 do
      local got = {}
      for b in l do got[#got + 1] = { b.x:totable(), b.y:totable() } end
      assert.same({ { { { 1, 2 }, { 3, 4 } }, { 1, 2 } }, { { { 5, 6 }, { 7, 8 } }, { 3, 4 } }, { { { 9, 10 } }, { 5 } } }, got)
    end
    local n = 0
    for b in moe.data.batches(x, { batch_size = 2, drop_last = true }) do
      n = n + 1
      assert.is_nil(b.y)
    end
    assert.equal(2, n)
  end)

  it("shuffles: every row once a pass, x with its y, other orders in other passes, the same ones for a seed", function()
    local big = moe.arange(1, 64, { dtype = "f32" })
    local function pass(l)
      local out = {}
      for b in l do
        local bx, by = b.x:totable(), b.y:totable()
        for i = 1, #bx do
          assert.equal(bx[i], by[i] / 2)
          out[#out + 1] = bx[i]
        end
      end
      return out
    end
    local l = moe.data.batches(big, big * 2, { batch_size = 7, shuffle = true, seed = 5 })
    local m = moe.data.batches(big, big * 2, { batch_size = 7, shuffle = true, seed = 5 })
    local one, two = pass(l), pass(l)
    assert.not_same(one, two)
    assert.same(one, pass(m))
    assert.same(two, pass(m))
    table.sort(one)
    assert.same(big:totable(), one)
    -- a state in the middle of the third pass
    l()
    m:restore(l:state())
    assert.same(l().x:totable(), m().x:totable())
  end)

  it("has permutations that are even", function()
    local count = {}
    for draw = 1, 600 do
      local p = moe.core._data.permutation(3, 1, draw):totable()
      local key = table.concat(p)
      count[key] = (count[key] or 0) + 1
    end
    local kinds = 0
    for _, n in pairs(count) do
      kinds = kinds + 1
      assert.is_true(n > 60 and n < 145, n) -- 100 expected, sigma 9
    end
    assert.equal(6, kinds)
  end)

  it("tells what is wrong", function()
    local function wrong(pattern, ...) assert.matches(pattern, helper.error_of(moe.data.batches, ...)) end
    wrong("argument 1 must be a tensor, got a nil")
    wrong("argument 2 must be a tensor", x, 3, {})
    wrong("x has 5 rows, y has 2", x, moe.zeros(2), { batch_size = 1 })
    wrong("'batch_size' is missing", x, y, {})
    wrong("unknown option 'shufle' %(did you mean 'shuffle'", x, y, { batch_size = 1, shufle = true })
    wrong("5 rows give no batch of 6", x, y, { batch_size = 6, drop_last = true })
    wrong("without dimensions", moe.tensor(1), { batch_size = 1 })
  end)
end)
