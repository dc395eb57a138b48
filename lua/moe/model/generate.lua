-- Sampling from a language model, one token at a time.

local moe = require "moe"
local options = require "moe.nn.options"

local ROWS = {
  max_new_tokens = { "integer" },       -- absent: until stopped
  temperature = { "number", 1.0 },      -- 0: the most probable token, always
  top_k = { "integer" },                -- only the k most probable
  top_p = { "number" },                 -- only the fewest whose probabilities reach p
  seed = { "integer" },                 -- draws of its own, independent of moe.manual_seed
  stop = { "integer|table|function" },  -- a token, a list of tokens, or function(token) -> boolean; it is not yielded
  ctx = { "table" },                    -- handed to the model
}

local function check(o)
  local function range(name, ok, wanted)
    if o[name] ~= nil and not ok(o[name]) then
      error(("generate: %s must be %s, got %s"):format(name, wanted, tostring(o[name])), 4)
    end
  end
  range("max_new_tokens", function(v) return v >= 0 end, "a count")
  range("temperature", function(v) return v >= 0 and v < math.huge end, "0 or a positive number")
  range("top_k", function(v) return v >= 1 end, "at least 1")
  range("top_p", function(v) return v > 0 and v <= 1 end, "in (0, 1]")
end

-- The prompt as a list of numbers: a list, or an index tensor [time] or [1, time].
local function prompt_of(ids)
  if type(ids) == "table" then
    local out = {}
    for i, id in ipairs(ids) do
      if math.type(id) ~= "integer" then error(("generate: ids[%d] must be an integer, got %s"):format(i, tostring(id)), 4) end
      out[i] = id
    end
    ids = out
  elseif moe.is_tensor(ids) then
    local shape = ids.shape
    if #shape == 2 and shape[1] == 1 then ids = ids:select(1, 1) end
    if #ids.shape ~= 1 then
      error(("generate: ids must be one sequence [time], got [%s]"):format(table.concat(shape, ", ")), 4)
    end
    ids = ids:totable()
  else
    error("generate: argument 1 must be a list or a tensor of token ids, got a " .. type(ids), 4)
  end
  if #ids == 0 then error("generate: the prompt must hold at least one token", 4) end
  return ids
end

local function stopper(stop)
  if stop == nil then return function() return false end end
  if type(stop) == "function" then return stop end
  local set = {}
  if type(stop) == "table" then
    for _, token in ipairs(stop) do set[token] = true end
  else
    set[stop] = true
  end
  return function(token) return set[token] end
end

-- A number in [0, 1): from the state's generator, or from one of its own.
local function uniform(own)
  if not own then return moe.rand(1):item() end
  local seed, offset = moe.rng_state()
  moe.set_rng_state(own.seed, own.offset)
  local u = moe.rand(1):item()
  own.seed, own.offset = moe.rng_state()
  moe.set_rng_state(seed, offset)
  return u
end

-- logits [vocab_size] -> a token.
local function choose(logits, o, own)
  if o.temperature == 0 then return logits:argmax():item() end
  logits = logits:cast("f32") / o.temperature
  local tokens
  if o.top_k or o.top_p then
    local n = logits.shape[1]
    logits, tokens = logits:topk(math.min(o.top_k or n, n))
  end
  local p = logits:softmax(-1):totable()
  local count, mass = #p, 1.0
  if o.top_p then
    mass, count = 0.0, 0
    repeat
      count = count + 1
      mass = mass + p[count]
    until mass >= o.top_p or count == #p
  end
  local left, pick = uniform(own) * mass, 1
  for i = 1, count do
    if p[i] > 0 then pick = i end -- rounding never lets the last, impossible one through
    left = left - p[i]
    if left < 0 then break end
  end
  return tokens and tokens[pick] or pick
end

-- In evaluation mode, without recording; the mode comes back also after an error.
local function quietly(model, f, ...)
  local training = model.training
  if training then model:eval() end
  local result = table.pack(pcall(moe.no_grad, f, ...))
  if training then model:train() end
  if not result[1] then error(result[2], 0) end
  return table.unpack(result, 2, result.n)
end

local function last_logits(model, window, ctx, state)
  local ids = moe.tensor({ window }, { dtype = "i64" })
  local x, after = model:hidden(ids, ctx, state)
  return model:logits(x:select(2, -1)):select(1, 1), after
end

--- Iterates over new tokens (numbers) that continue `ids`, a list or an index tensor [time]:
-- `for token in model:generate(ids, { max_new_tokens = 100, temperature = 0.8 }) do ... end`.
-- Keeps the mixers' states; past max_seq_len it computes the last max_seq_len tokens anew for each token.
local function generate(model, ids, given)
  local o = options.read("generate", given, ROWS)
  check(o)
  local tokens, stop = prompt_of(ids), stopper(o.stop)
  local own = o.seed and { seed = o.seed, offset = 0 }
  local limit = model.max_seq_len or math.huge
  local state = model:state(1)
  local pending, made, done = nil, 0, false
  if #tokens <= limit then pending = tokens end

  local function step()
    local logits
    if pending and state.position + #pending <= limit then
      logits, state = last_logits(model, pending, o.ctx, state)
    else
      pending, state = nil, nil
      logits = last_logits(model, table.move(tokens, math.max(1, #tokens - limit + 1), #tokens, 1, {}), o.ctx)
    end
    model.routings = {}
    return choose(logits, o, own)
  end

  return function()
    if done or (o.max_new_tokens and made >= o.max_new_tokens) then return nil end
    local token = quietly(model, step)
    if stop(token) then
      done = true
      return nil
    end
    made = made + 1
    if pending == tokens then tokens = table.move(tokens, 1, #tokens, 1, {}) end
    tokens[#tokens + 1] = token
    if pending then pending = { token } end
    return token
  end
end

return generate
