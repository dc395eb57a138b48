-- Linear recurrences at (batch 2, length 4096, heads 8, head width 64, state 64), forward + backward, as a share of the rate of a
-- large matrix product (sgemm) measured by turns in the same run, and beside our own causal attention at growing lengths:
-- `lua5.4 spec/bench/recurrence.lua [rounds [longest attention]]`. Least times of all rounds. With MOE_THREADS=1 times are processor
-- times, which other work on the machine disturbs less.
--
-- The share counts the matrix products of the chunked forms as they are done, chunks of 64 rows: C rows times dk or dv for every
-- pair of rows of a chunk (squares whole, though half of each is masked), dk dv for what meets the state; everything else
-- (decays, masks, sums, copies) counts as nothing. Attention's are counted alike, half of the square of the length.
local moe = require "moe"

local ROUNDS, LONGEST = tonumber(arg[1]) or 5, tonumber(arg[2]) or 4096
local B, T, H, D, C = 2, 4096, 8, 64, 64
local threads = tonumber(os.getenv "MOE_THREADS") or 2
moe.threads(threads)
moe.manual_seed(1)
local clock = threads == 1 and os.clock or moe.clock

-- Products of a row of a head: pairs of rows [C] with k's width, with v's, and products with the state.
local PLAIN <const> = { forward = { 1, 1, 2 }, backward = { 3, 2, 4 } }
local DELTA <const> = { forward = { 2, 1.5, 3 }, backward = { 6, 4, 7 } }
local LOW_RANK <const> = { forward = { 4, 3.5, 4 }, backward = { 12, 9, 9 } }

local function flops(count, t)
  return 2 * (count[1] * C * D + count[2] * C * D + count[3] * D * D) * B * t * H
end

-- A decay so that a state is forgotten over tens to thousands of steps, as trained models have it.
local function decay(...) return (moe.rand(...) * -6 - 1):exp() * -1 end

local function inputs(t)
  local k = moe.randn(B, t, H, D)
  return { q = moe.randn(B, t, H, D), k = k / (k * k):sum(-1, true):sqrt(), v = moe.randn(B, t, H, D), head = decay(B, t, H),
    wide = decay(B, t, H, D), beta = moe.rand(B, t, H) }
end

local FORMS <const> = {
  { "linear attention", PLAIN, function() return {} end },
  { "ssd (Mamba-2), retention", PLAIN, function(x) return { decay = x.head, beta = x.beta } end },
  { "gated linear attention", PLAIN, function(x) return { decay = x.wide } end },
  { "delta rule", DELTA, function(x) return { beta = x.beta, delta = true } end },
  { "gated delta rule", DELTA, function(x) return { decay = x.head, beta = x.beta, delta = true } end },
  { "Kimi delta attention", DELTA, function(x) return { decay = x.wide, beta = x.beta, delta = true } end },
  { "RWKV-7", LOW_RANK, function(x) return { decay = x.wide, a = x.k * -1, b = x.k * 0.5 } end },
}

local function leaf(x)
  x = x:detach()
  x.requires_grad = true
  return x
end

local function keep(least, forward, whole)
  least.forward, least.whole = math.min(least.forward or 1e9, forward), math.min(least.whole or 1e9, whole)
end

-- forward and whole time of f(leaves..), the gradient given
local function measure(least, f, x, options, g)
  local o = { chunk_size = C }
  for name, v in pairs(options) do o[name] = moe.is_tensor(v) and leaf(v) or v end
  local q, k, v = leaf(x.q), leaf(x.k), leaf(x.v)
  local start = clock()
  local y = f(q, k, v, o)
  local middle = clock()
  y:backward(g)
  keep(least, middle - start, clock() - start)
end

local function attend(q, k, v)
  return (moe.attention(q:transpose(2, 3), k:transpose(2, 3), v:transpose(2, 3), { causal = true }):transpose(2, 3))
end

local rate = 0
local function sgemm()
  local a, b = moe.randn(768, 768), moe.randn(768, 768)
  for _ = 1, 3 do
    local start = clock()
    moe.matmul(a, b)
    rate = math.max(rate, 2 * 768 ^ 3 / (clock() - start))
  end
end

local least = {}
for i = 1, #FORMS do least[i] = {} end
local x, g = inputs(T), moe.randn(B, T, H, D)
for _ = 1, ROUNDS do
  for i, form in ipairs(FORMS) do
    sgemm()
    moe.scope(measure, least[i], moe.linear_attention, x, form[3](x), g)
  end
end
print(("sgemm: %.1f GFLOP/s, %d thread%s; batch %d, length %d, heads %d, widths %d and %d, chunks of %d"):format(rate / 1e9, threads,
  threads == 1 and "" or "s", B, T, H, D, D, C))
print(("%-26s %12s %12s %22s"):format("form", "forward ms", "+ backward", "share of sgemm, both"))
for i, form in ipairs(FORMS) do
  local forward, backward = flops(form[2].forward, T), flops(form[2].backward, T)
  print(("%-26s %12.1f %12.1f %10.0f %% %8.0f %%"):format(form[1], least[i].forward * 1e3, least[i].whole * 1e3,
    100 * forward / least[i].forward / rate, 100 * (forward + backward) / least[i].whole / rate))
end

print(("\n%8s %14s %14s %14s %14s %14s"):format("length", "ssd ms", "gated delta ms", "attention ms", "attention/ssd", "ssd peak MB"))
local t = 512
while t <= LONGEST do
  local short, ssd, delta, attention = inputs(t), {}, {}, {}
  local gs = moe.randn(B, t, H, D)
  for _ = 1, math.max(2, ROUNDS // 2) do
    local before = moe.memory().live
    moe.reset_peak_memory()
    moe.scope(measure, ssd, moe.linear_attention, short, FORMS[2][3](short), gs)
    ssd.peak = moe.memory().peak - before
    moe.scope(measure, delta, moe.linear_attention, short, FORMS[5][3](short), gs)
    moe.scope(measure, attention, attend, short, {}, gs)
  end
  print(("%8d %14.1f %14.1f %14.1f %14.2f %14.1f"):format(t, ssd.whole * 1e3, delta.whole * 1e3, attention.whole * 1e3,
    attention.whole / ssd.whole, ssd.peak / 2 ^ 20))
  t = t * 2
end
