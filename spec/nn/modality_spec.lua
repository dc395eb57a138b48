local moe = require "moe"
local helper = require "spec.helper"

local EXACT = { rtol = 1e-11, atol = 1e-12 }
local function rand(...) return moe.randn({ ... }, { dtype = "f64" }) end
local function i64(t) return moe.tensor(t, { dtype = "i64" }) end
local function wide(m) m:to "f64" return m end

describe("modules by modality", function()
  it("with one modality is the module, to the bit", function()
    moe.manual_seed(1)
    for _, m in ipairs { wide(moe.nn.linear(6, 5)), wide(moe.nn.layernorm { size = 6 }), wide(moe.nn.ffn { d_model = 6 }) } do
      local x = rand(2, 3, 6)
      local y = moe.nn.by_modality { m }(x, { modality_ids = moe.ones({ 2, 3 }, { dtype = "i64" }) })
      assert.same(m(x):totable(), y:totable())
    end
  end)

  it("gives every row to the module of its id, none for 0, and trains those alone", function()
    moe.manual_seed(2)
    local m = wide(moe.nn.by_modality { moe.nn.linear(4, 3), moe.nn.linear(4, 3), moe.nn.linear(4, 3) })
    local x = rand(2, 3, 4)
    x.requires_grad = true
    local ids = i64 { { 3, 1, 0 }, { 1, 3, 3 } }
    local y, routing = m(x, { modality_ids = ids })
    assert.same({ 2, 0, 3 }, routing:load():totable())
    for b, row in ipairs(ids:totable()) do
      for t, id in ipairs(row) do
        assert.close(id == 0 and moe.zeros(3) or m[id](x[b][t]), y[b][t], EXACT)
      end
    end
    y:sum():backward()
    assert.is_nil(m[2].weight.grad)
    assert(moe.gradcheck(function(input) return m(input, { modality_ids = ids }):sin():sum() end, { x, m[3].weight }))
    assert.close(moe.zeros(2, 3, 4), (m(x, { modality_ids = i64 { { 0, 0, 0 }, { 0, 0, 0 } } })))
  end)

  it("takes an id a sequence, another field, and sparse layers that see their part of the context", function()
    moe.manual_seed(3)
    local function layer() return moe.layer { d_model = 4, num_experts = 2, dtype = "f64", router = moe.router.topk { top_k = 1 },
      experts = moe.experts.mlp { intermediate_size = 3 }, balance = { moe.loss.switch(1) } } end
    local m = moe.nn.by_modality({ layer(), layer() }, { by = "task_ids" })
    local x, ctx = rand(2, 3, 4), { task_ids = i64 { 2, 1 }, mask = moe.tensor { { 1, 1, 1 }, { 1, 0, 1 } }:ne(0) }
    local y = m(x, ctx)
    assert.close(m[2](x[1]), y[1], EXACT)
    assert.close(moe.zeros(4), y[2][2])
    assert.equal(2, #ctx.routings)
    assert.equal(1, ctx.routings[1].masked)
  end)

  it("says what is wrong", function()
    local function says(want, f, ...)
      local message = helper.error_of(f, ...)
      assert.truthy(message:find(want, 1, true), message)
    end
    says("argument 1 must be a list of modules, one a modality, got an empty one", moe.nn.by_modality, {})
    says("part 2 must be a module, got a number", moe.nn.by_modality, { moe.nn.linear(2, 2), 3 })
    local m = moe.nn.by_modality { moe.nn.linear(2, 2), moe.nn.linear(2, 2) }
    says("ctx.modality_ids must be a tensor of ids, got a nil", m, moe.randn(3, 2), {})
    says("ctx.modality_ids is [2], x has [3]", m, moe.randn(3, 2), { modality_ids = i64 { 1, 2 } })
    says("3", m, moe.randn(3, 2), { modality_ids = i64 { 1, 2, 3 } })
  end)
end)

describe("a layer of weights by modality", function()
  for _, n in ipairs { 1, 2 } do
    it("with tied weights is the dense layer: " .. n, function()
      moe.manual_seed(4)
      local attention = moe.mixer.attention { d_model = 8, num_heads = 4, num_kv_heads = 2, bias = false, rope = true }
      local dense = wide(moe.model.block { d_model = 8, mixer = attention, ffn = moe.nn.ffn { d_model = 8, bias = false } })
      local m = wide(moe.nn.modality_block { d_model = 8, num_modalities = n, num_heads = 4, num_kv_heads = 2, rope = true })
      m.norm1:copy_from(dense.norm1)
      m.norm2:copy_from(dense.norm2)
      m.ffn:copy_from(dense.ffn)
      for i = 1, n do
        m.mixer.qkv_proj[i]:load_state_dict { weight = dense.mixer:state_dict()["qkv_proj.weight"] }
        m.mixer.o_proj[i]:load_state_dict { weight = dense.mixer:state_dict()["o_proj.weight"] }
      end
      local x, ctx = rand(2, 5, 8), { modality_ids = moe.randint(1, n, { 2, 5 }) }
      local want = dense(x)
      assert.close(want, (m(x, nil, ctx)), EXACT)
      local state, parts = m.mixer:state(2), {}
      for t = 1, 5 do parts[t], state = m(x:narrow(2, t, 1), state, { modality_ids = ctx.modality_ids:narrow(2, t, 1) }) end
      assert.close(want, moe.cat(parts, 2), EXACT)
      local packed = { modality_ids = ctx.modality_ids:reshape { 1, 10 }, cu_seqlens = i64 { 0, 5, 10 } }
      assert.close(want, m(x:reshape { 1, 10, 8 }, nil, packed):reshape { 2, 5, 8 }, EXACT)
    end)
  end

  it("works in a language model with ids from the caller", function()
    moe.manual_seed(5)
    local lm = moe.model.lm { vocab_size = 9, d_model = 8, num_layers = 2, num_heads = 2, max_seq_len = 8 }
    for i = 1, 2 do lm.layers[i] = moe.nn.modality_block { d_model = 8, num_modalities = 2, num_heads = 2 } end
    local ids = moe.randint(1, 9, { 2, 6 })
    lm(ids, { modality_ids = ids:gt(4):to "i64" + 1 }):sum():backward()
    for name, p in lm:named_parameters() do assert.truthy(p.grad, name) end
  end)
end)
