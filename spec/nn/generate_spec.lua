-- Generation with the states of any mixers, for prompts of different lengths, and what narrows the draw.
require "spec.helper"
local moe = require "moe"
local lm = moe.model.lm

local function merge(...)
  local out = {}
  for _, t in ipairs { ... } do
    for k, v in pairs(t) do out[k] = v end
  end
  return out
end

local SMALL <const> = { vocab_size = 11, d_model = 16, num_heads = 2, num_layers = 2, intermediate_size = 16 }

local MODELS <const> = {
  mamba = { layer_types = "mamba", mixers = { mamba = { d_state = 4 } } },
  hybrid = { layer_types = { "gated_delta", "attention" }, ffn = { "none", "dense" } },
  rope = { positional = "rope" },
  learned = { max_seq_len = 40 },
  window = { positional = "rope", max_seq_len = 6 },
  positions = { layer_types = { "retention", "rwkv7" } },
  sparse = { layer_types = { "gla", "none" }, ffn = { "none", "moe" }, moe = { num_experts = 4, top_k = 2 } },
}

local function build(options)
  moe.manual_seed(11)
  local m = lm(merge(SMALL, options)):to "f64"
  for _, p in m:named_parameters() do -- far from even probabilities
    if #p.shape == 2 then p:detach():mul_(4) end
  end
  return m
end

local function ids_of(...) return moe.tensor({ ... }, { dtype = "i64" }) end

local PROMPTS <const> = { { 1, 2, 3, 4, 5 }, { 7 }, { 3, 3, 9, 10, 2, 2, 6, 1 }, { 5, 4, 3, 2, 1 } }

