-- Reductions and running sums against plain loops: every subset of dims, strided inputs, types, long inputs that are
-- cut into pieces, ties, NaN, empty sizes, messages.
local helper = require "spec.helper"
local moe = require "moe"

local inf, nan = math.huge, 0 / 0

-- Groups of the elements of a row-major list that fall together when `dims` are reduced, in row-major order, and the
-- shape with those dims taken out.
local function groups(flat, shape, dims)
  local gone, rest = {}, {}
  for _, d in ipairs(dims) do gone[d] = true end
  for d = 1, #shape do
    if not gone[d] then rest[#rest + 1] = shape[d] end
  end
  local count = 1
  for _, n in ipairs(rest) do count = count * n end
  local list = {}
  for k = 1, count do list[k] = {} end
  for i = 1, #flat do
    local left, at, scale = i - 1, 0, 1
    for d = #shape, 1, -1 do
      local p = left % shape[d]
      left = left // shape[d]
      if not gone[d] then
        at = at + p * scale
        scale = scale * shape[d]
      end
    end
    table.insert(list[at + 1], flat[i])
  end
  return list, rest
end

local function fold(start, f)
  return function(v)
    local a = start
    for i = 1, #v do a = f(a, v[i]) end
    return a
  end
end

local oracle = {}
oracle.sum = fold(0, function(a, x) return a + x end)
oracle.prod = fold(1, function(a, x) return a * x end)
oracle.amax = fold(-inf, math.max)
oracle.amin = fold(inf, math.min)
oracle.mean = function(v) return oracle.sum(v) / #v end
oracle.count_nonzero = fold(0, function(a, x) return x ~= 0 and a + 1 or a end)
oracle.any = function(v) return oracle.count_nonzero(v) > 0 end
oracle.all = function(v) return oracle.count_nonzero(v) == #v end
oracle.logsumexp = function(v) return math.log(fold(0, function(a, x) return a + math.exp(x) end)(v)) end
oracle.var = function(v, correction)
  local m = oracle.mean(v)
  return fold(0, function(a, x) return a + (x - m) ^ 2 end)(v) / (#v - (correction or 1))
end
oracle.std = function(v) return math.sqrt(oracle.var(v)) end
oracle.norm = function(v, p)
  if p == inf then return fold(0, function(a, x) return math.max(a, math.abs(x)) end)(v) end
  if p == -inf then return fold(inf, function(a, x) return math.min(a, math.abs(x)) end)(v) end
  if p == 0 then return oracle.count_nonzero(v) end
  return fold(0, function(a, x) return a + math.abs(x) ^ p end)(v) ^ (1 / p)
end

local subsets = { {}, { 1 }, { 2 }, { 3 }, { 1, 2 }, { 1, 3 }, { 2, 3 }, { 1, 2, 3 } }

-- Calls check(flat list of values, shape) results of f on x and its strided views.
local function each_form(x, check)
  check(x, "contiguous")
  for _, view in ipairs(helper.views(x)) do check(view[2], view[1]) end
end

local function sample(shape, dtype, f)
  local r = helper.random(7)
  return helper.tensor(f or function() return r.normal() end, shape, { dtype = dtype })
end

describe("reductions", function()
  local shape = { 3, 5, 67 } -- more columns than one tile of the kernels holds
  local simple = { "sum", "prod", "amax", "amin", "mean", "count_nonzero", "any", "all", "logsumexp", "var", "std" }
  for _, dtype in ipairs { "f64", "f32" } do
    local tolerance = dtype == "f64" and { rtol = 1e-12, atol = 1e-12 } or { rtol = 2e-5, atol = 2e-5 }
    for _, name in ipairs(simple) do
      it(name .. " over every subset of dims, " .. dtype, function()
        local r = helper.random(3)
        local x = helper.tensor(function()
          if name == "prod" then return 0.9 + 0.2 * r() end
          if name == "any" or name == "all" or name == "count_nonzero" then return r() < 0.5 and 0 or r.normal() end
          return r.normal()
        end, shape, { dtype = dtype })
        local flat = helper.flatten(x)
        each_form(x, function(v, form)
          for _, dims in ipairs(subsets) do
            if #dims > 0 or (name ~= "var" and name ~= "std") then
              local expected = {}
              local list, rest = groups(flat, shape, dims)
              for k, g in ipairs(list) do
                local e = oracle[name](g)
                expected[k] = e == true and 1 or e == false and 0 or e
              end
              local got, got_shape = helper.flatten(v[name](v, dims))
              tolerance.name = form .. " {" .. table.concat(dims, ",") .. "}"
              assert.same(rest, got_shape)
              assert.close(expected, got, tolerance)
              local kept = v[name](v, dims, true)
              assert.equal(3, #kept.shape)
              for _, d in ipairs(dims) do assert.equal(1, kept.shape[d]) end
              assert.same(got, (helper.flatten(kept)))
            end
          end
          local whole = helper.flatten(v[name](v))
          local e = oracle[name](flat)
          assert.close(e == true and 1 or e == false and 0 or e, whole[1], tolerance)
        end)
      end)
    end

    it("norm for every p over every subset of dims, " .. dtype, function()
      local x = sample(shape, dtype)
      local flat = helper.flatten(x)
      for _, p in ipairs { 2, 1, 0, 3, 0.5, -1, inf, -inf } do
        for _, dims in ipairs(subsets) do
          local list = groups(flat, shape, dims)
          local expected = {}
          for k, g in ipairs(list) do expected[k] = oracle.norm(g, p) end
          assert.close(expected, (helper.flatten(x:norm(p, dims))),
            { rtol = dtype == "f64" and 1e-11 or 3e-5, name = "p = " .. p })
        end
      end
    end)
  end

  it("max, min, argmax, argmin along each dim", function()
    local x = sample(shape, "f32", (function()
      local r = helper.random(5)
      return function() return r(9) end -- ties everywhere
    end)())
    local flat = helper.flatten(x)
    for dim = 1, 3 do
      local list = groups(flat, shape, { dim })
      for name, better in pairs { max = function(a, b) return a > b end, min = function(a, b) return a < b end } do
        local values, index = {}, {}
        for k, g in ipairs(list) do
          local at = 1
          for i = 2, #g do
            if better(g[i], g[at]) then at = i end
          end
          values[k], index[k] = g[at], at
        end
        for _, dtype in ipairs { "f32", "f64", "i64", "i32" } do
          each_form(x:to(dtype), function(v, form)
            local got, at = v[name](v, dim - 4)
            assert.equal(dtype, got.dtype)
            assert.equal("i64", at.dtype)
            assert.same(index, (helper.flatten(at)), form)
            assert.close(values, (helper.flatten(got)))
            assert.same(index, (helper.flatten(v["arg" .. name](v, dim, true))))
          end)
        end
      end
    end
  end)

  it("argmax without dim counts row by row, and takes the first", function()
    local x = moe.tensor { { 1, 7, 3 }, { 7, -2, 0 } }
    assert.equal(2, x:argmax():item())
    assert.equal(5, x:argmin():item())
    assert.equal(2, x:t():argmax():item())
  end)

  it("both zeros are one value in ties", function()
    assert.equal(1, moe.tensor({ -0.0, 0.0 }):argmax():item())
    assert.equal(1, moe.tensor({ 0.0, -0.0 }):argmin():item())
  end)

  it("max() is one result", function()
    assert.equal(1, select("#", moe.tensor({ 3, 9 }):max()))
    assert.equal(2, select("#", moe.tensor({ 3, 9 }):max(1)))
  end)

  it("NaN wins every maximum and minimum, of any sign and place", function()
    for _, dtype in ipairs { "f32", "f64" } do
      for _, n in ipairs { 3, 31, 64, 100, 5000, 40000 } do
        for _, at in ipairs { 1, n // 2 + 1, n } do
          for _, bad in ipairs { nan, -nan } do
            local x = helper.tensor(function(i) return i == at and bad or i end, { n }, { dtype = dtype })
            for _, name in ipairs { "amax", "amin", "max", "min", "sum", "mean", "prod", "logsumexp" } do
              local v = x[name](x):item()
              assert.is_true(v ~= v, name .. " n = " .. n .. " at " .. at)
            end
            for _, p in ipairs { 1, 2, 3, inf, -inf } do
              local v = x:norm(p):item()
              assert.is_true(v ~= v, "norm " .. p)
            end
            assert.equal(at, x:argmax():item())
            assert.equal(at, x:argmin():item())
            local two = moe.stack({ x, x }, { dim = 2 }) -- columns
            assert.same({ at, at }, two:argmax(1):totable())
            local m = two:amax(1):totable()
            assert.is_true(m[1] ~= m[1] and m[2] ~= m[2])
          end
        end
      end
    end
  end)

  it("infinities", function()
    local x = moe.tensor { -inf, 1, inf }
    assert.equal(inf, x:amax():item())
    assert.equal(-inf, x:amin():item())
    assert.equal(inf, x:norm(inf):item())
    assert.equal(inf, x:logsumexp():item())
    assert.equal(-inf, moe.tensor({ -inf, -inf }):logsumexp():item())
    assert.equal(-inf, moe.tensor({ { -inf, -inf }, { -inf, 0 } }):logsumexp(1):totable()[1])
    assert.equal(-inf, moe.tensor({ -inf, -inf }):amax():item())
    assert.close(1000 + math.log(2), moe.tensor({ 1000, 1000 }):logsumexp():item(), { rtol = 1e-6 })
  end)

  it("long sums in f32 stay accurate", function()
    for _, n in ipairs { 32768, 32769, 100001, 3000017 } do
      local x = moe.full({ n }, 0.1)
      local one = moe.full({ 1 }, 0.1):item()
      assert.close(one * n, x:sum():item(), { rtol = 1e-6 })
      assert.close(one, x:mean():item(), { rtol = 1e-6 })
      assert.close(one * math.sqrt(n), x:norm():item(), { rtol = 1e-6 })
    end
  end)

  it("long and wide reductions, cut into pieces", function()
    for _, shape2 in ipairs { { 5003, 3 }, { 700, 129 }, { 40, 2100 }, { 3, 33000 } } do
      local x = sample(shape2, "f64")
      local flat = helper.flatten(x)
      for dim = 1, 2 do
        local list = groups(flat, shape2, { dim })
        for _, name in ipairs { "sum", "amax", "count_nonzero", "var", "logsumexp" } do
          local expected = {}
          for k, g in ipairs(list) do expected[k] = oracle[name](g) end
          assert.close(expected, (helper.flatten(x[name](x, dim))), { rtol = 1e-10, atol = 1e-10, name = name })
          assert.close(expected, (helper.flatten(x:to("f32")[name](x:to("f32"), dim))), { rtol = 1e-4, atol = 1e-4, name = name })
        end
      end
    end
  end)

  it("are the same to the bit for any number of threads", function()
    local x = sample({ 300, 257 }, "f32")
    local function all_of()
      local list = {}
      for _, name in ipairs { "sum", "mean", "var", "norm", "logsumexp", "prod" } do
        list[#list + 1] = x[name](x):item()
        if name ~= "norm" then
          for d = 1, 2 do
            for _, v in ipairs((helper.flatten(x[name](x, d)))) do list[#list + 1] = v end
          end
        end
      end
      return list
    end
    local before = moe.threads()
    moe.threads(1)
    local one = all_of()
    for _, n in ipairs { 2, 3 } do
      moe.threads(n)
      assert.same(one, all_of())
    end
    moe.threads(before)
  end)

  it("types of results", function()
    local i = moe.tensor({ { 1, 2 }, { 3, 5 } }, { dtype = "i32" })
    assert.equal("i64", i:sum().dtype)
    assert.equal(11, i:sum():item())
    assert.equal("i64", i:prod().dtype)
    assert.equal(30, i:prod():item())
    assert.equal("i32", i:amax().dtype)
    assert.equal("f32", i:mean().dtype)
    assert.close(2.75, i:mean():item())
    assert.close(math.sqrt(39), i:norm():item())
    assert.equal("f32", i:var().dtype)
    local b = i:gt(2)
    assert.equal("i64", b:sum().dtype)
    assert.equal(2, b:sum():item())
    assert.equal("bool", b:any(1).dtype)
    assert.same({ true, true }, b:any(1):totable())
    assert.same({ false, true }, b:all(2):totable())
    assert.equal(2, b:count_nonzero():item())
    for _, dtype in ipairs { "bf16", "f16", "f32", "f64" } do
      local x = moe.tensor({ { 1, 2 }, { 3, 5 } }, { dtype = dtype })
      for _, name in ipairs { "sum", "mean", "amax", "var", "std", "norm", "logsumexp", "prod" } do
        assert.equal(dtype, x[name](x).dtype)
      end
      assert.equal(11, x:sum():item())
    end
    local big = moe.tensor({ math.maxinteger, 1 }, { dtype = "i64" })
    assert.equal(math.mininteger, big:sum():item()) -- wraps
    assert.equal(math.maxinteger, big:amax():item())
  end)

  it("of a scalar", function()
    local x = moe.tensor(-3)
    assert.equal(0, #x:sum().shape)
    assert.equal(-3, x:sum():item())
    assert.equal(-3, x:sum(1):item())
    assert.equal(-3, x:amax(-1):item())
    assert.equal(3, x:norm():item())
    local v, at = x:max(1)
    assert.equal(-3, v:item())
    assert.equal(1, at:item())
    assert.equal(-3, x:cumsum(1):item())
  end)

  it("of nothing", function()
    local x = moe.zeros(0, 3)
    assert.equal(0, x:sum():item())
    assert.same({ 0, 0, 0 }, x:sum(1):totable())
    assert.same({ 1, 1, 1 }, x:prod(1):totable())
    assert.equal(1, x:prod():item())
    local m = x:mean():item()
    assert.is_true(m ~= m)
    assert.equal(false, x:any():item())
    assert.equal(true, x:all():item())
    assert.equal(0, x:norm():item())
    assert.equal(-inf, x:logsumexp():item())
    assert.same({ 0 }, x:sum(2).shape)
    assert.same({ 0 }, x:amax(2).shape)
    assert.same({ 0, 3 }, x:cumsum(1).shape)
    for _, name in ipairs { "amax", "amin", "max", "min", "argmax", "argmin" } do
      assert.matches("nothing to choose from: x is %[0, 3%]", helper.error_of(x[name], x))
      assert.matches(name .. ": nothing", helper.error_of(x[name], x, 1))
    end
  end)

  it("var with every correction; a single element has none", function()
    local v = { 1, 2, 4, 8.5 }
    local x = moe.tensor(v, { dtype = "f64" })
    for correction = 0, 3 do
      assert.close(oracle.var(v, correction), x:var({ correction = correction }):item(), { rtol = 1e-12 })
    end
    local one = moe.tensor({ 5 }):var():item()
    assert.is_true(one ~= one)
    assert.equal(0, moe.tensor({ 5 }):var({ correction = 0 }):item())
    -- a large mean does not swallow the variance
    local far = moe.tensor({ 1e6, 1e6 + 1, 1e6 + 2 })
    assert.close(1, far:var():item(), { rtol = 1e-6 })
  end)

  it("messages", function()
    local x = moe.zeros(2, 3)
    assert.matches("sum: dim 3 is out of range for a tensor of 2 dimensions", helper.error_of(x.sum, x, 3))
    assert.matches("mean: dim 1 appears twice", helper.error_of(x.mean, x, { 1, -2 }))
    assert.matches("cumsum: dim %-3 is out of range", helper.error_of(x.cumsum, x, -3))
    assert.matches("norm: p is NaN", helper.error_of(x.norm, x, nan))
    assert.matches("argmax: dim", helper.error_of(x.argmax, x, 4))
    assert.has_error(function() x:sum(0) end)
    assert.has_error(function() x:sum("a") end)
  end)
end)

describe("running sums and products", function()
  it("along every dim, both ways", function()
    local shape = { 3, 5, 67 }
    for _, dtype in ipairs { "f64", "f32", "i64" } do
      local r = helper.random(2)
      local x = helper.tensor(function() return dtype == "i64" and r(-2, 3) or 0.5 + r() end, shape, { dtype = dtype })
      for dim = 1, 3 do
        local list = groups((helper.flatten(x)), shape, { dim })
        each_form(x, function(v)
          local forms = { sum = v:cumsum(dim), back = v:cumsum(dim, true), prod = v:cumprod(dim) }
          for name, y in pairs(forms) do
            assert.same(shape, y.shape)
            local got = groups((helper.flatten(y)), shape, { dim })
            for k, g in ipairs(list) do
              local run, n = name == "prod" and 1 or 0, #g
              for i = 1, n do
                local at = name == "back" and n + 1 - i or i
                if name == "prod" then run = run * g[at] else run = run + g[at] end
                assert.close(run, got[k][at], { rtol = dtype == "f32" and 1e-5 or 1e-12, atol = 1e-12 })
              end
            end
          end
        end)
      end
    end
  end)

  it("a long f32 sum does not drift", function()
    local y = moe.full({ 1000003 }, 0.1):cumsum(1)
    assert.close(moe.full({ 1 }, 0.1):item() * 1000003, y[-1], { rtol = 1e-6 })
  end)
end)

describe("gradients of reductions", function()
  local function leaf(t) return moe.tensor(t, { dtype = "f64", requires_grad = true }) end

  it("products with zeros", function()
    for _, case in ipairs {
      { { 2, 3, 4 }, { 12, 8, 6 } }, { { 2, 0, 4 }, { 0, 8, 0 } }, { { 0, 0, 4 }, { 0, 0, 0 } },
    } do
      local x = leaf(case[1])
      x:prod():backward()
      assert.same(case[2], x.grad:totable())
      local y = leaf(case[1])
      y:cumprod(1):sum():backward()
      local a, b, c = table.unpack(case[1])
      assert.same({ 1 + b + b * c, a + a * c, a * b }, y.grad:totable())
    end
  end)

  it("equals share amax, the first of equals takes max(dim)", function()
    local x = leaf { { 3, 1, 3 }, { 0, 0, 0 } }
    x:amax(2):sum():backward()
    assert.close({ { 0.5, 0, 0.5 }, { 1 / 3, 1 / 3, 1 / 3 } }, x.grad)
    local y = leaf { { 3, 1, 3 }, { 0, 0, 0 } }
    y:max(2):sum():backward()
    assert.close({ { 1, 0, 0 }, { 1, 0, 0 } }, y.grad)
    local z = leaf { { 3, 1, 3 }, { 0, 0, 0 } }
    z:max():backward()
    assert.close({ { 0.5, 0, 0.5 }, { 0, 0, 0 } }, z.grad)
    local w = leaf { { -3, 1, 3 }, { 0, 0, 2 } }
    w:norm(inf, 2):sum():backward()
    assert.close({ { -0.5, 0, 0.5 }, { 0, 0, 1 } }, w.grad)
  end)

  it("norm and std are flat at their kinks", function()
    local x = leaf { 0, 0 }
    x:norm():backward()
    assert.same({ 0, 0 }, x.grad:totable())
    local y = leaf { 2, 2 }
    y:std():backward()
    assert.same({ 0, 0 }, y.grad:totable())
  end)

  it("second derivatives of what is composed", function()
    for name, f in pairs {
      sum = function(x) return (x * x * x):sum(1):exp():sum() end,
      mean = function(x) return (x * x * x):mean():square() end,
      var = function(x) return x:var(2):square():sum() end,
      std = function(x) return x:std():square() end,
      norm = function(x) return x:norm(2, 1):square():sum() end,
      norm3 = function(x) return x:norm(3):square() end,
      logsumexp = function(x) return x:logsumexp(2):square():sum() end,
      cumsum = function(x) return x:cumsum(2):square():sum() end,
      amax = function(x) return x:amax(2):exp():sum() end,
      max = function(x) return x:square():max(2):exp():sum() end,
      softmax = function(x) return x:softmax(2):square():sum() end,
      log_softmax = function(x) return x:log_softmax(1):square():sum() end,
      topk = function(x) return x:exp():topk(2):square():sum() end,
      layer_norm = function(x) return x:layer_norm():exp():sum() end,
      rms_norm = function(x) return x:rms_norm():exp():sum() end,
      mse = function(x) return moe.mse(x, x:square()) end,
    } do
      local x = leaf { { 0.3, -1.2, 0.8 }, { 1.1, 0.4, -0.7 } }
      local ok, message = pcall(moe.gradcheck, function(v)
        return moe.enable_grad(function()
          if not v.requires_grad then -- the check's own differences
            v = v:detach()
            v.requires_grad = true
          end
          return moe.grad(f(v), v, { create_graph = true })
        end)
      end, { x })
      assert.is_true(ok, name .. ": " .. tostring(message))
    end
  end)

  it("what has no second derivative says so", function()
    local x = leaf { 1, 2 }
    assert.matches("prod: has no second derivative", helper.error_of(moe.grad, x:prod(), x, { create_graph = true }))
  end)
end)
