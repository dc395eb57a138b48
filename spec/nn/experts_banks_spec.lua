-- What every bank must do, whatever its experts are: files, types, autocast, recomputation, soft routings, empty batches.
local moe = require "moe"

local E <const>, D <const> = 3, 6

local BANKS <const> = {
  mlp = function(o) return moe.experts.mlp { d_model = o.d, num_experts = E, intermediate_size = 5, bias = true } end,
  swiglu = function(o) return moe.experts.swiglu { d_model = o.d, num_experts = E, intermediate_size = 5 } end,
  poly_relu = function(o) return moe.experts.mlp { d_model = o.d, num_experts = E, intermediate_size = 5, act = "poly_relu" } end,
  poly_norm = function(o) return moe.experts.glu { d_model = o.d, num_experts = E, intermediate_size = 5, act = "poly_norm" } end,
  module_act = function(o) return moe.experts.mlp { d_model = o.d, num_experts = E, intermediate_size = 5, act = moe.nn.poly_norm() } end,
  unequal = function(o) return moe.experts.unequal { d_model = o.d, widths = { 4, 9, 4 }, bias = true } end,
  join = function(o)
    return moe.experts.join {
      moe.experts.mlp { d_model = o.d, num_experts = 1, intermediate_size = 5 },
      moe.experts.swiglu { d_model = o.d, num_experts = 2, intermediate_size = 3 },
    }
  end,
  film = function(o) return moe.experts.film { d_model = o.d, num_experts = E, intermediate_size = 5, spread = 0.5 } end,
  ia3 = function(o) return moe.experts.ia3 { d_model = o.d, num_experts = E } end,
  ternary = function(o) return moe.experts.ternary { d_model = o.d, num_experts = E, intermediate_size = 5 } end,
  low_bit = function(o)
    return moe.experts.low_bit { d_model = o.d, num_experts = E, intermediate_size = 5, bits = 4, activation_bits = 8 }
  end,
  map = function(o)
    local list = {}
    for e = 1, E do list[e] = moe.nn.sequential(moe.nn.linear(o.d, 4), moe.nn.tanh(), moe.nn.linear(4, o.d)) end
    return moe.experts.map(list)
  end,
  lora = function(o) return moe.experts.lora { d_model = o.d, num_experts = E, rank = 2, base = moe.nn.linear(o.d, o.d) } end,
  adapter = function(o)
    return moe.experts.adapter { d_model = o.d, num_experts = E, intermediate_size = 2, base = moe.nn.linear(o.d, o.d) }
  end,
}
-- Rounding makes steps: a neighbouring input may fall on another level.
local STEPS <const> = { ternary = true, low_bit = true }

local function make(name, d)
  local bank = BANKS[name] { d = d or D }
  for _, p in ipairs(bank:parameters()) do -- what starts at 0 (the second halves of adapters) takes part
    moe.no_grad(function() p:add_(moe.randn(p.shape) * 0.2) end)
  end
  return bank
end

local function choose(T)
  local w, i = moe.router_topk(moe.randn(T, E), { top_k = 2 })
  return moe.routing.topk(i, w, E)
end

