-- Mixers over linear recurrences: one call, token by token, in pieces and packed give the same numbers; gradients; first values;
-- names of their weights; closed forms; bad input.
local helper = require "spec.helper"
local moe = require "moe"

local D <const> = 16

local MIXERS <const> = {
  { "mamba2", { d_state = 4, headdim = 8, ngroups = 2, chunk_size = 4 } },
  { "mamba2", { d_state = 4, headdim = 8, norm_before_gate = true, D_has_hdim = true, bias = true, conv_bias = false } },
  { "mamba2", { d_state = 3, headdim = 16, rmsnorm = false, d_conv = 2 } },
  { "retention", { num_heads = 2, chunk_size = 4 } },
  { "gla", { num_heads = 2, chunk_size = 4 } },
  { "delta", { num_heads = 2, chunk_size = 4 } },
  { "gated_delta", { num_heads = 2, chunk_size = 5, allow_neg_eigval = true } },
  { "gated_delta", { num_heads = 1, num_v_heads = 3, head_dim = 4, expand_v = 1, use_gate = false } },
  { "kda", { num_heads = 2, chunk_size = 4 } },
  { "lightning", { num_heads = 2, layer = 2, num_layers = 3 } },
  { "based", { num_heads = 2, feature_dim = 3 } },
  { "rwkv7", { head_dim = 8, chunk_size = 4 } },
}

local function make(row, dtype)
  local o = { d_model = D, dtype = dtype }
  for k, v in pairs(row[2]) do o[k] = v end
  moe.manual_seed(4)
  local m = moe.mixer[row[1]](o)
  for name, p in m:named_parameters() do -- what starts at 0 or 1 should matter
    if name:find "lora.0" or name:find "r_k" or row[1] == "rwkv7" and name:find "o_proj" or name:find "bias$" or name:find "norm" then
      moe.no_grad(function() p:detach():add_(moe.randn(p.shape, { dtype = p.dtype }) * 0.2) end)
    end
  end
  return m
end

