-- The simple C layers: constructors, fields, values against plain loops, and errors.
local helper = require "spec.helper" -- luacheck: ignore
local moe = require "moe"
local nn = moe.nn

-- The error of f(...) without its position.
local function message(f, ...)
  local ok, text = pcall(f, ...)
  assert.is_false(ok)
  return (tostring(text):gsub("^[^:]+:%d+: ", ""))
end

local function bounds(t)
  return t:min():item(), t:max():item()
end

describe("linear", function()
  it("computes x weight^T + bias", function()
    local m = nn.linear(3, 2)
    local x = { { 1, 2, 3 }, { -1, 0.5, 4 } }
    local w, b = m.weight:totable(), m.bias:totable()
    local want = {}
    for i, row in ipairs(x) do
      want[i] = {}
      for j = 1, 2 do
        want[i][j] = b[j]
        for k = 1, 3 do want[i][j] = want[i][j] + row[k] * w[j][k] end
      end
    end
    assert.close(want, m(moe.tensor(x)), { rtol = 1e-5, atol = 1e-6 })
    assert.close(want, m:forward(moe.tensor(x)), { rtol = 1e-5, atol = 1e-6 })
    assert.same({ 2, 5, 2 }, m(moe.ones(2, 5, 3)).shape)
    assert.same({ 0, 2 }, m(moe.ones(0, 3)).shape)
  end)

  it("starts like PyTorch's, from the seed", function()
    moe.manual_seed(3)
    local a = nn.linear(100, 50)
    local lo, hi = bounds(a.weight)
    assert.truthy(lo >= -0.1 and lo < -0.099 and hi <= 0.1 and hi > 0.099)
    lo, hi = bounds(a.bias)
    assert.truthy(lo >= -0.1 and lo < -0.08 and hi <= 0.1 and hi > 0.08)
    assert.close(0, a.weight:mean():item(), { atol = 0.005 })
    moe.manual_seed(3)
    local b = nn.linear(100, 50)
    assert.same(a.weight:totable(), b.weight:totable())
    assert.same(a.bias:totable(), b.bias:totable())
    assert.is_not.same(a.weight:totable(), nn.linear(100, 50).weight:totable())
  end)

  it("has fields", function()
    local m = nn.linear { in_features = 3, out_features = 2, bias = false, dtype = "f64" }
    assert.equal(3, m.in_features)
    assert.equal(2, m.out_features)
    assert.equal(false, (rawequal(m.bias, false)))
    assert.is_nil(m.bias)
    assert.is_nil(m.anything)
    assert.equal("f64", m.dtype)
    assert.equal("cpu", m.device)
    assert.equal("f64", m.weight.dtype)
    assert.is_true(m.weight.requires_grad)
    assert.is_true(rawequal(m.weight, m.weight))
    assert.equal("linear(3 -> 2, dtype=f64) 6 parameters", tostring(m))
    assert.equal("linear(8 -> 4, bias) 36 parameters", tostring(nn.linear(8, 4)))
  end)

  it("takes a weight that fits", function()
    local m = nn.linear(3, 2)
    local w = moe.ones(2, 3)
    m.weight = w
    assert.is_true(rawequal(w, m.weight))
    assert.is_true(w.requires_grad)
    assert.equal(2, #m:parameters())
    m.bias:detach():fill_(0)
    assert.same({ { 3, 3 } }, m(moe.ones(1, 3)):totable())
    m(moe.ones(1, 3)):sum():backward()
    assert.same({ { 1, 1, 1 }, { 1, 1, 1 } }, w.grad:totable())
    assert.equal("linear: weight is [2, 3], got a tensor [3, 2]", message(function() m.weight = moe.ones(3, 2) end))
    assert.equal("linear: weight must be a tensor, got nil", message(function() m.weight = nil end))
    assert.equal("linear: weight is f32, got a tensor of i64", message(function() m.weight = moe.zeros(2, 3, { dtype = "i64" }) end))
    assert.truthy(message(function() m.weight = w * 2 end):find("must be a leaf", 1, true))
    assert.equal("linear: no field 'wieght' (did you mean 'weight'?)", message(function() m.wieght = w end))
    assert.equal("linear: in_features is fixed when the layer is made", message(function() m.in_features = 4 end))
    assert.has_error(function() m[1] = w end)
    local bare = nn.linear { in_features = 3, out_features = 2, bias = false }
    assert.truthy(message(function() bare.bias = moe.ones(2) end):find("made without bias", 1, true))
    bare.bias = nil
  end)

  it("names what is wrong with its options", function()
    assert.equal("linear: unknown option 'in_feature' (did you mean 'in_features'?)",
      message(nn.linear, { in_feature = 3, out_features = 2 }))
    assert.equal("linear: takes 2 positional arguments and a table of options, got 3", message(nn.linear, 3, 2, true))
    assert.equal("linear: out_features must be at least 1, got 0", message(nn.linear, 3, 0))
    for _, bad in ipairs { { 3 }, { "3", 2 }, { 3, 2.5 }, { 3, -2 }, { {} }, { 3, 2, { bias = 1 } }, { 3, 2, { dtype = "i64" } },
      { 3, 2, { device = "toaster" } }, { 3, 2, { init = "no" } }, { math.maxinteger, math.maxinteger }, { 3, 1 << 60 } } do
      assert.has_error(function() nn.linear(table.unpack(bad)) end)
    end
    assert.has_error(function() nn.linear(3, 2)() end)
    assert.has_error(function() nn.linear(3, 2)("x") end)
    assert.has_error(function() nn.linear(3, 2)(moe.ones(2, 4)) end)
    assert.has_error(function() getmetatable(nn.linear(3, 2)).forward(moe.ones(2)) end)
    assert.has_error(function() getmetatable(nn.linear(3, 2)).state(nn.linear(3, 2)) end)
  end)

  it("hooks on weights survive in the graph", function()
    local m, calls = nn.linear(3, 2), 0
    m.weight:register_hook(function(g)
      calls = calls + 1
      return g * 0
    end)
    local y = m(moe.ones(1, 3))
    m = { m.weight } -- the module itself may go
    collectgarbage()
    y:sum():backward()
    assert.equal(1, calls)
    assert.same({ { 0, 0, 0 }, { 0, 0, 0 } }, m[1].grad:totable())
  end)
end)

describe("embedding", function()
  it("picks rows, counting from 1", function()
    local m = nn.embedding(5, 3)
    local w = m.weight:totable()
    assert.close({ { w[1], w[5] }, { w[2], w[2] } }, m(moe.tensor({ { 1, 5 }, { 2, 2 } }, { dtype = "i64" })))
    assert.has_error(function() m(moe.tensor({ 6 }, { dtype = "i64" })) end)
    assert.has_error(function() m(moe.tensor({ 0 }, { dtype = "i64" })) end)
    assert.has_error(function() m(moe.ones(2)) end)
    assert.equal("embedding(5, 3) 15 parameters", tostring(m))
  end)

  it("starts from N(0, 1)", function()
    moe.manual_seed(5)
    local w = nn.embedding(200, 100).weight
    assert.close(0, w:mean():item(), { atol = 0.03 })
    assert.close(1, w:std():item(), { atol = 0.03 })
  end)

  it("gives no gradient to padding_idx", function()
    local m = nn.embedding(4, 2, { padding_idx = 2 })
    assert.equal(2, m.padding_idx)
    m(moe.tensor({ 1, 2, 2 }, { dtype = "i64" })):sum():backward()
    assert.same({ { 1, 1 }, { 0, 0 }, { 0, 0 }, { 0, 0 } }, m.weight.grad:totable())
  end)
end)

describe("norms", function()
  local x = { { 1, 2, 3, 4 }, { -2, 0, 0, 5 } }

  it("layernorm", function()
    local m = nn.layernorm(4)
    m.weight:detach():copy_(moe.tensor { 1, 2, 3, 4 })
    m.bias:detach():copy_(moe.tensor { 0, 0.5, 0, -1 })
    local want, w, b = {}, { 1, 2, 3, 4 }, { 0, 0.5, 0, -1 }
    for i, row in ipairs(x) do
      local mean, var = 0, 0
      for _, v in ipairs(row) do mean = mean + v / 4 end
      for _, v in ipairs(row) do var = var + (v - mean) ^ 2 / 4 end
      want[i] = {}
      for j, v in ipairs(row) do want[i][j] = (v - mean) / math.sqrt(var + 1e-5) * w[j] + b[j] end
    end
    assert.close(want, m(moe.tensor(x)), { rtol = 1e-5, atol = 1e-6 })
    assert.is_nil(nn.layernorm { size = 4, bias = false }.bias)
    assert.has_error(function() m(moe.ones(2, 3)) end)
  end)

  it("rmsnorm", function()
    local m = nn.rmsnorm { size = 4, eps = 0.1 }
    assert.equal(0.1, m.eps)
    local want = {}
    for i, row in ipairs(x) do
      local square = 0
      for _, v in ipairs(row) do square = square + v * v / 4 end
      want[i] = {}
      for j, v in ipairs(row) do want[i][j] = v / math.sqrt(square + 0.1) end
    end
    assert.close(want, m(moe.tensor(x)), { rtol = 1e-5, atol = 1e-6 })
    m.eps = 1e3
    assert.truthy(math.abs(m(moe.tensor(x)):max():item()) < 0.2)
    assert.has_error(function() m.eps = "x" end)
  end)
end)

describe("dropout", function()
  it("works in training alone", function()
    moe.manual_seed(1)
    local m = nn.dropout(0.25)
    local x = moe.ones(10000)
    local y = m(x)
    local kept = y:gt(0):sum():item()
    assert.close(7500, kept, { rtol = 0.03 })
    assert.close(1 / 0.75, y:max():item())
    m:eval()
    assert.same(x:totable(), m(x):totable())
    m:train().p = 0
    assert.same(x:totable(), m(x):totable())
    assert.equal(0, m:num_parameters())
    assert.equal("dropout(0)", tostring(m))
    for _, p in ipairs { -0.1, 1.1, 0 / 0 } do assert.has_error(function() nn.dropout(p) end) end
  end)
end)

describe("ffn", function()
  it("is two linear layers with an activation between", function()
    moe.manual_seed(2)
    for act, f in pairs { gelu = "gelu", relu = "relu", silu = "silu" } do
      local m = nn.ffn { d_model = 3, intermediate_size = 5, activation = act }
      local x = moe.randn(2, 4, 3)
      local h = x:linear(m.up_proj.weight, m.up_proj.bias)
      local want = h[f](h):linear(m.down_proj.weight, m.down_proj.bias)
      assert.close(want, m(x), { rtol = 1e-4, atol = 1e-6 })
    end
    assert.equal(12, nn.ffn(3).up_proj.weight.shape[1])
  end)

  it("gated: the first half decides", function()
    for act, f in pairs { swiglu = "silu", geglu = "gelu", reglu = "relu" } do
      local m = nn.ffn { d_model = 3, intermediate_size = 5, activation = act, bias = false }
      local x = moe.randn(6, 3)
      local h = x:linear(m.gate_up_proj.weight)
      local gate, up = h:narrow(2, 1, 5), h:narrow(2, 6, 5)
      assert.close((gate[f](gate) * up):linear(m.down_proj.weight), m(x), { rtol = 1e-4, atol = 1e-6 })
      assert.same({ 10, 3 }, m.gate_up_proj.weight.shape)
    end
  end)

  it("has gradients", function()
    local m = nn.ffn { d_model = 3, intermediate_size = 4, activation = "swiglu", dtype = "f64" }
    local x = moe.randn(5, 3, { dtype = "f64" })
    moe.gradcheck(function(v) return m(v) end, { x })
    m(x):square():sum():backward()
    local h = x:linear(m.gate_up_proj.weight, m.gate_up_proj.bias)
    local y = (h:narrow(2, 1, 4):silu() * h:narrow(2, 5, 4)):linear(m.down_proj.weight, m.down_proj.bias):square():sum()
    local leaves = { m.gate_up_proj.weight, m.gate_up_proj.bias, m.down_proj.weight, m.down_proj.bias }
    local grads = { moe.grad({ y }, leaves) }
    assert.equal(4, #grads)
    for i, g in ipairs(grads) do assert.close(g, leaves[i].grad, { rtol = 1e-9, atol = 1e-12 }) end
  end)

  it("parts may be assigned", function()
    local m = nn.ffn { d_model = 2, intermediate_size = 3, bias = false }
    m.up_proj.weight = moe.ones(3, 2)
    assert.same({ { 1, 1 }, { 1, 1 }, { 1, 1 } }, m["up_proj.weight"]:totable())
    assert.is_true(rawequal(m.up_proj.weight, m["up_proj.weight"]))
    assert.has_error(function() m.up_proj.weight = moe.ones(2, 2) end)
    assert.is_nil(m.up_proj.bias)
  end)
end)

describe("conv1d", function()
  local function convolve(x, w, b, stride, pad, dilation, groups)
    local out = {}
    local per_in, per_out = #w[1], #w // groups
    for o = 1, #w do
      local g = (o - 1) // per_out
      out[o] = {}
      local t = 1 - pad
      while t + dilation * (#w[1][1] - 1) <= #x[1] + pad do
        local sum = b and b[o] or 0
        for c = 1, per_in do
          for k = 1, #w[1][1] do
            local at = t + (k - 1) * dilation
            sum = sum + w[o][c][k] * (x[g * per_in + c][at] or 0)
          end
        end
        table.insert(out[o], sum)
        t = t + stride
      end
    end
    return out
  end

  it("general", function()
    moe.manual_seed(4)
    for _, case in ipairs { { 2, 3, 3, 1, 0, 1, 1 }, { 4, 6, 3, 2, 2, 2, 2 }, { 3, 3, 4, 1, 1, 1, 3 } } do
      local cin, cout, width, stride, pad, dilation, groups = table.unpack(case)
      local m = nn.conv1d { in_channels = cin, out_channels = cout, kernel_size = width, stride = stride, padding = pad,
        dilation = dilation, groups = groups }
      local x = moe.randn(cin, 9)
      local want = convolve(x:totable(), m.weight:totable(), m.bias:totable(), stride, pad, dilation, groups)
      assert.close({ want }, m(x:unsqueeze(1)), { rtol = 1e-4, atol = 1e-5 })
      assert.same({ cout, cin // groups, width }, m.weight.shape)
    end
  end)

  it("causal: what comes later changes nothing before", function()
    for stride = 1, 3 do
      local m = nn.conv1d { in_channels = 2, out_channels = 3, kernel_size = 4, causal = true, dilation = 2, stride = stride }
      local x = moe.randn(1, 2, 11)
      local y = m(x)
      assert.same({ 1, 3, (11 + stride - 1) // stride }, y.shape)
      local changed = x:clone()
      changed[{ 1, {}, 7 }] = 100
      local z = m(changed)
      local same = (7 - 2) // stride + 1 -- outputs at times 1, 1 + stride .. below 7
      assert.same(y:narrow(3, 1, same):totable(), z:narrow(3, 1, same):totable())
      assert.is_not.same(y:totable(), z:totable())
    end
    assert.has_error(function() nn.conv1d { in_channels = 2, out_channels = 3, kernel_size = 4, causal = true, padding = 1 } end)
    assert.has_error(function() nn.conv1d { in_channels = 3, out_channels = 4, kernel_size = 4, groups = 2 } end)
    assert.has_error(function() nn.conv1d { in_channels = 3, out_channels = 4, kernel_size = 1 << 40 } end)
  end)

  it("depthwise, in pieces, gives the same numbers", function()
    local m = nn.causal_conv1d { channels = 3, kernel_size = 4, activation = "silu" }
    assert.equal("silu", m.activation)
    local x = moe.randn(2, 9, 3)
    local whole = m(x)
    local state = m:state(2)
    assert.same({ 2, 3, 3 }, state.conv.shape)
    local parts = {}
    for i, n in ipairs { 1, 1, 5, 2 } do
      local start = ({ 1, 2, 3, 8 })[i]
      local y
      y, state = m(x:narrow(2, start, n), state)
      parts[i] = y
    end
    assert.close(whole, moe.cat(parts, 2), { rtol = 1e-5, atol = 1e-6 })
    assert.equal(1, select("#", m(x)))
    assert.has_error(function() m(x, { conv = 3 }) end)
    assert.has_error(function() m(x, 3) end)
    assert.has_error(function() m:state(-1) end)
  end)
end)

describe("initialisers", function()
  local function spread(t) return t:mean():item(), t:std():item(), t:min():item(), t:max():item() end

  it("by name", function()
    moe.manual_seed(6)
    local t = moe.zeros(200, 100)
    local mean, std, lo, hi, _
    assert.is_true(rawequal(t, nn.init.normal_(t, 0.02)))
    mean, std = spread(t)
    assert.close(0, mean, { atol = 1e-3 })
    assert.close(0.02, std, { rtol = 0.05 })
    nn.init.normal_(t, { mean = 3, std = 2 })
    mean, std = spread(t)
    assert.close(3, mean, { atol = 0.1 })
    assert.close(2, std, { rtol = 0.05 })
    nn.init.uniform_(t, -1, 3)
    mean, _, lo, hi = spread(t)
    assert.close(1, mean, { atol = 0.05 })
    assert.truthy(lo >= -1 and lo < -0.99 and hi < 3 and hi > 2.99)
    nn.init.xavier_uniform_(t)
    _, _, lo, hi = spread(t)
    assert.close(math.sqrt(6 / 300), hi, { rtol = 0.01 })
    assert.close(-math.sqrt(6 / 300), lo, { rtol = 0.01 })
    nn.init.xavier_normal_(t, 2)
    assert.close(2 * math.sqrt(2 / 300), select(2, spread(t)), { rtol = 0.05 })
    nn.init.kaiming_uniform_(t)
    assert.close(math.sqrt(6 / 100), select(4, spread(t)), { rtol = 0.01 })
    nn.init.kaiming_normal_(t, { a = 1 })
    assert.close(math.sqrt(1 / 100), select(2, spread(t)), { rtol = 0.05 })
    nn.init.trunc_normal_(t, 1, 0, -0.5, 1)
    _, _, lo, hi = spread(t)
    assert.truthy(lo >= -0.5 and lo < -0.49 and hi <= 1 and hi > 0.99)
    nn.init.trunc_normal_(t, 1, 0, 6, 7) -- far out in the tail
    _, _, lo, hi = spread(t)
    assert.truthy(lo >= 6 and hi <= 7)
    nn.init.constant_(t, 4)
    assert.equal(4, t:max():item())
    nn.init.zeros_(t)
    assert.equal(0, t:sum():item())
    nn.init.ones_(t)
    assert.equal(20000, t:sum():item())
  end)

  it("orthogonal", function()
    for _, shape in ipairs { { 3, 7 }, { 7, 3 }, { 4, 4 } } do
      local q = nn.init.orthogonal_(moe.zeros(shape, { dtype = "f64" }), 2)
      local product = shape[1] <= shape[2] and q:matmul(q:t()) or q:t():matmul(q)
      assert.close(moe.eye(math.min(shape[1], shape[2]), { dtype = "f64" }) * 4, product, { atol = 1e-12 })
    end
  end)

  it("give the same numbers in every type, up to rounding", function()
    moe.manual_seed(7)
    local a = nn.init.normal_(moe.zeros(50, { dtype = "f64" }))
    moe.manual_seed(7)
    local b = nn.init.normal_(moe.zeros(50))
    assert.close(a, b:cast "f64", { rtol = 1e-6, atol = 1e-7 })
  end)

  it("as options of layers", function()
    moe.manual_seed(8)
    local m = nn.linear { in_features = 100, out_features = 100, init = "normal(0.5)" }
    assert.close(0.5, m.weight:std():item(), { rtol = 0.05 })
    assert.equal(0, m.bias:abs():max():item())
    assert.equal("normal(0.5)", m.init)
    assert.equal(0, nn.embedding { num_embeddings = 3, embedding_dim = 2, init = "zeros" }.weight:sum():item())
    nn.init.apply(m.weight:detach(), "uniform(2, 3)")
    assert.truthy(m.weight:min():item() >= 2)
    nn.init.apply(m.weight:detach(), 5)
    assert.equal(5, m.weight:max():item())
  end)

  it("refuse what makes no sense", function()
    local t = moe.zeros(3, 3)
    for _, text in ipairs { "nope", "normal(", "normal(1", "normal(a)", "normal(1,2,3)", "normal(-1)", "zeros(1)", "trunc_normal(1,0,2,1)",
      "uniform(2,1)", "", "normal(1) " } do
      assert.has_error(function() nn.linear { in_features = 2, out_features = 2, init = text } end, nil)
    end
    assert.has_error(function() nn.init.normal_(3) end)
    assert.has_error(function() nn.init.normal_(t, 1, 2, 3) end)
    assert.has_error(function() nn.init.normal_(t, "x") end)
    assert.has_error(function() nn.init.normal_(t, { sdt = 1 }) end)
    assert.has_error(function() nn.init.xavier_uniform_(moe.zeros(3)) end)
    assert.has_error(function() nn.init.normal_(moe.zeros(3, { dtype = "i64" })) end)
  end)
end)
