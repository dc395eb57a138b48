-- Activations that the fused kernel does not know: polynomials with coefficients, modules, functions.
local moe = require "moe"
local helper = require "spec.helper"

local F64 <const> = { dtype = "f64" }

local function choose(T, E, k)
  local w, i = moe.router_topk(moe.randn(T, E, F64), { top_k = k, norm_topk_prob = k > 1 })
  w = w:detach():requires_grad_()
  return moe.routing.topk(i, w, E), w, i
end

-- One expert after the other on every token, times its weight or 0.
local function by_loops(bank, x, w, index, gated, act)
  local y = 0
  for e = 1, bank.num_experts do
    local up = gated and bank.gate_up_proj or bank.up_proj
    local b = gated and bank.gate_up_bias or bank.up_bias
    local h = x:matmul(up[e]:t())
    if b then h = h + b[e] end
    local I = bank.intermediate_size
    h = gated and act(h:narrow(2, 1, I), e) * h:narrow(2, I + 1, I) or act(h, e)
    local out = h:matmul(bank.down_proj[e]:t())
    if bank.down_bias then out = out + bank.down_bias[e] end
    local weight = (w * index:eq(e):to(w.dtype)):sum(2, true)
    y = y + out * weight
  end
  return y
end

local function same_gradients(a, b, inputs, tolerance)
  assert.close(a, b, tolerance)
  local g = moe.randn_like(a:detach())
  local ga, gb = { moe.grad((a * g):sum(), inputs) }, { moe.grad((b * g):sum(), inputs) }
  for i = 1, #inputs do assert.close(ga[i], gb[i], tolerance) end
end

local exact <const> = { rtol = 1e-9, atol = 1e-9 }

