-- Causal attention of heads split out of one projection: `lua5.4 attention.lua BATCH TIME WIDTH HEADS`. Answers at the end with
-- the least times in ms of forward + backward and of forward alone (wall, then processor time over all threads), and the
-- rate of the BLAS on a product of 1024 x 1024 matrices in the same run, in GFLOP/s.
-- `lua5.4 attention.lua memory`: peak bytes by length, forward and backward, above the inputs.
local moe = require "moe"
local serve = require "spec.bench.serve"

moe.threads(tonumber(os.getenv "MOE_THREADS") or 2)
moe.manual_seed(1)

local function heads(B, T, W, H)
  local x = moe.randn(B, T, 3, H, W // H)
  local q, k, v = x:select(3, 1):transpose(2, 3), x:select(3, 2):transpose(2, 3), x:select(3, 3):transpose(2, 3)
  for _, t in ipairs { q, k, v } do t.requires_grad = true end
  return { q, k, v }, moe.randn(B, T, H, W // H):transpose(2, 3)
end

if arg[1] == "memory" then
  for _, T in ipairs { 512, 2048, 8192, 32768 } do
    local qkv, g = heads(1, T, 64, 1)
    moe.empty_cache()
    moe.reset_peak_memory()
    local before = moe.memory().live
    moe.scope(function()
      moe.grad({ moe.attention(qkv[1], qkv[2], qkv[3], { causal = true, window = 1024 }) }, qkv, { grad_outputs = { g } })
    end)
    local peak = moe.memory().peak - before
    print(("  length %6d: %8.2f MB, %.0f bytes a position"):format(T, peak / 1e6, peak / T))
  end
  return
end

local B, T, W, H = table.unpack(table.move(arg, 1, 4, 1, {}))
local qkv, g = heads(B // 1 | 0, T // 1 | 0, W // 1 | 0, H // 1 | 0)
local a, b = moe.randn(1024, 1024), moe.randn(1024, 1024)
local both, forward, product = { math.huge, math.huge }, { math.huge, math.huge }, { math.huge, math.huge }

local function least(old, f)
  local t, cpu = moe.clock(), os.clock()
  f()
  old[1], old[2] = math.min(old[1], moe.clock() - t), math.min(old[2], os.clock() - cpu)
end

local function attention() return moe.attention(qkv[1], qkv[2], qkv[3], { causal = true }) end

serve.blocks(function()
  least(product, function() local _ <close> = a:matmul(b) end)
  for _ = 1, 4 do
    least(forward, function()
      moe.no_grad(function() local _ <close> = attention() end)
    end)
    least(both, function()
      moe.scope(function() moe.grad({ attention() }, qkv, { grad_outputs = { g } }) end)
    end)
  end
end, function()
  return ("%.4f %.4f %.4f %.4f %.2f"):format(both[1] * 1e3, forward[1] * 1e3, both[2] * 1e3, forward[2] * 1e3,
    2 * 1024 ^ 3 / product[1] / 1e9)
end)
