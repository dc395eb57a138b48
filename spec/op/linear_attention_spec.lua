-- Linear recurrences: the chunked kernel and the step-by-step one against a loop over time made of plain operations,
-- values and gradients; states, packed sequences, threads, extreme decays, bad input.
local helper = require "spec.helper"
local moe = require "moe"

local function random(rng, shape, dtype)
  return helper.tensor(function() return rng.normal() end, shape, { dtype = dtype or "f64" })
end

-- The definition, time by time: S [b, h, dk, dv], rows as columns [b, h, dk, 1] and as rows [b, h, 1, dv].
local function naive(q, k, v, o)
  local b, t, h, dk, dv = v:size(1), v:size(2), v:size(3), k:size(4), v:size(4)
  local group = h // k:size(3)
  local function spread(x)
    return x and x:unsqueeze(4):expand { b, t, k:size(3), group, dk }:reshape { b, t, h, dk }
  end
  local function at(x, i) return x:narrow(2, i, 1):squeeze(2) end
  q, k = spread(q), spread(k)
  local read, write = spread(o.a), spread(o.b)
  local scale = o.scale or dk ^ -0.5
  local S = o.initial_state or moe.zeros({ b, h, dk, dv }, { dtype = v.dtype })
  local out = {}
  for i = 1, t do
    local qi, ki, vi = at(q, i):unsqueeze(4), at(k, i):unsqueeze(4), at(v, i):unsqueeze(3)
    local before = S
    if o.decay then
      local d = o.decay
      d = d:dim() == 1 and d:reshape { 1, h, 1, 1 } or d:dim() == 3 and at(d, i):reshape { b, h, 1, 1 } or at(d, i):unsqueeze(4)
      S = S * d:exp()
    end
    local by = o.beta and at(o.beta, i):reshape { b, h, 1, 1 } or 1
    if o.delta then
      S = S + ki * ((vi - (S * ki):sum(3, true)) * by)
    else
      if o.a then S = S + at(write, i):unsqueeze(4) * (before * at(read, i):unsqueeze(4)):sum(3, true) end
      S = S + ki * (vi * by)
    end
    if o.bonus then
      local own = (qi * o.bonus:reshape { 1, h, dk, 1 } * ki):sum(3, true)
      out[i] = ((before * qi):sum(3, true) + own * (vi * by)) * scale
    else
      out[i] = (S * qi):sum(3, true) * scale
    end
  end
  return #out > 0 and moe.cat(out, 3):transpose(2, 3) or moe.zeros({ b, 0, h, dv }, { dtype = v.dtype }), S
end

-- The members of the family, by their options; sizes are b, t, heads of q, heads, dk, dv.
local FAMILY <const> = {
  { "linear attention", {}, function() return {} end },
  { "retention", {}, function(_, s) return { decay = helper.tensor(function(i) return -0.05 * i end, { s.h }, { dtype = "f64" }) } end },
  { "Mamba-2", { hk = 1 }, function(r, s)
    return { decay = -random(r, { s.b, s.t, s.h }):abs(), beta = random(r, { s.b, s.t, s.h }), scale = 1 }
  end },
  { "gated linear attention", { wide = true }, function(r, s) return { decay = -random(r, { s.b, s.t, s.h, s.dk }):abs() } end },
  { "DeltaNet", {}, function(r, s) return { delta = true, beta = random(r, { s.b, s.t, s.h }):sigmoid() } end, unit = true },
  { "gated DeltaNet", { hk = 1 }, function(r, s)
    return { delta = true, beta = random(r, { s.b, s.t, s.h }):sigmoid(), decay = -random(r, { s.b, s.t, s.h }):abs() }
  end, unit = true },
  { "Kimi delta attention", { wide = true }, function(r, s)
    return { delta = true, beta = random(r, { s.b, s.t, s.h }):sigmoid(), decay = -random(r, { s.b, s.t, s.h, s.dk }):abs() }
  end, unit = true },
  { "RWKV-6", { wide = true }, function(r, s)
    return { decay = -random(r, { s.b, s.t, s.h, s.dk }):abs(), bonus = random(r, { s.h, s.dk }), scale = 1 }
  end },
  { "RWKV-7", { wide = true }, function(r, s)
    local kk = random(r, { s.b, s.t, s.hk, s.dk })
    kk = kk / (kk * kk):sum(4, true):sqrt()
    return { decay = -random(r, { s.b, s.t, s.h, s.dk }):abs(), a = -kk, b = kk * random(r, { s.b, s.t, s.hk, s.dk }):sigmoid(), scale = 1 }
  end },
  { "low rank, one decay a head", {}, function(r, s)
    return { decay = -random(r, { s.b, s.t, s.h }):abs(), a = random(r, { s.b, s.t, s.hk, s.dk }) * 0.3,
      b = random(r, { s.b, s.t, s.hk, s.dk }) * 0.3 }
  end },
}

