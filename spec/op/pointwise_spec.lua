-- Elementwise operations against Lua's own arithmetic: values on a grid with special ones, layouts, types, broadcasting,
-- in-place forms, first and second gradients.
local helper = require "spec.helper"
local moe = require "moe"

local inf, nan = math.huge, 0 / 0

local function exp(x) return math.exp(x) end
local function expm1(x) -- by its series where the difference would cancel
  if math.abs(x) > 0.5 then return math.exp(x) - 1 end
  local sum, term = 0.0, 1.0
  for i = 1, 30 do
    term = term * x / i
    sum = sum + term
  end
  return x == 0 and x or sum
end
local function log(x) return x < 0 and nan or math.log(x) end
local function log1p(x)
  if math.abs(x) > 0.25 or x ~= x then return log(1 + x) end
  local sum, power = 0.0, -1.0
  for i = 1, 60 do
    power = -power * x
    sum = sum + power / i
  end
  return sum
end
local function tanh(x)
  if math.abs(x) > 30 then return x > 0 and 1 or -1 end
  local e = expm1(2 * x)
  return e / (e + 2)
end
local function erf(x) -- series near 0, continued fraction of the complement far out
  if x ~= x then return x end
  local a = math.abs(x)
  if a > 6 then return x > 0 and 1 or -1 end
  if a < 2.5 then
    local sum, term = a, a
    for i = 1, 200 do
      term = -term * a * a / i
      sum = sum + term / (2 * i + 1)
    end
    return (x < 0 and -1 or 1) * sum * 2 / math.sqrt(math.pi)
  end
  local f = 0.0
  for i = 120, 1, -1 do f = i / 2 / (a + f) end
  local v = 1 - math.exp(-a * a) / math.sqrt(math.pi) / (a + f)
  return x < 0 and -v or v
end
local function sigmoid(x) return 1 / (1 + math.exp(-x)) end
local function softplus(x) return math.max(x, 0) + log1p(math.exp(-math.abs(x))) end
local function round(x)
  if math.abs(x) >= 2 ^ 52 or x ~= x then return x end
  local f = math.floor(x)
  local d = x - f
  if d > 0.5 or (d == 0.5 and f % 2 == 1) then f = f + 1 end
  return f
end
local function whole(f)
  return function(x) return (math.abs(x) >= 2 ^ 52 or x ~= x) and x or f(x) end
end

-- name -> { reference, low, high }: values outside of [low, high] are left out of the grid
local unary = {
  neg = { function(x) return -x end },
  abs = { math.abs },
  sign = { function(x) return x > 0 and 1 or x < 0 and -1 or 0 end },
  floor = { whole(math.floor) },
  ceil = { whole(math.ceil) },
  round = { round },
  trunc = { whole(function(x) return x < 0 and math.ceil(x) or math.floor(x) end) },
  square = { function(x) return x * x end },
  reciprocal = { function(x) return 1 / x end },
  sqrt = { function(x) return x < 0 and nan or math.sqrt(x) end },
  rsqrt = { function(x) return x < 0 and nan or 1 / math.sqrt(x) end },
  exp = { exp }, expm1 = { expm1 }, log = { log }, log1p = { log1p },
  log2 = { function(x) return log(x) / math.log(2) end },
  sin = { math.sin }, cos = { math.cos }, tanh = { tanh }, erf = { erf },
  sigmoid = { sigmoid },
  logsigmoid = { function(x) return -softplus(-x) end },
  softplus = { softplus },
  relu = { function(x) return x < 0 and 0 or x end },
  relu_squared = { function(x) return x < 0 and 0 or x * x end },
  leaky_relu = { function(x) return x < 0 and 0.01 * x or x end },
  elu = { function(x) return x < 0 and expm1(x) or x end },
  silu = { function(x) return x * sigmoid(x) end },
  gelu = { function(x) return 0.5 * x * (1 + erf(x / math.sqrt(2))) end },
}

