-- Some of a routing's experts alone; banks joined into one layer; experts of unequal widths.
local moe = require "moe"
local helper = require "spec.helper"

local F64 <const> = { dtype = "f64" }
local exact <const> = { rtol = 1e-10, atol = 1e-10 }

local function choose(T, E, k)
  local w, i = moe.router_topk(moe.randn(T, E, F64), { top_k = k })
  w = w:detach():requires_grad_()
  return moe.routing.topk(i, w, E), w, i
end

describe("routing:pick", function()
  it("keeps the assignments of some experts under new numbers, over the same tokens and weights", function()
    local index = moe.tensor({ { 1, 3 }, { 2, 0 }, { 3, 2 }, { 4, 3 } }, { dtype = "i64" })
    local weight = moe.tensor { { 0.1, 0.2 }, { 0.3, 0 }, { 0.4, 0.5 }, { 0.6, 0.7 } }
    local part = moe.routing.topk(index, weight, 4):pick { 3, 1 }
    assert.equal(4, part.num_tokens)
    assert.equal(2, part.num_experts)
    assert.same({ 1, 3, 4, 1 }, part.token:totable())
    assert.same({ 1, 1, 1, 2 }, part.expert:totable())
    assert.close({ 0.2, 0.4, 0.7, 0.1 }, part.weight, { rtol = 1e-6 })
    assert.same({ 3, 1 }, part:load():totable())
    assert.same({ 1, 4, 5 }, part.offsets:totable())
  end)

  it("of every expert is the whole: parts add up, gradients of the weights too", function()
    moe.manual_seed(1)
    local routing, w = choose(20, 6, 3)
    local bank = moe.experts.mlp { d_model = 4, num_experts = 6, intermediate_size = 5, dtype = "f64" }
    local x = moe.randn(20, 4, F64)
    local whole, sum = bank(x, routing), 0
    for _, list in ipairs { { 2, 5 }, { 6 }, { 1, 3, 4 } } do
      local part = moe.experts.mlp { d_model = 4, num_experts = #list, intermediate_size = 5, dtype = "f64" }
      local at = moe.tensor(list, { dtype = "i64" })
      moe.no_grad(function()
        part.up_proj:copy_(bank.up_proj:index_select(1, at))
        part.down_proj:copy_(bank.down_proj:index_select(1, at))
      end)
      sum = sum + part(x, routing:pick(list))
    end
    assert.close(whole, sum, exact)
    assert.close(moe.grad(whole:square():sum(), w), moe.grad(sum:square():sum(), w), exact)
  end)

  it("of nobody chosen is empty, and masks stay", function()
    local index = moe.tensor({ { 1 }, { 2 } }, { dtype = "i64" })
    local routing = moe.routing.topk(index, nil, 3, { mask = moe.tensor { true, false } })
    assert.equal(0, routing:pick({ 3 }).num_assignments)
    assert.equal(0, routing:pick({ 2 }).num_assignments)
    assert.equal(1, routing:pick({ 1 }).num_assignments)
    assert.same({ 2, 4 }, moe.experts.mlp({ d_model = 4, intermediate_size = 2 })(moe.ones(2, 4), routing:pick { 3 }).shape)
  end)

  it("names what is wrong", function()
    local routing = moe.routing.topk(moe.ones({ 2, 1 }, { dtype = "i64" }), nil, 3)
    assert.matches("expert 4 at position 2 is none of the 3", helper.error_of(routing.pick, routing, { 1, 4 }))
    assert.matches("expert 0 at position 1", helper.error_of(routing.pick, routing, { 0 }))
    assert.matches("expert 2 is named twice", helper.error_of(routing.pick, routing, { 2, 2 }))
    assert.matches("names no expert", helper.error_of(routing.pick, routing, {}))
    assert.matches("got a string at position 1", helper.error_of(routing.pick, routing, { "a" }))
    assert.matches("got a number at position 1", helper.error_of(routing.pick, routing, { 1.5 }))
    assert.matches("list of expert numbers", helper.error_of(routing.pick, routing, 3))
  end)
end)

describe("experts of unequal widths", function()
  local widths <const> = { 3, 8, 3, 1, 8 }

  it("are each a network of their own width, forward and backward", function()
    moe.manual_seed(3)
    for _, gated in ipairs { true, false } do
      local bank = moe.experts.unequal { widths = widths, d_model = 4, d_out = 6, gated = gated, bias = true, act = "gelu", dtype = "f64" }
      assert.equal(5, bank.num_experts)
      local x = moe.randn(17, 4, F64):requires_grad_()
      local routing, w, index = choose(17, 5, 2)
      local y, wanted = bank(x, routing), 0
      local place = { { 1, 1 }, { 2, 1 }, { 1, 2 }, { 3, 1 }, { 2, 2 } } -- bank and number in it
      for e, at in ipairs(place) do
        local b = bank.banks[at[1]]
        local up = gated and b.gate_up_proj or b.up_proj
        assert.same({ gated and 2 * widths[e] or widths[e], 4 }, up[at[2]].shape)
        local h = x:matmul(up[at[2]]:t()) + (gated and b.gate_up_bias or b.up_bias)[at[2]]
        h = gated and h:narrow(2, 1, widths[e]):gelu() * h:narrow(2, widths[e] + 1, widths[e]) or h:gelu()
        local out = h:matmul(b.down_proj[at[2]]:t()) + b.down_bias[at[2]]
        wanted = wanted + out * (w * index:eq(e):to "f64"):sum(2, true)
      end
      assert.close(wanted, y, exact)
      local inputs = bank:parameters()
      inputs[#inputs + 1], inputs[#inputs + 2] = x, w
      local a, b = { moe.grad(wanted:square():sum(), inputs) }, { moe.grad(y:square():sum(), inputs) }
      for i = 1, #inputs do assert.close(a[i], b[i], exact) end
    end
  end)

  it("of one width are the plain bank", function()
    moe.manual_seed(4)
    local bank = moe.experts.unequal { widths = { 5, 5, 5 }, d_model = 4, act = "silu" }
    local plain = moe.experts.swiglu { d_model = 4, num_experts = 3, intermediate_size = 5 }
    plain:load_state_dict(bank.banks[1]:state_dict())
    local w, i = moe.router_topk(moe.randn(9, 3), { top_k = 2 })
    local routing, x = moe.routing.topk(i, w, 3), moe.randn(9, 4)
    assert.same(plain(x, routing):totable(), bank(x, routing):totable())
  end)

  it("take their number of parameters, no more", function()
    local bank = moe.experts.unequal { widths = { 2, 64, 2 }, d_model = 10 }
    assert.equal(3 * 10 * 68, bank:num_parameters())
    local names = {}
    for name in pairs(bank:state_dict()) do names[#names + 1] = name end
    table.sort(names)
    assert.same({ "banks.1.down_proj", "banks.1.gate_up_proj", "banks.2.down_proj", "banks.2.gate_up_proj" }, names)
    assert.matches("widths=2 64 2", tostring(bank))
  end)

  it("sit in a layer, also of a soft routing", function()
    local layer = moe.layer { d_model = 6, num_experts = 3, experts = moe.experts.unequal { widths = { 4, 4, 9 } } }
    layer(moe.randn(2, 5, 6)):sum():backward()
    assert.is_true(layer.experts.banks[2].down_proj.grad:abs():sum():item() > 0)
    local soft = moe.rand(7, 3, 2)
    local routing = moe.routing.soft(soft:softmax(1), soft:reshape({ 7, 6 }):softmax(2):reshape { 7, 3, 2 })
    local x = moe.randn(7, 6)
    local wanted, D, C = 0, routing.dispatch, routing.combine_matrix
    for e, at in ipairs { { 1, 1 }, { 1, 2 }, { 2, 1 } } do
      local b = layer.experts.banks[at[1]]
      local one = moe.experts.glu { d_model = 6, intermediate_size = b.intermediate_size }
      one:load_state_dict { gate_up_proj = b.gate_up_proj[{ { at[2], at[2] } }], down_proj = b.down_proj[{ { at[2], at[2] } }] }
      wanted = wanted + C:select(2, e):matmul(one(D:select(2, e):t():matmul(x)))
    end
    assert.close(wanted, layer.experts(x, routing), { rtol = 1e-4, atol = 1e-6 })
  end)

  it("name what is wrong", function()
    local unequal = moe.experts.unequal
    assert.matches("'widths' is missing", helper.error_of(unequal, {}))
    assert.matches("lists no expert", helper.error_of(unequal, { widths = {} }))
    assert.matches("widths%[2%] must be a positive integer, got 0", helper.error_of(unequal, { widths = { 3, 0 } }))
    assert.matches("lists 2 experts, num_experts is 3", helper.error_of(unequal, { widths = { 3, 4 }, num_experts = 3 }))
    assert.matches("lists 2 experts, the layer wants 4",
      helper.error_of(moe.layer, { d_model = 4, num_experts = 4, experts = unequal { widths = { 3, 4 } } }))
    assert.matches("unknown option 'intermediate_size'", helper.error_of(unequal, { widths = { 3 }, intermediate_size = 3 }))
    local bank = unequal { widths = { 3, 4 }, d_model = 4 }
    assert.matches("2 experts need a routing", helper.error_of(bank, moe.ones(1, 4)))
    assert.matches("description without weights", helper.error_of(unequal { widths = { 3, 4 } }, moe.ones(1, 4)))
  end)
end)

describe("moe.experts.join", function()
  it("makes one layer of banks of different kinds", function()
    moe.manual_seed(6)
    local banks = {
      moe.experts.swiglu { d_model = 4, num_experts = 2, intermediate_size = 5 },
      moe.experts.map { moe.nn.linear(4, 4) },
      moe.experts.mlp { d_model = 4, num_experts = 1, intermediate_size = 3, act = "poly_norm" },
    }
    local bank = moe.experts.join(banks)
    assert.equal(4, bank.num_experts)
    local w, i = moe.router_topk(moe.randn(12, 4), { top_k = 2 })
    local routing, x = moe.routing.topk(i, w, 4), moe.randn(12, 4)
    local wanted = banks[1](x, routing:pick { 1, 2 }) + banks[3](x, routing:pick { 4 })
      + banks[2][1](x) * (w * i:eq(3):to "f32"):sum(2, true)
    assert.close(wanted, bank(x, routing), { rtol = 1e-5, atol = 1e-6 })
    assert.is_truthy(bank:state_dict()["banks.2.1.weight"])
  end)

  it("binds descriptions to a layer's sizes", function()
    local layer = moe.layer {
      d_model = 6, num_experts = 3,
      experts = moe.experts.join { moe.experts.mlp { intermediate_size = 4, num_experts = 2 },
        moe.experts.swiglu { intermediate_size = 9, num_experts = 1 } },
    }
    assert.same({ 2, 4, 6 }, layer.experts.banks[1].up_proj.shape)
    layer(moe.randn(5, 6)):sum():backward()
  end)

  it("names what is wrong", function()
    local join, mlp = moe.experts.join, moe.experts.mlp
    assert.matches("must be a list of banks, got none", helper.error_of(join, {}))
    assert.matches("must be a list of banks, got a number", helper.error_of(join, 3))
    assert.matches("part 2 must be a bank of moe.experts, got a number",
      helper.error_of(join, { mlp { intermediate_size = 2, num_experts = 1 }, 3 }))
    assert.matches("part 1 needs num_experts", helper.error_of(join, { mlp { intermediate_size = 2 } }))
    assert.matches("d_model of part 2 is 5, of those before it 4",
      helper.error_of(join, { mlp { intermediate_size = 2, d_model = 4 }, mlp { intermediate_size = 2, d_model = 5 } }))
    assert.matches("have 2 experts together, the layer wants 3", helper.error_of(moe.layer, {
      d_model = 4, num_experts = 3, experts = join { mlp { intermediate_size = 2, num_experts = 2 } },
    }))
  end)
end)
