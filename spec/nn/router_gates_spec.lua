-- What the routers of a variable number of experts have in common, and expert choice and cosine with them.
local moe = require "moe"

local ROUTERS <const> = {
  cosine = { top_k = 2, proj_dim = 4 }, expert_choice = { top_k = 2 }, relu = {}, top_p = { p = 0.6 },
  threshold = { quantile = 0.6, over = "batch" }, dense_to_sparse = { temperature = 0.5 },
}

local function layer_of(name, o)
  moe.manual_seed(5)
  local options = {}
  for k, v in pairs(ROUTERS[name]) do options[k] = v end
  for k, v in pairs(o and o.router or {}) do options[k] = v end
  return moe.layer {
    d_model = 6, num_experts = o and o.num_experts or 5, router = moe.router[name](options), dtype = o and o.dtype,
    experts = moe.experts.swiglu { intermediate_size = 4 }, capacity_factor = o and o.capacity_factor,
  }
end

for name in pairs(ROUTERS) do
  describe("moe.router." .. name .. " in a layer", function()
    it("takes any shape, no tokens, and another type of numbers", function()
      local layer = layer_of(name)
      for _, shape in ipairs { { 3, 4, 6 }, { 7, 6 }, { 0, 6 }, { 2, 0, 6 } } do
        local x = moe.randn(shape, { requires_grad = true })
        local y = layer(x)
        assert.same(shape, y:size())
        y:sum():backward()
        assert.same(shape, x.grad:size())
      end
      local y, routing = layer_of(name, { dtype = "bf16" })(moe.randn({ 4, 6 }, { dtype = "bf16" }))
      assert.equal("bf16", y.dtype)
      assert.equal("f32", routing.probs.dtype)
    end)

    it("has probabilities that sum to 1, or are 0 for a token without experts", function()
      local _, routing = layer_of(name)(moe.randn(9, 6))
      for _, v in ipairs(routing.probs:sum(-1):totable()) do assert.is_true(v == 0 or math.abs(v - 1) < 1e-5) end
      assert.same({ 9, 5 }, routing.logits:size())
      assert.is_true(routing:token_entropy() >= 0)
    end)

    it("decides the same again when it is recomputed", function()
      local layer = layer_of(name)
      local x = moe.randn({ 8, 6 }, { requires_grad = true })
      moe.manual_seed(9)
      layer(x):sum():backward()
      local wanted = x.grad:clone()
      x.grad = nil
      moe.manual_seed(9)
      moe.checkpoint(function(z) return (layer(z)) end, x):sum():backward()
      assert.close(wanted, x.grad)
    end)

    it("obeys a capacity, a balance loss, and its state dict", function()
      local layer = layer_of(name, { capacity_factor = 0.5 })
      local _, routing = layer(moe.randn(20, 6))
      assert.is_true(routing.num_assignments > 0 and routing.dropped > 0)
      assert.is_true(moe.loss.switch(1)(routing, {}):item() > 0)
      local again = layer_of(name, { capacity_factor = 0.5 })
      for _, p in ipairs(again:parameters()) do p:detach():fill_(0) end
      again:load_state_dict(layer:state_dict())
      local x = moe.randn(5, 6)
      assert.same(layer:eval()(x):totable(), again:eval()(x):totable())
      assert.matches(name, tostring(layer))
    end)

    if name ~= "relu" and name ~= "cosine" then
      it("is the dense network where there is one expert", function()
        local layer = layer_of(name, { num_experts = 1, router = ROUTERS[name].top_k and { top_k = 1 } })
        local x = moe.randn(4, 6)
        assert.same(layer.experts(x):totable(), (layer(x)):totable())
      end)
    end
  end)
end
