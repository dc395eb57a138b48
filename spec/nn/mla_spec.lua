-- Latent attention against Transformers, its two forms against each other, and its state.
local helper = require "spec.helper"
local moe = require "moe"

local CASES <const> = helper.fixture "mla"

local function make(case, absorb)
  local o = { dtype = "f64", absorb = absorb, rope_scaling = case.rope_scaling }
  for k, v in pairs(case.options) do o[k] = v end
  local m = moe.mixer.mla(o)
  local weights = {}
  for name, w in pairs(case.weights) do weights[name] = moe.tensor(w, { dtype = "f64" }) end
  m:load_state_dict(weights)
  return m
end

local function random_mla(o)
  moe.manual_seed(o and o.seed or 3)
  local given = { d_model = 8, num_heads = 2, kv_lora_rank = 5, qk_rope_head_dim = 4, v_head_dim = 3, dtype = "f64" }
  for k, v in pairs(o or {}) do
    if k ~= "seed" then given[k] = v end
  end
  return moe.mixer.mla(given)
end

describe("mla", function()
  for name, case in pairs(CASES) do
    for _, absorb in ipairs { false, true } do
      it("agrees with Transformers: " .. name .. (absorb and ", absorbed" or ""), function()
        local m = make(case, absorb)
        local x = moe.tensor(case.x, { dtype = "f64", requires_grad = true })
        local y = m(x)
        local close = { rtol = 2e-5, atol = 2e-5 } -- theirs turns and normalises in f32
        assert.close(case.y, y, close)
        ;(y * moe.tensor(case.g, { dtype = "f64" })):sum():backward()
        assert.close(case.dx, x.grad, close)
        local count = 0
        for p, t in m:named_parameters() do
          count = count + 1
          assert.close(case.grads[p], t.grad, { rtol = 2e-5, atol = 2e-5, name = p })
        end
        for _ in pairs(case.grads) do count = count - 1 end
        assert.equal(0, count)
      end)
    end
  end

  it("gives the same by both forms, with masks, windows and packed sequences", function()
    for _, o in ipairs { {}, { q_lora_rank = 3, window = 3 }, { causal = false, bias = true } } do
      local m = random_mla(o)
      local x = moe.randn(2, 7, 8, { dtype = "f64" })
      local one = moe.randn(1, 7, 8, { dtype = "f64" })
      local results = {}
      for _, absorb in ipairs { true, false } do
        m._options.absorb = absorb
        results[#results + 1] = {
          m(x), m(x, nil, { attn_mask = moe.nn.masks.block(7, 7, 3, false) }),
          m(one, nil, { cu_seqlens = moe.tensor({ 0, 3, 3, 7 }, { dtype = "i64" }) }),
        }
      end
      for i = 1, 3 do assert.close(results[1][i], results[2][i], { rtol = 1e-11, atol = 1e-12 }) end
      assert.close(moe.cat({ m(one:narrow(2, 1, 3)), m(one:narrow(2, 4, 4)) }, 2), results[1][3], { rtol = 1e-11, atol = 1e-12 })
    end
  end)

  it("in pieces and token by token equals whole; the state is the latents alone", function()
    for _, absorb in ipairs { "auto", true, false } do
      local m = random_mla { rope_scaling = "linear(factor=2)" }
      if absorb ~= "auto" then m._options.absorb = absorb end
      local x = moe.randn(2, 40, 8, { dtype = "f64", requires_grad = true })
      local whole = m(x)
      local state, parts, at = m:state(2), {}, 1
      for _, n in ipairs { 3, 1, 1, 30, 1, 4 } do
        parts[#parts + 1], state = m(x:narrow(2, at, n), state)
        at = at + n
      end
      assert.same({ 2, 1, 40, 5 + 4 }, state.latent.shape)
      local pieces = moe.cat(parts, 2)
      assert.close(whole, pieces, { rtol = 1e-10, atol = 1e-11 })
      local g = moe.randn(2, 40, 8, { dtype = "f64" })
      local a, b = moe.grad(whole, { x }, { grad_outputs = g })[1], moe.grad(pieces, { x }, { grad_outputs = g })[1]
      assert.close(a, b, { rtol = 1e-9, atol = 1e-10 })
    end
  end)

  it("has gradients", function()
    local m = random_mla { q_lora_rank = 3 }
    moe.gradcheck(function(x) return m(x) end, { moe.randn(1, 4, 8, { dtype = "f64" }) })
    m._options.absorb = true
    moe.gradcheck(function(x, latent) return (m(x, { latent = latent })) end,
      { moe.randn(1, 2, 8, { dtype = "f64" }), moe.randn(1, 1, 3, 9, { dtype = "f64" }) })
  end)

  it("refuses what does not fit", function()
    local m = random_mla()
    local function says(want, f, ...)
      local message = helper.error_of(f, ...)
      assert.truthy(message:find(want, 1, true), message)
    end
    local function z(...) return moe.zeros({ ... }, { dtype = "f64" }) end
    says("mla: x must be [batch, time, 8], got [2, 8]", m, z(2, 8))
    says("mla: state.latent must be [1, 1, time, 9], got [2, 1, 3, 9]", m, z(1, 2, 8), { latent = z(2, 1, 3, 9) })
    says("got a nil", m, z(1, 2, 8), { k = z(1, 1, 3, 9) })
    says("must rise from 0 to the 2 positions", m, z(1, 2, 8), nil, { cu_seqlens = moe.tensor({ 0, 3 }, { dtype = "i64" }) })
    says("packs sequences into a batch of 1", m, z(2, 2, 8), nil, { cu_seqlens = moe.tensor({ 0, 2 }, { dtype = "i64" }) })
    says("there can be no state", m, z(1, 2, 8), m:state(1), { cu_seqlens = moe.tensor({ 0, 2 }, { dtype = "i64" }) })
    says("option 'kv_lora_rank' is missing", moe.mixer.mla, { d_model = 8, num_heads = 2 })
    says("kv_lora_rank must be at least 1, got 0", moe.mixer.mla, { d_model = 8, num_heads = 2, kv_lora_rank = 0 })
    says("qk_rope_head_dim must be even, got 3", moe.mixer.mla, { d_model = 8, num_heads = 2, kv_lora_rank = 4, qk_rope_head_dim = 3 })
    says("did you mean 'q_lora_rank'?", moe.mixer.mla, { d_model = 8, num_heads = 2, kv_lora_rank = 4, q_lora_rnk = 3 })
    says("factor must be given", moe.mixer.mla, { d_model = 8, num_heads = 2, kv_lora_rank = 4, rope_scaling = { rope_type = "linear" } })
    says("unknown field 'faktor'", moe.mixer.mla,
      { d_model = 8, num_heads = 2, kv_lora_rank = 4, rope_scaling = { rope_type = "linear", faktor = 2 } })
  end)
end)
