-- Synthetic tasks: a solver of a few lines reads every answer off the input; what is drawn is drawn as said; seeds and passes.
require "spec.helper"
local moe = require "moe"
local S = moe.data.synthetic
local groups = require "moe.data.groups"
local Generator = require "moe.data.generator"

local ASK <const> = false

-- Solvers: x (a list) and the options -> answers, ASK where none is asked.
local function nothing(n)
  local y = {}
  for t = 1, n do y[t] = ASK end
  return y
end

local function products(product)
  return function(x)
    local y, now = {}, x[1]
    for t = 1, #x do
      if t > 1 then now = product(x[t], now) end
      y[t] = now
    end
    return y
  end
end

-- Pairs of key and value, a key being a token up to `half`; what is above `kinds` is noise.
local function recall(kinds)
  return function(x)
    local y, map = nothing(#x), {}
    for t = 1, #x, 2 do
      if x[t] <= kinds then
        assert.truthy(x[t] <= kinds // 2 and x[t + 1] > kinds // 2 and x[t + 1] <= kinds)
        if map[x[t]] then
          assert.equal(map[x[t]], x[t + 1])
          y[t] = map[x[t]]
        end
        map[x[t]] = x[t + 1]
      end
    end
    assert.truthy(y[#x - 1])
    return y
  end
end

local function fuzzy(x)
  local y, map, t = nothing(#x), {}, 1
  while x[t] == 16 do t = t + 1 end
  while t <= #x do
    local key, value, seen = {}, {}, {}
    while x[t] and x[t] <= 7 do key[#key + 1], t = x[t], t + 1 end
    while x[t] and x[t] > 7 do
      assert.is_nil(seen[x[t]])
      assert.truthy(x[t] <= 15)
      value[#value + 1], seen[x[t]], t = x[t], true, t + 1
    end
    assert.truthy(#key >= 1 and #key <= 3 and #value >= 1 and #value <= 3)
    local name = table.concat(key, " ")
    if map[name] then
      assert.same(map[name], value)
      for j = 1, #value do y[t - #value + j - 2] = map[name][j] end
    end
    map[name] = value
  end
  assert.truthy(y[#x - 1])
  return y
end

local TASKS <const> = {
  { "selective_copying", {}, function(x)
    local y, data = nothing(#x), {}
    for t = 1, #x do
      if x[t] <= 14 then data[#data + 1] = x[t] end
      assert.equal(t == 256 - 16, x[t] == 16)
    end
    assert.equal(16, #data)
    table.move(data, 1, 16, #x - 15, y)
    return y
  end },
  { "selective_copying", { selective = false, seq_len = 21, num_tokens = 5, vocab_size = 4 }, function(x)
    local y = nothing(21)
    for i = 1, 5 do y[16 + i] = x[i] end
    for t = 6, 21 do assert.equal(t == 16 and 4 or 3, x[t]) end
    return y
  end },
  { "induction_heads", { seq_len = 64 }, function(x)
    local y, count = nothing(#x), 0
    for t = 1, #x - 1 do
      if x[t] == 16 then y[#x], count = x[t + 1], count + 1 end
    end
    assert.equal(1, count)
    assert.equal(16, x[#x])
    return y
  end },
  { "mqar", { seq_len = 32, vocab_size = 40 }, function(x)
    local y, map = nothing(#x), {}
    for t = 1, 8, 2 do
      assert.truthy(x[t] >= 2 and x[t] <= 20 and x[t + 1] > 20 and not map[x[t]])
      map[x[t]] = x[t + 1]
    end
    for t = 9, 32 do
      if x[t] ~= 1 then
        assert.equal(1, t % 2)
        y[t], map[x[t]] = map[x[t]], nil
      end
    end
    assert.is_nil(next(map))
    return y
  end },
  { "parity", { seq_len = 17 }, function(x)
    local y, ones = {}, 0
    for t = 1, #x do
      ones = ones + x[t] - 1
      y[t] = 1 + ones % 2
    end
    return y
  end },
  { "word_problem", { group = "z60" }, products(function(a, b) return (a - 1 + b - 1) % 60 + 1 end) },
  { "in_context_recall", {}, recall(16) },
  { "noisy_recall", {}, recall(16) },
  { "fuzzy_recall", {}, fuzzy },
  { "memorization", {}, (function()
    local map, back = {}, {} -- of all rows
    return function(x, y)
      local out = nothing(#x)
      for t = 1, #x, 2 do
        local key, value = x[t], y[t + 1]
        assert.equal(256, x[t + 1])
        assert.truthy(key <= 127 and value >= 128 and value <= 255)
        assert.equal(map[key] or value, value)
        assert.equal(back[value] or key, key)
        map[key], back[value] = value, key
        out[t + 1] = map[key]
      end
      return out
    end
  end)() },
  { "compression", {}, function(x)
    local y = { table.unpack(x, 1, #x - 1) }
    for t = 1, #x - 1 do assert.truthy(x[t] <= 15) end
    assert.equal(16, x[#x])
    y[#x] = ASK
    return y
  end },
}

local function merge(a, b)
  local out = {}
  for k, v in pairs(a) do out[k] = v end
  for k, v in pairs(b) do out[k] = v end
  return out
end

describe("synthetic tasks", function()
  for i, row in ipairs(TASKS) do
    local name, options, solve = table.unpack(row)
    it(("%s (%d): every answer can be read off the input, and nothing else is asked"):format(name, i), function()
      local loader = S[name](merge(options, { batch_size = 7, seed = 3 }))
      local kinds = {}
      for _ = 1, 6 do
        local batch = loader()
        assert.same({ 7, loader.seq_len }, batch.x.shape)
        assert.same("i64", batch.x.dtype)
        assert.same("bool", batch.mask.dtype)
        local xs, ys, asked = batch.x:totable(), batch.y:totable(), batch.mask:totable()
        for b = 1, 7 do
          local want = solve(xs[b], ys[b])
          for t = 1, loader.seq_len do
            kinds[xs[b][t]] = true
            assert.truthy(xs[b][t] >= 1 and xs[b][t] <= loader.vocab_size)
            assert.equal(want[t] or -100, ys[b][t])
            assert.equal(want[t] ~= ASK, asked[b][t])
          end
        end
      end
      local n = 0
      for _ in pairs(kinds) do n = n + 1 end
      assert.truthy(n > 0.4 * loader.vocab_size)
    end)

    it(("%s (%d): is fixed by its seed, goes on from a state, and repeats a number of examples"):format(name, i), function()
      local function make(more) return S[name](merge(options, merge({ batch_size = 4, seed = 9 }, more or {}))) end
      local function text(batch) return moe.io.json_encode { batch.x:totable(), batch.y:totable() } end
      local a, b = make(), make()
      local first, second = text(a()), text(a())
      assert.equal(first, text(b()))
      assert.are_not.equal(first, second)
      assert.are_not.equal(first, text(make { seed = 10 }()))
      local state = b:state()
      assert.equal(second, text(b()))
      a:restore(state)
      assert.equal(second, text(a()))
      assert.has_error(function() a:restore { kind = "another", at = 0, seed = 1 } end)
      -- a row depends on its number, not on the batch that it comes in
      local wide = make { batch_size = 8 }()
      assert.equal(second, text { x = wide.x:narrow(1, 5, 4), y = wide.y:narrow(1, 5, 4) })
      local pass = make { examples = 6 }
      assert.equal(first, text(pass()))
      local rest = pass()
      assert.same(2, rest.x:size(1))
      assert.is_nil(pass())
      assert.equal(first, text(pass()))
    end)
  end

  it("published settings build, and one's own options go before them", function()
    local count = 0
    for name, settings in pairs(S.settings) do
      for setting, o in pairs(settings) do
        count = count + 1
        local batch = S[name] { setting = setting, batch_size = 1 }()
        assert.same({ 1, o.seq_len }, batch.x.shape)
        assert.truthy(batch.mask:any():item())
      end
    end
    assert.truthy(count >= 16)
    local loader = S.mqar { setting = "zoology_64", seq_len = 128, batch_size = 2 }
    assert.equal(8192, loader.vocab_size)
    assert.equal(128, loader().x:size(2))
  end)

  it("mqar: gaps follow the power law; other tokens may be random", function()
    -- one pair, slots 1 .. 4 of seq_len 10: p in proportion to i^(a - 1)
    for _, a in ipairs { 0.01, 1 } do
      local counts, total = { 0, 0, 0, 0 }, 0
      for i = 1, 4 do total = total + i ^ (a - 1) end
      local batch = S.mqar { seq_len = 10, num_kv_pairs = 1, vocab_size = 20, power_a = a, batch_size = 4000 }()
      for _, row in ipairs(batch.mask:totable()) do
        for i = 1, 4 do
          if row[2 * i + 1] then counts[i] = counts[i] + 1 end
        end
      end
      for i = 1, 4 do assert.close(i ^ (a - 1) / total, counts[i] / 4000, { atol = 0.03 }) end
    end
    local batch = S.mqar { setting = "zoology_basic", batch_size = 50 }()
    local plain = S.mqar { setting = "zoology_basic", batch_size = 50, random_non_queries = false }()
    assert.same(plain.y:totable(), batch.y:totable())
    assert.truthy(plain.x:eq(1):to("f32"):mean():item() > 0.7)
    assert.truthy(batch.x:eq(1):to("f32"):mean():item() < 0.02)
    local kept = plain.x:ne(1)
    assert.same(plain.x:masked_select(kept):totable(), batch.x:masked_select(kept):totable())
  end)

  it("noise takes its share of the pairs, memorization's map outlives the seed, fuzzy keys may be the longest", function()
    local noise, pairs_of_rows = 0, 0
    for _, row in ipairs(S.noisy_recall { batch_size = 100 }().x:totable()) do
      for t = 1, 127, 2 do
        pairs_of_rows = pairs_of_rows + 1
        if row[t] > 16 then
          noise = noise + 1
          assert.truthy(row[t + 1] > 16)
        end
      end
    end
    assert.close(0.2 * 62 / 64, noise / pairs_of_rows, { atol = 0.02 })
    local function map(o)
      local out, batch = {}, S.memorization(merge({ batch_size = 200, vocab_size = 21 }, o))()
      local xs, ys = batch.x:totable(), batch.y:totable()
      for b = 1, 200 do
        for t = 1, 31, 2 do out[xs[b][t]] = ys[b][t + 1] end
      end
      assert.equal(10, #out)
      return out
    end
    assert.same(map { seed = 1 }, map { seed = 2 })
    assert.are_not.same(map { seed = 1 }, map { seed = 1, map_seed = 3 })
    for _, row in ipairs(S.fuzzy_recall { batch_size = 5, longest_keys = true }().x:totable()) do
      local run = 0
      for _, token in ipairs(row) do
        if token <= 7 then
          run = run + 1
        else
          assert.truthy(run == 0 or run == 3)
          run = 0
        end
      end
    end
  end)

  it("groups are groups: of the right size, associative, with the identity first", function()
    for name, size in pairs { s3 = 6, s4 = 24, s5 = 120, a4 = 12, a5 = 60, z7 = 7, z60 = 60, a4xz5 = 60, z2xz3xs3 = 36, s1 = 1 } do
      local group = groups.group(name)
      assert.equal(size, group.size)
      local p = group.product
      for a = 1, size do
        assert.equal(a, p(1, a))
        assert.equal(a, p(a, 1))
        local row = {}
        for b = 1, size do row[p(a, b)] = true end
        assert.equal(size, #row) -- a row of the table is a permutation: inverses exist
      end
      local g = Generator.new(1, 1)
      for _ = 1, 200 do
        local a, b, c = g:integer(1, size), g:integer(1, size), g:integer(1, size)
        assert.equal(p(p(a, b), c), p(a, p(b, c)))
      end
    end
    local s3 = groups.group "s3" -- 1 = 123, 2 = 132, 3 = 213, 4 = 231: first 132, then 213: 1 -> 1 -> 2, 2 -> 3 -> 3, 3 -> 2 -> 1
    assert.equal(4, s3.product(3, 2))
    for _, name in ipairs { "", "s", "s7", "q8", "z0", "a5x", "xa5", "z99999999999999999999", "s5 " } do
      assert.is_nil(groups.group(name))
    end
    local batch = S.word_problem { group = "s3", answers = "last", seq_len = 5, batch_size = 20 }()
    local xs, ys = batch.x:totable(), batch.y:totable()
    for b = 1, 20 do
      local now = 1
      for t = 1, 5 do now = s3.product(xs[b][t], now) end
      assert.same({ -100, -100, -100, -100, now }, ys[b])
    end
  end)

  it("the generator draws evenly, and what it chooses differs", function()
    local g, counts, sum = Generator.new(5, 6), {}, 0
    for _ = 1, 6000 do
      local v = g:integer(3, 8)
      counts[v] = (counts[v] or 0) + 1
      sum = sum + g:number()
    end
    for v = 3, 8 do assert.close(1000, counts[v], { atol = 130 }) end -- 4.5 standard deviations
    assert.close(0.5, sum / 6000, { atol = 0.02 })
    local first = {}
    for place = 1, 2000 do
      local list = Generator.new(5, place):choose(5, 3)
      assert.equal(3, #list)
      assert.truthy(list[1] ~= list[2] and list[2] ~= list[3] and list[1] ~= list[3])
      first[list[1]] = (first[list[1]] or 0) + 1
      local all = g:choose_by({ 1, 2, 3 }, 3)
      table.sort(all)
      assert.same({ 1, 2, 3 }, all)
    end
    for v = 1, 5 do assert.close(400, first[v], { atol = 80 }) end
  end)

  it("fits cross_entropy, accuracy and the trainer", function()
    local batch = S.induction_heads { seq_len = 8, batch_size = 3 }()
    local logits = moe.randn(3, 8, 16)
    local want = 0
    for b = 1, 3 do want = want - logits[b][8]:log_softmax(-1):totable()[batch.y[b][8]] / 3 end
    assert.close(want, moe.loss.cross_entropy(logits, batch.y):item(), { rtol = 1e-5 })
    local right = moe.zeros(3, 8, 16)
    for b = 1, 2 do right[b][8]:narrow(1, batch.y[b][8], 1):fill_(1) end
    right[3][8]:narrow(1, batch.y[3][8] % 16 + 1, 1):fill_(1)
    assert.close(2 / 3, S.accuracy(right, batch), { rtol = 1e-12 })
    moe.manual_seed(1)
    local model = moe.model.lm { vocab_size = 2, d_model = 8, layer_types = { "gated_delta" }, ffn = "none",
      mixers = { gated_delta = { num_heads = 2, expand_v = 1 } } }
    local trainer = moe.trainer { model = model, optimizer = moe.optim.adamw { lr = 0.01 }, quiet = true,
      loss = function(m, b) return moe.loss.cross_entropy(m(b.x), b.y) end }
    trainer:fit(S.parity { seq_len = 4, batch_size = 8 }, { steps = 3 })
    assert.equal(3, trainer.step)
  end)

  it("says what is wrong", function()
    local function says(want, name, o) assert.error_matches(function() S[name](o) end, want) end
    says("mqar: there is no setting 'zoology_65' %(did you mean 'zoology_64'%?%); known: zoology_128,", "mqar", { setting = "zoology_65" })
    says("mqar: 20 pairs and queries need an even seq_len of at least 80, got 64", "mqar", { num_kv_pairs = 20 })
    says("mqar: 4 keys need a vocab_size of at least 10, got 9", "mqar", { vocab_size = 9 })
    says("mqar: unknown option 'num_kv_pair' %(did you mean 'num_kv_pairs'%?%)", "mqar", { num_kv_pair = 2 })
    says("mqar: takes a table of options, got a number", "mqar", 3)
    says("parity: batch_size must be at least 1, got 0", "parity", { batch_size = 0 })
    says("parity: option 'answers' must be one of all, last", "parity", { answers = "some" })
    says("selective_copying: 16 data tokens and their answers need a seq_len of 33, got 32", "selective_copying", { seq_len = 32 })
    says("induction_heads: seq_len must be at least 3, got 2", "induction_heads", { seq_len = 2 })
    says("word_problem: group must be one as s5, a5, z60 or a4xz5 .*, got 's9'", "word_problem", { group = "s9" })
    says("in_context_recall: seq_len must be even", "in_context_recall", { seq_len = 5 })
    says("noisy_recall: frac_noise must lie in %[0, 1%), got 1", "noisy_recall", { frac_noise = 1 })
    says("noisy_recall: vocab_size must leave a key and a value beside 16 noise tokens, got 16", "noisy_recall", { vocab_size = 16 })
    says("fuzzy_recall: vocab_size must hold motifs of 3 and 3 different tokens, got 6", "fuzzy_recall", { vocab_size = 6 })
    says("fuzzy_recall: seq_len must be at least 12, got 11", "fuzzy_recall", { seq_len = 11 })
    says("memorization: vocab_size must be at least 3", "memorization", { vocab_size = 2 })
    says("compression: seq_len must be at least 2, got 1", "compression", { seq_len = 1 })
  end)
end)