local function inputs(row, t, dtype, seed)
  local s = { b = 2, t = t, h = 2, hk = row[2].hk or 2, dk = 5, dv = 3 }
  local r = helper.random(seed or 7)
  local q, k, v = random(r, { s.b, t, s.hk, s.dk }), random(r, { s.b, t, s.hk, s.dk }), random(r, { s.b, t, s.h, s.dv })
  if row.unit then k = k / (k * k):sum(4, true):sqrt() end
  local o = row[3](r, s)
  o.initial_state = random(r, { s.b, s.h, s.dk, s.dv })
  if dtype then
    q, k, v = q:to(dtype), k:to(dtype), v:to(dtype)
    for name, x in pairs(o) do
      if moe.is_tensor(x) then o[name] = x:to(dtype) end
    end
  end
  return q, k, v, o
end

local function with(o, more)
  local out = {}
  for name, x in pairs(o) do out[name] = x end
  for name, x in pairs(more) do out[name] = x end
  return out
end

local GRADED <const> = { "q", "k", "v", "decay", "beta", "a", "b", "bonus", "initial_state" }

-- Results and all gradients of f under a loss in which every result has its own weights.
local function run(f, q, k, v, o)
  local leaf = { q = q, k = k, v = v }
  for _, name in ipairs(GRADED) do leaf[name] = leaf[name] or o[name] end
  local given = with(o, {})
  for name, x in pairs(leaf) do
    leaf[name] = x:detach():clone()
    leaf[name].requires_grad = true
    if name ~= "q" and name ~= "k" and name ~= "v" then given[name] = leaf[name] end
  end
  local y, S = f(leaf.q, leaf.k, leaf.v, given)
  local r = helper.random(3)
  local loss = (y * random(r, y.shape, y.dtype)):sum() + (S * random(r, S.shape, S.dtype)):sum()
  loss:backward()
  local out = { y = y:detach(), S = S:detach() }
  for name, x in pairs(leaf) do out["d" .. name] = x.grad end
  return out
end

local function agree(expected, got, tolerance)
  for name, x in pairs(expected) do
    assert.close(x, got[name], { rtol = tolerance, atol = tolerance, message = name })
  end
end

