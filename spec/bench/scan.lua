-- The selective scan: spec/bench/run.sh scan
--
-- (batch, length, channels, states) = (4, 512, 512, 16), f32: forward, and forward + backward, beside the machine's limit. Per state and
-- position the forward takes one exponential and 3 multiply-adds, the backward the exponential again and 11 more operations; both
-- are bound by arithmetic: 32 bytes a channel and position pass through memory against 16 x 20 operations. The exponential's rate
-- is that of `exp` over a cached tensor, measured here. Then the cost against the length.
local moe = require "moe"

local function timed(f)
  local t = moe.clock()
  f()
  return moe.clock() - t
end

local function inputs(batch, length, channels, states)
  local o = { requires_grad = true }
  local A = (-moe.arange(1, states):to "f32":expand { channels, states }):contiguous()
  A.requires_grad = true
  return {
    moe.randn({ batch, length, channels }, o), moe.randn({ batch, length, channels }, o), A, moe.randn({ batch, length, states }, o),
    moe.randn({ batch, length, states }, o), { D = moe.ones({ channels }, o), z = moe.randn({ batch, length, channels }, o),
      delta_bias = moe.zeros({ channels }, o), delta_softplus = true },
  }
end

local function scan(a) return (moe.selective_scan(a[1], a[2], a[3], a[4], a[5], a[6])) end
local function step(a, g)
  scan(a):backward(g)
  for _, v in ipairs { a[1], a[2], a[3], a[4], a[5], a[6].D, a[6].z, a[6].delta_bias } do v.grad = nil end
end

local repeats = tonumber(os.getenv "MOE_BENCH_REPEATS") or 15
local B, L, D, N = 4, 512, 512, 16
local a, g, small = inputs(B, L, D, N), moe.randn(B, L, D), moe.randn(1 << 17)
local forward, both, exp = math.huge, math.huge, math.huge
for _ = 1, repeats do
  forward = math.min(forward, timed(function() moe.no_grad(function() scan(a) end) end))
  both = math.min(both, timed(function() step(a, g) end))
  exp = math.min(exp, timed(function()
    for _ = 1, 16 do small:exp() end
  end) / 16 / (1 << 17))
end
local count = B * L * D * N
print(("threads %d, %s"):format(moe.threads(), moe.build.simd))
print(("(%d, %d, %d, %d): forward %.2f ms (%.2f ns a state on all threads), forward + backward %.2f ms"):format(B, L, D, N, forward * 1e3,
  forward / count * 1e9, both * 1e3))
print(("exponentials alone at the rate of exp over a cached tensor: %.2f ms forward, %.2f ms forward + backward"):format(exp * count * 1e3,
  2 * exp * count * 1e3))

print "cost against the length, 1 sequence of 512 channels, forward + backward:"
local first
for _, length in ipairs { 512, 2048, 8192, 32768, 131072 } do
  local x = inputs(1, length, D, N)
  local grad = moe.randn(1, length, D)
  moe.reset_peak_memory()
  local before, best = moe.memory().live, math.huge
  for _ = 1, length > 10000 and 2 or 5 do best = math.min(best, timed(function() step(x, grad) end)) end
  first = first or best / length
  local peak = moe.memory().peak - before
  print(("%7d positions: %8.1f ms, %5.2f times the cost of a position at 512; peak %7.1f MB beyond the inputs, %.0f bytes each"):format(
    length, best * 1e3, best / length / first, peak / 1e6, peak / length))
end
