--- Tasks on which sequence mixers differ: loaders of batches that are made as they are asked for.
--
--   local train = moe.data.synthetic.mqar { setting = "zoology_64", batch_size = 32, seed = 1 }
--   local batch = train()                       -- x, y [batch, time] counting from 1, mask [batch, time]
--   local loss = moe.loss.cross_entropy(model(batch.x), batch.y)
--   print(moe.data.synthetic.accuracy(model(batch.x), batch))
--
-- y[b][t] is the answer that the output at t should give; where nothing is asked, mask is false and y is -100, which
-- cross_entropy leaves out. Options of every task: seq_len (the length of x); batch_size (32); seed (1); setting, the name of a
-- published setting (moe.data.synthetic.settings), which one's own options override; examples: that many, the same in each pass (nil ends
-- it), instead of new ones without end. Example i depends on the seed and on i alone. A loader has vocab_size and seq_len.

local core = require "moe.core"
local task = require "moe.data.task"
local groups = require "moe.data.groups"
local mad = require "moe.data.mad"

local M = {}

local IGNORE <const>, filled <const> = task.IGNORE, task.filled

--- Published settings: settings[task][name] is a table of options.
M.settings = {
  selective_copying = {
    mamba = { vocab_size = 16, seq_len = 4096, num_tokens = 16 }, -- Mamba, appendix E.1
    mad = { vocab_size = 16, seq_len = 256, num_tokens = 16, examples = 12800 },
  },
  induction_heads = { mamba = { vocab_size = 16, seq_len = 256 } }, -- trained at 256, tested at 2^6 .. 2^20 (appendix E.1)
  mqar = { -- zoology's basic example and the rows of figure 2
    zoology_basic = { vocab_size = 256, seq_len = 64, num_kv_pairs = 4, random_non_queries = true, examples = 10000 },
    zoology_64 = { vocab_size = 8192, seq_len = 64, num_kv_pairs = 4, examples = 100000 },
    zoology_128 = { vocab_size = 8192, seq_len = 128, num_kv_pairs = 8, examples = 100000 },
    zoology_256 = { vocab_size = 8192, seq_len = 256, num_kv_pairs = 16, examples = 100000 },
    zoology_512 = { vocab_size = 8192, seq_len = 512, num_kv_pairs = 64, examples = 100000 },
  },
  parity = { negative_eigenvalues = { seq_len = 40 } }, -- arXiv 2411.12537: trained up to 40, tested up to 256
  word_problem = { -- the groups of arXiv 2404.08819 (the length is ours), and S5
    a5 = { group = "a5", seq_len = 25 }, a4xz5 = { group = "a4xz5", seq_len = 25 }, z60 = { group = "z60", seq_len = 25 },
    s5 = { group = "s5", seq_len = 25 },
  },
}
for name, settings in pairs(mad.settings) do M.settings[name] = settings end

--- Selective copying: num_tokens (16) data tokens stand at random places among blanks; after a copy token as many blanks follow, and
-- the i-th of them asks for the i-th data token. Of vocab_size (16) kinds the last is the copy token, the one before it the blank,
-- the rest are data. x = seq_len (256) tokens: seq_len - num_tokens - 1 with the data, the copy token, num_tokens blanks.
-- selective = false: the data stand at the front, which a time-invariant model can copy.
-- Source: Gu and Dao, "Mamba", 2023, arXiv 2312.00752, section 4.1.1 (from Jing et al. 2019); MAD, arXiv 2403.17844. The places are
-- uniform here, and the blank and the copy token count among the kinds.
function M.selective_copying(o)
  return task.loader("selective_copying", o, {
    seq_len = { "integer", 256 }, vocab_size = { "integer", 16 }, num_tokens = { "integer", 16 }, selective = { "boolean", true },
  }, M.settings.selective_copying, function(s, fail)
    local n, time, kinds = s.num_tokens, s.seq_len, s.vocab_size
    local context = time - n - 1
    if kinds < 3 then fail("vocab_size must be at least 3 (data, blank, copy), got %d", kinds) end
    if n < 1 or context < n then fail("%d data tokens and their answers need a seq_len of %d, got %d", n, 2 * n + 1, time) end
    return function(g)
      local x, y = filled(time, kinds - 1), filled(time, IGNORE)
      local at = s.selective and g:choose(context, n) or {}
      table.sort(at)
      for i = 1, n do
        local token = g:integer(1, kinds - 2)
        x[at[i] or i], y[context + 1 + i] = token, token
      end
      x[context + 1] = kinds
      return x, y
    end, kinds
  end)
end

--- Induction heads: among random tokens stands a special one (the last of vocab_size = 16 kinds), once, at a random place, and again
-- at the end, where it asks for the token that followed it: x[p] = x[T] = special, y[T] = x[p + 1], p uniform in 1 .. T - 2.
-- seq_len 256 in training; train at one length and test at others for the published comparison.
-- Source: Olsson et al., arXiv 2209.11895, as in Fu et al. (H3), arXiv 2212.14052, and in Mamba, arXiv 2312.00752, section 4.1.2.
function M.induction_heads(o)
  return task.loader("induction_heads", o, { seq_len = { "integer", 256 }, vocab_size = { "integer", 16 } }, M.settings.induction_heads,
    function(s, fail)
      local time, kinds = s.seq_len, s.vocab_size
      if time < 3 then fail("seq_len must be at least 3, got %d", time) end
      if kinds < 2 then fail("vocab_size must be at least 2, got %d", kinds) end
      return function(g)
        local x, y = {}, filled(time, IGNORE)
        for t = 1, time - 1 do x[t] = g:integer(1, kinds - 1) end
        local p = g:integer(1, time - 2)
        x[p], x[time], y[time] = kinds, kinds, x[p + 1]
        return x, y
      end, kinds
    end)
