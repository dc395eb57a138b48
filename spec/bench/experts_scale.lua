-- What an expert layer costs as the number of experts grows: spec/bench/run.sh experts_scale
--
-- Two questions, forward + backward of a SwiGLU bank over an even routing, two threads, minima of many repeats taken in turns.
-- 1. The same assignments over 8, 64 and 512 experts of one size, beside the roofline: the larger of operations over
--    the sgemm rate and bytes (each touched weight and its gradient once) over the copy bandwidth, both measured here.
-- 2. Eight experts split into 512 of a 64th of the width, k raised 64-fold: the same operations, 64 times the assignments.
local moe = require "moe"

local T, D = 2048, 512
local repeats = tonumber(os.getenv "MOE_BENCH_REPEATS") or 7

local function timed(f)
  local t = moe.clock()
  f()
  return moe.clock() - t
end

-- Rates of the machine: a product of the size that experts have (rows 2048), and a copy of 256 MB.
local a, b = moe.randn(2048, D), moe.randn(1024, D)
local function product() moe.no_grad(function() for _ = 1, 8 do a:linear(b) end end) end
local big = moe.zeros(32 << 20)
local function copy() big:clone() end

local function case(E, k, hidden)
  local bank = moe.experts.swiglu { d_model = D, num_experts = E, intermediate_size = hidden }
  local x = moe.randn(T, D, { requires_grad = true })
  local index = moe.router.uniform_choice(T, k, E)
  local weight = (moe.ones(T, k) / k):detach()
  weight.requires_grad = true
  local g = moe.randn(T, D)
  local routing = moe.routing.topk(index, weight, E)
  local function step()
    local y = bank(x, routing)
    y:backward(g)
    for _, p in ipairs { x, weight, bank.gate_up_proj, bank.down_proj } do p.grad = nil end
  end
  local flop = 3 * 2 * T * k * 3 * D * hidden
  local bytes = 2 * 4 * math.min(E, T * k) * 3 * D * hidden
  local self = { flop = flop, bytes = bytes, E = E, k = k, hidden = hidden, best = math.huge, forward = math.huge }
  function self.run()
    self.best = math.min(self.best, timed(step))
    self.forward = math.min(self.forward, timed(function() moe.no_grad(function() bank(x, routing) end) end))
  end
  return self
end

local rate, bandwidth = 0, 0
local function rates()
  rate = math.max(rate, 8 * 2 * 2048 * D * 1024 / timed(product))
  bandwidth = math.max(bandwidth, 2 * 4 * (32 << 20) / timed(copy))
end

local function measure(cases)
  for _ = 1, repeats do
    rates()
    for _, c in ipairs(cases) do c.run() end
    collectgarbage()
  end
  for _, c in ipairs(cases) do
    local roof = math.max(c.flop / rate, c.bytes / bandwidth)
    print(("%4d experts, %3d a token, hidden %3d: forward + backward %7.1f ms (forward %6.1f), roofline %6.1f ms (%s): %3.0f %%"):format(
      c.E, c.k, c.hidden, c.best * 1e3, c.forward * 1e3, roof * 1e3,
      c.flop / rate > c.bytes / bandwidth and "operations" or "bytes", 100 * roof / c.best))
  end
  return cases
end

print(("threads %d, %s"):format(moe.threads(), moe.build.simd))
print "the same assignments over more experts:"
measure { case(8, 8, 512), case(64, 8, 512), case(512, 8, 512) }
print "the same operations over more and narrower experts:"
local c = measure { case(8, 1, 512), case(64, 8, 64), case(512, 64, 8) }
print(("64 times the assignments cost %.2f times as much"):format(c[3].best / c[1].best))
print(("sgemm %.1f GFLOP/s, copy %.1f GB/s"):format(rate / 1e9, bandwidth / 1e9))
