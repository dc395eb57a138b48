local moe = require "moe"
local polycom = moe.recipe.polycom

describe("recipe polycom", function()
  it("has activations whose gradients, those of the coefficients included, are what differences show", function()
    moe.manual_seed(1)
    local x, a = moe.randn(3, 6, { dtype = "f64" }), moe.randn({ 4 }, { dtype = "f64" })
    assert.is_true(moe.gradcheck(function(...) return moe.poly_relu(...) end, { x, a }))
    assert.is_true(moe.gradcheck(function(...) return moe.poly_norm(...) end, { x, a }))
  end)

  it("is ReLU for a = (0, 1, 0, 0)", function()
    local x = moe.randn(4, 9)
    assert.same(x:relu():totable(), x:poly_relu(moe.tensor { 0.0, 1, 0, 0 }):totable())
  end)

  it("differs from the default layer in the activation alone, at the same number of parameters", function()
    local o = { d_model = 12, num_experts = 4, top_k = 2, intermediate_size = 24 }
    local own, gelu, swiglu = polycom.layer(o), polycom.with "gelu"(o), polycom.with "swiglu"(o)
    assert.equal(gelu:num_parameters() + 4 * 4, own:num_parameters()) -- four coefficients an expert
    assert.equal(gelu:num_parameters(), swiglu:num_parameters())
    local x = moe.randn(2, 5, 12)
    own(x):square():sum():backward()
    assert.is_true(own.experts.coefficients.grad:abs():sum():item() > 0)
    -- one expert's own network, by its formula
    local e, h = 3, x:reshape({ 10, 12 }):matmul(own.experts.up_proj[3]:t())
    local y, a, p = 0, own.experts.coefficients[e], 1
    for i = 1, 3 do
      p = p * h
      y = y + p / (p:square():mean(-1, true) + 1e-6):sqrt() * a:narrow(1, i + 1, 1)
    end
    local routing = moe.routing.topk(moe.full({ 10, 1 }, e, { dtype = "i64" }), nil, 4)
    assert.close(y:matmul(own.experts.down_proj[e]:t()), own.experts(x:reshape { 10, 12 }, routing), { rtol = 1e-4, atol = 1e-5 })
  end)

  it("fits smooth functions of one and two variables with half the units of ReLU, and less error", function()
    local functions = {
      { 1, function(x) return (x * 3):sin() end },
      { 1, function(x) return (x:square() * -8):exp() end },
      { 2, function(x) return (x:narrow(2, 1, 1) * 3):sin() * (x:narrow(2, 2, 1) * 2):cos() end },
    }
    for _, f in ipairs(functions) do
      local function error_of(act, units)
        local sum = 0
        for seed = 1, 3 do
          sum = sum + polycom.fit { d = f[1], f = f[2], act = act, units = units, steps = 600, seed = seed }
        end
        return sum / 3
      end
      local relu, norm = error_of("relu", 8), error_of("poly_norm", 4)
      assert.is_true(norm < 0.8 * relu, ("PolyNorm, 4 units: %g, ReLU, 8: %g"):format(norm, relu))
    end
  end)

  it("learns a text as well as GELU does, or better", function()
    local function loss(act)
      local sum = 0
      for seed = 1, 2 do sum = sum + polycom.train({ act = act, seed = seed }).val_loss end
      return sum / 2
    end
    local gelu, norm = loss "gelu", loss "poly_norm"
    assert.is_true(norm < 1.01 * gelu, ("PolyNorm %g, GELU %g"):format(norm, gelu)) -- found: 0.7 % lower
  end)
end)