local grid = { 0.0, 1e-30, -1e-30, 1e-6, -1e-6, 0.01, -0.01, 0.3, -0.3, 0.5, -0.5, 0.6249, 0.626, 0.93, -0.93, 1.0, -1.0,
  1.5, 2.5, -2.5, 3.5, -3.7, 5.0, -7.25, 10.0, -10.0, 17.0, -20.0, 50.0, -60.0, 1000.5, -1234.5, 65536.0 }
local special = { inf, -inf, nan }

local function as(dtype, v) return moe.tensor(v, { dtype = dtype }) end
local function rounded(dtype, v) return as(dtype, v):totable() end

describe("pointwise functions", function()
  for name, row in pairs(unary) do
    local reference = row[1]
    it(name .. " agrees with Lua on a grid", function()
      for dtype, tol in pairs { f32 = { 2e-6, 2e-7 }, f64 = { 1e-13, 1e-15 }, bf16 = { 8e-3, 1e-7 }, f16 = { 1e-3, 1e-6 } } do
        local x = {}
        for _, v in ipairs(rounded(dtype, grid)) do
          local y = reference(v)
          -- halves end at 65504, f32 at 3.4e38: the overflow has a test of its own
          if math.abs(y) < (dtype == "f16" and 6e4 or 3e38) and math.abs(v) < 1e5 then x[#x + 1] = v end
        end
        local want = {}
        for i, v in ipairs(x) do want[i] = reference(v) end
        local got = as(dtype, x)[name](as(dtype, x))
        assert.equal(dtype, got.dtype)
        assert.close(want, got, { rtol = tol[1], atol = tol[2], nan = true, name = name .. " " .. dtype })
      end
    end)

    it(name .. " agrees with Lua at inf, -inf and NaN", function()
      for _, dtype in ipairs { "f32", "f64" } do
        for _, v in ipairs(special) do
          local want = reference(v)
          if name == "softplus" or name == "logsigmoid" then
            want = v ~= v and v or (name == "softplus" and (v > 0 and inf or 0) or (v > 0 and 0 or -inf))
          elseif name == "expm1" then want = v == -inf and -1 or v
          elseif name == "tanh" or name == "erf" then want = v ~= v and v or v > 0 and 1 or -1
          elseif name == "elu" then want = v == -inf and -1 or v
          end
          local got = as(dtype, { v })[name](as(dtype, { v })):totable()[1]
          assert.is_true(got == want or (got ~= got and want ~= want),
            ("%s(%s) in %s is %s, expected %s"):format(name, v, dtype, got, want))
        end
      end
    end)

    it(name .. " gives the same for long, strided, transposed, broadcast, scalar and empty tensors", function()
      local r = helper.random(7)
      local values = {}
      for i = 1, 20011 do values[i] = 0.1 + 3 * r() end -- more than one task
      local x = as("f32", values)
      local y = x[name](x)
      for _, i in ipairs { 1, 2, 255, 256, 257, 8191, 16384, 16385, 20011 } do
        assert.close(reference(x:narrow(1, i, 1):item()), y:narrow(1, i, 1):item(), { rtol = 2e-6, atol = 2e-7 })
      end
      local m = x:narrow(1, 1, 35 * 41):reshape(35, 41)
      local t, want = m:t(), y:narrow(1, 1, 35 * 41):reshape(35, 41):t()
      assert.close(want, t[name](t), { rtol = 1e-6 })
      local s = x:slice(1, 2, 20010, 3)
      assert.close(y:slice(1, 2, 20010, 3), s[name](s), { rtol = 1e-6 })
      local e = m:narrow(2, 3, 1):expand(35, 50)
      assert.close(y:narrow(1, 1, 35 * 41):reshape(35, 41):narrow(2, 3, 1):expand(35, 50), e[name](e), { rtol = 1e-6 })
      local one = x:narrow(1, 5, 1):reshape({})
      assert.equal(0, #one[name](one).shape)
      assert.close(y:narrow(1, 5, 1):item(), one[name](one):item(), { rtol = 1e-6 })
      local none = moe.zeros(0, 3)
      assert.same({ 0, 3 }, { table.unpack(none[name](none).shape) })
      -- in place, whole and through a strided view
      local copy = x:clone()
      assert.equal(copy, copy[name .. "_"](copy))
      assert.close(y, copy, { rtol = 0, atol = 0 })
      copy = x:clone()
      local view = copy:slice(1, 1, 20011, 2)
      view[name .. "_"](view)
      assert.close(y:slice(1, 1, 20011, 2), copy:slice(1, 1, 20011, 2), { rtol = 1e-6 })
      assert.close(x:slice(1, 2, 20011, 2), copy:slice(1, 2, 20011, 2), { rtol = 0, atol = 0 })
    end)
  end

  it("overflow and underflow as they should", function()
    assert.same({ inf, 0.0, 0.0 }, as("f32", { 89, -104, -inf }):exp():totable())
    assert.close({ 1.4013e-45 * 3, 3.3e38 }, as("f32", { -102.2, math.log(3.3e38) }):exp(), { rtol = 0.2 })
    assert.close({ -103.278929903 }, as("f32", { 2.0 ^ -149 }):log(), { rtol = 1e-6 })
    assert.close({ 0, 1 }, as("f32", { -200, 200 }):sigmoid(), { atol = 1e-38 })
    assert.same({ 200.0, 0.0 }, as("f32", { 200, -200 }):softplus():totable())
  end)

  it("sine and cosine of large arguments", function()
    local x = rounded("f32", { 1e4, 12345.678, 1e6, -3e7, 1.3e8, 1e10, -1e20 })
    local s, c = {}, {}
    for i, v in ipairs(x) do s[i], c[i] = math.sin(v), math.cos(v) end
    assert.close(s, as("f32", x):sin(), { rtol = 1e-5, atol = 1e-7 })
    assert.close(c, as("f32", x):cos(), { rtol = 1e-5, atol = 1e-7 })
  end)

  it("options of softplus, leaky_relu, elu and gelu", function()
    local x = { -3, -0.5, 0.25, 2 }
    local t = as("f64", x)
    local a, b, c, d = {}, {}, {}, {}
    for i, v in ipairs(x) do
      a[i] = softplus(3 * v) / 3
      b[i] = v < 0 and 0.2 * v or v
      c[i] = v < 0 and 1.5 * expm1(v) or v
      d[i] = 0.5 * v * (1 + tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v ^ 3)))
    end
    assert.close(a, t:softplus(3), { rtol = 1e-12 })
    assert.close(b, t:leaky_relu { slope = 0.2 }, { rtol = 1e-12 })
    assert.close(c, t:elu(1.5), { rtol = 1e-12 })
    assert.close(d, t:gelu "tanh", { rtol = 1e-12 })
    assert.close(d, t:gelu { approximate = "tanh" }, { rtol = 1e-12 })
    assert.matches("gelu.*none, tanh", helper.error_of(function() t:gelu "fast" end))
  end)

  it("integers: kept by the functions that know them, f32 from the others", function()
    local x = as("i64", { -3, 0, 7 })
    for name, want in pairs { neg = { 3, 0, -7 }, abs = { 3, 0, 7 }, sign = { -1, 0, 1 }, floor = { -3, 0, 7 }, ceil = { -3, 0, 7 },
      round = { -3, 0, 7 }, trunc = { -3, 0, 7 }, square = { 9, 0, 49 }, relu = { 0, 0, 7 } } do
      local y = x[name](x)
      assert.equal("i64", y.dtype)
      assert.same(want, y:totable())
      assert.equal("i32", x:to("i32")[name](x:to("i32")).dtype)
    end
    assert.equal("f32", x:exp().dtype)
    assert.close({ math.exp(-3), 1, math.exp(7) }, x:exp(), { rtol = 1e-6 })
    assert.equal("f32", as("bool", { true, false }):sqrt().dtype)
    assert.matches("exp_: the result is f32", helper.error_of(function() x:exp_() end))
  end)

  it("predicates", function()
    for _, dtype in ipairs { "f32", "f64", "bf16", "f16" } do
      local x = as(dtype, { 1, inf, -inf, nan })
      assert.same({ false, false, false, true }, x:isnan():totable())
      assert.same({ false, true, true, false }, x:isinf():totable())
      assert.same({ true, false, false, false }, x:isfinite():totable())
    end
    local x = as("i64", { 0, 5 })
    assert.same({ false, false }, x:isnan():totable())
    assert.same({ true, true }, x:isfinite():totable())
    assert.same({ true, false }, x:logical_not():totable())
    assert.same({ true, false, false }, as("f32", { 0, 0.5, nan }):logical_not():totable())
    assert.same({ { true, true }, { false, false } }, as("f32", { { nan, 1 }, { nan, 2 } }):t():isnan():totable())
  end)
end)

