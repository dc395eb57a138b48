-- Low-rank experts and adapters beside a frozen base.
local moe = require "moe"
local helper = require "spec.helper"
local ref = require "spec.nn.moe_ref"

local exact = { rtol = 1e-10, atol = 1e-10 }

-- Fresh values for all that starts at zero.
local function shake(m)
  for _, p in m:named_parameters() do
    if p.requires_grad then moe.nn.init.normal_(p:detach(), 0, 0.5) end
  end
  return m
end

local function bits(t)
  local out = {}
  for i, v in ipairs(t:detach():reshape({ -1 }):totable()) do out[i] = string.pack("d", v) end
  return table.concat(out)
end

local INDEX <const> = { { 1, 3 }, { 3, 0 }, { 0, 0 }, { 2, 1 }, { 3, 2 } }

local function routing_of(weight) return moe.routing.topk(moe.tensor(INDEX, { dtype = "i64" }), weight, 3) end

local BANKS <const> = {
  lora = function(o)
    o.rank, o.alpha = 2, 5
    return moe.experts.lora(o)
  end,
  adapter = function(o)
    o.intermediate_size, o.act, o.scale = 2, "tanh", 2.5
    return moe.experts.adapter(o)
  end,
}

-- base(x) plus the sum by loops over tokens and choices.
local function by_loops(bank, x, weight, base)
  local lora = bank.lora_A ~= nil
  local p = {
    act = lora and "identity" or "tanh", gated = false, w_in = lora and bank.lora_A or bank.down_proj,
    w_out = lora and bank.lora_B or bank.up_proj, b_in = bank.down_bias, b_out = bank.up_bias,
  }
  return base + ref.experts(p, x, ref.choices(INDEX, weight)) * 2.5
end

