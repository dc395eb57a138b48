-- Sampling from a language model, one token at a time, for one sequence or several.

local moe = require "moe"
local options = require "moe.nn.options"
local sampling = require "moe.model.sampling"

local ROWS = {
  max_new_tokens = { "integer" },       -- of each sequence; absent: until stopped
  temperature = { "number", 1.0 },      -- 0: the most probable token, always
  top_k = { "integer" },                -- only the k most probable
  top_p = { "number" },                 -- only the fewest whose probabilities reach p (Holtzman et al., arXiv 1904.09751)
  min_p = { "number" },                 -- only those of at least min_p times the highest (Nguyen et al., arXiv 2407.01082)
  repetition_penalty = { "number" },    -- above 1: tokens of the prompt and of what was made get less (CTRL, arXiv 1909.05858, 4.1)
  seed = { "integer" },                 -- draws of their own, independent of moe.manual_seed; sequence b draws from seed + b - 1
  stop = { "integer|table|function" },  -- a token, a list of tokens, or function(token, b) -> boolean; it is not yielded
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
  range("min_p", function(v) return v >= 0 and v <= 1 end, "in [0, 1]")
  range("repetition_penalty", function(v) return v > 0 and v < math.huge end, "a positive number")
end

-- --- prompts and stops ---

local function sequence_of(ids, name)
  local out = {}
  if moe.is_tensor(ids) then
    if #ids.shape ~= 1 then
      error(("generate: %s must be one sequence [time], got [%s]"):format(name, table.concat(ids.shape, ", ")), 5)
    end
    ids = ids:totable()
  elseif type(ids) ~= "table" then
    error(("generate: %s must be a list or a tensor of token ids, got a %s"):format(name, type(ids)), 5)
  end
  for i, id in ipairs(ids) do
    if math.type(id) ~= "integer" then error(("generate: %s[%d] must be an integer, got %s"):format(name, i, tostring(id)), 5) end
    out[i] = id
  end
  if #out == 0 then error(("generate: %s must hold at least one token"):format(name), 5) end
  return out
end

-- The prompts as lists of numbers, and whether there is a batch of them: a list of lists or of tensors, or a tensor
-- [batch, time] of more than one row.
local function prompts_of(ids)
  if moe.is_tensor(ids) and #ids.shape == 2 then
    if ids.shape[1] == 1 then return { sequence_of(ids:select(1, 1), "ids") }, false end
    ids = ids:totable()
  end
  if type(ids) ~= "table" or #ids == 0 or type(ids[1]) == "number" or type(ids[1]) == "string" then
    return { sequence_of(ids, "ids") }, false
  end
  local out = {}
  for b, sequence in ipairs(ids) do out[b] = sequence_of(sequence, ("ids[%d]"):format(b)) end
  return out, true
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

-- In evaluation mode, without recording; the mode comes back also after an error.
local function quietly(model, f, ...)
  local training = model.training
  if training then model:eval() end
  local result = table.pack(pcall(moe.no_grad, f, ...))
  if training then model:train() end
  if not result[1] then error(result[2], 0) end
  return table.unpack(result, 2, result.n)
end

-- --- states of several sequences: tables, to any depth, of tensors [batch, ..] and of values that hold for the whole batch ---

local function same_sizes(a, b, from)
  if #a ~= #b then return false end
  for d = from, #a do
    if a[d] ~= b[d] then return false end
  end
  return true
end

-- One state of all the batches together; nil where they do not go together (caches of different lengths, other positions).
local function join(list)
  local first = list[1]
  if moe.is_tensor(first) then
    for _, t in ipairs(list) do
      if not moe.is_tensor(t) or not same_sizes(first.shape, t.shape, 2) then return nil end
    end
    return moe.cat(list, 1)
  elseif type(first) == "table" then
    local out = {}
    for k in pairs(first) do
      local parts = {}
      for i, state in ipairs(list) do
        if state[k] == nil then return nil end
        parts[i] = state[k]
      end
      out[k] = join(parts)
      if out[k] == nil then return nil end
    end
    return out
  end
  for _, v in ipairs(list) do
    if v ~= first then return nil end
  end
  return first
end

local function select_rows(state, index)
  if moe.is_tensor(state) then return state:index_select(1, index) end
  if type(state) ~= "table" then return state end
  local out = {}
  for k, v in pairs(state) do out[k] = select_rows(v, index) end
  return out
end

-- Whether every tensor has the same sizes before and after.
local function constant(before, after)
  if moe.is_tensor(before) then return moe.is_tensor(after) and same_sizes(before.shape, after.shape, 1) end
  if type(before) ~= "table" then return true end
  for k, v in pairs(after) do
    if before[k] == nil and v ~= nil or not constant(before[k], v) then return false end
  end
  return true
end

-- --- the steps ---

-- The positions after which the last max_seq_len tokens are computed anew: with learned positions, and with caches that
-- grow. States of a constant size go on for ever.
local function window(model, ctx, token)
  local limit = model.max_seq_len
  if not limit then return math.huge end
  if model.positions then return limit end
  local before = model:state(1)
  local _, after = model:hidden(moe.tensor({ { token } }, { dtype = "i64" }), ctx, before)
  return constant(before, after) and math.huge or limit
end

-- A long prompt is read in pieces of so many tokens: what a layer computes between two states stays small.
local PIECE <const> = 4096

-- rows of one group: { b =, own =, tokens = the last `limit` (only where there is one), seen = }.
-- group: rows, pending (what each row is still to read, all of one length), state, windowed.
local function group_logits(model, group, limit, ctx)
  local ids = group.pending
  if not group.windowed and group.state.position + #ids[1] > limit then group.windowed, group.state = true, nil end
  if group.windowed then
    ids = {}
    for i, row in ipairs(group.rows) do
      ids[i] = table.move(row.tokens, math.max(1, #row.tokens - limit + 1), #row.tokens, 1, {})
    end
  end
  ids = moe.tensor(ids, { dtype = "i64" })
  local time, x = ids:size(2), nil
  local step = group.windowed and time or PIECE
  for at = 1, time, step do
    x, group.state = model:hidden(ids:narrow(2, at, math.min(step, time - at + 1)), ctx, group.state)
  end
  model.routings = {}
  return model:logits(x:select(2, -1))
end

local function remember(row, token, limit)
  if row.tokens then
    row.tokens[#row.tokens + 1] = token
    if #row.tokens > 2 * limit then row.tokens = table.move(row.tokens, #row.tokens - limit + 1, #row.tokens, 1, {}) end
  end
  if row.seen then row.seen:narrow(1, token, 1):fill_(1) end
end

-- Sequences that have read as much as each other run as one batch: it needs no padding, so that each gets what it gets alone.
local function start(model, prompts, o, limit)
  local groups, by_length = {}, {}
  for b, prompt in ipairs(prompts) do
    local group = by_length[#prompt]
    if not group then
      group = { rows = {}, pending = {} }
      by_length[#prompt], groups[#groups + 1] = group, group
    end
    local row = { b = b, own = o.seed and { seed = o.seed + b - 1, offset = 0 } }
    if limit < math.huge then row.tokens = table.move(prompt, 1, #prompt, 1, {}) end
    group.rows[#group.rows + 1], group.pending[#group.pending + 1] = row, prompt
  end
  for _, group in ipairs(groups) do group.state = model:state(#group.rows) end
  return groups
end

-- After the prompts: states that hold a sequence in a constant size go together, whatever was read.
local function together(model, groups)
  local states, all = {}, { rows = {}, pending = {} }
  for i, group in ipairs(groups) do
    if group.windowed or model.positions then return groups end
    states[i] = {}
    for k, v in pairs(group.state) do
      if k ~= "position" then states[i][k] = v end
    end
    table.move(group.rows, 1, #group.rows, #all.rows + 1, all.rows)
    table.move(group.pending, 1, #group.pending, #all.pending + 1, all.pending)
  end
  all.state = join(states)
  if all.state == nil then return groups end
  all.state.position = groups[1].state.position
  return { all }
end

local function step(run)
  local model, o, made = run.model, run.o, {}
  if not run.groups then
    run.limit = window(model, o.ctx, run.prompts[1][1])
    run.groups = start(model, run.prompts, o, run.limit)
  end
  local left = {}
  for _, group in ipairs(run.groups) do
    local logits, rows, pending, kept = group_logits(model, group, run.limit, o.ctx), {}, {}, {}
    for i, row in ipairs(group.rows) do
      local scores = logits:select(1, i)
      if o.repetition_penalty then
        if not row.seen then
          row.seen = moe.zeros(#scores, { dtype = "bool", device = scores.device })
          for _, token in ipairs(run.prompts[row.b]) do row.seen:narrow(1, token, 1):fill_(1) end
        end
        scores = sampling.penalise(scores, row.seen, o.repetition_penalty)
      end
      local token = sampling.choose(scores, o, row.own)
      if run.stop(token, row.b) then
        made[row.b] = false
      else
        made[row.b] = token
        remember(row, token, run.limit)
        rows[#rows + 1], pending[#pending + 1], kept[#kept + 1] = row, { token }, i
      end
    end
    if #rows > 0 then
      if #rows < #group.rows and group.state then
        group.state = select_rows(group.state, moe.tensor(kept, { dtype = "i64", device = logits.device }))
      end
      group.rows, group.pending = rows, pending
      left[#left + 1] = group
    end
  end
  if run.made == 0 and #left > 1 then left = together(model, left) end
  run.groups, run.made = left, run.made + 1
  return made
end

--- Iterates over new tokens that continue `ids`:
--   for token in model:generate(ids, { max_new_tokens = 100, temperature = 0.8, top_k = 40, seed = 1 }) do ... end
-- ids: one sequence, a list of numbers or an index tensor [time] or [1, time], yields a number a step. Several, a list of lists or
-- tensors (of any lengths) or a tensor [batch, time], yield a list a step, tokens[b] being that of sequence b, or false once it
-- has stopped; the end comes when all have. Each gets what it gets alone (with the seed seed + b - 1): nothing is padded;
-- sequences of one length run as one batch, and all of them where every mixer's state has a constant size.
-- Options: max_new_tokens, temperature (0: the most probable), then top_k, top_p, min_p in this order; repetition_penalty c: logits
-- of tokens seen so far l / c where l > 0, else l c; seed; stop, a token, a list of tokens or function(token, b) -> boolean
-- (a string is found by a function that decodes and keeps what came); ctx for the model. The stop itself is not yielded.
-- Keeps the states of the mixers, so that a step reads one token; memory stays as it is when no mixer's state grows. With learned
-- positions, or with caches that grow under a max_seq_len, what lies past max_seq_len is computed anew from the last
-- max_seq_len tokens at each step.
local function generate(model, ids, given)
  local o = options.read("generate", given, ROWS)
  check(o)
  local prompts, batch = prompts_of(ids)
  local run = { model = model, o = o, prompts = prompts, stop = stopper(o.stop), made = 0 }
  local count, finished = #prompts, false
  return function()
    if finished or o.max_new_tokens and run.made >= o.max_new_tokens then return nil end
    local made = quietly(model, step, run)
    if #run.groups == 0 then
      finished = true
      return nil
    end
    if not batch then return made[1] end
    for b = 1, count do made[b] = made[b] or false end
    return made
  end
end

return generate