local binary = {
  add = function(a, b) return a + b end,
  sub = function(a, b) return a - b end,
  mul = function(a, b) return a * b end,
  div = function(a, b) return a / b end,
  floor_divide = function(a, b) return a // b end,
  remainder = function(a, b) return a % b end,
  fmod = math.fmod,
  minimum = function(a, b) return (a < b or a ~= a) and a or b end,
  maximum = function(a, b) return (a > b or a ~= a) and a or b end,
  pow = function(a, b) return a ^ b end,
  atan2 = math.atan,
}
local compare = {
  eq = function(a, b) return a == b end, ne = function(a, b) return a ~= b end,
  lt = function(a, b) return a < b end, le = function(a, b) return a <= b end,
  gt = function(a, b) return a > b end, ge = function(a, b) return a >= b end,
  logical_and = function(a, b) return a ~= 0 and b ~= 0 end,
  logical_or = function(a, b) return a ~= 0 or b ~= 0 end,
  logical_xor = function(a, b) return (a ~= 0) ~= (b ~= 0) end,
}

describe("pointwise functions of two", function()
  local av = { 1.5, -2.25, 0.0, 7.0, -7.5, 3.0 }
  local bv = { 2.0, 3.0, -1.5, 2.5, -2.0, 3.0 }

  for name, f in pairs(binary) do
    it(name .. " agrees with Lua, tensors and numbers on either side", function()
      for dtype, tol in pairs { f32 = 1e-6, f64 = 1e-14, bf16 = 8e-3, f16 = 1e-3 } do
        local a, b = as(dtype, av), as(dtype, bv)
        local want, left, right = {}, {}, {}
        for i = 1, #av do
          want[i], left[i], right[i] = f(av[i], bv[i]), f(2.5, bv[i]), f(av[i], 2.5)
        end
        local opts = { rtol = tol, atol = 1e-7, nan = true, name = name .. " " .. dtype }
        assert.close(want, moe[name](a, b), opts)
        assert.close(right, a[name](a, 2.5), opts)
        assert.close(left, moe[name](2.5, b), opts)
        assert.equal(dtype, moe[name](a, b).dtype)
        assert.equal(dtype, moe[name](2.5, b).dtype)
        assert.close(want, a:clone()[name .. "_"](a:clone(), b), opts)
      end
    end)

    it(name .. " broadcasts over every layout", function()
      local r = helper.random(3)
      local function make(...) return helper.tensor(function() return 0.5 + 2 * r() end, { ... }) end
      local function at(t, i, j, k)
        local s = t.shape
        local idx, n = { i, j, k }, #s
        local v = t:totable()
        for d = 1, n do
          local p = idx[3 - n + d]
          v = v[s[d] == 1 and 1 or p]
        end
        return v
      end
      local pairs_of = {
        { make(2, 3, 40), make(2, 3, 40) }, { make(2, 3, 40), make(40) }, { make(2, 3, 1), make(3, 40) }, { make(1), make(2, 3, 40) },
        { make(2, 3, 5), make(3, 1) }, { make(3, 2, 5):transpose(1, 2), make(2, 3, 5) }, { make(2, 3, 5), make(5, 3, 2):transpose(1, 3) },
        { make(2, 1, 5):expand(2, 3, 5), make(2, 3, 1) }, { make(4, 3, 10):slice(1, 1, 4, 2):slice(3, 1, 10, 2), make(2, 1, 1) },
      }
      for n, p in ipairs(pairs_of) do
        local y = moe[name](p[1], p[2])
        assert.equal(3, #y.shape)
        local want = {}
        for i = 1, y.shape[1] do
          want[i] = {}
          for j = 1, y.shape[2] do
            want[i][j] = {}
            for k = 1, y.shape[3] do want[i][j][k] = f(at(p[1], i, j, k), at(p[2], i, j, k)) end
          end
        end
        -- at a whole quotient rounding may choose either side
        local loose = name == "floor_divide" or name == "remainder" or name == "fmod"
        assert.close(want, y, { rtol = loose and 1e-4 or 2e-6, atol = 1e-6, name = name .. " pair " .. n })
      end
      assert.same({ 0, 4 }, { table.unpack(moe[name](moe.zeros(0, 4), moe.ones(4)).shape) })
      assert.matches(name .. ".*%[2, 3%] and %[2%] do not broadcast", helper.error_of(moe[name], moe.ones(2, 3), moe.ones(2)))
      assert.matches(name, helper.error_of(moe[name], 1, 2))
    end)
  end

  for name, f in pairs(compare) do
    it(name .. " agrees with Lua", function()
      local a = { 1, -2, 0, 0, 5, nan, inf }
      local b = { 1, 3, 0, 2, 0, 1, inf }
      for _, dtype in ipairs { "f32", "f64", "bf16" } do
        local want, left, right = {}, {}, {}
        for i = 1, #a do want[i], left[i], right[i] = f(a[i], b[i]), f(1.5, b[i]), f(a[i], 1) end
        local y = moe[name](as(dtype, a), as(dtype, b))
        assert.equal("bool", y.dtype)
        assert.same(want, y:totable())
        assert.same(left, moe[name](1.5, as(dtype, b)):totable())
        assert.same(right, moe[name](as(dtype, a), 1):totable())
      end
      local want = {}
      for i = 1, 5 do want[i] = f(a[i], 1.5) end
      assert.same(want, moe[name](as("i64", { 1, -2, 0, 0, 5 }), 1.5):totable())
      local x = moe.arange(70):reshape(7, 10)
      assert.same(moe[name](x:t():contiguous(), 30):totable(), moe[name](x:t(), 30):totable())
      assert.same({ 7, 10 }, { table.unpack(moe[name](x, moe.ones(7, 1)).shape) })
    end)
  end

  it("compares integers and fractions exactly", function()
    local big = as("i64", { 16777217, 16777216 })
    assert.same({ true, false }, big:eq(16777217):totable())
    assert.same({ true, false }, big:gt(16777216.5):totable())
    assert.same({ true }, as("f32", { 0.1 }):eq(0.1):totable()) -- the number is taken in the tensor's type
  end)

  it("types meet as promised", function()
    local order = { "bool", "u8", "i32", "i64", "f16", "bf16", "f32", "f64" }
    for i, p in ipairs(order) do
      for j, q in ipairs(order) do
        local want = order[math.max(i, j)]
        if (p == "f16" and q == "bf16") or (p == "bf16" and q == "f16") then want = "f32" end
        local a, b = moe.ones(3, { dtype = p }), moe.ones(3, { dtype = q })
        assert.equal(want, (a + b).dtype)
        assert.equal(want, moe.where(moe.ones(3), a, b).dtype)
        local quotient = want:match "^[fb]%d*f?%d+$" and want or "f32"
        assert.equal(quotient, (a / b).dtype)
        assert.close({ 1, 1, 1 }, a * b)
      end
      local x = moe.ones(2, { dtype = p })
      local float = p:match "f" ~= nil
      assert.equal(float and p or "f32", (x + 1.5).dtype)
      assert.equal(float and p or p == "bool" and "i64" or p, (x + 1).dtype)
      assert.equal(float and p or "f32", (x / 2).dtype)
    end
  end)

  it("whole numbers stay exact and divide as in Lua", function()
    local a, b = { 7, -7, 7, -7, 9007199254740993, math.mininteger }, { 2, 2, -2, -2, 3, -1 }
    local function big(v) -- beyond 2^53 not through doubles
      local t = moe.zeros(#v, { dtype = "i64" })
      for i, n in ipairs(v) do t[i] = n end
      return t
    end
    local x, y = big(a), big(b)
    if x:totable()[5] == a[5] then
      for name, f in pairs { add = binary.add, sub = binary.sub, mul = binary.mul, floor_divide = binary.floor_divide,
        remainder = binary.remainder } do
        local want = {}
        for i = 1, #a do want[i] = f(a[i], b[i]) end
        assert.same(want, moe[name](x, y):totable())
      end
    end
    assert.same({ 49, -343, 1, 0 }, as("i64", { 7, -7, 3, 2 }):pow(as("i64", { 2, 3, 0, -1 })):totable())
    assert.close({ 0.25 }, as("i64", { 2 }):pow(-2))
    for _, name in ipairs { "remainder", "floor_divide", "fmod" } do
      assert.matches(name .. ".*divide an integer by zero", helper.error_of(moe[name], x, 0))
      assert.matches(name .. ".*divide an integer by zero", helper.error_of(moe[name], as("i64", { 1, 2 }), as("i64", { 1, 0 })))
      assert.equal("f32", moe[name](as("f32", { 1 }), 0).dtype)
    end
  end)

  it("in place: the type of the first argument, aliases, and what does not fit", function()
    local x = as("f32", { 1, 2, 3 })
    assert.equal("f32", x:add_(as("f64", { 1, 1, 1 })).dtype)
    assert.same({ 2.0, 3.0, 4.0 }, x:totable())
    x:mul_(x)
    assert.same({ 4.0, 9.0, 16.0 }, x:totable())
    local h = as("bf16", { 1, 2 })
    assert.equal("bf16", h:add_(as("f32", { 1, 1 })).dtype)
    assert.same({ 2.0, 3.0 }, h:totable())
    local i = as("i32", { 1, 2 })
    assert.equal("i32", i:add_(as("i64", { 1, 1 })).dtype)
    assert.matches("add_.*does not fit", helper.error_of(function() i:add_(1.5) end))
    assert.matches("add_.*does not fit", helper.error_of(function() as("f32", { 1 }):add_(moe.ones(3)) end))
    -- an operand that overlaps the result in another order
    local m = as("f32", { { 1, 2, 3 }, { 4, 5, 6 }, { 7, 8, 9 } })
    m:add_(m:t())
    assert.same({ { 2.0, 6.0, 10.0 }, { 6.0, 10.0, 14.0 }, { 10.0, 14.0, 18.0 } }, m:totable())
    local v = moe.arange(1, 9, { dtype = "f32" })
    v:narrow(1, 2, 8):add_(v:narrow(1, 1, 8))
    assert.same({ 1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0, 17.0 }, v:totable())
  end)

  it("arithmetic by operators", function()
    local x = as("f32", { 1, -2, 3 })
    assert.close({ 3, 0, 5 }, x + 2)
    assert.close({ 1, 4, -1 }, 2 - x)
    assert.close({ 0.5, -1, 1.5 }, x / 2)
    assert.close({ 2, -1, 2 / 3 }, 2 / x, { rtol = 1e-6 })
    assert.close({ 1, 0, 1 }, x % 2)
    assert.close({ 1, 4, 9 }, x ^ 2)
    assert.close({ -1, 2, -3 }, -x)
  end)
end)

describe("where, clamp, fill", function()
  it("where chooses, broadcast over all three, in every type", function()
    for _, dtype in ipairs { "bool", "u8", "i32", "i64", "f16", "bf16", "f32", "f64" } do
      local a, b = moe.ones(2, 3, { dtype = dtype }), moe.zeros(3, { dtype = dtype })
      local y = moe.where(moe.tensor { { true }, { false } }, a, b)
      assert.equal(dtype, y.dtype)
      assert.close({ { 1, 1, 1 }, { 0, 0, 0 } }, y)
    end
    local c = moe.tensor { true, false, true }
    assert.close({ 1, 5, 3 }, moe.where(c, moe.tensor { 1, 2, 3 }, 5))
    assert.equal("i64", moe.where(c, 1, 0).dtype)
    assert.equal("f32", moe.where(c, 1, 0.5).dtype)
    assert.close({ { 1, 4 }, { 2, 5 } }, moe.where(moe.ones(2, 2), (moe.tensor { { 1, 2 }, { 4, 5 } }):t(), nan))
    assert.close({ 2, 9 }, moe.where(moe.tensor { -0.5, 0 }, 2, 9)) -- any number but 0 is true
    assert.same({ 0, 2 }, { table.unpack(moe.where(moe.zeros(0, 1), moe.ones(2), 1).shape) })
    assert.matches("where", helper.error_of(moe.where, moe.ones(2), moe.ones(3), 1))
    -- NaN on the side that is not chosen does not reach the gradient
    local x = moe.tensor({ 0.0, 1.0 }, { requires_grad = true })
    moe.where(x:gt(0.5), x, 0):sum():backward()
    assert.close({ 0, 1 }, x.grad)
  end)

  it("clamp holds values between the bounds", function()
    local x = as("f32", { -5, 0.5, 5, nan, inf, -inf })
    assert.close({ -1, 0.5, 1, nan, 1, -1 }, x:clamp(-1, 1), { nan = true })
    assert.close({ -1, 0.5, 5, nan, inf, -1 }, x:clamp(-1), { nan = true })
    assert.close({ -5, 0.5, 1, nan, 1, -inf }, x:clamp { max = 1 }, { nan = true })
    assert.same({ -2, 2, 3 }, as("i64", { -9, 2, 9 }):clamp(-2.5, 3.5):totable())
    assert.close({ { 1, 1 }, { 1, 2 } }, as("f32", { { 0, 1 }, { -1, 3 } }):t():clamp(1, 2):t() , {})
    assert.matches("clamp: give min, max or both", helper.error_of(function() x:clamp() end))
    local g = moe.tensor({ -2.0, -1.0, 0.0, 1.0, 2.0 }, { requires_grad = true })
    g:clamp(-1, 1):sum():backward()
    assert.close({ 0, 1, 1, 1, 0 }, g.grad)
  end)

  it("fill_ and zero_", function()
    local x = moe.ones(2, 3)
    x:narrow(2, 2, 1):fill_(7)
    assert.close({ { 1, 7, 1 }, { 1, 7, 1 } }, x)
    assert.close({ { 0, 0, 0 }, { 0, 0, 0 } }, x:zero_())
  end)

  it("lerp, addcmul, addcdiv", function()
    local a, b = as("f64", { 1, 2 }), as("f64", { 3, 6 })
    assert.close({ 1.5, 3 }, a:lerp(b, 0.25))
    assert.close({ 1, 6 }, a:lerp(b, as("f64", { 0, 1 })))
    assert.close({ 2.5, 8 }, a:addcmul(a, b, 0.5))
    assert.close({ 2, 3.5 }, as("f64", { 1, 2 }):addcdiv(b, a, 0.5) - as("f64", { 0.5, 0 }))
  end)
end)

describe("gradients of pointwise functions", function()
  it("at kinks and ties as documented", function()
    local x = moe.tensor({ 0.0, 2.0, -1.0 }, { requires_grad = true })
    x:relu():sum():backward()
    assert.close({ 0, 1, 0 }, x.grad)
    x.grad = nil
    x:abs():sum():backward()
    assert.close({ 0, 1, -1 }, x.grad)
    local a, b = moe.tensor({ 1.0, 2.0 }, { requires_grad = true }), moe.tensor({ 1.0, 5.0 }, { requires_grad = true })
    moe.maximum(a, b):sum():backward()
    assert.close({ 0.5, 0 }, a.grad)
    assert.close({ 0.5, 1 }, b.grad)
    local z = moe.tensor({ 1.5 }, { requires_grad = true })
    z:floor():sum():backward()
    assert.is_true(z.grad == nil or z.grad:item() == 0)
  end)

  it("of pow at 0", function()
    local x = moe.tensor({ 0.0, 2.0 }, { requires_grad = true })
    x:pow(0):sum():backward()
    assert.is_true(x.grad == nil or (x.grad:abs():sum():item() == 0))
    local e = moe.tensor({ 2.0, 0.0 }, { requires_grad = true })
    moe.pow(moe.tensor { 0.0, 0.0 }, e):sum():backward()
    assert.close({ 0, 0 }, e.grad)
    local base = moe.tensor({ 0.0 }, { requires_grad = true })
    moe.pow(base, moe.tensor { 0.0 }):sum():backward()
    assert.close({ 0 }, base.grad)
  end)

  it("of second order, against differences of the first", function()
    local positive = { sqrt = true, rsqrt = true, log = true, log2 = true, log1p = true, reciprocal = true }
    for name in pairs(unary) do
      if not ({ neg = 1, sign = 1, floor = 1, ceil = 1, round = 1, trunc = 1, abs = 1, relu = 1, leaky_relu = 1 })[name] then
        for _, mode in ipairs(name == "gelu" and { "none", "tanh" } or { false }) do
          local start = positive[name] and { 0.7, 1.3 } or { -0.8, 0.6 }
          local function first(values, graph)
            local x = moe.tensor(values, { dtype = "f64", requires_grad = true })
            local y = mode and x[name](x, mode) or x[name](x)
            return moe.grad(y:sum(), x, { create_graph = graph }), x
          end
          local g, x = first(start, true)
          if type(g) == "table" then g = g[1] end
          local second = moe.grad(g:sum(), x)
          if type(second) == "table" then second = second[1] end
          local h, want = 1e-5, {}
          for i = 1, 2 do
            local up, down = { start[1], start[2] }, { start[1], start[2] }
            up[i], down[i] = up[i] + h, down[i] - h
            local gu, gd = first(up), first(down)
            if type(gu) == "table" then gu, gd = gu[1], gd[1] end
            want[i] = (gu:sum():item() - gd:sum():item()) / (2 * h)
          end
          assert.close(want, second, { rtol = 1e-6, atol = 1e-7, name = name })
        end
      end
    end
  end)

  it("reach broadcast operands and halves", function()
    local x = moe.ones(3, 1, { dtype = "bf16", requires_grad = true })
    local b = moe.ones(4, { requires_grad = true })
    local y = (x * 2) * b
    y:silu():sum():backward()
    assert.equal("bf16", x.grad.dtype)
    assert.same({ 3, 1 }, { table.unpack(x.grad.shape) })
    local s = sigmoid(2)
    local slope = s * (1 + 2 * (1 - s))
    assert.close({ { 8 * slope }, { 8 * slope }, { 8 * slope } }, x.grad, { rtol = 2e-2 })
    assert.close({ 6 * slope, 6 * slope, 6 * slope, 6 * slope }, b.grad, { rtol = 1e-5 })
  end)

  it("are refused after an input was overwritten", function()
    local x = moe.ones(3, { requires_grad = true })
    local h = x * 1
    local y = h:silu()
    h:add_(1)
    assert.matches("in place", helper.error_of(function() y:sum():backward() end))
    local k = x * 1
    k:sigmoid_() -- keeps its result, so that it may write over its input
    k:sum():backward()
    assert.close({ sigmoid(1) * sigmoid(-1), sigmoid(1) * sigmoid(-1), sigmoid(1) * sigmoid(-1) }, x.grad, { rtol = 1e-5 })
  end)
end)
