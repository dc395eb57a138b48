-- What a router or its input can do wrong, and that the layer is whole afterwards.
local helper = require "spec.helper"
local moe = require "moe"

local E, d = 4, 6

describe("moe.layer with a fault", function()
  local function layer_of(router)
    return moe.layer { d_model = d, num_experts = E, router = router, experts = moe.experts.swiglu { intermediate_size = 5 },
      balance = { moe.loss.switch(0.01) } }
  end
  -- A router of one's own around the usual one, that does something else once.
  local function once(fault)
    local usual = moe.router.topk { d_model = d, num_experts = E, top_k = 2 }
    return { usual = usual, route = function(self, x, ctx)
      local f = fault
      fault = nil
      if f then return f(self.usual, x, ctx) end
      return self.usual:route(x, ctx)
    end }
  end
  local function index_of(rows) return moe.tensor(rows, { dtype = "i64" }) end

  local faults = {
    { "an expert out of range", function(_, x)
      return moe.routing.topk(index_of { { 1, 5 }, { 1, 2 }, { 3, 4 } }, nil, E), x
    end, "index %[1, 2%] is 5; wanted 1 to 4, or 0 for none" },
    { "NaN logits", function(usual, x, ctx) return usual:route(x * (0 / 0), ctx) end, "the logit of token 1 for expert 1 is NaN" },
    { "all experts masked for a token", function(usual, x)
      local mask = moe.ones(3, E):gt(0)
      mask[2] = false
      return usual:route(x, { expert_mask = mask })
    end, "token 2 may choose among 0 of 4 experts" },
    { "k above the number of allowed experts", function(usual, x)
      return usual:route(x, { expert_mask = moe.tensor({ 0, 0, 1, 0 }):gt(0) })
    end, "token 1 may choose among 1 of 4 experts %(the others are masked%), wanted 2" },
    { "a wrong expert mask", function(usual, x) return usual:route(x, { expert_mask = moe.ones(3) }) end,
      "expert_mask must be a bool tensor %[4%] or %[3, 4%], got f32 %[3%]" },
    { "the wrong thing", function() return { 1, 2, 3 } end, "must return a routing %(.*%), got a table" },
    { "nothing", function() end, "must return a routing %(.*%), got a nil" },
    { "a routing over other experts", function() return moe.routing.topk(index_of { { 1 }, { 2 }, { 3 } }, nil, 3) end,
      "returned 3 tokens and 3 experts, wanted 3 and 4" },
    { "an error of its own", function() error "no such rule" end, "no such rule" },
  }
  for _, case in ipairs(faults) do
    it("names itself and the router for " .. case[1] .. ", and works on", function()
      moe.manual_seed(3)
      local layer = layer_of(once(case[2]))
      local x = moe.randn(3, d)
      local message = helper.error_of(function() return layer(x, { layer_number = 7 }) end)
      assert.matches("^layer 7: the router %(of one's own%)", message)
      assert.matches(case[3], message)
      local y, routing = layer(x, { layer_number = 7 })
      assert.equal(6, routing.num_assignments)
      local loss = y:sum() + routing:aux()
      loss:backward()
      assert.is_true(layer.experts.down_proj.grad:abs():sum():item() > 0)
      assert.equal(1, layer:stats().forwards) -- the failed call counted nowhere
    end)
  end

  it("names a router of the library by its kind", function()
    local layer = layer_of(moe.router.topk { top_k = 2 })
    assert.matches("^layer: the router %(topk%): .*router_topk: the logit of token 2 for expert 1 is NaN", helper.error_of(function()
      return layer(moe.tensor { { 1, 1, 1, 1, 1, 1 }, { 0 / 0, 1, 1, 1, 1, 1 } })
    end))
  end)

  it("passes on errors that are no strings", function()
    local mark = {}
    local layer = layer_of(function() error(mark) end)
    local ok, err = pcall(layer, moe.ones(1, d))
    assert.is_false(ok)
    assert.equal(mark, err)
  end)

  it("takes weights as they are, whatever their sum", function()
    moe.manual_seed(5)
    local weight = moe.tensor { { 3, -1 }, { 0.5, 0 } }
    local probs = moe.ones(2, E) / E
    local layer = layer_of(function() return moe.routing.topk(index_of { { 1, 2 }, { 4, 3 } }, weight, E, { probs = probs }) end)
    local x = moe.randn(2, d)
    local y = layer(x)
    local function expert(e, row)
      local bank = layer.experts
      local h = bank.gate_up_proj[e]:matmul(row)
      return bank.down_proj[e]:matmul(h[{ { 1, 5 } }]:silu() * h[{ { 6, 10 } }])
    end
    assert.close(expert(1, x[1]) * 3 - expert(2, x[1]), y[1], { rtol = 1e-4, atol = 1e-6 })
    assert.close(expert(4, x[2]) * 0.5, y[2], { rtol = 1e-4, atol = 1e-6 })
  end)

  it("gives no rows for no tokens, and the dense network for one expert", function()
    local layer = layer_of(moe.router.topk { top_k = 2 })
    local y, routing = layer(moe.zeros(0, d))
    assert.same({ 0, d }, y.shape)
    assert.equal(0, routing.num_assignments)
    assert.equal(0, routing:aux():item())
    local bank = moe.experts.swiglu { intermediate_size = 5 }
    local one = moe.layer { d_model = d, num_experts = 1, router = moe.router.topk { top_k = 1 }, experts = bank }
    local x = moe.randn(7, d)
    assert.same(one.experts(x):totable(), one(x):totable())
  end)
end)
