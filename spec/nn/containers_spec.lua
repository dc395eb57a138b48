-- Containers and activations.
local helper = require "spec.helper" -- luacheck: ignore
local moe = require "moe"
local nn = moe.nn

describe("sequential", function()
  it("hands the first result on", function()
    local m = nn.sequential(nn.lambda(function(x) return x + 1, "dropped" end), function(x, ...) return x * 2, select("#", ...) end)
    local y, extra = m(moe.tensor { 1, 2 })
    assert.same({ 4, 6 }, y:totable())
    assert.equal(0, extra)
    assert.equal(2, #m)
    assert.equal(m, m:append(nn.relu()))
    assert.equal(3, #m)
    assert.same({ 5 }, nn.sequential()(moe.tensor { 5 }):totable())
  end)

  it("hands a context to every part", function()
    local seen = {}
    local function spy(x, ctx)
      seen[#seen + 1] = ctx.step
      return x
    end
    local m = nn.sequential { spy, nn.linear(2, 2), nn.gelu(), nn.residual(nn.linear(2, 2)), spy }
    m(moe.ones(1, 2), { step = 7, anything = {} })
    assert.same({ 7, 7 }, seen)
  end)

  it("refuses what cannot be called", function()
    assert.error_matches(function() nn.sequential { 3 } end, "part 1 must be a module or a function, got a number")
    assert.error_matches(function() nn.sequential { a = nn.relu() } end, "the key 'a'")
    assert.has_error(function() nn.sequential(nn.relu(), "x") end)
    assert.has_error(function() nn.sequential():append(3) end)
  end)
end)

describe("list and dict", function()
  it("hold parts by number and by name", function()
    local l = nn.list { nn.linear(2, 3), nn.linear(3, 1) }
    assert.equal(2, #l)
    assert.equal(9 + 4, l:num_parameters())
    local n = 0
    for i, part in ipairs(l) do
      n = n + i
      assert.truthy(nn.is_module(part))
    end
    assert.equal(3, n)
    local d = nn.dict { b = nn.rmsnorm(2), a = nn.linear(1, 1) }
    local names = {}
    for name in d:named_parameters() do names[#names + 1] = name end
    assert.same({ "a.weight", "a.bias", "b.weight" }, names)
    assert.same({ 1, 2 }, d.b(moe.ones(1, 2)).shape)
    assert.error_matches(function() nn.dict { train = nn.relu() } end, "the name of a method")
    assert.has_error(function() nn.dict { nn.relu() } end)
    assert.has_error(function() nn.dict { a = 3 } end)
    assert.has_error(function() nn.dict(3) end)
  end)
end)

describe("residual", function()
  it("adds, and lets a state through", function()
    local m = nn.residual(nn.attention(4, 2))
    local x = moe.randn(1, 3, 4)
    assert.close(x + m.inner(x), m(x))
    local y, state = m(x, m.inner:state(1))
    assert.close(x + m.inner(x), y, { rtol = 1e-5, atol = 1e-6 })
    assert.same({ 1, 2, 3, 2 }, state.k.shape)
    assert.close(x * 1.5, nn.residual(nn.identity(), 0.5)(x))
    assert.has_error(function() nn.residual(3) end)
    assert.has_error(function() nn.residual(nn.relu(), "x") end)
  end)
end)

describe("activations", function()
  it("are the operations of their names", function()
    local x = moe.randn(3, 4)
    for _, name in ipairs { "relu", "silu", "tanh", "sigmoid", "softplus", "relu_squared", "gelu", "leaky_relu", "elu" } do
      assert.same(x[name](x):totable(), nn[name]()(x):totable(), name)
    end
    assert.same(x:gelu("tanh"):totable(), nn.gelu("tanh")(x):totable())
    assert.same(x:gelu("tanh"):totable(), nn.gelu { approximate = "tanh" }(x):totable())
    assert.same(x:softmax(1):totable(), nn.softmax { dim = 1 }(x):totable())
    assert.same(x:softmax(-1):totable(), nn.softmax()(x):totable())
    assert.same(x:log_softmax(2):totable(), nn.log_softmax(2)(x):totable())
    assert.same(x:leaky_relu(0.3):totable(), nn.leaky_relu(0.3)(x):totable())
    assert.equal(7, select(2, nn.identity()(x, 7)))
    assert.equal("gelu(approximate=tanh)", tostring(nn.gelu "tanh"))
    assert.equal("relu", tostring(nn.relu()))
  end)

  it("check their options", function()
    assert.error_matches(function() nn.gelu { approx = "tanh" } end, "unknown option 'approx' %(options: approximate%)")
    assert.error_matches(function() nn.relu { x = 1 } end, "it has none")
    assert.has_error(function() nn.relu(3) end)
    assert.has_error(function() nn.softmax { dim = "x" } end)
    assert.has_error(function() nn.softmax { dim = 0 }(moe.ones(2)) end)
  end)

  it("nest, train and print with C layers", function()
    local m = nn.sequential { nn.linear(2, 2), nn.gelu(), nn.dropout(0.5), nn.dict { head = nn.linear(2, 1) } }
    m:eval()
    assert.is_false(m[3].training)
    assert.equal(6 + 3, m:num_parameters())
    local text = "\n  2: gelu\n  3: dropout(0.5)\n  4: dict 3 parameters\n    head: linear(2 -> 1, bias) 3 parameters"
    assert.truthy(tostring(m):find(text, 1, true))
  end)
end)
