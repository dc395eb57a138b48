local moe = require "moe"
local helper = require "spec.helper"
local ref = require "spec.nn.moe_ref"

-- A random routing in which experts have the given numbers of tokens.
local function routing_of(loads, T, r, dtype)
  local entries, index, most = {}, {}, 0
  for e, n in ipairs(loads) do
    for i = 1, n do
      local t = T >= n and (i * 7 + e) % T + 1 or r(1, T)
      entries[t] = entries[t] or {}
      table.insert(entries[t], e)
      most = math.max(most, #entries[t])
    end
  end
  most = math.max(most, 1)
  for t = 1, T do
    index[t] = {}
    for k = 1, most do index[t][k] = entries[t] and entries[t][k] or 0 end
  end
  local weight = helper.tensor(function() return r.normal() end, { T, most }, { dtype = dtype })
  return index, weight
end

local function parameters(E, d, I, d_out, o, dtype)
  local function p(shape)
    local t = moe.randn(shape, { dtype = dtype }) * 0.5
    t = t:detach()
    t.requires_grad = true
    return t
  end
  return {
    act = o.act, gated = o.gated, w_in = p { E, (o.gated and 2 or 1) * I, d }, w_out = p { E, d_out, I },
    b_in = o.bias and p { E, (o.gated and 2 or 1) * I } or nil, b_out = o.bias and p { E, d_out } or nil,
  }
end

local function fused(p, x, routing)
  return moe.core._sparse.ffn(x, p.w_in, p.w_out, p.b_in, p.b_out, routing, p.act, p.gated)
end

local function leaves(p, ...)
  local out = { ... }
  for _, key in ipairs { "w_in", "w_out", "b_in", "b_out" } do out[#out + 1] = p[key] end
  return out
end

local function compare(loads, T, sizes, o, dtype, tolerance)
  local d, I, d_out = table.unpack(sizes)
  local r = helper.random(#loads + T)
  moe.manual_seed(T + 1)
  local p = parameters(#loads, d, I, d_out, o, dtype)
  local index, weight = routing_of(loads, T, r, dtype)
  weight.requires_grad = true
  local x = moe.randn(T, d, { dtype = dtype, requires_grad = true })
  local routing = moe.routing.topk(moe.tensor(index, { dtype = "i64" }), weight, #loads)
  local y = fused(p, x, routing)
  local y_ref = ref.experts(p, x, ref.choices(index, weight))
  local g = moe.randn_like(y:detach())
  local inputs = leaves(p, x, weight)
  local got = { moe.grad((y * g):sum(), inputs) }
  local wanted = y_ref.requires_grad and { moe.grad((y_ref * g):sum(), inputs) } or {}
  assert.close(y_ref, y, tolerance)
  for i = 1, #inputs do
    if wanted[i] == nil then
      assert.is_true(got[i] == nil or got[i]:abs():max():item() == 0)
    else
      assert.close(wanted[i], got[i], tolerance)
    end
  end
end

describe("expert networks", function()
  local exact = { rtol = 1e-10, atol = 1e-10 }

  it("agree with loops over tokens for every activation, gated and plain, with biases and without", function()
    for act in pairs(ref.act) do
      for _, gated in ipairs { true, false } do
        for _, bias in ipairs { true, false } do
          compare({ 3, 0, 5, 1 }, 6, { 5, 3, 4 }, { act = act, gated = gated, bias = bias }, "f64", exact)
        end
      end
    end
  end)

  it("agree at every number of rows: none, one, few, a tile, several tiles, an expert cut into stripes", function()
    local o = { act = "silu", gated = true, bias = true }
    for _, loads in ipairs { { 0, 0 }, { 1, 0 }, { 1, 1, 1 }, { 2, 3, 4, 5 }, { 40, 2, 1 }, { 0, 90, 0 } } do
      compare(loads, 45, { 6, 5, 7 }, o, "f64", exact)
    end
    compare({ 20, 33, 7 }, 40, { 9, 70, 8 }, { act = "relu2", gated = false, bias = true }, "f64", exact)
    compare({ 5, 4, 1, 30 }, 33, { 17, 19, 16 }, o, "f32", { rtol = 2e-4, atol = 2e-4 })
  end)

  it("agree when an expert has more rows than a task takes whole", function()
    -- against the dense form: all experts on all tokens, by matrix products
    moe.manual_seed(1)
    for _, T in ipairs { 700, 1100 } do
      local p = parameters(2, 8, 130, 6, { act = "silu", gated = true, bias = true }, "f64")
      local x = moe.randn(T, 8, { dtype = "f64", requires_grad = true })
      local gate = (moe.rand(T, 2, { dtype = "f64" }) + 0.1):detach()
      gate.requires_grad = true
      local y, wanted = fused(p, x, moe.routing.dense(gate)), 0
      for e = 1, 2 do
        local h = x:matmul(p.w_in[e]:t()) + p.b_in[e]
        local a = h:narrow(2, 1, 130):silu() * h:narrow(2, 131, 130)
        wanted = wanted + (a:matmul(p.w_out[e]:t()) + p.b_out[e]) * gate:narrow(2, e, 1)
      end
      local g, inputs = moe.randn_like(y:detach()), leaves(p, x, gate)
      local a, b = { moe.grad((y * g):sum(), inputs) }, { moe.grad((wanted * g):sum(), inputs) }
      assert.close(wanted, y, exact)
      for i = 1, #inputs do assert.close(b[i], a[i], { rtol = 1e-9, atol = 1e-9 }) end
    end
  end)

  it("pass the gradient check", function()
    moe.manual_seed(6)
    local index = moe.tensor({ { 1, 2 }, { 3, 1 }, { 1, 0 }, { 2, 3 } }, { dtype = "i64" })
    for _, o in ipairs { { act = "gelu", gated = true, bias = true }, { act = "tanh", gated = false, bias = false } } do
      local p = parameters(4, 3, 4, 2, o, "f64")
      local x, w = moe.randn(4, 3, { dtype = "f64" }), moe.rand(4, 2, { dtype = "f64" })
      assert.is_true(moe.gradcheck(function(X, W, w_in, w_out, b_in, b_out)
        return fused({ act = o.act, gated = o.gated, w_in = w_in, w_out = w_out, b_in = b_in, b_out = b_out }, X,
          moe.routing.topk(index, W, 4))
      end, leaves(p, x, w)))
    end
  end)

  it("with one expert and k = 1 are the dense network to the bit, forward and backward", function()
    for _, T in ipairs { 1, 3, 64, 777 } do
      moe.manual_seed(T)
      local bank = moe.experts.swiglu { d_model = 24, intermediate_size = 40 }
      local x = moe.randn(T, 24, { requires_grad = true })
      local g = moe.randn(T, 24)
      local weight = moe.ones({ T, 1 }, { requires_grad = true })
      local routed = bank(x, moe.routing.topk(moe.ones({ T, 1 }, { dtype = "i64" }), weight, 1))
      local dense = bank(x)
      assert.same(dense:totable(), routed:totable())
      local inputs = { x, bank.gate_up_proj, bank.down_proj }
      local a, b = { moe.grad((routed * g):sum(), inputs) }, { moe.grad((dense * g):sum(), inputs) }
      for i = 1, 3 do assert.same(b[i]:reshape({ -1 }):totable(), a[i]:reshape({ -1 }):totable()) end
    end
  end)

  it("give the same bits on one thread and on two", function()
    local before = moe.threads()
    local function run(n)
      moe.threads(n)
      moe.manual_seed(12)
      local bank = moe.experts.swiglu { d_model = 32, num_experts = 5, intermediate_size = 96 }
      local x = moe.randn(700, 32, { requires_grad = true })
      local w, i = moe.router_topk(moe.randn(700, 5) * moe.tensor { 9, 1, 1, 1, 1 }, { top_k = 2 })
      local y = bank(x, moe.routing.topk(i, w, 5))
      y:square():sum():backward()
      return { y, x.grad, bank.gate_up_proj.grad, bank.down_proj.grad }
    end
    local one, two = run(1), run(2)
    moe.threads(before)
    for i = 1, 4 do assert.same(one[i]:reshape({ -1 }):totable(), two[i]:reshape({ -1 }):totable()) end
  end)

  it("that are copies of one another are that one network, whatever the routing", function()
    moe.manual_seed(2)
    local one = moe.experts.mlp { d_model = 6, intermediate_size = 9, bias = true }
    local many = moe.experts.mlp { d_model = 6, num_experts = 4, intermediate_size = 9, bias = true }
    for _, key in ipairs { "up_proj", "up_bias", "down_proj", "down_bias" } do
      moe.no_grad(function() many[key]:copy_(one[key]:expand(many[key].shape)) end)
    end
    local x = moe.randn(20, 6)
    local w, i = moe.router_topk(moe.randn(20, 4), { top_k = 3, norm_topk_prob = true })
    assert.close(one(x), many(x, moe.routing.topk(i, w, 4)), { rtol = 1e-5, atol = 1e-6 })
  end)

  it("do not care how experts are numbered", function()
    moe.manual_seed(2)
    local bank = moe.experts.swiglu { d_model = 6, num_experts = 4, intermediate_size = 5 }
    local other = moe.experts.swiglu { d_model = 6, num_experts = 4, intermediate_size = 5 }
    local perm = moe.tensor({ 3, 1, 4, 2 }, { dtype = "i64" })
    moe.no_grad(function()
      other.gate_up_proj:copy_(bank.gate_up_proj:index_select(1, perm))
      other.down_proj:copy_(bank.down_proj:index_select(1, perm))
    end)
    local logits, x = moe.randn(15, 4), moe.randn(15, 6)
    local w, i = moe.router_topk(logits, { top_k = 2 })
    local w2, i2 = moe.router_topk(logits:index_select(2, perm), { top_k = 2 })
    assert.close(bank(x, moe.routing.topk(i, w, 4)), other(x, moe.routing.topk(i2, w2, 4)), { rtol = 1e-5, atol = 1e-6 })
  end)

  it("keep for the backward the hidden layer, and no gathered copy of their input", function()
    local T, d, I, E, k = 512, 64, 16, 8, 4
    local bank = moe.experts.swiglu { d_model = d, num_experts = E, intermediate_size = I }
    local x = moe.randn(T, d, { requires_grad = true })
    local w, i = moe.router_topk(moe.randn(T, E), { top_k = k })
    local routing = moe.routing.topk(i, w, E)
    collectgarbage()
    collectgarbage()
    local before = moe.memory().live
    local y = bank(x, routing)
    local kept = moe.memory().live - before
    local hidden, out = T * k * 2 * I * 4, T * d * 4
    assert.is_true(kept < 1.3 * (hidden + out), ("kept %d bytes, hidden layer and result are %d"):format(kept, hidden + out))
    assert.is_true(kept < T * k * d * 4 + hidden)
    assert.equal(T, y:size(1))
  end)

  it("leave frozen weights and inputs without gradients", function()
    local bank = moe.experts.swiglu { d_model = 4, num_experts = 2, intermediate_size = 3 }
    bank:freeze()
    local x = moe.randn(5, 4, { requires_grad = true })
    local routing = moe.routing.topk(moe.tensor({ { 1 }, { 2 }, { 1 }, { 2 }, { 2 } }, { dtype = "i64" }), nil, 2)
    bank(x, routing):sum():backward()
    assert.is_nil(bank.gate_up_proj.grad)
    assert.is_true(x.grad:abs():sum():item() > 0)
    bank:unfreeze()
    bank(moe.randn(5, 4), routing):sum():backward()
    assert.is_true(bank.gate_up_proj.grad:abs():sum():item() > 0)
  end)

  it("take half precision and views", function()
    moe.manual_seed(3)
    local bank = moe.experts.glu { d_model = 8, num_experts = 3, intermediate_size = 6, act = "gelu" }
    local x = moe.randn(8, 10):t()
    local w, i = moe.router_topk(moe.randn(10, 3), { top_k = 2 })
    local routing = moe.routing.topk(i, w, 3)
    local y = bank(x, routing)
    assert.close(y, bank(x:contiguous(), routing))
    local half = moe.experts.glu { d_model = 8, num_experts = 3, intermediate_size = 6, act = "gelu", dtype = "bf16" }
    moe.no_grad(function()
      half.gate_up_proj:copy_(bank.gate_up_proj)
      half.down_proj:copy_(bank.down_proj)
    end)
    local z = half(x:to "bf16", routing)
    assert.equal("bf16", z.dtype)
    assert.close(y, z:to "f32", { rtol = 0.05, atol = 0.02 })
    z:to("f32"):sum():backward()
    assert.equal("bf16", half.down_proj.grad.dtype)
  end)

  it("work with no token at all", function()
    local bank = moe.experts.swiglu { d_model = 4, num_experts = 2, intermediate_size = 3 }
    local x = moe.zeros({ 0, 4 }, { requires_grad = true })
    local y = bank(x, moe.routing.topk(moe.zeros({ 0, 2 }, { dtype = "i64" }), moe.zeros(0, 2), 2))
    assert.same({ 0, 4 }, y.shape)
    y:sum():backward()
    assert.equal(0, bank.down_proj.grad:abs():sum():item())
    assert.same({ 0, 4 }, moe.experts.swiglu { d_model = 4, intermediate_size = 3 }(x).shape)
  end)

  it("can be a million that each see few tokens", function()
    local E = 100000
    local bank = moe.experts.mlp { d_model = 4, num_experts = 3, intermediate_size = 1, act = "gelu" }
    local up, down = moe.randn(E, 1, 4, { requires_grad = true }), moe.randn(E, 4, 1, { requires_grad = true })
    local index = moe.randint(1, E, { 9, 5 })
    local x = moe.randn(9, 4)
    bank.up_proj, bank.down_proj = up, down
    local y = bank(x, moe.routing.topk(index, nil, E))
    local want = moe.zeros(4)
    for k = 1, 5 do
      local e = math.tointeger(index[2][k])
      local h = up[e]:matmul(x[2])
      want = want + down[e]:matmul(h:gelu())
    end
    assert.close(want, y[2], { rtol = 1e-4, atol = 1e-5 })
    y:sum():backward()
    local touched = up.grad:abs():sum(3):gt(0):to("i64"):sum():item()
    assert.is_true(touched > 0 and touched <= 45)
  end)

  it("name what is wrong", function()
    local bank = moe.experts.swiglu { d_model = 4, num_experts = 2, intermediate_size = 3 }
    local routing = moe.routing.topk(moe.ones({ 3, 1 }, { dtype = "i64" }), nil, 2)
    local three = moe.routing.topk(moe.ones({ 1, 1 }, { dtype = "i64" }), nil, 3)
    local cases = {
      { "x is %[3, 5%], but the experts take vectors of 4", function() return bank(moe.ones(3, 5), routing) end },
      { "4 tokens, but the routing has 3", function() return bank(moe.ones(4, 4), routing) end },
      { "the routing is over 3 experts, the bank has 2", function() return bank(moe.ones(1, 4), three) end },
      { "2 experts need a routing", function() return bank(moe.ones(3, 4)) end },
      { "argument 6 %(routing%) must be a routing", function() return bank:work(moe.ones(3, 4), {}) end },
      { "must be a tensor", function() return bank:work(3, routing) end },
      { "option 'intermediate_size' is missing", function() return moe.experts.swiglu { d_model = 4 } end },
      { "unknown option 'intermediate' %(did you mean 'intermediate_size'", function() return moe.experts.mlp { intermediate = 4 } end },
      { "'intermediate_size' must be at least 1", function() return moe.experts.mlp { intermediate_size = 0 } end },
      { "must be one of silu", function() return moe.experts.mlp { intermediate_size = 4, act = "swish" } end },
      { "description without weights", function() return moe.experts.mlp { intermediate_size = 4 }(moe.ones(2, 2)) end },
      { "gave %[1, 4%] for 3 rows",
        function() return moe.experts.map(function(xe) return xe:narrow(1, 1, 1) end)(moe.ones(3, 4), routing) end },
      { "the list has no expert", function() return moe.experts.map {}(moe.ones(3, 4), routing) end },
    }
    for _, case in ipairs(cases) do assert.matches(case[1], helper.error_of(case[2])) end
  end)
end)

describe("moe.experts.map", function()
  it("runs Lua functions and modules as experts", function()
    moe.manual_seed(7)
    local index = moe.tensor({ { 1, 2 }, { 2, 4 }, { 3, 2 } }, { dtype = "i64" })
    local weight = moe.rand(3, 2)
    local routing = moe.routing.topk(index, weight, 4)
    local x = moe.randn(3, 2, { requires_grad = true })
    local seen = {}
    local y = moe.experts.map(function(xe, e)
      seen[#seen + 1] = ("%d:%d"):format(e, xe:size(1))
      if e == 3 then return nil end -- an expert that gives nothing
      return xe * e
    end)(x, routing)
    assert.same({ "1:1", "2:3", "3:1", "4:1" }, seen)
    local factor = moe.tensor { weight[1][1] * 1 + weight[1][2] * 2, weight[2][1] * 2 + weight[2][2] * 4, weight[3][2] * 2 }
    assert.close(x * factor:reshape { 3, 1 }, y, { rtol = 1e-5 })
  end)

  it("owns the parameters of its modules", function()
    local list = { moe.nn.linear(4, 4), moe.nn.linear(4, 4) }
    local bank = moe.experts.map(list)
    assert.equal(4, #bank:parameters())
    local routing = moe.routing.topk(moe.tensor({ { 1 }, { 2 }, { 1 } }, { dtype = "i64" }), nil, 2)
    local x = moe.randn(3, 4)
    local y = bank(x, routing)
    assert.close(list[2](x:narrow(1, 2, 1)), y:narrow(1, 2, 1), { rtol = 1e-5, atol = 1e-6 })
    y:sum():backward()
    assert.is_true(list[2].weight.grad:abs():sum():item() > 0)
  end)
end)
