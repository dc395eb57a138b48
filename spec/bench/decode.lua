-- Decoding: the time of a token and the bytes of the state at position 100 and at position 100,000, for every recurrent mixer and for
-- attention (whose cache grows): `lua5.4 spec/bench/decode.lua [d_model far tokens rounds]`. Both positions take turns; the least time
-- of all rounds. With MOE_THREADS=1 times are processor times, which other work on the machine disturbs less.
local moe = require "moe"

local D, FAR, TOKENS, ROUNDS = 256, 100000, 20, 150
for i, v in ipairs(arg) do
  v = math.tointeger(tonumber(v))
  if i == 1 then D = v elseif i == 2 then FAR = v elseif i == 3 then TOKENS = v else ROUNDS = v end
end
local threads = tonumber(os.getenv "MOE_THREADS") or 2
moe.threads(threads)
moe.manual_seed(1)
local clock = threads == 1 and os.clock or moe.clock

local PIECE <const> = 2000

-- The state after n tokens, read in pieces.
local function state_at(mixer, n)
  local state = mixer:state(1)
  for at = 1, n, PIECE do
    local _
    _, state = mixer(moe.randn(1, math.min(PIECE, n - at + 1), D), state)
  end
  return state
end

local function bytes(state)
  local sum = 0
  for _, t in pairs(state) do
    if moe.is_tensor(t) then sum = sum + 4 * t:numel() end
  end
  return sum
end

local function decode(mixer, state, x)
  local start = clock()
  for _ = 1, TOKENS do
    local _
    _, state = mixer(x, state)
  end
  return (clock() - start) / TOKENS
end

local names = { "mamba", "mamba2", "retention", "gla", "delta", "gated_delta", "kda", "lightning", "based", "rwkv7", "attention" }
print(("%-12s %14s %14s %8s %14s %14s"):format("mixer", "us at 100", "us at " .. FAR, "ratio", "bytes at 100", "bytes at " .. FAR))
for _, name in ipairs(names) do
  moe.no_grad(moe.scope, function()
    local o = { d_model = D, num_heads = D // 64 }
    if name == "mamba" or name == "mamba2" then o.num_heads = nil end
    local mixer = moe.mixer[name](o)
    local near, far = state_at(mixer, 100), state_at(mixer, name == "attention" and FAR // 20 or FAR)
    local x, a, b = moe.randn(1, 1, D), math.huge, math.huge
    for _ = 1, ROUNDS do
      a = math.min(a, moe.scope(decode, mixer, near, x))
      b = math.min(b, moe.scope(decode, mixer, far, x))
    end
    print(("%-12s %14.1f %14.1f %8.3f %14d %14d"):format(name, a * 1e6, b * 1e6, b / a, bytes(near), bytes(far)))
  end)
end
print(("attention stands at %d instead"):format(FAR // 20))