for name, make in pairs(BANKS) do
  describe("moe.experts." .. name, function()
    it("adds to the base what loops over tokens and choices add", function()
      moe.manual_seed(3)
      local base = moe.nn.linear(4, 6):to "f64"
      local bank = shake(make { d_model = 4, num_experts = 3, base = base })
      assert.equal("f64", (bank.lora_A or bank.down_proj).dtype)
      local x, weight = moe.randn(5, 4, { dtype = "f64" }), moe.rand(5, 2, { dtype = "f64" })
      weight.requires_grad, x.requires_grad = true, true
      local y, wanted = bank(x, routing_of(weight)), by_loops(bank, x, weight, base(x))
      assert.close(wanted, y, exact)
      local g, inputs = moe.randn(5, 6, { dtype = "f64" }), { x, weight }
      for _, p in ipairs(bank:parameters()) do
        if p.requires_grad then inputs[#inputs + 1] = p end
      end
      assert.equal(name == "lora" and 4 or 6, #inputs)
      local got, want = { moe.grad((y * g):sum(), inputs) }, { moe.grad((wanted * g):sum(), inputs) }
      for i = 1, #inputs do assert.close(want[i], got[i], exact) end
    end)

    it("passes the gradient check", function()
      moe.manual_seed(4)
      local bank = shake(make { d_model = 3, num_experts = 3, dtype = "f64", base = moe.nn.ffn(3, 4):to "f64" })
      local inputs = { moe.randn(5, 3, { dtype = "f64" }), moe.rand(5, 2, { dtype = "f64" }) }
      for _, p in ipairs(bank:parameters()) do
        if p.requires_grad then inputs[#inputs + 1] = p end
      end
      assert.is_true(moe.gradcheck(function(x, w) return bank(x, routing_of(w)) end, inputs))
    end)

    it("is the base to the bit at the start, for a linear layer, a weight and an FFN", function()
      moe.manual_seed(5)
      local linear, ffn = moe.nn.linear(4, 4), moe.nn.ffn(4, 9)
      local x = moe.randn(5, 4)
      for _, case in ipairs { { linear, linear(x) }, { linear.weight, x:linear(linear.weight) }, { ffn, ffn(x) } } do
        local bank = make { d_model = 4, num_experts = 3, base = case[1] }
        assert.equal(bits(case[2]), bits(bank(x, routing_of(moe.rand(5, 2)))))
      end
    end)

    it("keeps the base's bits under training, and spends no gradient on it", function()
      moe.manual_seed(6)
      local base = moe.nn.linear(4, 6)
      local before = bits(base.weight) .. bits(base.bias)
      local bank = make { d_model = 4, num_experts = 3, base = base }
      assert.is_false(base.weight.requires_grad)
      assert.is_false(base(moe.randn(5, 4)).requires_grad) -- not recorded: no backward through it
      local optimizer = moe.optim.adamw(bank, { lr = 0.1, weight_decay = 0.5 })
      local x, first = moe.randn(5, 4), nil
      for _ = 1, 5 do
        optimizer:zero_grad()
        local loss = (bank(x, routing_of(moe.ones(5, 2))) - 1):square():mean()
        first = first or loss:item()
        loss:backward()
        optimizer:step()
        assert.is_nil(base.weight.grad)
      end
      assert.equal(before, bits(base.weight) .. bits(base.bias))
      assert.is_true((bank(x, routing_of(moe.ones(5, 2))) - 1):square():mean():item() < first)
      -- a weight given as a tensor is shared, not copied, and saved with the rest
      local weight = moe.randn(6, 4)
      local of_weight = make { d_model = 4, base = weight }
      assert.equal(weight:storage_id(), of_weight.base:storage_id())
      assert.is_truthy(of_weight:state_dict().base)
    end)

    it("without a base is the sum alone, and serves a layer beside its FFN, for masked tokens too", function()
      moe.manual_seed(7)
      local ffn = moe.nn.ffn(4, 8)
      local layer = shake(moe.layer { d_model = 4, num_experts = 3, experts = make { base = ffn } })
      local beside = shake(moe.layer { d_model = 4, num_experts = 3, experts = make {}, shared = ffn })
      beside:load_state_dict((function()
        local state = {}
        for key, v in pairs(layer:state_dict()) do state[key:gsub("^experts%.base", "shared")] = v end
        return state
      end)())
      local x = moe.randn(2, 5, 4)
      local mask = moe.tensor({ { true, true, false, true, true }, { false, true, true, true, true } }, { dtype = "bool" })
      local y = layer(x, { mask = mask })
      assert.close(beside(x, { mask = mask }), y, { rtol = 1e-5, atol = 1e-6 })
      assert.equal(bits(ffn(x)[1][3]), bits(y[1][3]))
      assert.is_true((ffn(x)[1][2] - y[1][2]):abs():max():item() > 1e-3)
    end)

    it("with one expert serves as the FFN of a model, which gives it a context", function()
      local ffn = moe.nn.ffn(4, 8)
      local bank, x = shake(make { d_model = 4, base = ffn }), moe.randn(2, 3, 4)
      assert.equal(bits(bank(x)), bits(bank(x, { step = 1 })))
      assert.same({ 2, 3, 4 }, bank(x).shape)
    end)

    it("keeps its values and those of its base in a language model", function()
      moe.manual_seed(7)
      local ffn = moe.nn.ffn(8, 8)
      local before = bits(ffn.up_proj.weight)
      local model = moe.model.lm {
        vocab_size = 5, d_model = 8, num_layers = 1, num_heads = 1, positional = "none", ffn = "moe",
        moe = { num_experts = 3, experts = make { base = ffn } },
      }
      local bank = model.layers[1].ffn.experts
      assert.equal(before, bits(bank.base.up_proj.weight))
      assert.equal(0, (bank.lora_B or bank.up_proj):abs():sum():item())
    end)

    it("names what is wrong", function()
      local cases = {
        { "option 'base' must be a module or a weight %[d_out, d_model%], got a tensor %[3%]", { d_model = 3, base = moe.ones(3) } },
        { "option 'base' must be a module or a weight %[d_out, d_model%], got a table", { d_model = 3, base = {} } },
        { "the base's weight is %[6, 4%], wanted %[6, 3%]", { d_model = 3, base = moe.nn.linear(4, 6) } },
        { "the base's weight is %[6, 4%], wanted %[5, 4%]", { d_model = 4, d_out = 5, base = moe.ones(6, 4) } },
        { "unknown option 'basis'", { basis = 3 } },
      }
      for _, case in ipairs(cases) do
        local message = helper.error_of(make, case[2])
        assert.matches(case[1], message)
        assert.matches("experts." .. name, message, 1, true)
      end
      assert.matches("description without weights", helper.error_of(make {}, moe.ones(2, 2)))
    end)
  end)
end

describe("moe.experts.lora", function()
  it("merges one expert into the base", function()
    moe.manual_seed(8)
    local base = moe.nn.linear(4, 6)
    local bank = shake(moe.experts.lora { d_model = 4, num_experts = 3, rank = 2, alpha = 4, base = base })
    local x = moe.randn(5, 4)
    for e = 1, 3 do
      local merged = bank:merge(e)
      local all = moe.full({ 5, 1 }, e, { dtype = "i64" })
      assert.close(bank(x, moe.routing.topk(all, nil, 3)), merged(x), { rtol = 1e-5, atol = 1e-5 })
      assert.close(base.weight + bank.lora_B[e]:matmul(bank.lora_A[e]) * 2, merged.weight, { rtol = 1e-6, atol = 1e-6 })
      assert.is_true(merged.weight.requires_grad)
    end
    local bare = shake(moe.experts.lora { d_model = 4, rank = 2, base = base.weight })
    assert.close(bare(x), x:linear(bare:merge()), { rtol = 1e-5, atol = 1e-5 })
    assert.is_nil(moe.nn.is_module(bare:merge()) or nil)
    assert.matches("must be one of 1..3, got 4", helper.error_of(function() bank:merge(4) end))
    assert.matches("must be one of 1..3, got 0", helper.error_of(function() bank:delta(0) end))
    assert.matches("no base with a weight", helper.error_of(function()
      moe.experts.lora { d_model = 4, rank = 2, base = moe.nn.ffn(4, 8) }:merge()
    end))
  end)

  it("scales by alpha over rank, or as told", function()
    assert.equal(1, moe.experts.lora { d_model = 4, rank = 8 }.scale)
    assert.equal(2, moe.experts.lora { d_model = 4, rank = 8, alpha = 16 }.scale)
    assert.equal(0.3, moe.experts.lora { d_model = 4, rank = 8, scale = 0.3 }.scale)
    assert.matches("alpha or scale, not both", helper.error_of(moe.experts.lora, { rank = 8, scale = 1, alpha = 2 }))
    assert.matches("'rank' must be at least 1", helper.error_of(moe.experts.lora, { rank = 0 }))
    assert.matches("option 'rank' is missing", helper.error_of(moe.experts.lora, {}))
  end)
end)

describe("moe.experts.lora_ffn", function()
  it("is the network at the start, for every activation, and each linear layer with its experts after", function()
    moe.manual_seed(11)
    local x = moe.randn(2, 5, 6)
    for act, f in pairs {
      gelu = function(h) return h:gelu() end, gelu_tanh = function(h) return h:gelu "tanh" end, relu = function(h) return h:relu() end,
      relu2 = function(h) return h:relu():square() end, silu = function(h) return h:silu() end,
    } do
      for _, bias in ipairs { true, false } do
        local base = moe.nn.ffn { d_model = 6, intermediate_size = 10, activation = act, bias = bias }
        for _, E in ipairs { 1, 3 } do
          local m = moe.experts.lora_ffn { base = base, rank = 2, num_experts = E }
          assert.close(base(x), m(x), { rtol = 0, atol = 1e-5 })
          shake(m)
          local h = m.up(x)
          if bias then h = h + base.up_proj.bias end
          local want = m.down(f(h))
          if bias then want = want + base.down_proj.bias end
          assert.close(want, m(x), { rtol = 1e-5, atol = 1e-5 })
        end
      end
    end
    for act in pairs { swiglu = 1, geglu = 1, reglu = 1 } do
      local base = moe.nn.ffn { d_model = 6, intermediate_size = 10, activation = act }
      assert.close(base(x), moe.experts.lora_ffn { base = base, rank = 2, num_experts = 2 }(x), { rtol = 0, atol = 1e-5 })
    end
  end)

  it("returns the routing of its second layer with the losses of both", function()
    local m = moe.experts.lora_ffn { base = moe.nn.ffn(6, 10), rank = 2, num_experts = 3, balance = { moe.loss.switch(0.01) } }
    local ctx = {}
    local _, routing = m(moe.randn(4, 6), ctx)
    assert.equal(ctx.routings[2], routing)
    assert.close(ctx.routings[1]:aux() + routing:aux "switch", routing:aux(), { rtol = 1e-6 })
    local _, none = moe.experts.lora_ffn { base = moe.nn.ffn(6, 10), rank = 2 }(moe.randn(4, 6), {})
    assert.is_nil(none)
  end)

  it("wants a dense network", function()
    for _, bad in ipairs { { rank = 2 }, { rank = 2, base = moe.nn.linear(3, 3) }, { rank = 2, base = moe.ones(3, 3) } } do
      assert.matches("lora_ffn: option 'base' must be a moe.nn.ffn", helper.error_of(moe.experts.lora_ffn, bad))
    end
    assert.matches("unknown option 'ranks'", helper.error_of(moe.experts.lora_ffn, { base = moe.nn.ffn(3), ranks = 2 }))
  end)
end)

describe("moe.experts.lora_linear", function()
  it("with one expert is plain LoRA, without a router", function()
    moe.manual_seed(9)
    local base = moe.nn.linear(4, 6)
    local m = shake(moe.experts.lora_linear { base = base, rank = 2, alpha = 6 })
    local names = {}
    for name, p in m:named_parameters() do
      if p.requires_grad then names[#names + 1] = name end
    end
    assert.same({ "experts.lora_A", "experts.lora_B" }, names)
    local x = moe.randn(2, 5, 4)
    local A, B = m.experts.lora_A[1], m.experts.lora_B[1]
    assert.close(base(x) + x:linear(A):linear(B) * 3, m(x), { rtol = 1e-5, atol = 1e-5 })
    assert.close(m(x), m:merge()(x), { rtol = 1e-5, atol = 1e-5 })
  end)

  it("with several routes by softmax, the k best normalised, and balances as a layer does", function()
    moe.manual_seed(10)
    local base = moe.nn.linear { in_features = 4, out_features = 6, bias = false }
    local m = shake(moe.experts.lora_linear { base = base, num_experts = 3, rank = 2, balance = { moe.loss.switch(0.01) } })
    local x, ctx = moe.randn(2, 5, 4), {}
    local y, routing = m(x, ctx)
    assert.same({ 2, 5, 6 }, y.shape)
    assert.equal(routing, ctx.routing)
    assert.is_true(routing:aux():item() > 0)
    local p = x:linear(m.router.weight):softmax(-1)
    local gate, index = p:topk(2)
    gate = gate / gate:sum(-1, true)
    for t = 1, 5 do
      local want = base(x[1][t])
      for k = 1, 2 do
        want = want + m.experts:delta(math.tointeger(index[1][t][k])):matmul(x[1][t]) * gate[1][t][k]
      end
      assert.close(want, y[1][t], { rtol = 1e-5, atol = 1e-5 })
    end
    (y:sum() + routing:aux()):backward()
    assert.is_nil(base.weight.grad)
    assert.is_true(m.router.weight.grad:abs():sum():item() > 0)
  end)

  it("names what is wrong", function()
    local base = moe.nn.linear(4, 6)
    local cases = {
      { "option 'base' must be a linear layer or a weight %[d_out, d_model%], got a weight %[4%]", { base = moe.nn.rmsnorm(4), rank = 2 } },
      { "option 'base' must be a linear layer or a weight %[d_out, d_model%], got a userdata", { base = moe.nn.ffn(4), rank = 2 } },
      { "option 'base' is missing", { rank = 2 } },
      { "option 'rank' is missing", { base = base } },
      { "top_k or a router", { base = base, rank = 2, num_experts = 2, top_k = 1, router = moe.router.topk {} } },
      { "unknown option 'ranks' %(did you mean 'rank'", { base = base, ranks = 2 } },
    }
    for _, case in ipairs(cases) do assert.matches(case[1], helper.error_of(moe.experts.lora_linear, case[2])) end
  end)
end)
