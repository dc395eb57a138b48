-- Mamba-2's operation against a fixture of PyTorch, and its own forms against each other.
local helper = require "spec.helper"
local moe = require "moe"

local NAMES <const> = { "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state" }

local function fixture()
  local raw = helper.fixture "ssd"
  local t = {}
  local function read(v, name)
    v = moe.tensor(v, { dtype = "f64" })
    return (name == "initial_state" or name == "last" or name == "glast") and v:transpose(3, 4):contiguous() or v
  end
  for name, v in pairs(raw) do
    if name ~= "grad" then t[name] = read(v, name) end
  end
  t.grad = {}
  for name, v in pairs(raw.grad) do t.grad[name] = read(v, name) end
  return t
end

local function call(t, more)
  local o = { D = t.D, z = t.z, dt_bias = t.dt_bias, initial_state = t.initial_state, dt_softplus = true }
  for name, v in pairs(more or {}) do o[name] = v end
  return moe.ssd(t.x, t.dt, t.A, t.B, t.C, o)
end

describe("ssd", function()
  for _, chunk in ipairs { 64, 11, 5, 1 } do
    it("agrees with PyTorch in chunks of " .. chunk, function()
      local t = fixture()
      for _, name in ipairs(NAMES) do t[name].requires_grad = true end
      local y, last = call(t, { chunk_size = chunk })
      assert.close(t.y, y, { rtol = 1e-7, atol = 1e-7 })
      assert.close(t.last, last, { rtol = 1e-7, atol = 1e-7 })
      moe.backward({ y, last }, { t.gy, t.glast })
      for _, name in ipairs(NAMES) do assert.close(t.grad[name], t[name].grad, { rtol = 1e-7, atol = 1e-7, message = name }) end
    end)
  end

  it("agrees in f32, and token by token", function()
    local t = fixture()
    for _, name in ipairs(NAMES) do t[name] = t[name]:to "f32" end
    assert.close(t.y, (call(t)), { rtol = 1e-5, atol = 1e-5 })
    local S = t.initial_state
    for i = 1, 11 do
      local at = { A = t.A, D = t.D, dt_bias = t.dt_bias, initial_state = S }
      for _, name in ipairs { "x", "dt", "B", "C", "z" } do at[name] = t[name]:narrow(2, i, 1) end
      local y
      y, S = call(at)
      assert.close(t.y:narrow(2, i, 1), y, { rtol = 1e-5, atol = 1e-5 })
    end
    assert.close(t.last, S, { rtol = 1e-5, atol = 1e-5 })
  end)

  it("takes packed sequences", function()
    local t = fixture()
    local cut = { A = t.A, D = t.D, dt_bias = t.dt_bias }
    for _, name in ipairs { "x", "dt", "B", "C", "z" } do cut[name] = t[name]:reshape { 1, 22, table.unpack(t[name].shape, 3) } end
    cut.initial_state = t.initial_state
    local y, last = call(cut, { cu_seqlens = moe.tensor({ 0, 11, 22 }, { dtype = "i64" }), chunk_size = 4 })
    assert.close(t.y, y:reshape(t.y.shape), { rtol = 1e-7, atol = 1e-7 })
    assert.close(t.last, last, { rtol = 1e-7, atol = 1e-7 })
  end)

  it("with a time step of 0 the state stays; D alone passes x through", function()
    local r = helper.random(1)
    local x = helper.tensor(function() return r.normal() end, { 1, 6, 2, 3 }, { dtype = "f64" })
    local B = helper.tensor(function() return r.normal() end, { 1, 6, 1, 4 }, { dtype = "f64" })
    local S = helper.tensor(function() return r.normal() end, { 1, 2, 4, 3 }, { dtype = "f64" })
    local A, dt = moe.full({ 2 }, -3, { dtype = "f64" }), moe.zeros({ 1, 6, 2 }, { dtype = "f64" })
    local _, last = moe.ssd(x, dt, A, B, B, { initial_state = S })
    assert.close(S, last, { rtol = 0, atol = 0 })
    local y = moe.ssd(x, dt, A, B, B, { D = moe.full({ 2, 3 }, 2, { dtype = "f64" }) })
    assert.close(x * 2, y, { rtol = 1e-15, atol = 0 })
  end)

  it("says what is wrong", function()
    local function z(...) return moe.zeros { ... } end
    local function says(want, ...)
      local message = helper.error_of(moe.ssd, ...)
      assert.truthy(message:find(want, 1, true), message)
    end
    local x, dt, A, B = z(2, 5, 4, 3), z(2, 5, 4), z(4), z(2, 5, 2, 6)
    says("ssd: x must be [batch, time, heads, width], got [2, 5]", z(2, 5), dt, A, B, B)
    says("dt must be [2, 5, 4] (x is [2, 5, 4, 3]), got [2, 5, 1]", x, z(2, 5, 1), A, B, B)
    says("A must be [4]", x, dt, z(4, 6), B, B)
    says("B must be [batch, time, groups, states], groups dividing the 4 heads of x, got [2, 5, 3, 6]", x, dt, A, z(2, 5, 3, 6), B)
    says("C must be [2, 5, 2, 6] (x is [2, 5, 4, 3]), got [2, 5, 2, 7]", x, dt, A, B, z(2, 5, 2, 7))
    says("z must be [2, 5, 4, 3]", x, dt, A, B, B, { z = dt })
    says("initial_state must be", x, dt, A, B, B, { initial_state = z(2, 4, 3, 6) })
  end)
end)
