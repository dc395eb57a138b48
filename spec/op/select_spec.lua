-- router_gates against a slow twin: sort, then walk down the order.
local moe = require "moe"
local helper = require "spec.helper"

-- One row of scores (a table); limits: mass, threshold, min_k, max_k, numbers or nil.
local function reference(row, o)
  local order, sum = {}, 0
  for e, v in ipairs(row) do
    order[e] = e
    sum = sum + v
  end
  table.sort(order, function(a, b)
    if row[a] ~= row[b] then return row[a] > row[b] end
    return a < b
  end)
  local least = math.min(o.min_k or 1, #row)
  local most = math.max(least, math.min(o.max_k or #row, #row))
  local out, held = {}, 0
  for e = 1, #row do out[e] = 0 end
  for n, e in ipairs(order) do
    local wanted = row[e] > (o.threshold or -math.huge) and ((o.mass or 1) >= 1 or held < o.mass * sum)
    if n > most or not (n <= least or wanted) then break end
    out[e] = row[e]
    held = held + row[e]
  end
  return out
end

describe("moe.router_gates", function()
  it("takes the best of each row as far as the limits go", function()
    local r = helper.random(5)
    for case = 1, 150 do
      local T, E = r(0, 5), r(1, 14)
      local rows, per_row, call = {}, {}, {}
      local names = { mass = r() < 0.5, threshold = r() < 0.5, min_k = r() < 0.5, max_k = r() < 0.5 }
      local function draw(name)
        if name == "mass" then return r(1, 9) / 10 end
        if name == "threshold" then return r(0, 20) / 10 end
        return r(name == "min_k" and 0 or 1, E)
      end
      local each = r() < 0.5 -- one limit a token
      for name, on in pairs(names) do
        if on then
          local list = {}
          for t = 1, T do list[t] = (each or t == 1) and draw(name) or list[1] end
          per_row[name] = list
          call[name] = each and T > 0 and moe.tensor(list, { dtype = "f64" }) or list[1]
        end
      end
      for t = 1, T do
        rows[t] = {}
        -- few distinct values: ties are common
        for e = 1, E do rows[t][e] = case % 2 == 0 and r(0, 3) / 2 or 2 * r() end
      end
      local score = T > 0 and moe.tensor(rows, { dtype = "f64" }) or moe.zeros({ 0, E }, { dtype = "f64" })
      local gates = moe.router_gates(score, call)
      for t = 1, T do
        local o = {}
        for name, list in pairs(per_row) do o[name] = list[t] end
        assert.same(reference(rows[t], o), gates[t]:totable())
      end
      if T == 0 then assert.same({ 0, E }, gates:size()) end
    end
  end)

  it("is top-k, top-p and a threshold by one limit each", function()
    local score = moe.tensor { { 0.1, 0.4, 0.3, 0.2 } }
    local function of(o) return moe.router_gates(score, o)[1]:totable() end
    local function near(wanted, o) assert.close(wanted, of(o), { rtol = 1e-6 }) end
    near({ 0, 0.4, 0.3, 0 }, { min_k = 2, max_k = 2 })
    near({ 0, 0.4, 0.3, 0 }, { mass = 0.6 })
    near({ 0, 0.4, 0, 0 }, { mass = 0 })
    near({ 0.1, 0.4, 0.3, 0.2 }, { mass = 1 })
    near({ 0, 0.4, 0.3, 0 }, { threshold = 0.25 })
    near({ 0, 0.4, 0, 0 }, { threshold = 0.9 })
    near({ 0, 0, 0, 0 }, { threshold = 0.9, min_k = 0 })
    near({ 0.1, 0.4, 0.3, 0.2 }, {})
  end)

  it("chooses among many experts", function()
    moe.manual_seed(2)
    local score = moe.randn(2, 5000)
    local gates = moe.router_gates(score, { min_k = 300, max_k = 300 })
    local value, index = score:topk(300)
    assert.same(moe.zeros(2, 5000):scatter(2, index, value):totable(), gates:totable())
  end)

  it("survives what is not finite", function()
    local nan, inf = 0 / 0, math.huge
    local x = moe.tensor { { nan, 2, nan }, { -inf, -inf, -inf }, { inf, 1, inf } }
    for _, o in ipairs { { mass = 0.5 }, { threshold = 0.5 }, { min_k = 2, max_k = 2 }, { threshold = nil, mass = 0.5, max_k = 1 } } do
      assert.same({ 3, 3 }, moe.router_gates(x, o):size())
    end
    assert.equal(2, moe.router_gates(x, { min_k = 1, max_k = 1 })[1][2])
    local wild = moe.tensor({ nan, -3, 1e300 }, { dtype = "f64" })
    assert.same({ 3, 3 }, moe.router_gates(x, { min_k = wild, max_k = wild, mass = wild, threshold = wild }):size())
  end)

  it("names what is wrong", function()
    local x = moe.ones(3, 4)
    for _, case in ipairs {
      { "score is a f32 tensor %[4%], wanted floats %[tokens, experts%]", function() return moe.router_gates(moe.ones(4)) end },
      { "threshold is a f32 tensor %[4%], wanted a number or one a token, %[3%]",
        function() return moe.router_gates(x, { threshold = moe.ones(4) }) end },
      { "mass is NaN", function() return moe.router_gates(x, { mass = 0 / 0 }) end },
      { "min_k is %-1, wanted a count", function() return moe.router_gates(x, { min_k = -1 }) end },
      { "max_kk", function() return moe.router_gates(x, { max_kk = 1 }) end },
    } do
      assert.matches(case[1], helper.error_of(case[2]))
    end
  end)
end)