local names = {}
for name in pairs(BANKS) do names[#names + 1] = name end
table.sort(names)

for _, name in ipairs(names) do
  describe("a bank of " .. name, function()
    it("comes back from a file as it was", function()
      moe.manual_seed(1)
      local bank, other = make(name), make(name)
      local x, routing = moe.randn(7, D), choose(7)
      local path = os.tmpname()
      assert(moe.io.save(path, bank:state_dict()))
      other:load_state_dict(assert(moe.io.load(path)))
      os.remove(path)
      assert.same(bank(x, routing):totable(), other(x, routing):totable())
    end)

    it("runs in f64 and in bf16", function()
      moe.manual_seed(2)
      local bank = make(name)
      local x, routing = moe.randn(7, D), choose(7)
      local y = bank(x, routing)
      bank:to "f64"
      local z = bank(x:to "f64", routing)
      assert.equal("f64", z.dtype)
      assert.close(z, y, { rtol = 1e-4, atol = 1e-5 })
      bank:to "bf16"
      local h = bank(x:to "bf16", routing)
      assert.equal("bf16", h.dtype)
      if not STEPS[name] then assert.close(y, h:to "f32", { rtol = 0.05, atol = 0.06 }) end
      h:to("f32"):square():sum():backward()
      for _, p in ipairs(bank:parameters()) do
        if p.grad then assert.equal("bf16", p.grad.dtype) end
      end
    end)

    it("keeps weights and their gradients in f32 under autocast", function()
      moe.manual_seed(3)
      local bank = make(name)
      local x, routing = moe.randn(7, D), choose(7)
      local y = bank(x, routing)
      local z = moe.autocast("bf16", bank, x, routing)
      if not STEPS[name] then assert.close(y, z:to "f32", { rtol = 0.05, atol = 0.06 }) end
      z:to("f32"):square():sum():backward()
      local moved = 0
      for _, p in ipairs(bank:parameters()) do
        assert.equal("f32", p.dtype)
        if p.grad then
          assert.equal("f32", p.grad.dtype)
          moved = moved + 1
        end
      end
      assert.is_true(moved > 0)
    end)

    it("gives the same in training and evaluation, and when it is computed again for the backward", function()
      moe.manual_seed(4)
      local bank = make(name)
      local x, routing = moe.randn(7, D):requires_grad_(), choose(7)
      local y = bank(x, routing)
      assert.same(y:totable(), bank:eval()(x, routing):totable())
      bank:train()
      local function gradients(out)
        bank:zero_grad()
        x.grad = nil
        out:square():sum():backward()
        local list = { x.grad:clone() }
        for _, p in ipairs(bank:parameters()) do list[#list + 1] = p.grad and p.grad:clone() or false end
        return list
      end
      local a = gradients(y)
      local again = moe.checkpoint(function(rows) return bank(rows, routing) end, x)
      assert.same(y:totable(), again:totable())
      local b = gradients(again)
      assert.equal(#a, #b)
      for i = 1, #a do
        assert.equal(not a[i], not b[i])
        if a[i] then assert.same(a[i]:reshape({ -1 }):totable(), b[i]:reshape({ -1 }):totable()) end
      end
    end)

    it("takes no token, and the slots of a soft routing", function()
      local bank = make(name)
      local none = moe.routing.topk(moe.zeros({ 0, 2 }, { dtype = "i64" }), moe.zeros(0, 2), E)
      assert.same({ 0, D }, bank(moe.zeros(0, D), none).shape)
      local idle = moe.routing.topk(moe.zeros({ 4, 2 }, { dtype = "i64" }), moe.zeros(4, 2), E)
      assert.same({ 4, D }, bank(moe.ones(4, D), idle).shape)
      local soft = moe.rand(2, 5, E, 2)
      local y = bank(moe.randn(10, D), moe.routing.soft(soft:softmax(2), soft))
      assert.same({ 10, D }, y.shape)
      assert.is_true(y:isfinite():all():item())
    end)
  end)
end

describe("a language model", function()
  it("gives banks its initial weights, and leaves vectors and coefficients as they start", function()
    local banks = {
      moe.experts.film { intermediate_size = 8 }, moe.experts.ia3(), moe.experts.mlp { intermediate_size = 8, act = "poly_norm" },
      moe.experts.unequal { widths = { 4, 4, 9 } },
    }
    local model = moe.model.lm {
      vocab_size = 5, d_model = 40, num_layers = 4, max_seq_len = 4, ffn = "moe", residual_scale = false,
      moe = function(i) return { num_experts = E, experts = banks[i] } end,
    }
    local bank = {}
    for i = 1, 4 do bank[i] = model.layers[i].ffn.experts end
    assert.close(moe.ones(E, 8), bank[1].gamma)
    assert.close(moe.zeros(E, 8), bank[1].beta)
    assert.close(moe.ones(E, 40), bank[2].vectors)
    assert.close({ 0, 1 / 3, 1 / 3, 1 / 3 }, bank[3].coefficients[2], { rtol = 1e-6 })
    for _, w in ipairs { bank[1].up_proj, bank[1].down_proj, bank[3].up_proj, bank[4].banks[2].down_proj } do
      assert.is_true(math.abs(w:std():item() - 0.02) < 0.004)
    end
  end)
end)
