local moe = require "moe"
local helper = require "spec.helper"
local decode, encode = moe.io.json_decode, moe.io.json_encode

describe("JSON", function()
  it("decodes values", function()
    assert.same({ a = { 1, 2.5, "x", true, false }, b = {} }, decode ' { "a" : [1, 2.5, "x", true, false], "b": {} } ')
    assert.equal("integer", math.type(decode "12"))
    assert.equal("float", math.type(decode "12.0"))
    assert.equal(math.mininteger, decode "-9223372036854775808")
    assert.equal(2 ^ 63, decode "9223372036854775808")
    assert.equal(-0.015, decode "-1.5e-2")
    assert.equal("a\"\\/\b\f\n\r\tä€😀", decode [["a\"\\\/\b\f\n\r\t\u00e4\u20AC\ud83d\ude00"]])
    assert.equal("\0", decode [["\u0000"]])
    assert.is_nil((decode "null"))
    assert.same({ a = 1 }, decode '{"a":1,"b":null}')
  end)

  it("refuses what is not JSON", function()
    for _, text in ipairs { "", " ", "nul", "tru", "[1,]", "[1 2]", "{1:2}", '{"a"}', '{"a":}', "01", "1.", ".5", "1e", "-", "--1",
      "0x10", "Infinity", '"\\u12"', '"\\ude00"', '"\\ud800\\u0041"', "[", "]", '"', "\xef\xbb\xbf1", "1 1", '{"a":1,"a":2}' } do
      local v, message = decode(text)
      assert.is_nil(v)
      assert.is_string(message, text)
      assert.matches("^JSON: ", message)
    end
    assert.is_nil((decode(("["):rep(65) .. ("]"):rep(65))))
    assert.is_table(decode(("["):rep(64) .. ("]"):rep(64)))
  end)

  it("encodes so that everything comes back", function()
    local v = { list = { 1, 2, { x = "y" } }, n = 0.1, i = math.maxinteger, s = "\1\"\\é\n", t = true, f = false, e = {},
      tiny = 5e-324, big = 1.7976931348623157e308, whole = 3.0 }
    local back = decode(encode(v))
    assert.same(v, back)
    assert.equal("float", math.type(back.whole))
    assert.equal("integer", math.type(back.i))
    assert.equal(encode(v), encode(back))
  end)

  it("survives another locale", function()
    local before = os.setlocale(nil, "numeric")
    for _, name in ipairs { "de_DE.UTF-8", "fr_FR.UTF-8", "C" } do
      if os.setlocale(name, "numeric") then
        assert.equal("0.5", encode(0.5))
        assert.equal(0.5, decode "0.5")
      end
    end
    os.setlocale(before, "numeric")
  end)

  it("raises on what has no JSON form", function()
    local loop = {}
    loop[1] = loop
    for _, case in ipairs { { print, "function" }, { { [1.5] = 1 }, "the number 1.5" }, { { 1, x = 2 }, "list or have string keys" },
      { 0 / 0, "no JSON form" }, { math.huge, "no JSON form" }, { "\xff", "UTF%-8" }, { loop, "nested too deeply" },
      { { [1] = 1, [3] = 3 }, "" } } do
      assert.matches(case[2], helper.error_of(encode, case[1]))
    end
    assert.matches("must be a string", helper.error_of(decode, 3))
  end)

  it("takes random text without harm", function()
    local r = helper.random(3)
    local alphabet = '{}[]",:0123456789.eE-+\\u \ntrufalsn\xc3\xa4\xff'
    for _ = 1, 20000 do
      local t = {}
      for i = 1, r(12) do
        local at = r(#alphabet)
        t[i] = alphabet:sub(at, at)
      end
      local text = table.concat(t)
      local v, message = decode(text)
      assert.is_true(v ~= nil or message ~= nil or text:match "^%s*null%s*$" ~= nil)
    end
  end)
end)