describe("linear_attention", function()
  for i, row in ipairs(FAMILY) do
    describe(row[1], function()
      for _, case in ipairs { { 37, 64 }, { 70, 33 }, { 9, 4 }, { 5, 1 }, { 1, 64 } } do
        local t, chunk = table.unpack(case)
        it(("length %d in chunks of %d: values and gradients of the loop"):format(t, chunk), function()
          local q, k, v, o = inputs(row, t)
          agree(run(naive, q, k, v, o), run(moe.linear_attention, q, k, v, with(o, { chunk_size = chunk })), 1e-9)
        end)
      end

      -- wide decays take larger or smaller blocks, or go pair by pair, as strong as they are
      for _, times in ipairs(row[2].wide and { 9, 20, 70 } or {}) do
        it(("with decays %d times as strong"):format(times), function()
          local q, k, v, o = inputs(row, 70)
          o.decay = o.decay * times
          agree(run(naive, q, k, v, o), run(moe.linear_attention, q, k, v, with(o, { chunk_size = 50 })), 1e-9)
        end)
      end

      it("in f32", function()
        local q, k, v, o = inputs(row, 45)
        local expected = run(naive, q, k, v, o)
        local q4, k4, v4, o4 = inputs(row, 45, "f32")
        agree(expected, run(moe.linear_attention, q4, k4, v4, with(o4, { chunk_size = 32 })), 2e-4)
      end)

      it("token by token and in pieces, by the state", function()
        local q, k, v, o = inputs(row, 20)
        local whole, last = moe.linear_attention(q, k, v, with(o, { chunk_size = 16 }))
        for _, size in ipairs { 1, 7 } do
          local parts, S = {}, o.initial_state
          for t = 1, 20, size do
            local n = math.min(size, 21 - t)
            local cut = { initial_state = S }
            for _, name in ipairs { "decay", "beta", "a", "b" } do
              if o[name] and o[name]:dim() > 1 then cut[name] = o[name]:narrow(2, t, n) end
            end
            local y
            y, S = moe.linear_attention(q:narrow(2, t, n), k:narrow(2, t, n), v:narrow(2, t, n), with(o, cut))
            parts[#parts + 1] = y
          end
          assert.close(whole, moe.cat(parts, 2), { rtol = 1e-11, atol = 1e-11 })
          assert.close(last, S, { rtol = 1e-11, atol = 1e-11 })
        end
      end)

      it("packed sequences are those alone, gradients too", function()
        local q, k, v, o = inputs(row, 15, nil, 10 + i)
        local function pack(x) return x:reshape { 1, 30, table.unpack(x.shape, 3) } end
        local lengths = { 0, 4, 4, 21, 30 }
        local packed = with(o, { initial_state = random(helper.random(5), { 4, 2, 5, 3 }) })
        for _, name in ipairs { "decay", "beta", "a", "b" } do
          if o[name] and o[name]:dim() > 1 then packed[name] = pack(o[name]) end
        end
        q, k, v = pack(q), pack(k), pack(v)
        local function alone(qx, kx, vx, ox)
          local ys, Ss = {}, {}
          for s = 1, 4 do
            local from, n = lengths[s] + 1, lengths[s + 1] - lengths[s]
            local cut = { initial_state = ox.initial_state:narrow(1, s, 1) }
            for _, name in ipairs { "decay", "beta", "a", "b" } do
              if ox[name] and ox[name]:dim() > 1 then cut[name] = ox[name]:narrow(2, from, n) end
            end
            ys[s], Ss[s] = naive(qx:narrow(2, from, n), kx:narrow(2, from, n), vx:narrow(2, from, n), with(ox, cut))
          end
          return moe.cat(ys, 2), moe.cat(Ss, 1)
        end
        local cu = moe.tensor(lengths, { dtype = "i64" })
        agree(run(alone, q, k, v, packed), run(function(qx, kx, vx, ox)
          return moe.linear_attention(qx, kx, vx, with(ox, { cu_seqlens = cu, chunk_size = 8 }))
        end, q, k, v, packed), 1e-9)
      end)
    end)
  end

  -- values and gradients of flash-linear-attention's plain loops (spec/fixture/make_recurrence.py)
  local fixture = helper.fixture "recurrence"
  for _, name in ipairs { "gla", "delta", "gated_delta", "kda", "rwkv6", "rwkv7" } do
    it("agrees with an independent " .. name, function()
      for _, chunk in ipairs { 64, 6, 1 } do
        local arg, o = {}, { delta = name:find "delta" ~= nil or name == "kda", chunk_size = chunk }
        for _, key in ipairs { "q", "k", "v", table.unpack(GRADED, 4) } do
          local x = fixture[name .. "." .. key]
          if x then
            arg[key] = x:clone():requires_grad_()
            if #key > 1 or key == "a" or key == "b" then o[key] = arg[key] end
          end
        end
        local y, S = moe.linear_attention(arg.q, arg.k, arg.v, o)
        assert.close(fixture[name .. ".o"], y, { rtol = 1e-5, atol = 2e-6 })
        assert.close(fixture[name .. ".state"], S, { rtol = 1e-5, atol = 2e-6 })
        moe.backward({ y, S }, { fixture[name .. ".go"], fixture[name .. ".gstate"] })
        for key, x in pairs(arg) do
          assert.close(fixture[name .. ".grad." .. key], x.grad, { rtol = 1e-4, atol = 1e-5, message = key })
        end
      end
    end)
  end

  it("gives the same bits on any number of threads", function()
    local before = moe.threads()
    for _, row in ipairs { FAMILY[3], FAMILY[7], FAMILY[9] } do
      local q, k, v, o = inputs(row, 50, "f32")
      local function all(n)
        moe.threads(n)
        return run(moe.linear_attention, q, k, v, with(o, { chunk_size = 24 }))
      end
      local one, two = all(1), all(2)
      moe.threads(before)
      for name, x in pairs(one) do assert.same(helper.flatten(x), helper.flatten(two[name]), name) end
    end
  end)

  it("a decay to nothing starts anew, and leaves no NaN", function()
    for _, wide in ipairs { false, true } do
      local r = helper.random(3)
      local q, k, v = random(r, { 1, 40, 1, 4 }), random(r, { 1, 40, 1, 4 }), random(r, { 1, 40, 1, 3 })
      local decay = helper.tensor(function(i) return (wide and (i - 1) // 4 + 1 or i) == 23 and -math.huge or -1e-3 end,
        wide and { 1, 40, 1, 4 } or { 1, 40, 1 }, { dtype = "f64" })
      for _, chunk in ipairs { 64, 16, 1 } do
        local g = run(moe.linear_attention, q, k, v, { decay = decay, chunk_size = chunk })
        local tail = moe.linear_attention(q:narrow(2, 23, 18), k:narrow(2, 23, 18), v:narrow(2, 23, 18),
          { decay = moe.full(wide and { 1, 18, 1, 4 } or { 1, 18, 1 }, -1e-3, { dtype = "f64" }) })
        assert.close(tail, g.y:narrow(2, 23, 18), { rtol = 1e-12, atol = 1e-12 })
        for _, x in pairs(g) do assert.is_true(x:isfinite():all():item()) end
      end
    end
  end)

  it("keeps its precision behind strong decays", function() -- differences of cumulative logarithms in f32 lose it
    local r = helper.random(9)
    local q, k, v = random(r, { 1, 64, 1, 8 }), random(r, { 1, 64, 1, 8 }), random(r, { 1, 64, 1, 4 })
    for _, shape in ipairs { { 1, 64, 1 }, { 1, 64, 1, 8 } } do
      local decay = helper.tensor(function(i) return i % 3 == 0 and -3e4 or -0.01 end, shape, { dtype = "f64" })
      local expected = moe.linear_attention(q, k, v, { decay = decay, chunk_size = 1 })
      local got = moe.linear_attention(q:to "f32", k:to "f32", v:to "f32", { decay = decay:to "f32" })
      assert.close(expected, got, { rtol = 1e-5, atol = 1e-5 })
    end
  end)

  it("decays above one grow as they say", function()
    local r = helper.random(4)
    local q, k, v = random(r, { 1, 30, 1, 3 }), random(r, { 1, 30, 1, 3 }), random(r, { 1, 30, 1, 2 })
    local o = { decay = random(r, { 1, 30, 1, 3 }) * 0.3 }
    agree(run(naive, q, k, v, o), run(moe.linear_attention, q, k, v, o), 1e-9)
  end)

  it("the delta rule with unit keys and beta 1 gives back the value just written", function()
    local r = helper.random(8)
    local k, v = random(r, { 1, 40, 1, 6 }), random(r, { 1, 40, 1, 5 })
    k = k / (k * k):sum(4, true):sqrt()
    local y, S = moe.linear_attention(k, k, v, { delta = true, scale = 1 })
    assert.close(v, y, { rtol = 1e-10, atol = 1e-10 })
    local none = moe.zeros({ 1, 40, 1 }, { dtype = "f64" })
    local same = moe.linear_attention(k, k, v, { delta = true, beta = none, initial_state = S, scale = 1 })
    assert.close(moe.matmul(k:squeeze(3), S:squeeze(2)), same:squeeze(3), { rtol = 1e-10, atol = 1e-10 }) -- beta 0: nothing changes
  end)

  it("without decay is the lower triangle of q k^T times v", function()
    local r = helper.random(2)
    local q, k, v = random(r, { 2, 150, 3, 4 }), random(r, { 2, 150, 3, 4 }), random(r, { 2, 150, 3, 5 })
    local function heads(x) return x:transpose(2, 3) end
    local expected = (moe.matmul(heads(q), heads(k):transpose(3, 4)) * 0.5):tril():matmul(heads(v))
    assert.close(heads(expected), moe.linear_attention(q, k, v, { chunk_size = 128 }), { rtol = 1e-10, atol = 1e-10 })
  end)

  it("NaN stays in its sequence", function()
    local r = helper.random(2)
    local q, k, v = random(r, { 3, 20, 2, 4 }), random(r, { 3, 20, 2, 4 }), random(r, { 3, 20, 2, 4 })
    local decay = -random(r, { 3, 20, 2, 4 }):abs()
    local clean = moe.linear_attention(q, k, v, { decay = decay })
    v[2][5][1][1] = 0 / 0
    decay[2][7][2][3] = 0 / 0
    local y, S = moe.linear_attention(q, k, v, { decay = decay })
    for _, b in ipairs { 1, 3 } do
      assert.same(helper.flatten(clean[b]), helper.flatten(y[b]))
      assert.is_true(S[b]:isfinite():all():item())
    end
    assert.is_true(y[2]:select(2, 1):isnan():any():item() and y[2]:select(2, 2):isnan():any():item())
  end)

  it("keeps a state a chunk for the backward, not one a time", function()
    local x = moe.randn(1, 512, 1, 32, { requires_grad = true })
    collectgarbage()
    collectgarbage()
    local before = moe.memory().live
    local y, S = moe.linear_attention(x, x, x, { chunk_size = 64 })
    local kept = moe.memory().live - before
    assert.is_true(kept <= 4 * (512 * 32 + (512 // 64 + 2) * 32 * 32) + 4096, "kept " .. kept)
    y:close()
    S:close()
  end)

  it("takes a chunk longer than any sequence", function()
    local q, k, v, o = inputs(FAMILY[4], 20)
    agree(run(moe.linear_attention, q, k, v, o), run(moe.linear_attention, q, k, v, with(o, { chunk_size = math.maxinteger })), 1e-12)
  end)

  it("takes sizes of zero", function()
    local function z(...) return moe.zeros { ... } end
    local y, S = moe.linear_attention(z(2, 0, 3, 4), z(2, 0, 3, 4), z(2, 0, 3, 5), { initial_state = moe.ones { 2, 3, 4, 5 } })
    assert.same({ 2, 0, 3, 5 }, y.shape)
    assert.same(2 * 3 * 4 * 5, S:sum():item())
    y, S = moe.linear_attention(z(0, 4, 3, 4), z(0, 4, 3, 4), z(0, 4, 3, 5))
    assert.same({ { 0, 4, 3, 5 }, { 0, 3, 4, 5 } }, { y.shape, S.shape })
    y = moe.linear_attention(z(1, 4, 3, 0), z(1, 4, 3, 0), moe.ones { 1, 4, 3, 5 })
    assert.same(0, y:sum():item())
    y, S = moe.linear_attention(z(1, 0, 3, 4), z(1, 0, 3, 4), z(1, 0, 3, 5), { cu_seqlens = moe.tensor({ 0 }, { dtype = "i64" }) })
    assert.same({ { 1, 0, 3, 5 }, { 0, 3, 4, 5 } }, { y.shape, S.shape })
  end)

  it("says what is wrong", function()
    local function z(...) return moe.zeros { ... } end
    local function says(want, ...)
      local message = helper.error_of(moe.linear_attention, ...)
      assert.truthy(message:find(want, 1, true), message)
    end
    local q, v = z(2, 4, 2, 3), z(2, 4, 2, 5)
    says("linear_attention: q must be [batch, time, heads, width], got [2, 3]", z(2, 3), q, v)
    says("k must be as q = [2, 4, 2, 3], got [2, 4, 2, 4]", q, z(2, 4, 2, 4), v)
    says("batch or time differ (dims 1 and 2): q is [2, 4, 2, 3]", q, q, z(2, 5, 2, 5))
    says("v's heads must be a multiple of q's (dim 3)", q, q, z(2, 4, 3, 5))
    says("decay must be [batch, time, heads] (or [heads] or [.., width of k]) = [2, 4, 2], got [2, 4, 1]", q, q, v, z(2, 4, 1))
    says("decay must be [heads]", q, q, v, z(3))
    says("beta must be [batch, time, heads] = [2, 4, 2], got [2, 4, 2, 3]", q, q, v, { beta = q })
    says("a and b come together", q, q, v, { a = q })
    says("cannot come with a and b", q, q, v, { a = q, b = q, delta = true })
    says("bonus is for sums", q, q, v, { bonus = z(2, 3), delta = true })
    says("bonus must be [heads, width of k] = [2, 3], got [3]", q, q, v, { bonus = z(3) })
    says("initial_state must be [sequences, heads, width of k, width of v] = [2, 2, 3, 5], got [2, 2, 5, 3]", q, q, v,
      { initial_state = z(2, 2, 5, 3) })
    says("chunk_size must be at least 1, got 0", q, q, v, { chunk_size = 0 })
    says("v must be of a floating-point type", q, q, v:to "i64")
    local q1, v1 = z(1, 4, 2, 3), z(1, 4, 2, 5)
    local function cu(list, dtype) return { cu_seqlens = moe.tensor(list, { dtype = dtype or "i64" }) } end
    says("cu_seqlens packs sequences into a batch of 1, but the batch is 2", q, q, v, cu { 0, 4 })
    says("cu_seqlens must be integers [sequences + 1], got f32", q1, q1, v1, cu({ 0, 4 }, "f32"))
    says("cu_seqlens must run from 0 to the 4 times of q, got 0 .. 3", q1, q1, v1, cu { 0, 3 })
    says("cu_seqlens must not fall: element 3 is 1 after 3", q1, q1, v1, cu { 0, 3, 1, 4 })
  end)
end)
