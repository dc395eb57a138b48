-- Any module as an expert: heterogeneous lists, their names, their errors.
local moe = require "moe"
local helper = require "spec.helper"

describe("a list of modules as experts", function()
  local function experts()
    return {
      moe.nn.linear(4, 4),
      moe.nn.sequential(moe.nn.linear(4, 9), moe.nn.gelu(), moe.nn.linear(9, 4)),
      function(xe) return xe end,
      moe.experts.swiglu { d_model = 4, intermediate_size = 3 },
    }
  end

  it("agrees with each expert on its own tokens", function()
    moe.manual_seed(1)
    local list = experts()
    local bank = moe.experts.map(list)
    local w, i = moe.router_topk(moe.randn(15, 4), { top_k = 2 })
    local x, wanted = moe.randn(15, 4), 0
    for e = 1, 4 do wanted = wanted + list[e](x) * (w * i:eq(e):to "f32"):sum(2, true) end
    assert.close(wanted, bank(x, moe.routing.topk(i, w, 4)), { rtol = 1e-5, atol = 1e-6 })
  end)

  it("names its parameters by the expert's number, in a layer too", function()
    local layer = moe.layer { d_model = 4, num_experts = 4, experts = moe.experts.map(experts()) }
    local state = layer:state_dict()
    for _, name in ipairs { "experts.1.weight", "experts.2.1.weight", "experts.2.3.bias", "experts.4.gate_up_proj" } do
      assert.is_truthy(state[name], name)
    end
    local other = moe.layer { d_model = 4, num_experts = 4, experts = moe.experts.map(experts()) }
    other:load_state_dict(state)
    local x = moe.randn(7, 4)
    assert.close((layer(x)), (other(x)))
    assert.matches("map%(4 experts%)", tostring(layer))
  end)

  it("reaches modules with train, eval, freeze and to", function()
    local bank = moe.experts.map { moe.nn.dropout(0.5), moe.nn.linear(4, 4) }
    local x = moe.ones(64, 4)
    local routing = moe.routing.topk(moe.ones({ 64, 1 }, { dtype = "i64" }), nil, 2)
    bank:eval()
    assert.close(x, bank(x, routing))
    bank:train()
    assert.is_true(bank(x, routing):eq(0):any():item())
    bank:freeze()
    assert.equal(0, bank:num_parameters(true))
    bank:to "f64"
    assert.equal("f64", bank[2].weight.dtype)
  end)

  it("may be one module for all", function()
    local linear = moe.nn.linear(4, 3)
    local bank = moe.experts.map(linear)
    local x = moe.randn(5, 4)
    local w, i = moe.router_topk(moe.randn(5, 3), { top_k = 2, norm_topk_prob = true })
    assert.close(linear(x), bank(x, moe.routing.topk(i, w, 3)), { rtol = 1e-5, atol = 1e-6 })
    assert.is_truthy(bank:state_dict()["experts.weight"])
  end)

  it("names what is wrong", function()
    local map = moe.experts.map
    assert.matches("the list has 4 experts, the layer wants 3",
      helper.error_of(moe.layer, { d_model = 4, num_experts = 3, experts = map(experts()) }))
    local three = moe.routing.topk(moe.ones({ 2, 1 }, { dtype = "i64" }), nil, 3)
    assert.matches("the routing is over 3 experts, the list has 4", helper.error_of(map(experts()), moe.ones(2, 4), three))
    assert.matches("4 experts need a routing", helper.error_of(map(experts()), moe.ones(2, 4)))
    assert.matches("expert 2 must be a function or a module, got a number", helper.error_of(map, { moe.nn.linear(2, 2), 3 }))
    assert.matches("got the key 'a'", helper.error_of(map, { moe.nn.linear(2, 2), a = moe.nn.linear(2, 2) }))
    assert.matches("the list has no expert", helper.error_of(map, {}))
    assert.matches("got a number", helper.error_of(map, 3))
    assert.matches("expert 1 gave a number for 2 rows", helper.error_of(map { function() return 3 end }, moe.ones(2, 4),
      moe.routing.topk(moe.ones({ 2, 1 }, { dtype = "i64" }), nil, 1)))
    local two = moe.routing.topk(moe.tensor({ { 1, 2 } }, { dtype = "i64" }), nil, 2)
    assert.matches("expert 2 gave %[1, 5%] for 1 rows, wanted a tensor %[1, 4%]",
      helper.error_of(map { moe.nn.linear(4, 4), moe.nn.linear(4, 5) }, moe.ones(1, 4), two))
  end)
end)
