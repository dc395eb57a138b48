-- Run by host.c in a state of its own: trains a small mixture of experts on f(x) = sin(2 pi x), and returns a function
-- that the host calls from C.
local moe = require "moe"

moe.manual_seed(...)
local inner = moe.nn.linear(1, 16)
local experts = moe.layer {
  d_model = 16, num_experts = 4, router = moe.router.topk { top_k = 2, norm_topk_prob = true },
  experts = moe.experts.swiglu { intermediate_size = 16 },
}
local outer = moe.nn.linear(16, 1)
local optimizer = moe.optim.adamw(moe.nn.list { inner, experts, outer }, { lr = 1e-2 })

local function model(x)
  local y = experts(inner(x)) -- the routing, its second result, is of no use here
  return outer(y)
end

for _ = 1, 400 do
  local x = moe.rand(64, 1)
  local loss = moe.mse(model(x), (x * (2 * math.pi)):sin())
  optimizer:zero_grad()
  loss:backward()
  optimizer:step()
end

return function(number)
  return moe.no_grad(function() return model(moe.tensor { { number } }):item() end)
end
