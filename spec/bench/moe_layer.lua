-- One MoE layer (router, SwiGLU experts), forward and backward: `lua5.4 moe_layer.lua T D H E K`. Answers at the end with
-- the least times in ms of forward + backward and of forward alone, and the rate of the BLAS on a product of 1024 x 1024
-- matrices in the same run, in GFLOP/s.
local moe = require "moe"
local serve = require "spec.bench.serve"

local T, D, H, E, K = table.unpack(table.move(arg, 1, 5, 1, {}))
T, D, H, E, K = T // 1 | 0, D // 1 | 0, H // 1 | 0, E // 1 | 0, K // 1 | 0

moe.threads(tonumber(os.getenv "MOE_THREADS") or 2)
moe.manual_seed(1)
local layer = moe.layer {
  d_model = D, num_experts = E, router = moe.router.topk { top_k = K, norm_topk_prob = true },
  experts = moe.experts.swiglu { intermediate_size = H },
}
local x, g = moe.randn(T, D, { requires_grad = true }), moe.randn(T, D)
local a, b = moe.randn(1024, 1024), moe.randn(1024, 1024)
local both, forward, product = math.huge, math.huge, math.huge

local function least(old, f)
  local t = moe.clock()
  f()
  return math.min(old, moe.clock() - t)
end

serve.blocks(function()
  for _ = 1, 3 do product = least(product, function() local _ <close> = a:matmul(b) end) end
  forward = least(forward, function()
    moe.no_grad(function() moe.scope(function() layer(x) end) end)
  end)
  layer:zero_grad()
  x.grad = nil
  both = least(both, function()
    moe.scope(function() (layer(x)):backward(g) end)
  end)
end, function() return ("%.4f %.4f %.2f"):format(both * 1e3, forward * 1e3, 2 * 1024 ^ 3 / product / 1e9) end)