local function alone(m, prompt, options)
  local out = {}
  for token in m:generate(prompt, options) do out[#out + 1] = token end
  return out
end

-- The rows of a batch run, each up to its stop; the steps that were yielded.
local function rows_of(m, prompts, options)
  local out, ended, steps = {}, {}, 0
  for b = 1, #prompts do out[b] = {} end
  for tokens in m:generate(prompts, options) do
    assert.equal(#prompts, #tokens)
    steps = steps + 1
    for b, token in ipairs(tokens) do
      if token then
        assert.is_nil(ended[b])
        out[b][#out[b] + 1] = token
      else
        ended[b] = true
      end
    end
  end
  return out, steps
end

describe("generate", function()
  for name, options in pairs(MODELS) do
    it("gives each sequence of a batch what it gets alone: " .. name, function()
      local m = build(options)
      local settings = { max_new_tokens = 12, temperature = 0.9, seed = 5, stop = { 8, 4 }, repetition_penalty = 1.1, min_p = 0.01 }
      local got, steps = rows_of(m, PROMPTS, settings)
      local longest = 0
      for b, prompt in ipairs(PROMPTS) do
        local want = alone(m, prompt, merge(settings, { seed = 5 + b - 1 }))
        assert.same(want, got[b])
        longest = math.max(longest, #want)
      end
      assert.equal(longest, steps)
      assert.is_true(m.training)
      local greedy = rows_of(m, PROMPTS, { max_new_tokens = 9, temperature = 0 })
      for b, prompt in ipairs(PROMPTS) do assert.same(alone(m, prompt, { max_new_tokens = 9, temperature = 0 }), greedy[b]) end
    end)

    it("equals computing everything anew: " .. name, function()
      local m = build(options)
      local got = alone(m, PROMPTS[3], { max_new_tokens = 15, temperature = 0 })
      m:eval()
      local all = { table.unpack(PROMPTS[3]) }
      for i = 1, 15 do
        local from = name == "window" and math.max(1, #all - 5) or 1
        local ids = ids_of(table.move(all, from, #all, 1, {}))
        assert.equal(m(ids):select(2, -1):argmax():item(), got[i])
        all[#all + 1] = got[i]
      end
    end)
  end

  it("joins the sequences where the states have a constant size, and drops those that stopped", function()
    local m = build(MODELS.mamba)
    local calls, hidden = {}, m.hidden
    m.hidden = function(self, ids, ...)
      calls[#calls + 1] = table.concat(ids.shape, "x")
      return hidden(self, ids, ...)
    end
    local steps = 0
    for _ in m:generate(PROMPTS, { max_new_tokens = 4, temperature = 0, stop = function(_, b)
      if b == 1 then steps = steps + 1 end
      return b == 2 or b == 1 and steps == 3
    end }) do end -- luacheck: ignore
    assert.same({ "2x5", "1x1", "1x8", "3x1", "3x1", "2x1" }, calls)
  end)

  it("goes on past max_seq_len with states of a constant size, in constant memory", function()
    local m = build(merge(MODELS.mamba, { max_seq_len = 4 }))
    local free = build(MODELS.mamba)
    assert.same(alone(free, PROMPTS[3], { max_new_tokens = 20, seed = 1 }), alone(m, PROMPTS[3], { max_new_tokens = 20, seed = 1 }))
    local n, early, late = 0, nil, nil
    for _ in m:generate({ 1, 2 }, { max_new_tokens = 120, seed = 1, repetition_penalty = 1.2 }) do
      n = n + 1
      if n == 20 or n == 120 then
        collectgarbage()
        collectgarbage()
        if n == 20 then early = moe.memory().live else late = moe.memory().live end
      end
    end
    assert.equal(early, late)
  end)

  it("reads a long prompt in pieces", function()
    local m = build { layer_types = { "mamba2", "attention" }, mixers = { mamba2 = { d_state = 2, headdim = 16 } }, d_model = 8 }
    local prompt, sizes, hidden = {}, {}, m.hidden
    for i = 1, 4100 do prompt[i] = i * i % 11 + 1 end
    local want = moe.no_grad(function() return m(ids_of(prompt)):select(2, -1):argmax():item() end)
    m.hidden = function(self, ids, ...)
      sizes[#sizes + 1] = ids:size(2)
      return hidden(self, ids, ...)
    end
    assert.same({ want }, alone(m, prompt, { max_new_tokens = 1, temperature = 0 }))
    assert.same({ 4096, 4 }, sizes)
  end)

  it("takes batches as lists, lists of tensors and tensors", function()
    local m = build(MODELS.hybrid)
    local o = { max_new_tokens = 5, temperature = 0 }
    local want = rows_of(m, { { 1, 2, 3 }, { 4, 5, 6 } }, o)
    assert.same(want, rows_of(m, { moe.tensor({ 1, 2, 3 }, { dtype = "i64" }), { 4, 5, 6 } }, o))
    local steps = {}
    for tokens in m:generate(ids_of({ 1, 2, 3 }, { 4, 5, 6 }), o) do steps[#steps + 1] = tokens end
    for t = 1, 5 do assert.same({ want[1][t], want[2][t] }, steps[t]) end
    for tokens in m:generate({ { 1, 2, 3 } }, o) do assert.same({ want[1][1] }, tokens) break end -- luacheck: ignore
    assert.is_nil(m:generate(PROMPTS, { max_new_tokens = 0 })())
    assert.is_nil(m:generate(PROMPTS, { stop = function() return true end })())
  end)

  it("stops at a string that a function looks for", function()
    local m = build(MODELS.mamba)
    local all = alone(m, { 1 }, { max_new_tokens = 40, seed = 3 })
    local letters = "abcdefghijk"
    local text = ""
    for i, t in ipairs(all) do all[i], text = letters:sub(t, t), text .. letters:sub(t, t) end
    local wanted = text:sub(11, 13)
    local so_far = ""
    local got = alone(m, { 1 }, { max_new_tokens = 40, seed = 3, stop = function(token)
      so_far = so_far .. letters:sub(token, token)
      return so_far:sub(-#wanted) == wanted
    end })
    assert.equal(text:find(wanted, 1, true) + 1, #got)
  end)

  it("draws among the likely, and seldom again what was there", function()
    local m = build(MODELS.mamba)
    local scores = moe.tensor { 0, 1, 2, 3, -1e9, -1e9, -1e9, -1e9, -1e9, -1e9, -1e9 }
    m.logits = function(_, x) return scores:unsqueeze(1):expand { x:size(1), 11 } end
    local function shares(options)
      local counts, n = {}, 600
      for token in m:generate({ 1 }, merge({ max_new_tokens = n, seed = 1 }, options)) do counts[token] = (counts[token] or 0) + 1 / n end
      return counts
    end
    -- p = e^0 .. e^3 over their sum: 0.05 of the highest keeps e^1 and up (e^-2 = 0.135, e^-3 = 0.0498)
    local some = shares { min_p = 0.05 }
    assert.is_nil(some[1])
    local z = math.exp(1) + math.exp(2) + math.exp(3)
    for i = 2, 4 do assert.close(math.exp(i - 1) / z, some[i], { atol = 0.05 }) end
    assert.truthy(shares { min_p = 0.049 }[1])
    assert.same({ [4] = true }, (function()
      local only = {}
      for k in pairs(shares { min_p = 1 }) do only[k] = true end
      return only
    end)())
    -- once seen, 3 becomes 3 / 2 < 2, then 2 becomes 1: 4, 3, and then 4 (1.5 against 1, 1)
    assert.same({ 4, 3, 4, 4 }, alone(m, { 1 }, { temperature = 0, repetition_penalty = 2, max_new_tokens = 4 }))
    -- what is below zero is multiplied: -1 becomes -2
    scores = moe.tensor { -1, -1.5, -3, -3, -3, -3, -3, -3, -3, -3, -3 }
    assert.same({ 2, 1, 1 }, alone(m, { 1 }, { temperature = 0, repetition_penalty = 2, max_new_tokens = 3 }))
    assert.same({ 1, 1 }, alone(m, { 3 }, { temperature = 0, repetition_penalty = 1, max_new_tokens = 2 }))
  end)

  it("says what is wrong", function()
    local m = build(MODELS.mamba)
    local function says(want, ids, options) assert.error_matches(function() m:generate(ids, options) end, want) end
    says("ids%[2%] must hold at least one token", { { 1 }, {} })
    says("ids%[1%]%[2%] must be an integer, got x", { { 1, "x" } })
    says("ids%[2%] must be a list or a tensor of token ids, got a number", { { 1 }, 2 })
    says("ids must hold at least one token", {})
    says("ids must be a list or a tensor of token ids, got a nil", nil)
    says("min_p must be in %[0, 1%], got 2", { 1 }, { min_p = 2 })
    says("repetition_penalty must be a positive number, got 0", { 1 }, { repetition_penalty = 0 })
    says("unknown option 'top_q'", { 1 }, { top_q = 2 })
  end)
end)
