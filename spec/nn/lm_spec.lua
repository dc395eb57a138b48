-- Language models built from options.
local helper = require "spec.helper" -- luacheck: ignore
local moe = require "moe"
local lm = require("moe.model").lm
local nn = moe.nn

local function merge(a, b)
  local out = {}
  for k, v in pairs(a) do out[k] = v end
  for k, v in pairs(b or {}) do out[k] = v end
  return out
end

local SMALL = { vocab_size = 11, d_model = 8, num_layers = 2, num_heads = 2, max_seq_len = 12 }

local VARIANTS = {
  learned = {},
  rope = { positional = "rope", norm = "rmsnorm", activation = "swiglu", num_kv_heads = 1, tie_embeddings = false, qk_norm = true },
  none = { positional = "none", bias = true, activation = "relu", head_bias = true, tie_embeddings = false },
  mixed = { ffn = { "none", "dense" }, positional = "rope", dropout = 0.1 },
  sparse = { ffn = { "moe", "dense" }, moe = { num_experts = 4, top_k = 2, balance = { moe.loss.switch(0.1) } } },
}

local function tokens(text)
  local out = {}
  for i = 1, #text do out[i] = (text:byte(i) - 97) % 11 + 1 end
  return out
end

describe("lm", function()
  for name, options in pairs(VARIANTS) do
    it("maps ids to logits, and all parameters learn: " .. name, function()
      moe.manual_seed(1)
      local m = lm(merge(SMALL, options))
      local ids = moe.tensor({ tokens "abcdefg", tokens "gfedcba" }, { dtype = "i64" })
      local y = m(ids)
      assert.same({ 2, 7, 11 }, y.shape)
      local loss = y:reshape(-1, 11):cross_entropy(moe.tensor(tokens "bcdefghfedcbaj", { dtype = "i64" })) + m:aux()
      loss:backward()
      for pname, p in m:named_parameters() do
        assert.truthy(p.grad, pname)
        assert.truthy(p.grad:isfinite():all():item(), pname)
      end
    end)

    it("sees nothing of the future: " .. name, function()
      moe.manual_seed(2)
      local m = lm(merge(SMALL, options)):eval()
      local a, b = tokens "abcdefgh", tokens "abcdefgh"
      b[6] = 11
      local y, z = m(moe.tensor({ a }, { dtype = "i64" })), m(moe.tensor({ b }, { dtype = "i64" }))
      assert.same(y:narrow(2, 1, 5):totable(), z:narrow(2, 1, 5):totable())
      assert.is_not.same(y[1][6]:totable(), z[1][6]:totable())
    end)

    it("with a state equals without: " .. name, function()
      moe.manual_seed(3)
      local m = lm(merge(merge(SMALL, options), { dtype = nil })):to("f64"):eval()
      local ids = moe.tensor({ tokens "abcdefghi", tokens "iabbcddef" }, { dtype = "i64" })
      local whole = m(ids)
      local state, parts, start = m:state(2), {}, 1
      for i, n in ipairs { 4, 1, 1, 3 } do
        parts[i], state = m(ids:narrow(2, start, n), nil, state)
        start = start + n
      end
      assert.equal(9, state.position)
      assert.close(whole, moe.cat(parts, 2), { rtol = 1e-9, atol = 1e-10 })
    end)

    it("packed equals one by one: " .. name, function()
      moe.manual_seed(3)
      local m = lm(merge(SMALL, options)):to("f64"):eval()
      local a, b = tokens "abcdefghij", tokens "jihgf"
      local both = table.move(b, 1, #b, #a + 1, { table.unpack(a) })
      local function ids(list) return moe.tensor({ list }, { dtype = "i64" }) end
      local ctx = { cu_seqlens = moe.tensor({ 0, 10, 15 }, { dtype = "i64" }) }
      assert.close(moe.cat({ m(ids(a)), m(ids(b)) }, 2), m(ids(both), ctx), { rtol = 1e-9, atol = 1e-10 })
    end)

    it("generates as computing everything anew does: " .. name, function()
      moe.manual_seed(4)
      local m = lm(merge(SMALL, options)):to "f64"
      local prompt, got = tokens "abc", {}
      for token in m:generate(prompt, { max_new_tokens = 20, temperature = 0 }) do got[#got + 1] = token end
      assert.is_true(m.training)
      assert.equal(3, #prompt)
      local all, want = tokens "abc", {}
      m:eval()
      for i = 1, 20 do
        local window = table.move(all, math.max(1, #all - 11), #all, 1, {})
        want[i] = m(moe.tensor({ window }, { dtype = "i64" })):select(2, -1):argmax():item()
        all[#all + 1] = want[i]
      end
      assert.same(want, got)
    end)

    it("round-trips its state dict and prints: " .. name, function()
      local a, b = lm(merge(SMALL, options)):eval(), lm(merge(SMALL, options)):eval()
      b:load_state_dict(a:state_dict())
      local ids = moe.tensor({ tokens "abcdefg" }, { dtype = "i64" })
      assert.same(a(ids):totable(), b(ids):totable())
      assert.truthy(tostring(a):find("^lm%(vocab_size=11, d_model=8, num_layers=2"))
    end)
  end

  for name, options in pairs {
    gpt = { bias = true, max_seq_len = 6 },
    llama = { positional = "rope", norm = "rmsnorm", activation = "swiglu", num_kv_heads = 1, tie_embeddings = false,
      intermediate_size = 12 },
  } do
    it("equals PyTorch's layers: " .. name, function()
      local case = require("spec.fixture.lm")[name]
      local m = lm(merge({ vocab_size = 7, d_model = 8, num_layers = 2, num_heads = 2 }, options)):to "f64"
      local state = {}
      for k, v in pairs(case.weights) do state[k] = moe.tensor(v, { dtype = "f64" }) end
      m:load_state_dict(state)
      local logits = m(moe.tensor(case.ids, { dtype = "i64" }))
      assert.close(case.logits, logits, { rtol = 1e-7, atol = 1e-8 })
      local loss = logits:reshape(-1, 7):cross_entropy(moe.tensor(case.target, { dtype = "i64" }):reshape(-1))
      assert.close(case.loss, loss:item(), { rtol = 1e-8 })
      loss:backward()
      for k, p in m:named_parameters() do
        local g = p.grad:reshape(-1)
        local direction = moe.arange(1, #g, { dtype = "f64" }):sin()
        assert.close(case.gradients[k], { g:square():sum():item(), (g * direction):sum():item() }, { rtol = 1e-6, atol = 1e-9 })
      end
    end)
  end

  it("of nanoGPT's small setting has its parameters and its start", function()
    moe.manual_seed(5)
    local m = lm { vocab_size = 65, d_model = 128, num_layers = 4, num_heads = 4, max_seq_len = 64 }
    -- wte 65 x 128, wpe 64 x 128, four layers of 12 d^2 + 2 d, the last norm
    assert.equal(65 * 128 + 64 * 128 + 4 * (12 * 128 * 128 + 2 * 128) + 128, m:num_parameters())
    local function std(t) return t:std():item() end
    assert.close(0.02, std(m.embed.weight), { rtol = 0.05 })
    assert.close(0.02, std(m.positions.weight), { rtol = 0.05 })
    assert.close(0.02, std(m.layers[3].mixer.qkv_proj.weight), { rtol = 0.05 })
    assert.close(0.02, std(m.layers[4].ffn.up_proj.weight), { rtol = 0.05 })
    assert.close(0.02 / math.sqrt(8), std(m.layers[1].mixer.o_proj.weight), { rtol = 0.05 })
    assert.close(0.02 / math.sqrt(8), std(m.layers[2].ffn.down_proj.weight), { rtol = 0.05 })
    local ids = moe.randint(1, 65, { 4, 64 })
    local loss = m(ids):reshape(-1, 65):cross_entropy(moe.randint(1, 65, { 256 }))
    assert.close(math.log(65), loss:item(), { rtol = 0.02 })
    assert.is_nil(m.head)
  end)

  it("of makeMoE's setting has its parameters", function()
    local m = lm {
      vocab_size = 65, d_model = 128, num_layers = 8, num_heads = 8, max_seq_len = 32, bias = true, qkv_bias = false, head_bias = true,
      tie_embeddings = false, dropout = 0.1, ffn = "moe", activation = "relu", init = "kaiming_normal", embedding_init = "default",
      bias_init = "default", residual_scale = false,
      moe = { num_experts = 8, router = moe.router.topk {
        top_k = 2, bias = true, init = "kaiming_normal", noise = "learned", noise_in_eval = true } },
    }
    assert.equal(8996545, m:num_parameters())
    assert.close(math.sqrt(2 / 128), m.layers[1].mixer.qkv_proj.weight:std():item(), { rtol = 0.05 })
    assert.close(math.sqrt(2 / 512), m.layers[1].ffn.experts.down_proj:std():item(), { rtol = 0.05 })
    assert.close(math.sqrt(2 / 128), m.head.weight:std():item(), { rtol = 0.05 })
    assert.close(1, m.embed.weight:std():item(), { rtol = 0.05 })
    assert.equal(0.1, m.layers[1].mixer.dropout)
  end)

  it("collects routings and their losses", function()
    moe.manual_seed(6)
    local m = lm(merge(SMALL, { ffn = "moe", moe = { num_experts = 4, top_k = 2, balance = { moe.loss.switch(0.1) } } }))
    local ids = moe.tensor({ tokens "abcdefgh" }, { dtype = "i64" })
    local ctx = { step = 3 }
    m(ids, ctx)
    assert.equal(2, #m.routings)
    assert.equal(2, #ctx.routings)
    assert.is_nil(ctx.token_ids)
    local sum = 0
    for _, routing in ipairs(m.routings) do sum = sum + routing:aux():item() end
    assert.close(sum, m:aux():item())
    assert.truthy(m:aux():item() > 0.1)
    m(ids)
    assert.equal(2, #m.routings)
    local dense = lm(SMALL)
    dense(ids)
    assert.equal(0, dense:aux())
    assert.equal(0, #dense.routings)
  end)

  it("builds layers from functions", function()
    local seen = {}
    local m = lm(merge(SMALL, {
      mixer = function(i)
        seen[#seen + 1] = i
        return nn.attention { d_model = 8, num_heads = i }
      end,
      ffn = { function() return nn.linear(8, 8) end, "none" },
    }))
    assert.same({ 1, 2 }, seen)
    assert.equal(2, m.layers[2].mixer.num_heads)
    assert.is_nil(m.layers[2].ffn)
    assert.same({ 1, 3, 11 }, m(moe.tensor({ { 1, 2, 3 } }, { dtype = "i64" })).shape)
  end)

  it("gives its memory back", function()
    local function live()
      collectgarbage()
      collectgarbage()
      return moe.memory().live
    end
    local before = live()
    do
      local m = lm(SMALL)
      local ids = moe.tensor({ tokens "abcdefgh" }, { dtype = "i64" })
      m(ids):sum():backward()
      for _ in m:generate({ 1 }, { max_new_tokens = 3 }) do break end -- luacheck: ignore
    end
    assert.equal(before, live())
  end)

  it("refuses what does not fit", function()
    local m = lm(SMALL)
    assert.error_matches(function() m(moe.tensor({ 1, 2 }, { dtype = "i64" })) end, "ids must be %[batch, time%], got %[2%]")
    assert.error_matches(function() m(moe.randint(1, 11, { 1, 13 })) end, "13 positions, but max_seq_len is 12")
    assert.error_matches(function() lm(merge(SMALL, { num_layer = 3 })) end, "unknown option 'num_layer' %(did you mean 'num_layers'%?%)")
    assert.error_matches(function() lm { vocab_size = 3, d_model = 4 } end, "is missing")
    assert.error_matches(function() lm { vocab_size = 3, d_model = 4, num_layers = 1 } end, "needs max_seq_len")
    for _, bad in ipairs { { vocab_size = 0 }, { d_model = -1 }, { num_layers = -1 }, { positional = "absolute" }, { dropout = 1 },
      { mixer = { "attention", "attention", "attention" } }, { mixer = "mambo" }, { ffn = "none at all" }, { ffn = "moe" },
      { init = "nope" }, { num_heads = 3 },
      { d_model = 8.5 } } do
      assert.has_error(function() lm(merge(SMALL, bad)) end)
    end
    assert.has_error(function() lm() end)
    assert.has_error(function() lm(3) end)
  end)
end)

describe("generate", function()
  local function model()
    moe.manual_seed(7)
    return lm(SMALL)
  end
  local function take(m, prompt, options)
    local out = {}
    for token in m:generate(prompt, options) do out[#out + 1] = token end
    return out
  end

  it("draws from a seed of its own", function()
    local m = model()
    moe.manual_seed(1)
    local a = take(m, { 1, 2 }, { max_new_tokens = 30, seed = 5 })
    local after = moe.rand(1):item()
    moe.manual_seed(1)
    assert.equal(after, moe.rand(1):item())
    assert.same(a, take(m, moe.tensor({ 1, 2 }, { dtype = "i64" }), { max_new_tokens = 30, seed = 5 }))
    assert.same(a, take(m, moe.tensor({ { 1, 2 } }, { dtype = "i64" }), { max_new_tokens = 30, seed = 5 }))
    assert.is_not.same(a, take(m, { 1, 2 }, { max_new_tokens = 30, seed = 6 }))
    moe.manual_seed(2)
    local b = take(m, { 1, 2 }, { max_new_tokens = 30 })
    moe.manual_seed(2)
    assert.same(b, take(m, { 1, 2 }, { max_new_tokens = 30 }))
  end)

  it("draws by probability", function()
    local m = model()
    -- a model whose logits do not depend on its input: log p = 0, 1, 2, ... of the tied rows
    for _, p in m:named_parameters() do p:detach():fill_(0) end
    local norm = m.norm
    local wanted = moe.tensor { 0, 1, 2, 3, -1e9, -1e9, -1e9, -1e9, -1e9, -1e9, -1e9 }
    m.logits = function(_, x) return norm(x):sum(-1):unsqueeze(-1) * 0 + wanted end
    local function share(options)
      local counts, n = {}, 0
      for token in m:generate({ 1 }, merge({ max_new_tokens = 2000, seed = 1 }, options)) do
        counts[token] = (counts[token] or 0) + 1
        n = n + 1
      end
      for k, v in pairs(counts) do counts[k] = v / n end
      return counts
    end
    local z = 1 + math.exp(1) + math.exp(2) + math.exp(3)
    local plain = share {}
    for i = 1, 4 do assert.close(math.exp(i - 1) / z, plain[i], { atol = 0.03 }) end
    assert.is_nil(plain[5])
    local two = share { top_k = 2 }
    assert.is_nil(two[2])
    assert.close(1 / (1 + math.exp(-1)), two[4], { atol = 0.03 })
    local nucleus = share { top_p = 0.7 }
    assert.is_nil(nucleus[2])
    assert.close(1 / (1 + math.exp(-1)), nucleus[4], { atol = 0.03 })
    assert.same({ [4] = 1 }, share { top_p = 0.5 })
    assert.same({ [4] = 1 }, share { temperature = 0, max_new_tokens = 20 })
    assert.same({ [4] = 1 }, share { temperature = 0.01, max_new_tokens = 20 })
    assert.close(0.25, share { temperature = 1000 }[1], { atol = 0.04 })
  end)

  it("stops", function()
    local m = model()
    local all = take(m, { 1, 2 }, { max_new_tokens = 40, seed = 5 })
    assert.equal(40, #all)
    local function before(set)
      local out = {}
      for _, t in ipairs(all) do
        if set[t] then break end
        out[#out + 1] = t
      end
      return out
    end
    assert.same(before { [all[9]] = true }, take(m, { 1, 2 }, { max_new_tokens = 40, seed = 5, stop = all[9] }))
    local two = { max_new_tokens = 40, seed = 5, stop = { all[7], all[9] } }
    assert.same(before { [all[7]] = true, [all[9]] = true }, take(m, { 1, 2 }, two))
    local n = 0
    local some = take(m, { 1, 2 }, { seed = 5, stop = function()
      n = n + 1
      return n == 6
    end })
    assert.same(table.move(all, 1, 5, 1, {}), some)
    assert.same({}, take(m, { 1 }, { max_new_tokens = 0 }))
  end)

  it("takes a prompt longer than the window, and none that is empty", function()
    local m = model()
    local long = tokens "abcdefghijkabcdefghijk"
    assert.equal(3, #take(m, long, { max_new_tokens = 3 }))
    assert.has_error(function() m:generate {} end)
    assert.has_error(function() m:generate "abc" end)
    assert.has_error(function() m:generate { 1, "x" } end)
    assert.has_error(function() m:generate(moe.ones(2, 2, 2, { dtype = "i64" })) end)
    for _, bad in ipairs { { temperature = -1 }, { top_k = 0 }, { top_p = 0 }, { top_p = 1.1 }, { max_new_tokens = -1 }, { sed = 1 },
      { temperature = 0 / 0 } } do
      assert.has_error(function() m:generate({ 1 }, bad) end)
    end
  end)

  it("puts the training mode back after an error", function()
    local m = model()
    local nextone = m:generate({ 99 }, {})
    assert.has_error(nextone)
    assert.is_true(m.training)
    assert.is_true(m.layers[1].mixer.training)
  end)
end)
