-- Drawing a token from logits.

local moe = require "moe"

local M = {}

--- Generators of their own, independent of moe.manual_seed: a number in [0, 1), from `own` or, without one, from the state's.
function M.uniform(own)
  if not own then return moe.rand(1):item() end
  local seed, offset = moe.rng_state()
  moe.set_rng_state(own.seed, own.offset)
  local u = moe.rand(1):item()
  own.seed, own.offset = moe.rng_state()
  moe.set_rng_state(seed, offset)
  return u
end

--- logits of tokens that were seen (a bool tensor) moved down: l / penalty where l > 0, else l * penalty.
function M.penalise(logits, seen, penalty)
  return moe.where(seen, moe.where(logits:gt(0), logits / penalty, logits * penalty), logits)
end

--- logits [vocab_size] -> a token. In this order: temperature, the top_k, the fewest that hold top_p of what is left, those
-- of at least min_p times the highest probability.
function M.choose(logits, o, own)
  if o.temperature == 0 then return logits:argmax():item() end
  logits = logits:cast("f32") / o.temperature
  local tokens
  if o.top_k or o.top_p or o.min_p then
    local n = logits.shape[1]
    logits, tokens = logits:topk(math.min(o.top_k or n, n))
  end
  local p = logits:softmax(-1):totable()
  local count, mass = #p, 1.0
  if o.top_p or o.min_p then -- p falls
    local least = p[1] * (o.min_p or 0)
    mass, count = 0.0, 0
    repeat
      count = count + 1
      mass = mass + p[count]
    until mass >= (o.top_p or math.huge) or count == #p or p[count + 1] < least
  end
  local left, pick = M.uniform(own) * mass, 1
  for i = 1, count do
    if p[i] > 0 then pick = i end -- rounding never lets the last, impossible one through
    left = left - p[i]
    if left < 0 then break end
  end
  return tokens and tokens[pick] or pick
end

return M
