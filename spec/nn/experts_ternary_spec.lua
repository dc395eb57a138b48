-- Banks whose weights are rounded to few levels.
local moe = require "moe"
local helper = require "spec.helper"

local function choose(T, E, k)
  local w, i = moe.router_topk(moe.randn(T, E), { top_k = k })
  return moe.routing.topk(i, w, E)
end

local function values(t)
  local seen, n = {}, 0
  for _, v in ipairs(t:reshape({ -1 }):totable()) do
    if not seen[v] then
      seen[v] = true
      n = n + 1
    end
  end
  return n
end

describe("moe.experts.ternary", function()
  it("is a bank of the rounded weights, three values an expert, with the gradient of those weights", function()
    moe.manual_seed(1)
    for _, gated in ipairs { true, false } do
      local bank = moe.experts.ternary { d_model = 6, num_experts = 3, intermediate_size = 8, gated = gated, bias = true }
      local plain = moe.experts[gated and "glu" or "mlp"] { d_model = 6, num_experts = 3, intermediate_size = 8, act = "silu", bias = true }
      local rounded = bank:state_dict()
      for name, t in pairs(rounded) do
        if #t.shape == 3 then
          rounded[name] = t:fake_quantize(1, "absmean", 2)
          for e = 1, 3 do assert.equal(3, values(rounded[name][e])) end
          local s = t[2]:abs():mean():item()
          assert.close({ -s, 0, s }, { rounded[name][2]:min():item(), 0, rounded[name][2]:max():item() }, { rtol = 1e-5 })
        end
      end
      plain:load_state_dict(rounded)
      local x, routing = moe.randn(12, 6), choose(12, 3, 2)
      local a, b = bank(x, routing), plain(x, routing)
      assert.close(b, a, { rtol = 1e-5, atol = 1e-6 })
      a:square():sum():backward()
      b:square():sum():backward()
      for name, p in bank:named_parameters() do
        assert.close(plain[name].grad, p.grad, { rtol = 1e-4, atol = 1e-5, name = name })
      end
    end
  end)

  it("learns a function that ternary weights can express, where rounding afterwards cannot", function()
    moe.manual_seed(5)
    local teacher = moe.experts.ternary { d_model = 6, intermediate_size = 16, act = "relu", gated = false }
    local x = moe.randn(256, 6)
    local target = teacher(x):detach()
    local function train(bank, steps)
      local opt = moe.optim.adamw(bank, { lr = 0.01, weight_decay = 0 })
      local loss
      for _ = 1, steps do
        opt:zero_grad()
        loss = (bank(x) - target):square():mean()
        loss:backward()
        opt:step()
      end
      return loss:item()
    end
    moe.manual_seed(6)
    local bank = moe.experts.ternary { d_model = 6, intermediate_size = 48, act = "relu", gated = false }
    local before = (bank(x) - target):square():mean():item()
    local after = train(bank, 250)
    local plain = moe.experts.mlp { d_model = 6, intermediate_size = 48, act = "relu" }
    train(plain, 250)
    local rounded = moe.experts.ternary { d_model = 6, intermediate_size = 48, act = "relu", gated = false }
    rounded:load_state_dict(plain:state_dict())
    local post = (rounded(x) - target):square():mean():item()
    assert.is_true(after < 0.3 * before, ("%g -> %g"):format(before, after))
    assert.is_true(after < post, ("%g, rounded afterwards %g"):format(after, post))
  end)
end)

describe("moe.experts.low_bit", function()
  it("comes to the plain bank as bits are added, and has 2^bits - 1 values", function()
    moe.manual_seed(2)
    local plain = moe.experts.swiglu { d_model = 8, num_experts = 2, intermediate_size = 24 }
    local x, routing = moe.randn(20, 8), choose(20, 2, 1)
    local wanted, last = plain(x, routing), math.huge
    for _, bits in ipairs { 2, 4, 6, 8, 12 } do
      local bank = moe.experts.low_bit { d_model = 8, num_experts = 2, intermediate_size = 24, bits = bits }
      bank:load_state_dict(plain:state_dict())
      assert.is_true(values(bank:rounded(bank.gate_up_proj)[1]) <= 2 ^ bits - 1)
      local err = (bank(x, routing) - wanted):abs():max():item()
      assert.is_true(err < last)
      last = err
    end
    assert.is_true(last < 1e-3)
  end)

  it("may scale every output by itself", function()
    local bank = moe.experts.low_bit { d_model = 4, intermediate_size = 3, bits = 3, per = "row" }
    local w = bank:rounded(bank.down_proj)
    for r = 1, 4 do assert.close(bank.down_proj[1][r]:abs():max(), w[1][r]:abs():max(), { rtol = 1e-6 }) end
  end)

  it("may round what enters each product, too", function()
    moe.manual_seed(3)
    local bank = moe.experts.low_bit { d_model = 8, num_experts = 2, intermediate_size = 6, bits = 8, activation_bits = 4, act = "gelu" }
    local x, routing = moe.randn(10, 8), choose(10, 2, 2)
    local rows = routing:gather(x:fake_quantize(7))
    local h = routing:linear(rows, bank.gate_up_proj:fake_quantize(127, "absmax", 2))
    h = (h:narrow(2, 1, 6):gelu() * h:narrow(2, 7, 6)):fake_quantize(7)
    assert.close(routing:combine(routing:linear(h, bank.down_proj:fake_quantize(127, "absmax", 2))), bank(x, routing),
      { rtol = 1e-5, atol = 1e-6 })
    bank(x, routing):sum():backward()
    assert.is_true(bank.gate_up_proj.grad:abs():sum():item() > 0)
  end)

  it("names what is wrong", function()
    local low = moe.experts.low_bit
    assert.matches("'bits' must lie in 2..16, got 1", helper.error_of(low, { intermediate_size = 4, bits = 1 }))
    assert.matches("'activation_bits' must lie in 2..16, got 99", helper.error_of(low, { intermediate_size = 4, activation_bits = 99 }))
    assert.matches("unknown option 'bits'", helper.error_of(moe.experts.ternary, { intermediate_size = 4, bits = 2 }))
    assert.matches("'per' must be one of expert, row", helper.error_of(low, { intermediate_size = 4, per = "column" }))
  end)
end)