describe("banks with polynomial activations", function()
  for _, act in ipairs { "poly_relu", "poly_norm" } do
    for _, gated in ipairs { false, true } do
      it(("%s, %s, agree with loops over experts"):format(act, gated and "gated" or "plain"), function()
        moe.manual_seed(4)
        local bank = moe.experts[gated and "glu" or "mlp"] {
          d_model = 5, num_experts = 3, intermediate_size = 6, act = act, eps = 0.01, bias = true, dtype = "f64",
        }
        moe.no_grad(function() bank.coefficients:normal_(0, 1) end)
        local x = moe.randn(11, 5, F64):requires_grad_()
        local routing, w, index = choose(11, 3, 2)
        local inputs = bank:parameters()
        assert.equal(gated and 5 or 5, #inputs)
        inputs[#inputs + 1], inputs[#inputs + 2] = x, w
        same_gradients(by_loops(bank, x, w, index, gated, function(h, e)
          if act == "poly_relu" then return h:poly_relu(bank.coefficients[e]) end
          return h:poly_norm(bank.coefficients[e], 0.01)
        end), bank(x, routing), inputs, exact)
      end)
    end
  end

  it("pass the gradient check", function()
    moe.manual_seed(2)
    local bank = moe.experts.mlp { d_model = 3, num_experts = 2, intermediate_size = 4, act = "poly_norm", eps = 0.1, dtype = "f64" }
    local index = moe.tensor({ { 1, 2 }, { 2, 0 }, { 2, 1 } }, { dtype = "i64" })
    assert.is_true(moe.gradcheck(function(x, w) return bank(x, moe.routing.topk(index, w, 2)) end,
      { moe.randn(3, 3, F64), moe.rand(3, 2, F64) }))
  end)

  it("start with a third of each power in every expert, and take another order", function()
    local bank = moe.experts.mlp { d_model = 3, num_experts = 2, intermediate_size = 4, act = "poly_relu" }
    assert.close({ { 0, 1 / 3, 1 / 3, 1 / 3 }, { 0, 1 / 3, 1 / 3, 1 / 3 } }, bank.coefficients, { rtol = 1e-6 })
    assert.is_false(moe.nn.decays(bank.coefficients))
    bank = moe.experts.glu { d_model = 3, num_experts = 2, intermediate_size = 4, act = "poly_norm", order = 2 }
    assert.same({ 2, 3 }, bank.coefficients.shape)
    assert.matches("act=poly_norm", tostring(bank))
  end)

  it("with a = (0, 1, 0, 0) are relu banks", function()
    moe.manual_seed(8)
    local relu = moe.experts.mlp { d_model = 6, num_experts = 3, intermediate_size = 8, act = "relu" }
    local poly = moe.experts.mlp { d_model = 6, num_experts = 3, intermediate_size = 8, act = "poly_relu" }
    moe.no_grad(function()
      poly.up_proj:copy_(relu.up_proj)
      poly.down_proj:copy_(relu.down_proj)
      poly.coefficients:copy_(moe.tensor { 0.0, 1, 0, 0 })
    end)
    local x = moe.randn(9, 6)
    local w, i = moe.router_topk(moe.randn(9, 3), { top_k = 2 })
    local routing = moe.routing.topk(i, w, 3)
    assert.close(relu(x, routing), poly(x, routing), { rtol = 1e-5, atol = 1e-6 })
  end)

  it("of one expert need no routing, and x may have any shape", function()
    local bank = moe.experts.mlp { d_model = 4, intermediate_size = 5, act = "poly_norm" }
    local x = moe.randn(2, 3, 4)
    local y = bank(x)
    assert.same({ 2, 3, 4 }, y.shape)
    local routing = moe.routing.topk(moe.ones({ 6, 1 }, { dtype = "i64" }), nil, 1)
    assert.close(bank(x:reshape { 6, 4 }, routing), y:reshape { 6, 4 }, { rtol = 1e-5, atol = 1e-6 })
  end)
end)

describe("any module or function as an activation", function()
  it("agrees with the fused kernel where that knows it", function()
    moe.manual_seed(9)
    for _, kind in ipairs { "mlp", "glu" } do
      local o = { d_model = 5, num_experts = 4, intermediate_size = 7, act = "silu", bias = true, dtype = "f64" }
      local fused = moe.experts[kind](o)
      for _, act in ipairs { function(h) return h:silu() end, moe.nn.silu() } do
        o.act = act
        local bank = moe.experts[kind](o)
        bank:load_state_dict(fused:state_dict())
        local x = moe.randn(13, 5, F64):requires_grad_()
        local routing, w = choose(13, 4, 2)
        same_gradients(fused(x, routing), bank(x, routing), { x, w }, exact)
        local a, b = {}, {}
        for name, p in fused:named_parameters() do
          a[#a + 1] = { name, moe.grad(fused(x, routing):square():sum(), p) }
        end
        for _, p in bank:named_parameters() do b[#b + 1] = moe.grad(bank(x, routing):square():sum(), p) end
        for i, pair in ipairs(a) do assert.close(pair[2], b[i], { rtol = 1e-9, atol = 1e-9, name = pair[1] }) end
      end
    end
  end)

  it("may have coefficients that all experts share: the child act", function()
    local bank = moe.experts.mlp { d_model = 4, num_experts = 2, intermediate_size = 5, act = moe.nn.poly_norm() }
    assert.is_truthy(bank:state_dict()["act.coefficients"])
    local w, i = moe.router_topk(moe.randn(6, 2), { top_k = 1 })
    bank(moe.randn(6, 4), moe.routing.topk(i, w, 2)):sum():backward()
    assert.same({ 4 }, bank.act.coefficients.grad:size())
    assert.is_true(bank.act.coefficients.grad:abs():sum():item() > 0)
  end)

  it("sees the routing whose rows it works on", function()
    local seen
    local bank = moe.experts.mlp {
      d_model = 4, num_experts = 2, intermediate_size = 5,
      act = function(h, routing)
        seen = { h:size(1), routing.num_assignments }
        return h * routing.expert:to("f32"):unsqueeze(2)
      end,
    }
    bank(moe.randn(3, 4), moe.routing.topk(moe.tensor({ { 1, 2 }, { 2, 0 }, { 1, 2 } }, { dtype = "i64" }), nil, 2))
    assert.same({ 5, 5 }, seen)
  end)

  it("that is none is named", function()
    local function mlp(act, order) return moe.experts.mlp { intermediate_size = 4, act = act, order = order } end
    assert.matches("must be one of silu, .* poly_norm, a module or a function, got the string \"swish\"", helper.error_of(mlp, "swish"))
    assert.matches("got a table", helper.error_of(mlp, {}))
    assert.matches("got a userdata", helper.error_of(mlp, moe.ones(2)))
    assert.matches("'order' must lie in 1..15, got 0", helper.error_of(mlp, "poly_relu", 0))
    local bank = moe.experts.mlp { d_model = 4, num_experts = 2, intermediate_size = 4, act = "poly_relu" }
    assert.matches("2 experts need a routing", helper.error_of(bank, moe.ones(1, 4)))
    local three = moe.routing.topk(moe.ones({ 1, 1 }, { dtype = "i64" }), nil, 3)
    assert.matches("the routing is over 3 experts, the bank has 2", helper.error_of(bank, moe.ones(1, 4), three))
  end)
end)