end

--- Multi-query associative recall: num_kv_pairs (4) keys, each followed by its value, then blanks among which every key stands once
-- more, where it asks for its value. Blank 1, keys 2 .. vocab_size / 2, values above; keys and values of a row all differ. The i-th
-- free slot of two behind the pairs holds a query with a probability in proportion to i^(power_a - 1) (slots without
-- replacement): power_a = 0.01 (the default) as gaps in text, 1 uniform. random_non_queries = true: random tokens instead of blanks.
-- Source: Arora et al., "Zoology", 2023, arXiv 2312.04927, section 4 and appendix; settings of its figure 2.
function M.mqar(o)
  return task.loader("mqar", o, {
    seq_len = { "integer", 64 }, vocab_size = { "integer", 8192 }, num_kv_pairs = { "integer", 4 }, power_a = { "number", 0.01 },
    random_non_queries = { "boolean", false },
  }, M.settings.mqar, function(s, fail)
    local time, n, half = s.seq_len, s.num_kv_pairs, s.vocab_size // 2
    if n < 1 then fail("num_kv_pairs must be at least 1, got %d", n) end
    if time % 2 ~= 0 or time < 4 * n then fail("%d pairs and queries need an even seq_len of at least %d, got %d", n, 4 * n, time) end
    if half - 1 < n then fail("%d keys need a vocab_size of at least %d, got %d", n, 2 * n + 2, s.vocab_size) end
    local weights = {}
    for i = 1, (time - 2 * n) // 2 do weights[i] = i ^ (s.power_a - 1) end
    return function(g)
      local x, y = filled(time, 1), filled(time, IGNORE)
      local keys, values, slots = g:choose(half - 1, n), g:choose(s.vocab_size - half, n), g:choose_by(weights, n)
      for i = 1, n do
        local key, value, query = keys[i] + 1, values[i] + half, 2 * n + 2 * slots[i] - 1
        x[2 * i - 1], x[2 * i], x[query], y[query] = key, value, key, value
      end
      if s.random_non_queries then
        for t = 2 * n + 1, time do
          if x[t] == 1 then x[t] = g:integer(1, s.vocab_size) end
        end
      end
      return x, y
    end, s.vocab_size
  end)
end

-- Running products in a group; answers at every place or at the last alone.
local function products(s, group)
  return function(g)
    local x, y, now = {}, filled(s.seq_len, IGNORE), 1
    for t = 1, s.seq_len do
      x[t] = g:integer(1, group.size)
      now = group.product(x[t], now)
      if s.answers == "all" or t == s.seq_len then y[t] = now end
    end
    return x, y
  end, group.size
end

local ANSWERS <const> = { { "all", "last" }, "all" }

--- Parity: bits as tokens 1 and 2; y_t = 1 + (number of 2s up to t) mod 2, at every place, or with answers = "last" at the end alone.
-- seq_len 40. The smallest task that a state with eigenvalues in [0, 1] cannot track.
-- Source: Grazzi et al., arXiv 2411.12537, sections 3 and 5.1.
function M.parity(o)
  return task.loader("parity", o, { seq_len = { "integer", 40 }, answers = ANSWERS }, M.settings.parity, function(s)
    return products(s, groups.group "z2")
  end)
end

--- The word problem of a group: x_t random elements, y_t = x_t x_(t-1) .. x_1 (of permutations: x_1 first), at every place or with
-- answers = "last" at the end alone. group: "s5" (permutations of 5, 120 elements), "a5" (the even ones, 60), "z60" (counting modulo
-- 60), products as "a4xz5"; s and a up to 6. Elements are numbered from 1, the identity, permutations in the order of words.
-- Source: Merrill, Petty and Sabharwal, "The Illusion of State in State-Space Models", 2024, arXiv 2404.08819, section 6.
function M.word_problem(o)
  return task.loader("word_problem", o, { seq_len = { "integer", 25 }, group = { "string", "s5" }, answers = ANSWERS },
    M.settings.word_problem, function(s, fail)
      local group = groups.group(s.group)
      if not group then fail("group must be one as s5, a5, z60 or a4xz5 (s and a up to 6, z up to 10000), got '%s'", s.group) end
      return products(s, group)
    end)
end

for name, make in pairs(mad.tasks) do M[name] = make end

--- The share of the asked places of batch where the highest of logits [batch, time, vocab_size] is the answer.
function M.accuracy(logits, batch)
  return core.no_grad(function()
    local right = logits:argmax(-1):eq(batch.y):logical_and(batch.mask)
    return right:to("f64"):sum():item() / batch.mask:to("f64"):sum():item()
  end)
end

return M
