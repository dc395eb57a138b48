local moe = require "moe"
local helper = require "spec.helper"

local function layer_of(loss, o)
  moe.manual_seed(3)
  return moe.layer { d_model = 5, num_experts = 4, router = moe.router.relu(o or {}), balance = { loss },
    experts = moe.experts.mlp { intermediate_size = 4 } }
end

-- A routing of gates [T, E] (a table), its mask, and the loss by the formula at coefficient 1.
local function value_of(gates, mask, k, balanced)
  local loss = moe.loss.relu_l1 { top_k = k, start = 1, balanced = balanced }
  local state = {}
  loss:start(state, #gates[1])
  return loss(moe.routing.dense(moe.tensor(gates), { mask = mask }), {}, state):item()
end

describe("moe.loss.relu_l1", function()
  it("is the L1 norm of a token, times the load in the balanced form", function()
    local even = { { 1, 2, 0, 0 }, { 0, 0, 3, 2 } }
    assert.close(4, value_of(even, nil, 2)) -- each load 1 = k T / E
    assert.close(4, value_of(even, nil, 2, false))
    local collapsed = { { 2, 0, 0, 0 }, { 2, 0, 0, 0 } }
    assert.close(8, value_of(collapsed, nil, 1)) -- f = E on the one expert
    assert.close(2, value_of(collapsed, nil, 1, false))
    assert.close(0, value_of({ { 0, 0 } }, nil, 1))
    -- a masked token counts in neither the gates nor the load
    assert.close(8, value_of({ { 2, 0, 0, 0 }, { 2, 0, 0, 0 }, { 0, 0, 0, 0 } }, moe.tensor { true, true, false }, 1))
  end)

  it("has checked gradients", function()
    local loss, state = moe.loss.relu_l1 { top_k = 2, start = 0.7 }, {}
    loss:start(state, 4)
    moe.gradcheck(function(gates) return loss(moe.routing.dense(gates:relu()), {}, state) end, { moe.randn(5, 4, { dtype = "f64" }) })
  end)

  it("moves its coefficient towards the wanted number of experts, once a step", function()
    for _, case in ipairs { { 0.5, 1.2 }, { 4, 1 / 1.2 } } do -- about two experts are open: too many, too few
      local layer = layer_of(moe.loss.relu_l1 { top_k = case[1], start = 0.01 })
      local y, routing = layer(moe.randn(20, 5))
      assert.is_true(routing:aux("relu_l1"):item() > 0)
      layer(moe.randn(20, 5))
      layer:after_step()
      assert.close(0.01 * case[2], layer.l1_coef:item(), { rtol = 1e-12 })
      layer:after_step() -- nothing was seen since
      layer:eval()
      layer(y:detach())
      layer:after_step()
      assert.close(0.01 * case[2], layer.l1_coef:item(), { rtol = 1e-12 })
    end
    local exact = layer_of(moe.loss.relu_l1 { top_k = 4, start = 0.01 }, { bias = true, init = "zeros" })
    exact.router.bias:detach():fill_(1)
    exact(moe.randn(6, 5))
    exact:after_step()
    assert.equal(0.01, exact.l1_coef:item())
  end)

  it("stays finite where no gate can shut", function()
    local layer = layer_of(moe.loss.relu_l1 { top_k = 1, start = 9e3 }, { init = "zeros" })
    layer.router.bias:detach():fill_(1)
    for _ = 1, 3 do
      layer(moe.randn(6, 5))
      layer:after_step()
    end
    assert.equal(1e4, layer.l1_coef:item())
  end)

  it("counts all layers that share it", function()
    local loss = moe.loss.relu_l1 { top_k = 3, start = 1 }
    local open, shut = layer_of(loss, { bias = true, init = "zeros" }), layer_of(loss, { bias = true, init = "zeros" })
    open.router.bias:detach():fill_(1)
    for _, layer in ipairs { open, shut } do layer(moe.randn(6, 5)) end -- four experts and none: two on average
    open:after_step()
    shut:after_step()
    assert.close(1 / 1.2, open.l1_coef:item())
    assert.close(1 / 1.2, shut.l1_coef:item())
  end)

  it("is saved with the layer", function()
    local a, b = layer_of(moe.loss.relu_l1 { top_k = 1, start = 0.01 }), layer_of(moe.loss.relu_l1 { top_k = 1, start = 0.01 })
    a(moe.randn(20, 5))
    a:after_step()
    b:load_state_dict(a:state_dict())
    assert.equal(a.l1_coef:item(), b.l1_coef:item())
    local x = moe.randn(9, 5)
    assert.equal(select(2, a(x)):aux():item(), select(2, b(x)):aux():item())
  end)

  it("holds the mean number of experts in training", function()
    moe.manual_seed(1)
    local layer = moe.layer { d_model = 8, num_experts = 8, router = moe.router.relu {},
      balance = moe.loss.relu_l1 { top_k = 2, start = 1e-2, alpha = 1.05 }, experts = moe.experts.mlp { intermediate_size = 8 } }
    local target = moe.randn(8, 8)
    local optimizer = moe.optim.adamw(layer, { lr = 1e-2 })
    local open, n = 0, 0
    for step = 1, 400 do
      local x = moe.randn(64, 8)
      local y, routing = layer(x)
      local loss = moe.loss.mse(y, x:matmul(target):tanh()) + routing:aux()
      optimizer:zero_grad()
      loss:backward()
      optimizer:step()
      layer:after_step()
      if step > 300 then open, n = open + routing.num_assignments, n + 64 end
    end
    assert.close(2, open / n, { atol = 0.1 })
  end)

  it("names what is wrong", function()
    for _, case in ipairs {
      { "option 'top_k', the mean number of experts a token, must be above 0, got nil", {} },
      { "'alpha' must be above 1, got 1", { top_k = 1, alpha = 1 } },
      { "'start' must be above 0, got 0", { top_k = 1, start = 0 } },
      { "unknown option 'k'", { k = 1 } },
    } do
      assert.matches(case[1], helper.error_of(function() moe.loss.relu_l1(case[2]) end))
    end
    local layer = moe.layer { d_model = 5, num_experts = 4, router = moe.router.topk {}, balance = moe.loss.relu_l1 { top_k = 1 },
      experts = moe.experts.mlp { intermediate_size = 4 } }
    assert.matches("relu_l1: the gates are %[3, 2%], wanted %[3, 4%]", helper.error_of(function() layer(moe.randn(3, 5)) end))
  end)
end)
