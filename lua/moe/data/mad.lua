-- The tasks of MAD (mechanistic architecture design); the sixth, selective copying, is in synthetic.lua.

local task = require "moe.data.task"
local Generator = require "moe.data.generator"

local M = { tasks = {}, settings = {
  in_context_recall = { mad = { vocab_size = 16, seq_len = 128, examples = 12800 } },
  noisy_recall = { mad = { vocab_size = 32, noise_vocab_size = 16, frac_noise = 0.2, seq_len = 128, examples = 12800 } },
  fuzzy_recall = { mad = { vocab_size = 16, k_motif_size = 3, v_motif_size = 3, seq_len = 128, examples = 12800 } },
  memorization = { mad = { vocab_size = 256, seq_len = 32, examples = 256 } },
  compression = { mad = { vocab_size = 16, seq_len = 32, examples = 12800 } },
} }

local IGNORE <const>, filled <const> = task.IGNORE, task.filled
local tasks <const> = M.tasks

local function check_pairs(s, fail)
  if s.seq_len % 2 ~= 0 or s.seq_len < 4 then fail("seq_len must be even and at least 4, got %d", s.seq_len) end
end

-- Pairs key, value with a map of the row's own; a key that was there before asks for its value. Some pairs are noise.
local function recall(s, fail)
  check_pairs(s, fail)
  local noise = s.noise_vocab_size or 0
  local share, kinds = s.frac_noise or 0, s.vocab_size - noise
  if noise < 0 or kinds < 2 then fail("vocab_size must leave a key and a value beside %d noise tokens, got %d", noise, s.vocab_size) end
  if not (share >= 0 and share < 1) then fail("frac_noise must lie in [0, 1), got %g", share) end
  if share > 0 and noise == 0 then fail("frac_noise = %g needs noise_vocab_size", share) end
  local half, pairs_of_row = kinds // 2, s.seq_len // 2
  return function(g)
    local x, y, map, seen = {}, filled(s.seq_len, IGNORE), {}, {}
    local sure = g:integer(1, pairs_of_row - 1) -- at least one pair before the last is none of noise
    for i = 1, pairs_of_row do
      local t = 2 * i - 1
      if i < pairs_of_row and i ~= sure and share > 0 and g:number() < share then
        x[t], x[t + 1] = g:integer(kinds + 1, s.vocab_size), g:integer(kinds + 1, s.vocab_size)
      else
        local key = i < pairs_of_row and g:integer(1, half) or seen[g:integer(1, #seen)]
        if map[key] then
          y[t] = map[key]
        else
          map[key] = g:integer(half + 1, kinds)
          seen[#seen + 1] = key
        end
        x[t], x[t + 1] = key, map[key]
      end
    end
    return x, y
  end, s.vocab_size
end

--- In-context recall (MAD): seq_len / 2 pairs of a key (the lower half of vocab_size = 16 kinds) and the value that it has in this row
-- (the upper half); a key that was there before asks for its value, y_t = x_(t+1). The last key is one that was there.
-- Source: Poli et al., "Mechanistic Design and Scaling of Hybrid Architectures", 2024, arXiv 2403.17844, appendix on MAD, in its
-- multi-query form. Only the recalled values count here, in training as well.
function tasks.in_context_recall(o)
  return task.loader("in_context_recall", o, { seq_len = { "integer", 128 }, vocab_size = { "integer", 16 } },
    M.settings.in_context_recall, recall)
end

--- Noisy in-context recall (MAD): in_context_recall with a share frac_noise (0.2) of the pairs replaced by two tokens of noise, the
-- last noise_vocab_size (16) of vocab_size (32) kinds.
-- Source: as in_context_recall.
function tasks.noisy_recall(o)
  return task.loader("noisy_recall", o, {
    seq_len = { "integer", 128 }, vocab_size = { "integer", 32 }, noise_vocab_size = { "integer", 16 }, frac_noise = { "number", 0.2 },
  }, M.settings.noisy_recall, recall)
end

-- 1 .. most different tokens of first .. last.
local function motif(g, first, last, least, most)
  local out = g:choose(last - first + 1, g:integer(least, most))
  for i = 1, #out do out[i] = out[i] + first - 1 end
  return out
end

--- Fuzzy in-context recall (MAD): keys and values are motifs of 1 .. k_motif_size (3) and 1 .. v_motif_size (3) different tokens; when
-- a key of the same tokens was there before, the whole value is asked for, from the key's last token on: y_t = x_(t+1). One pair at
-- a random place comes again at the end. Of vocab_size (16) kinds the last pads the front; the others are halved into keys and
-- values. longest_keys = true: all keys have k_motif_size tokens, as in MAD's tests.
-- Source: as in_context_recall.
function tasks.fuzzy_recall(o)
  return task.loader("fuzzy_recall", o, {
    seq_len = { "integer", 128 }, vocab_size = { "integer", 16 }, k_motif_size = { "integer", 3 }, v_motif_size = { "integer", 3 },
    longest_keys = { "boolean", false },
  }, M.settings.fuzzy_recall, function(s, fail)
    local k, v, half = s.k_motif_size, s.v_motif_size, (s.vocab_size - 1) // 2
    if k < 1 or v < 1 then fail("motifs must have at least one token, got k_motif_size %d, v_motif_size %d", k, v) end
    if half < k or s.vocab_size - 1 - half < v then
      fail("vocab_size must hold motifs of %d and %d different tokens, got %d", k, v, s.vocab_size)
    end
    if s.seq_len < 2 * (k + v) then fail("seq_len must be at least %d, got %d", 2 * (k + v), s.seq_len) end
    return function(g)
      local map, list, used = {}, {}, 0 -- a row's keys have one value each
      local function pair()
        local key = motif(g, 1, half, s.longest_keys and k or 1, k)
        local name, value = table.concat(key, " "), motif(g, half + 1, s.vocab_size - 1, 1, v)
        map[name] = map[name] or value
        used = used + #key + #map[name]
        return { key = key, value = map[name], name = name }
      end
      local probe = pair()
      used = 2 * used
      while used + k + v <= s.seq_len do list[#list + 1] = pair() end
      table.insert(list, g:integer(1, #list + 1), probe)
      list[#list + 1] = probe
      local x, y, seen = filled(s.seq_len - used, s.vocab_size), filled(s.seq_len, IGNORE), {}
      for _, one in ipairs(list) do
        table.move(one.key, 1, #one.key, #x + 1, x)
        if seen[one.name] then table.move(one.value, 1, #one.value, #x, y) end
        table.move(one.value, 1, #one.value, #x + 1, x)
        seen[one.name] = true
      end
      return x, y
    end, s.vocab_size
  end)
end

--- Memorization (MAD): a map from keys to values that is the same in all examples and must be learnt; x = key, insert token, key, insert
-- token, ..; the insert token (the last of vocab_size = 256 kinds) asks for the value of the key before it, which x never shows. Of
-- the other kinds the lower half are keys, the upper values; map_seed (12345) fixes the map, so that test data of another seed have it.
-- Source: as in_context_recall.
function tasks.memorization(o)
  return task.loader("memorization", o, {
    seq_len = { "integer", 32 }, vocab_size = { "integer", 256 }, map_seed = { "integer", 12345 },
  }, M.settings.memorization, function(s, fail)
    if s.seq_len % 2 ~= 0 then fail("seq_len must be even, got %d", s.seq_len) end
    local half = (s.vocab_size - 1) // 2
    if half < 1 then fail("vocab_size must be at least 3 (key, value, insert), got %d", s.vocab_size) end
    local map = Generator.new(s.map_seed, 0):choose(s.vocab_size - 1 - half, half)
    return function(g)
      local x, y = filled(s.seq_len, s.vocab_size), filled(s.seq_len, IGNORE)
      for t = 1, s.seq_len, 2 do
        x[t] = g:integer(1, half)
        y[t + 1] = map[x[t]] + half
      end
      return x, y
    end, s.vocab_size
  end)
end

--- Compression (MAD): seq_len - 1 random tokens and a compression token (the last of vocab_size = 16 kinds); y = x at all places but the
-- last. It asks what the state behind the compression token holds: the model's last hidden state alone, with each position added,
-- must be decoded into the tokens; a model that reads y_t from its output at t copies its input and learns nothing.
-- Source: as in_context_recall.
function tasks.compression(o)
  return task.loader("compression", o, { seq_len = { "integer", 32 }, vocab_size = { "integer", 16 } }, M.settings.compression,
    function(s, fail)
      if s.seq_len < 2 then fail("seq_len must be at least 2, got %d", s.seq_len) end
      if s.vocab_size < 2 then fail("vocab_size must be at least 2, got %d", s.vocab_size) end
      return function(g)
        local x, y = {}, {}
        for t = 1, s.seq_len - 1 do
          x[t] = g:integer(1, s.vocab_size - 1)
          y[t] = x[t]
        end
        x[s.seq_len], y[s.seq_len] = s.vocab_size, IGNORE
        return x, y
      end, s.vocab_size
    end)
end

return M