local function title(row)
  local keys = {}
  for k, v in pairs(row[2]) do keys[#keys + 1] = k .. "=" .. tostring(v) end
  table.sort(keys)
  return row[1] .. " " .. table.concat(keys, " ")
end

describe("recurrent mixers", function()
  for _, row in ipairs(MIXERS) do
    describe(title(row), function()
      it("step by step, in pieces and packed equal the whole", function()
        local m = make(row, "f64")
        local x = moe.randn(2, 13, D, { dtype = "f64" })
        local whole, last = m(x, m:state(2))
        assert.close(m(x), whole, { rtol = 0, atol = 0 })
        for _, size in ipairs { 1, 5 } do
          local parts, state = {}, m:state(2)
          for t = 1, 13, size do
            parts[#parts + 1], state = m(x:narrow(2, t, math.min(size, 14 - t)), state)
          end
          assert.close(whole, moe.cat(parts, 2), { rtol = 1e-9, atol = 1e-11 })
          for name, v in pairs(last) do
            if moe.is_tensor(v) then assert.close(v, state[name], { rtol = 1e-9, atol = 1e-11 }) else assert.same(v, state[name]) end
          end
        end
        local flat = moe.cat({ x[1]:narrow(1, 1, 7), x[2]:narrow(1, 1, 13), x[1]:narrow(1, 8, 1) }, 1):unsqueeze(1)
        local y = m(flat, nil, { cu_seqlens = moe.tensor({ 0, 7, 20, 20, 21 }, { dtype = "i64" }) })
        assert.close(whole[1]:narrow(1, 1, 7), y[1]:narrow(1, 1, 7), { rtol = 1e-9, atol = 1e-11 })
        assert.close(whole[2], y[1]:narrow(1, 8, 13), { rtol = 1e-9, atol = 1e-11 })
        assert.close(m(x:narrow(1, 1, 1):narrow(2, 8, 1)), y:narrow(2, 21, 1), { rtol = 1e-9, atol = 1e-11 })
      end)

      it("sees no later time", function()
        local m = make(row, "f64")
        local x = moe.randn(1, 9, D, { dtype = "f64" })
        local before = m(x):narrow(2, 1, 5)
        x:narrow(2, 6, 4):add_(1)
        assert.close(before, m(x):narrow(2, 1, 5), { rtol = 1e-12, atol = 1e-13 })
        assert.is_true(((m(x) - moe.cat({ before, m(x):narrow(2, 6, 4) }, 2)):abs():amax():item()) < 1e-12)
      end)

      it("has gradients by x, by every weight, into the state and out of it", function()
        local m = make(row, "f64")
        local x = moe.randn(1, 5, D, { dtype = "f64" })
        local _, start = m(moe.randn(1, 3, D, { dtype = "f64" }), m:state(1))
        local names = {}
        for name, v in pairs(start) do
          if moe.is_tensor(v) then names[#names + 1] = name end
        end
        table.sort(names)
        local inputs = { x }
        for i, name in ipairs(names) do inputs[i + 1] = start[name]:detach() end
        local function value(xi, ...)
          local state = { position = start.position }
          for i, name in ipairs(names) do state[name] = (select(i, ...)) end
          local y, after = m(xi, state)
          local out = { y }
          for i, name in ipairs(names) do out[i + 1] = after[name] end
          return table.unpack(out)
        end
        moe.gradcheck(value, inputs)
        local weights = moe.randn(1, 5, D, { dtype = "f64" })
        local function loss() return (m(x) * weights):sum() end
        loss():backward()
        for name, p in m:named_parameters() do -- along one direction
          assert.is_true(p.grad ~= nil, name .. " has no gradient")
          local way = moe.randn(p.shape, { dtype = "f64" })
          local values, eps = p:detach(), 1e-6
          local function at(by)
            values:add_(way * by)
            local v = moe.no_grad(loss):item()
            values:add_(way * -by)
            return v
          end
          local want = (at(eps) - at(-eps)) / (2 * eps)
          local got = (p.grad * way):sum():item()
          assert.is_true(math.abs(want - got) <= 1e-6 * (1 + math.abs(want)), ("%s: %.9g, wanted %.9g"):format(name, got, want))
        end
      end)

      it("takes empty sizes and runs in f32", function()
        local m = make(row)
        assert.same({ 2, 0, D }, m(moe.zeros { 2, 0, D }).shape)
        assert.same({ 0, 3, D }, m(moe.zeros { 0, 3, D }).shape)
        local x = moe.randn(2, 6, D)
        local double = make(row, "f64")
        double:load_state_dict(m:state_dict())
        assert.close(double(x:to "f64"), m(x), { rtol = 1e-3, atol = 1e-4 })
        local y, state = m(moe.zeros { 2, 0, D }, m:state(2))
        assert.same({ 2, 0, D }, y.shape)
        for name, v in pairs(m:state(2)) do
          if moe.is_tensor(v) then assert.close(v, state[name], { rtol = 0, atol = 0 }) end
        end
      end)

      it("says what is wrong", function()
        local m = make(row)
        local name = row[1]
        local function says(want, ...)
          local message = helper.error_of(m, ...)
          assert.truthy(message:find(want, 1, true), message)
        end
        says(name .. ": x must be [batch, time, 16], got [2, 3, 8]", moe.zeros { 2, 3, 8 })
        says(name .. ": x must be [batch, time, 16], got a number", 3)
        says(name .. ": state.", moe.zeros { 2, 3, D }, m:state(1))
        local mixed = m:state(2)
        mixed.recurrent = m:state(1).recurrent
        says(name .. ": state.recurrent must be [2, ", moe.zeros { 2, 3, D }, mixed)
        says(name .. ": the state must be a table", moe.zeros { 2, 3, D }, 1)
        local bad = m:state(2)
        bad.recurrent = nil
        says("got nothing", moe.zeros { 2, 3, D }, bad)
        local x, cu = moe.zeros { 1, 3, D }, moe.tensor({ 0, 3 }, { dtype = "i64" })
        says(name .. ": packed sequences start anew", x, m:state(1), { cu_seqlens = cu })
        local packed = { cu_seqlens = cu }
        says(name .. ": cu_seqlens packs sequences into a batch of 1, but the batch is 2", moe.zeros { 2, 3, D }, nil, packed)
        says(name .. ": cu_seqlens must be integers that rise from 0 to the 4 positions of x", moe.zeros { 1, 4, D }, nil, packed)
        local message = helper.error_of(moe.mixer[name], { d_model = D, chunk_sise = 3 })
        assert.truthy(message:find("did you mean 'chunk_size'", 1, true), message)
        message = helper.error_of(moe.mixer[name], { d_model = 0 })
        assert.truthy(message:find("option 'd_model' must be at least 1, got 0", 1, true), message)
      end)
    end)
  end

  local function rwkv7(layer)
    return moe.mixer.rwkv7 { d_model = 12, num_heads = 2, layer = layer, num_layers = 2, dtype = "f64", chunk_size = 4,
      decay_low_rank_dim = 5, a_low_rank_dim = 5, v_low_rank_dim = 5, gate_low_rank_dim = 5 }
  end

  -- weights, results and gradients of independent modules (spec/fixture/make_mixers.py): Transformers', and the papers' formulas
  for name, options in pairs {
    mamba2 = { d_model = 12, headdim = 6, d_state = 5, ngroups = 2, chunk_size = 4 },
    gated_delta = { d_model = 12, num_heads = 2, num_v_heads = 4, head_dim = 4, expand_v = 1.5, chunk_size = 4 },
    kda = { d_model = 12, num_heads = 2, head_dim = 4, chunk_size = 4 },
    lightning = { d_model = 12, num_heads = 2, head_dim = 4, layer = 2, num_layers = 3, chunk_size = 4 },
    retention = { d_model = 12, num_heads = 2, chunk_size = 4 },
    gla = { d_model = 12, num_heads = 2, gate_low_rank_dim = 3, chunk_size = 4 },
    delta = { d_model = 12, num_heads = 2, chunk_size = 4 },
    rwkv7 = {},
  } do
    it(name .. " is that of an independent implementation", function()
      local fixture, weights = helper.fixture "mixers", {}
      for key, t in pairs(fixture) do
        local weight = key:match("^" .. name .. "%.weight%.(.*)$")
        if weight then weights[weight] = t end
      end
      options.dtype = "f64"
      local m
      if name == "rwkv7" then
        local Two = moe.nn.module "two"
        function Two:forward(x)
          local ctx = {}
          return self[2](self[1](x, nil, ctx), nil, ctx)
        end
        m = Two()
        m[1], m[2] = rwkv7(1), rwkv7(2)
      else
        m = moe.mixer[name](options)
      end
      m:load_state_dict(weights)
      local x = fixture[name .. ".x"]:requires_grad_()
      local y = m(x)
      assert.close(fixture[name .. ".y"], y, { rtol = 2e-5, atol = 1e-6 }) -- parts of theirs run in f32
      y:backward(fixture[name .. ".w"])
      assert.close(fixture[name .. ".gx"], x.grad, { rtol = 1e-4, atol = 1e-5 })
    end)
  end

  it("have the field's names", function()
    local function names(m)
      local list = {}
      for name, p in m:named_parameters() do list[#list + 1] = ("%s [%s]"):format(name, table.concat(p.shape, ", ")) end
      table.sort(list)
      return list
    end
    assert.same({ "A_log [4]", "D [4]", "conv1d.bias [48]", "conv1d.weight [48, 1, 4]", "dt_bias [4]", "in_proj.weight [84, 16]",
      "norm.weight [32]", "out_proj.weight [16, 32]" }, names(moe.mixer.mamba2 { d_model = 16, headdim = 8, d_state = 8 }))
    assert.same({ "A_log [2]", "a_proj.weight [2, 16]", "b_proj.weight [2, 16]", "dt_bias [2]", "g_proj.weight [32, 16]",
      "k_conv1d.weight [16, 1, 4]", "k_proj.weight [16, 16]", "o_norm.weight [16]", "o_proj.weight [16, 32]",
      "q_conv1d.weight [16, 1, 4]", "q_proj.weight [16, 16]", "v_conv1d.weight [32, 1, 4]", "v_proj.weight [32, 16]" },
      names(moe.mixer.gated_delta { d_model = 16, num_heads = 2 }))
    local gla = names(moe.mixer.gla { d_model = 16 })
    assert.same({ "g_norm.weight [4]", "g_proj.weight [16, 16]", "gk_proj.0.weight [16, 16]", "gk_proj.1.bias [8]",
      "gk_proj.1.weight [8, 16]" }, { table.unpack(gla, 1, 5) })
  end)

  it("start as their papers say, and their decays and steps know no weight decay", function()
    moe.manual_seed(2)
    local m = moe.mixer.mamba2 { d_model = 256, headdim = 2 }
    local dt, A = m.dt_bias:softplus(), m.A_log:exp()
    assert.is_true(dt:amin():item() >= 0.00099 and dt:amax():item() <= 0.101 and dt:amax():item() > 0.08)
    assert.is_true(A:amin():item() >= 1 and A:amax():item() <= 16)
    assert.close(math.log(0.01), dt:log():mean():item(), { rtol = 0.05, atol = 0 })
    for _, name in ipairs { "A_log", "dt_bias", "D" } do assert.is_false(moe.nn.decays(m[name])) end
    assert.is_true(moe.nn.decays(m.in_proj.weight))
    for _, kind in ipairs { "gated_delta", "kda" } do
      m = moe.mixer[kind] { d_model = 16, num_heads = 2 }
      assert.is_false(moe.nn.decays(m.A_log) or moe.nn.decays(m.dt_bias))
    end
    m = moe.mixer.rwkv7 { d_model = 64, layer = 1, num_layers = 2 }
    assert.is_false(moe.nn.decays(m.x_r) or moe.nn.decays(m.k_k) or moe.nn.decays(m.w_lora.lora[2].bias))
  end)

  it("based approximates the attention of softmax where scores are small", function()
    moe.manual_seed(1)
    local m = moe.mixer.based { d_model = 8, num_heads = 2, feature_dim = 4, dtype = "f64" }
    local x = moe.randn(1, 12, 8, { dtype = "f64" }) * 0.2
    local function heads(t) return t:reshape { 1, 12, 2, -1 }:transpose(2, 3) end
    local y = moe.attention(heads(m.q_proj(x)), heads(m.k_proj(x)), heads(m.v_proj(x)), { causal = true })
    assert.close(m.o_proj(y:transpose(2, 3):reshape { 1, 12, 8 }), m(x), { rtol = 1e-3, atol = 1e-5 })
  end)

  it("rwkv7's later layers take the first one's values through ctx", function()
    moe.manual_seed(1)
    local function layer(i) return moe.mixer.rwkv7 { d_model = 16, head_dim = 8, layer = i, num_layers = 2, dtype = "f64" } end
    local first, second, ctx = layer(1), layer(2), {}
    local x = moe.randn(1, 4, 16, { dtype = "f64" })
    assert.truthy(helper.error_of(second, x):find("wants ctx.v_first", 1, true))
    local y = second(first(x, nil, ctx), nil, ctx)
    local before = moe.cat({ x:narrow(2, 1, 1) * 0, x:narrow(2, 1, 3) }, 2)
    assert.close(first.v_proj(x + (before - x) * first.x_v), ctx.v_first, { rtol = 1e-12, atol = 1e-12 })
    assert.same({ 1, 4, 16 }, y.shape)
  end)

  it("stand in a language model and learn", function()
    for _, name in ipairs { "mamba2", "retention", "gla", "delta", "gated_delta", "kda", "lightning", "based", "rwkv7" } do
      moe.manual_seed(3)
      local extra = { mamba2 = { headdim = 8, d_state = 8 }, rwkv7 = { head_dim = 8 } }
      local model = moe.model.lm {
        vocab_size = 5, d_model = 16, num_layers = 1, num_heads = 2, positional = "none",
        mixer = function()
          local o = { d_model = 16 }
          for k, v in pairs(extra[name] or { num_heads = 2 }) do o[k] = v end
          return moe.mixer[name](o)
        end,
      }
      local ids = moe.tensor { { 1, 2, 3, 4, 5, 1, 2, 3, 4, 5 } }:to "i64"
      local optimizer = moe.optim.adamw(model, { lr = 1e-2 })
      local losses = {}
      for step = 1, 12 do
        local loss = moe.loss.cross_entropy(model(ids:narrow(2, 1, 9)), ids:narrow(2, 2, 9))
        optimizer:zero_grad()
        loss:backward()
        optimizer:step()
        losses[step] = loss:item()
      end
      assert.is_true(losses[12] < 0.8 * losses[1], ("%s: %.3f -> %.3f"):format(name, losses[1], losses[12]))
    end
  end)
end)
