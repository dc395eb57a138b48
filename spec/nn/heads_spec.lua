local moe = require "moe"
local helper = require "spec.helper"

local EXACT = { rtol = 1e-11, atol = 1e-12 }
local function i64(t) return moe.tensor(t, { dtype = "i64" }) end
local function rand(...) return moe.randn({ ... }, { dtype = "f64" }) end

-- Every expert, each with weight 1.
local function all_on(x, ctx)
  local E = ctx.layer.num_experts
  return moe.routing.topk(moe.arange(1, E):to "i64":reshape { 1, E }:expand { x:size(1), E }:contiguous(), nil, E)
end

local function pair(o)
  moe.manual_seed(5)
  local plain = moe.mixer.attention { d_model = 12, num_heads = 4, num_kv_heads = o.num_kv_heads, bias = false, causal = o.causal }
  plain:to "f64"
  o.d_model, o.num_heads, o.dtype, o.router = 12, 4, "f64", o.router or all_on
  return plain, moe.mixer.mixture_of_heads(o):copy_from(plain)
end

describe("mixture of heads", function()
  for name, o in pairs {
    plain = {}, ["grouped keys"] = { num_kv_heads = 2 }, ["both ways"] = { causal = false }, ["keys of the chosen"] = { keys = "chosen" },
    ["keys of the chosen, both ways"] = { keys = "chosen", causal = false },
  } do
    it("with every head on and weights of 1 is plain attention, forward and backward: " .. name, function()
      local plain, moh = pair(o)
      local x, g = rand(2, 9, 12), rand(2, 9, 12)
      local xs = { x:clone(), x:clone() }
      for i, m in ipairs { plain, moh } do
        xs[i].requires_grad = true
        local y = m(xs[i])
        ;(y * g):sum():backward()
        xs[i] = { y:detach(), xs[i].grad }
      end
      assert.close(xs[1][1], xs[2][1], EXACT)
      assert.close(xs[1][2], xs[2][2], EXACT)
    end)
  end

  it("turns chosen queries by their own positions, also when continued and packed", function()
    moe.manual_seed(1)
    local plain = moe.mixer.attention { d_model = 8, num_heads = 2, bias = false, rope = true }
    plain:to "f64"
    local moh = moe.mixer.mixture_of_heads { d_model = 8, num_heads = 2, rope = true, router = all_on, dtype = "f64" }:copy_from(plain)
    local x = rand(2, 6, 8)
    local want = plain(x)
    assert.close(want, (moh(x)), EXACT)
    local state, parts = moh:state(2), {}
    for _, piece in ipairs { { 1, 3 }, { 4, 1 }, { 5, 2 } } do
      parts[#parts + 1], state = moh(x:narrow(2, piece[1], piece[2]), state)
    end
    assert.close(want, moe.cat(parts, 2), EXACT)
    local cu = { cu_seqlens = i64 { 0, 6, 12 } }
    assert.close(want, moh(x:reshape { 1, 12, 8 }, nil, cu):reshape { 2, 6, 8 }, EXACT)
    local mask = moe.rand(2, 1, 6, 6):gt(0.4)
    assert.close(plain(x, nil, { attn_mask = mask }), (moh(x, nil, { attn_mask = mask })), EXACT)
  end)

  it("weighs the chosen heads alone", function()
    local index, weight = i64 { { 1, 3 }, { 2, 4 }, { 0, 1 }, { 4, 3 }, { 0, 0 } }, rand(5, 2)
    local plain, moh = pair { router = function() return moe.routing.topk(index, weight, 4) end }
    local x = rand(1, 5, 12)
    -- each head by itself: plain attention whose output projection keeps that head's columns
    local heads, out = {}, plain:state_dict()["o_proj.weight"]
    local kept = out:clone()
    for h = 1, 4 do
      out:fill_(0)
      out:narrow(2, 3 * h - 2, 3):copy_(kept:narrow(2, 3 * h - 2, 3))
      heads[h] = plain(x):detach()
    end
    local want = moe.zeros({ 1, 5, 12 }, { dtype = "f64" })
    for t, row in ipairs(index:totable()) do
      for j, h in ipairs(row) do
        if h > 0 then want[1][t]:add_(heads[h][1][t] * weight[t][j]) end
      end
    end
    assert.close(want, (moh(x)), EXACT)
  end)

  it("attends among the chosen alone where keys are theirs", function()
    moe.manual_seed(12)
    local index = i64 { { 1, 2 }, { 2, 0 }, { 1, 0 }, { 0, 0 }, { 1, 2 }, { 1, 0 } }
    local m = moe.mixer.mixture_of_heads { d_model = 6, num_heads = 2, head_dim = 4, keys = "chosen", rope = true, dtype = "f64",
      router = function() return moe.routing.topk(index, nil, 2) end }
    local x = rand(2, 3, 6)
    x.requires_grad = true
    local want = moe.zeros({ 2, 3, 6 }, { dtype = "f64" })
    for b, heads in ipairs { { { 1, 3 }, { 1, 2 } }, { { 2, 3 }, { 2 } } } do
      for h, at in ipairs(heads) do
        local positions = i64(at)
        local rows = x[b]:index_select(1, positions):detach()
        local k, v = rows:linear(m.experts.kv_proj[h]):split(4, 2)
        local function head(t) return t:reshape { 1, 1, #at, 4 } end
        local q = head(rows:linear(m.experts.q_proj[h])):rope(positions - 1)
        local y = moe.attention(q, head(k):rope(positions - 1), head(v), { causal = true }):reshape { #at, 4 }:linear(m.experts.o_proj[h])
        for i, t in ipairs(at) do want[b][t]:add_(y[i]:detach()) end
      end
    end
    assert.close(want, (m(x)), EXACT)
    assert(moe.gradcheck(function(input) return (m(input)):sin():sum() end, { x, m.experts.kv_proj, m.experts.q_proj }))
    assert.truthy(helper.error_of(m, x, {}):find("takes neither a state", 1, true))
    assert.truthy(helper.error_of(m.state, m, 1):find("has no state", 1, true))
  end)

  it("does work for the chosen alone", function()
    moe.manual_seed(3)
    local m = moe.mixer.mixture_of_heads { d_model = 8, num_heads = 4, router = function(x)
      return moe.routing.topk(moe.zeros({ x:size(1), 1 }, { dtype = "i64" }), nil, 4)
    end }
    local x = moe.randn(2, 5, 8)
    local y, _, routing = m(x)
    assert.equal(0, routing.num_assignments)
    assert.close(moe.zeros(2, 5, 8), y)
    -- a weight that no assignment touches is never read: NaN in it stays where it is
    local some = moe.mixer.mixture_of_heads { d_model = 8, num_heads = 4, router = function(rows)
      return moe.routing.topk(moe.full({ rows:size(1), 1 }, 2):to "i64", nil, 4)
    end }
    moe.no_grad(function()
      some.experts.q_proj[1]:fill_(0 / 0)
      some.experts.o_proj[3]:fill_(0 / 0)
    end)
    assert.is_true(some(x):isfinite():all():item())
  end)

  it("routes by two stages, trains router and heads, and keeps masked tokens out", function()
    moe.manual_seed(4)
    local m = moe.mixer.mixture_of_heads { d_model = 12, num_heads = 6, num_shared = 2, top_k = 2, balance = { moe.loss.switch(0.1) } }
    local x = moe.randn(2, 5, 12)
    local mask = moe.tensor { { 1, 1, 1, 0, 0 }, { 1, 1, 1, 1, 1 } }:ne(0)
    local ctx = { mask = mask }
    local y, state, routing = m(x, nil, ctx)
    assert.is_nil(state)
    assert.equal(8 * 4, routing.num_assignments)
    assert.same({ 8, 8 }, { table.unpack(routing:load():totable(), 1, 2) })
    assert.equal(ctx.routing, routing)
    assert.equal(1, #ctx.routings)
    assert.close(moe.zeros(2, 12), y[1]:narrow(1, 4, 2))
    ;(y:square():sum() + routing:aux()):backward()
    for name, p in m:named_parameters() do
      assert.is_true(p.grad and p.grad:abs():sum():item() > 0, name)
    end
    assert.equal(1, m:stats().forwards)
  end)

  it("passes the gradient check", function()
    moe.manual_seed(6)
    local m = moe.mixer.mixture_of_heads {
      d_model = 4, num_heads = 4, head_dim = 2, num_kv_heads = 2, num_shared = 1, top_k = 2, dtype = "f64", rope = true,
    }
    local x = rand(2, 3, 4)
    x.requires_grad = true
    local parameters = m:parameters()
    assert(moe.gradcheck(function(input) return (m(input)):sin():sum() end, { x, table.unpack(parameters) }))
  end)

  it("knows empty sizes, and other types", function()
    moe.manual_seed(13)
    for _, m in ipairs {
      moe.mixer.mixture_of_heads { d_model = 8, num_heads = 4, num_shared = 1, top_k = 2, rope = true },
      moe.mixer.mixture_of_heads { d_model = 8, num_heads = 4, keys = "chosen" },
      moe.mixer.mixture_of_attention { d_model = 8, num_experts = 4, attention = "stick_breaking" },
      moe.mixer.stick_breaking { d_model = 8, num_heads = 2 },
    } do
      assert.same({ 2, 0, 8 }, (m(moe.zeros(2, 0, 8))).shape)
      assert.same({ 0, 3, 8 }, (m(moe.zeros(0, 3, 8))).shape)
      local x = moe.randn(2, 5, 8)
      assert.close(m(x):totable(), moe.autocast("bf16", function() return (m(x)) end):to "f32", { rtol = 0.1, atol = 0.1 })
      x.requires_grad = true
      local plain = m(x)
      plain:square():sum():backward()
      local grad = x.grad
      x.grad = nil
      moe.checkpoint(function(input) return (m(input)) end, x):square():sum():backward()
      assert.close(grad, x.grad, { rtol = 1e-5, atol = 1e-6 })
    end
  end)

  it("says what is wrong", function()
    local function says(want, o)
      local message = helper.error_of(moe.mixer.mixture_of_heads, o)
      assert.truthy(message:find(want, 1, true), message)
    end
    says("option 'num_heads' is missing", { d_model = 8 })
    says("d_model = 8 is no multiple of num_heads = 3", { d_model = 8, num_heads = 3 })
    says("give either them or a router", { d_model = 8, num_heads = 2, top_k = 1, router = all_on })
    says("head_dim must be even, got 1", { d_model = 4, num_heads = 4, rope = true })
    says("num_kv_heads = 3 does not divide the 4 heads", { d_model = 8, num_heads = 4, num_kv_heads = 3 })
    says("did you mean 'num_shared'", { d_model = 8, num_heads = 4, num_share = 3 })
    local m = moe.mixer.mixture_of_heads { d_model = 8, num_heads = 2, top_k = 1 }
    assert.truthy(helper.error_of(m, moe.randn(3, 8)):find("mixture_of_heads: x must be [batch, time, 8], got [3, 8]", 1, true))
  end)
end)

describe("mixture of attention heads", function()
  it("with one expert is plain attention of one head over its keys", function()
    moe.manual_seed(8)
    local plain = moe.mixer.attention { d_model = 6, num_heads = 1, head_dim = 4, bias = false }
    plain:to "f64"
    local moa = moe.mixer.mixture_of_attention { d_model = 6, num_experts = 1, head_dim = 4, router = all_on, dtype = "f64" }
    moa:copy_from(plain)
    local x = rand(2, 5, 6)
    assert.close(plain(x), (moa(x)), EXACT)
  end)

  for _, kind in ipairs { "softmax", "stick_breaking" } do
    it("is each expert's heads over shared keys, weighed: " .. kind, function()
      moe.manual_seed(9)
      local m = moe.mixer.mixture_of_attention {
        d_model = 6, num_experts = 5, top_k = 2, heads_per_expert = 2, head_dim = 3, dtype = "f64", attention = kind,
      }
      local x = rand(2, 4, 6)
      local y, _, routing = m(x)
      local k, v = m.kv_proj(x):reshape { 2, 4, 2, 2, 3 }:permute { 3, 1, 4, 2, 5 }:unbind(1)
      local want = moe.zeros({ 8, 6 }, { dtype = "f64" })
      local token, expert, weight = routing.token:totable(), routing.expert:totable(), routing.weight:totable()
      for e = 1, 5 do
        local q = x:linear(m.experts.q_proj[e]):reshape { 2, 4, 2, 3 }:transpose(2, 3)
        local h = kind == "softmax" and moe.attention(q, k, v, { causal = true }) or (moe.stick_breaking(q, k, v))
        local out = h:transpose(2, 3):reshape { 8, 6 }:linear(m.experts.o_proj[e])
        for a = 1, #token do
          if expert[a] == e then want[token[a]]:add_(out[token[a]]:detach() * weight[a]) end
        end
      end
      assert.close(want:reshape { 2, 4, 6 }, y, EXACT)
    end)
  end

  it("takes any router of the library, and passes the gradient check", function()
    moe.manual_seed(10)
    local m = moe.mixer.mixture_of_attention {
      d_model = 4, num_experts = 3, heads_per_expert = 2, head_dim = 2, dtype = "f64", attention = "stick_breaking",
      router = function(x, ctx) -- each expert chooses tokens, some none: an uneven load
        local index = i64 { { 5, 1, 2 }, { 0, 3, 0 }, { 0, 0, 0 } }
        return moe.routing.experts(index, x:sum(-1):narrow(1, 1, 3):reshape { 1, 3 }:expand { 3, 3 }:contiguous(), x:size(1)), ctx
      end,
    }
    local x = rand(2, 3, 4)
    x.requires_grad = true
    assert(moe.gradcheck(function(input) return (m(input)):sin():sum() end, { x, m.experts.q_proj, m.experts.o_proj, m.kv_proj.weight }))
  end)

  it("works in a language model, whose losses reach it", function()
    moe.manual_seed(11)
    local lm = moe.model.lm { vocab_size = 11, d_model = 8, num_layers = 2, max_seq_len = 6, mixer = function()
      return moe.mixer.mixture_of_attention { d_model = 8, num_experts = 4, top_k = 2, balance = { moe.loss.switch(1) } }
    end }
    local ids = moe.randint(1, 11, { 2, 5 })
    local logits = lm(ids)
    assert.is_true(lm:aux():item() >= 1.9) -- two layers, each about 1 at balance and never below by much
    logits:sum():backward()
    local state, parts = lm:state(2), {}
    for t = 1, 5 do parts[t], state = lm(ids:narrow(2, t, 1), nil, state) end
    assert.close(logits, moe.cat(parts, 2), { rtol = 1e-4, atol = 1e-5 })
  end)
end)
