-- rope against PyTorch, its formula, and what makes it a rotation by relative position.
local helper = require "spec.helper"
local moe = require "moe"

describe("rope", function()
  for name, case in pairs(helper.fixture "rope") do
    it("agrees with PyTorch: " .. name, function()
      local x = moe.tensor(case.x, { dtype = "f64", requires_grad = true })
      local options = { base = case.base, offset = case.offset, interleaved = case.interleaved }
      if case.positions then options.positions = moe.tensor(case.positions, { dtype = "i64" }) end
      local y = moe.rope(x, options)
      local loss = (y * moe.tensor(case.g, { dtype = "f64" })):sum()
      loss:backward()
      assert.close(case.y, y, { rtol = 1e-8, atol = 2e-9 })
      assert.close(case.dx, x.grad, { rtol = 1e-8, atol = 2e-9 })
      local single = moe.rope(moe.tensor(case.x), options)
      assert.close(case.y, single, { rtol = 1e-6, atol = 1e-6 })
    end)
  end

  it("turns each pair by its formula, far along in f32 too", function()
    local t, d, offset = 700, 6, 100000
    local x = moe.ones { t, d }
    for _, interleaved in ipairs { false, true } do
      local y = moe.rope(x, { offset = offset, interleaved = interleaved }):totable()
      for p = 1, t, 37 do
        for i = 0, d // 2 - 1 do
          local angle = (offset + p - 1) * 10000.0 ^ (-2 * i / d)
          local first, second = i + 1, i + 1 + d // 2
          if interleaved then first, second = 2 * i + 1, 2 * i + 2 end
          assert.close(math.cos(angle) - math.sin(angle), y[p][first], { rtol = 0, atol = 1e-6 })
          assert.close(math.cos(angle) + math.sin(angle), y[p][second], { rtol = 0, atol = 1e-6 })
        end
      end
    end
  end)

  it("makes products depend on the distance alone", function()
    local q, k = moe.randn({ 1, 8 }, { dtype = "f64" }), moe.randn({ 1, 8 }, { dtype = "f64" })
    for _, interleaved in ipairs { false, true } do
      local function score(p, s)
        local turned = moe.rope(k, { offset = s, interleaved = interleaved })
        return (moe.rope(q, { offset = p, interleaved = interleaved }) * turned):sum():item()
      end
      assert.close(score(5, 2), score(105, 102), { rtol = 1e-10 })
      assert.is_true(math.abs(score(5, 2) - score(5, 3)) > 1e-6)
    end
  end)

  it("leaves what lies beyond `dim` as it is", function()
    local x = moe.randn(2, 5, 7)
    local y = moe.rope(x, { dim = 4 })
    assert.close(x:narrow(3, 5, 3), y:narrow(3, 5, 3), { rtol = 0, atol = 0 })
    assert.close(moe.rope(x:narrow(3, 1, 4)), y:narrow(3, 1, 4), { rtol = 0, atol = 0 })
    assert.close(x, moe.rope(x, { dim = 0 }), { rtol = 0, atol = 0 })
  end)

  it("is the same in one call and in pieces, and for positions that count", function()
    local x = moe.randn(2, 3, 9, 4)
    local whole = moe.rope(x)
    local pieces = moe.cat({ moe.rope(x:narrow(3, 1, 4)), moe.rope(x:narrow(3, 5, 5), { offset = 4 }) }, 3)
    assert.close(whole, pieces, { rtol = 1e-6, atol = 1e-6 })
    local counted = helper.tensor(function(i) return i - 1 end, { 9 }, { dtype = "i64" })
    assert.close(whole, moe.rope(x, { positions = counted }), { rtol = 1e-6, atol = 1e-6 })
    local packed = helper.tensor(function(i) return (i - 1) % 9 // 3 end, { 2, 1, 9 }, { dtype = "i64" })
    local y = moe.rope(x, { positions = packed })
    assert.close(moe.rope(x:narrow(3, 2, 1), { offset = 0 }), y:narrow(3, 2, 1), { rtol = 1e-6, atol = 1e-6 })
    assert.close(moe.rope(x:narrow(3, 8, 1), { offset = 2 }), y:narrow(3, 8, 1), { rtol = 1e-6, atol = 1e-6 })
  end)

  it("takes heads that lie inside of positions, and keeps them there", function()
    local x = moe.randn(2, 5, 3, 4)
    local heads = x:transpose(2, 3)
    local y = moe.rope(heads)
    assert.close(moe.rope(heads:contiguous()), y, { rtol = 0, atol = 0 })
    assert.is_true(y:transpose(2, 3):is_contiguous())
  end)

  it("folds more dims than four", function()
    local x = moe.randn(2, 2, 3, 2, 5, 4)
    local positions = helper.tensor(function(i) return (i * 13) % 11 end, { 2, 1, 1, 2, 5 }, { dtype = "i64" })
    local y = moe.rope(x, { positions = positions })
    for a = 1, 2 do
      for b = 1, 2 do
        assert.close(moe.rope(x[a][b][3], { positions = positions[a][1][1] }), y[a][b][3], { rtol = 1e-6, atol = 1e-6 })
      end
    end
  end)

  it("says what is wrong", function()
    local function says(want, ...)
      local message = helper.error_of(moe.rope, ...)
      assert.truthy(message:find(want, 1, true), message)
    end
    says("rope: dim, the part of a row that turns, must be even and at most the size 5, got 5", moe.zeros { 2, 5 })
    says("must be even and at most the size 4, got 6", moe.zeros { 2, 4 }, { dim = 6 })
    says("rope: x must be [.., positions, size], got [4]", moe.zeros { 4 })
    says("rope: base must be positive", moe.zeros { 2, 4 }, { base = -1 })
    says("positions must hold numbers and broadcast to x's shape [2, 4] without its last dim, got i64 [3]", moe.zeros { 2, 4 },
      { positions = moe.zeros({ 3 }, { dtype = "i64" }) })
    assert.same({ 0, 4 }, moe.rope(moe.zeros { 0, 4 }).shape)
  end)

  for name, case in pairs(helper.fixture "rope_scaling") do
    it("turns by the frequencies of Transformers: " .. name, function()
      local x = moe.zeros({ 1, case.dim }, { dtype = "f64" })
      x:narrow(2, 1, case.dim // 2):fill_(1) -- turned: cosines, then sines
      local scaling = moe.nn.rope_scaling(case.scaling)
      for _, how in ipairs { { offset = case.length - 1 }, { positions = moe.tensor({ case.length - 1 }, { dtype = "i64" }) } } do
        how.base, how.scaling = case.base, scaling
        local y, want = x:rope(how), {}
        for i, f in ipairs(case.freq) do
          want[i] = case.factor * math.cos((case.length - 1) * f)
          want[i + case.dim // 2] = case.factor * math.sin((case.length - 1) * f)
        end
        assert.close({ want }, y, { rtol = 3e-5, atol = 3e-5 }) -- theirs are of f32
      end
    end)
  end

  it("scales by ntk: the highest frequency stays, the lowest is divided", function()
    local x = moe.tensor({ { 1, 1, 1, 0, 0, 0 } }, { dtype = "f64" })
    local y = x:rope { offset = 3, base = 100, scaling = "ntk(factor=4)" }:totable()[1]
    assert.close({ math.cos(3), math.cos(3 * 100 ^ (-2 / 3) / 4) }, { y[1], y[3] }, { rtol = 1e-12 })
  end)

  it("says what is wrong with a scaling", function()
    for text, want in pairs {
      ["yern(factor=2)"] = "it is none of linear, ntk, dynamic, yarn, llama3", ["linear"] = "it must be name(field=number, ...)",
      ["linear(factor=2"] = "it must be name(field=number, ...)", ["linear(factor=)"] = "it must be name(field=number, ...)",
      ["linear(beta_fast=2)"] = "it has a field that is not known to it", ["linear()"] = "factor must be given, and be at least 1",
      ["linear(factor=0.5)"] = "factor must be given, and be at least 1",
      ["linear(factor=nan)"] = "factor must be given, and be at least 1",
      ["dynamic(factor=2)"] = "original_max_position_embeddings must be given, and be positive",
    } do
      local message = helper.error_of(moe.rope, moe.zeros(2, 4), { scaling = text })
      assert.truthy(message:find(("rope: rope scaling '%s': %s"):format(text, want), 1, true), message)
    end
  end)
end)
