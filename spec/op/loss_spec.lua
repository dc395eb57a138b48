-- Losses against plain loops and closed forms: reductions, class weights, ignored targets, smoothing, probabilities,
-- the base of class numbers, extreme logits, messages.
local helper = require "spec.helper"
local moe = require "moe"

local inf = math.huge
local i64 = { dtype = "i64" }

local function log_softmax(row)
  local m, s, y = -inf, 0, {}
  for _, v in ipairs(row) do m = math.max(m, v) end
  for _, v in ipairs(row) do s = s + math.exp(v - m) end
  for i, v in ipairs(row) do y[i] = v - m - math.log(s) end
  return y
end

-- Loss and gradient of rows of logits: { loss a row, weight a row, gradient of the sum of losses by the logits }.
local function reference(rows, target, o)
  local s, losses, weights, grads = o.label_smoothing or 0, {}, {}, {}
  for k, row in ipairs(rows) do
    local lp, n = log_softmax(row), #row
    local q = {}
    for c = 1, n do
      local one
      if type(target[k]) == "table" then one = target[k][c] else one = target[k] == c and 1 or 0 end
      q[c] = ((1 - s) * one + s / n) * (o.weight and o.weight[c] or 1)
    end
    -- smoothing of class targets: the uniform part is weighted by each class, the other by the target's: the same q
    local ignored = target[k] == (o.ignore_index or -100)
    local total, loss = 0, 0
    for c = 1, n do
      if ignored then q[c] = 0 end
      total = total + q[c]
      loss = loss - (q[c] == 0 and 0 or q[c] * lp[c])
    end
    losses[k], grads[k] = loss, {}
    weights[k] = ignored and 0 or type(target[k]) == "table" and 1 or o.weight and o.weight[target[k]] or 1
    for c = 1, n do grads[k][c] = total * math.exp(lp[c]) - q[c] end
  end
  return losses, weights, grads
end

local function sum(list)
  local s = 0
  for _, v in ipairs(list) do s = s + v end
  return s
end

describe("cross_entropy", function()
  for _, dtype in ipairs { "f64", "f32" } do
    local tol = dtype == "f64" and { rtol = 1e-11, atol = 1e-12 } or { rtol = 2e-5, atol = 2e-6 }
    for _, size in ipairs { { 1, 1 }, { 4, 2 }, { 5, 7 }, { 7, 65 }, { 3, 128 }, { 300, 33 }, { 2, 5000 } } do
      it(("of %d rows of %d classes, %s"):format(size[1], size[2], dtype), function()
        local r = helper.random(size[1] * size[2])
        local n, classes = size[1], size[2]
        local logits, number, probability, weight = {}, {}, {}, {}
        for c = 1, classes do weight[c] = 0.5 + r() end
        for k = 1, n do
          logits[k], probability[k] = {}, {}
          for c = 1, classes do logits[k][c], probability[k][c] = 3 * r.normal(), r() end
          number[k] = r(classes)
          local total = sum(probability[k])
          for c = 1, classes do probability[k][c] = probability[k][c] * 1.25 / total end -- they need not sum to 1
        end
        local x0 = moe.tensor(logits, { dtype = dtype })
        logits = x0:totable()
        local targets = {
          { number, moe.tensor(number, i64) }, { number, moe.tensor(number, { dtype = "i32" }) },
          { probability, moe.tensor(probability, { dtype = dtype }) },
        }
        for _, target in ipairs(targets) do
          for _, o in ipairs {
            {}, { label_smoothing = 0.1 }, { ignore_index = number[1] }, { weight = weight },
            { weight = weight, label_smoothing = 0.3, ignore_index = number[n] }, { label_smoothing = 1 },
          } do
            local losses, weights, grads = reference(logits, target[1], o)
            for _, reduction in ipairs { "none", "sum", "mean" } do
              local total = sum(weights)
              if reduction ~= "mean" or total > 0 then
                local x = x0:clone()
                x.requires_grad = true
                local y = moe.cross_entropy(x, target[2], {
                  weight = o.weight and moe.tensor(o.weight, { dtype = dtype }), label_smoothing = o.label_smoothing,
                  ignore_index = o.ignore_index, reduction = reduction,
                })
                local by, expected = 1, losses
                if reduction == "mean" then by = total end
                if reduction ~= "none" then expected = sum(losses) / by end
                assert.close(expected, y, tol)
                y:sum():backward()
                local g = {}
                for k = 1, n do
                  g[k] = {}
                  for c = 1, classes do g[k][c] = grads[k][c] / by end
                end
                assert.close(g, x.grad, tol)
              end
            end
          end
        end
      end)
    end
  end

  it("leading dimensions, strided logits, each row's own gradient", function()
    local x = moe.randn(2, 3, 5, { dtype = "f64", requires_grad = true })
    local target = moe.tensor({ { 1, 2, 3 }, { 4, 5, 1 } }, i64)
    local flat = moe.cross_entropy(x:reshape { 6, 5 }, target:reshape { 6 }, { reduction = "none" })
    local y = moe.cross_entropy(x, target, { reduction = "none" })
    assert.same({ 2, 3 }, y.shape)
    assert.close(flat:reshape { 2, 3 }, y, { rtol = 0 })
    for _, view in ipairs(helper.views(x)) do
      assert.close(y, moe.cross_entropy(view[2], target, { reduction = "none" }), { rtol = 0 })
    end
    y:select(1, 1):select(1, 2):backward()
    local norms = x.grad:norm(2, 3):totable()
    assert.is_true(norms[1][2] > 0)
    assert.equal(0, norms[1][1] + norms[1][3] + norms[2][1] + norms[2][2] + norms[2][3])
    -- one row without leading dimensions
    assert.close(y[{ 1, 2 }], moe.cross_entropy(x:detach()[{ 1, 2 }], moe.tensor(2, i64)):item())
  end)

  it("uniform logits cost log C; a sure answer nothing", function()
    assert.close(math.log(65), moe.cross_entropy(moe.zeros(4, 65), moe.ones({ 4 }, i64)):item(), { rtol = 1e-6 })
    assert.equal(0, moe.cross_entropy(moe.tensor { { 1000, 0 } }, moe.tensor({ 1 }, i64)):item())
    assert.close(1000, moe.cross_entropy(moe.tensor { { 1000, 0 } }, moe.tensor({ 2 }, i64)):item())
    assert.equal(inf, moe.cross_entropy(moe.tensor { { 0, -inf } }, moe.tensor({ 2 }, i64)):item())
    -- a masked class takes no part
    local x = moe.tensor({ { 1, -inf, 2 } }, { requires_grad = true })
    local y = moe.cross_entropy(x, moe.tensor({ 1 }, i64))
    assert.close(math.log(1 + math.exp(1)), y:item(), { rtol = 1e-6 })
    y:backward()
    assert.equal(0, x.grad:totable()[1][2])
    -- probabilities of 0 there do neither
    assert.close(math.log(1 + math.exp(1)), moe.cross_entropy(x, moe.tensor { { 1, 0, 0 } }):item(), { rtol = 1e-6 })
  end)

  it("the gradient of probabilities", function()
    local x = moe.randn(3, 4, { dtype = "f64" })
    local t = moe.rand(3, 4, { dtype = "f64", requires_grad = true })
    moe.cross_entropy(x, t, { reduction = "sum", label_smoothing = 0.25 }):backward()
    assert.close(x:log_softmax() * -0.75, t.grad, { rtol = 1e-10 })
  end)

  it("all ignored: NaN as the mean, 0 as the sum; no rows", function()
    local x = moe.randn(2, 3, { requires_grad = true })
    local t = moe.tensor({ -100, -100 }, i64)
    local y = moe.cross_entropy(x, t)
    assert.is_true(y:item() ~= y:item())
    y = moe.cross_entropy(x, t, { reduction = "sum" })
    assert.equal(0, y:item())
    y:backward()
    assert.equal(0, x.grad:norm():item())
    assert.same({ 0 }, moe.cross_entropy(moe.zeros(0, 3), moe.zeros(0, i64), { reduction = "none" }).shape)
  end)

  it("types", function()
    local t = moe.tensor({ 1, 2 }, i64)
    for _, dtype in ipairs { "bf16", "f16" } do
      local x = moe.zeros(2, 4, { dtype = dtype, requires_grad = true })
      local y = moe.cross_entropy(x, t)
      assert.equal(dtype, y.dtype)
      assert.close(math.log(4), y:item(), { rtol = 1e-2 })
      y:backward()
      assert.equal(dtype, x.grad.dtype)
    end
  end)

  it("is the same to the bit for any number of threads", function()
    local x, t = moe.randn(2000, 65), moe.randint(1, 65, { 2000 })
    local function run()
      local v = x:clone()
      v.requires_grad = true
      local y = moe.cross_entropy(v, t)
      y:backward()
      return { y:item(), v.grad:totable() }
    end
    local before = moe.threads()
    moe.threads(1)
    local one = run()
    moe.threads(2)
    assert.same(one, run())
    moe.threads(before)
  end)

  it("messages", function()
    local x = moe.zeros(2, 65)
    local function message(t, o) return helper.error_of(moe.cross_entropy, x, t, o) end
    assert.matches("cross_entropy: target 66 %(element 2%) is out of range: the classes are 1 %.%. 65", message(moe.tensor({ 1, 66 }, i64)))
    assert.matches("target 0 %(element 1%) is out of range: the classes are 1 %.%. 65", message(moe.tensor({ 0, 1 }, i64)))
    assert.matches("target %-1 ", message(moe.tensor({ 1, -1 }, i64)))
    assert.matches("convert it, target:to%(\"i64\"%)", message(moe.tensor { 1, 2 }))
    assert.matches("x is %[2, 65%].* got %[3%]", message(moe.tensor({ 1, 2, 3 }, i64)))
    assert.matches("x is %[2, 65%].* got %[2, 64%]", message(moe.zeros(2, 64)))
    assert.matches("got bool", message(moe.tensor { true, false }))
    assert.matches("label_smoothing must lie in 0 %.%. 1, got 2", message(moe.tensor({ 1, 2 }, i64), { label_smoothing = 2 }))
    assert.matches("weight must be %[65%], a number a class, got %[2%]", message(moe.tensor({ 1, 2 }, i64), { weight = moe.ones(2) }))
    assert.matches("weight has no gradient", helper.error_of(moe.cross_entropy, x, moe.tensor({ 1, 2 }, i64),
      { weight = moe.ones(65, { requires_grad = true }) }))
    assert.matches("must be floating, got i64", helper.error_of(moe.cross_entropy, x:to "i64", moe.tensor({ 1, 2 }, i64)))
    assert.has_error(function() moe.cross_entropy(x, moe.tensor({ 1, 2 }, i64), { reduction = "avg" }) end)
    -- ignored before it is checked, in the numbers that the caller counts in
    assert.close(math.log(65), moe.cross_entropy(x, moe.tensor({ 0, 1 }, i64), { ignore_index = 0 }):item(), { rtol = 1e-6 })
  end)

  it("no class at all", function()
    assert.matches("out of range", helper.error_of(moe.cross_entropy, moe.zeros(2, 0), moe.tensor({ 1, 1 }, i64)))
  end)
end)

describe("nll", function()
  it("of log_softmax is cross_entropy, gradient included", function()
    local t = moe.tensor({ 3, 1, -100, 2 }, i64)
    local w = moe.tensor { 0.5, 1, 2 }
    for _, reduction in ipairs { "mean", "sum", "none" } do
      local x = moe.randn(4, 3, { requires_grad = true })
      local y = moe.nll(x:log_softmax(), t, { weight = w, reduction = reduction })
      y:sum():backward()
      local x2 = x:detach()
      x2.requires_grad = true
      local y2 = moe.cross_entropy(x2, t, { weight = w, reduction = reduction })
      y2:sum():backward()
      assert.close(y2, y, { rtol = 1e-5, atol = 1e-6 })
      assert.close(x2.grad, x.grad, { rtol = 1e-4, atol = 1e-6 })
    end
  end)

  it("messages", function()
    assert.matches("nll: target 4 %(element 1%) is out of range", helper.error_of(moe.nll, moe.zeros(1, 3), moe.tensor({ 4 }, i64)))
    assert.matches("nll: .*must be an integer tensor", helper.error_of(moe.nll, moe.zeros(1, 3), moe.zeros(1, 3)))
  end)
end)

describe("elementwise losses", function()
  local function clip(d, delta) return d > delta and delta or d < -delta and -delta or d end
  -- name -> value, derivative by the input, derivative by the target, options
  local list = {
    { "mse", function(a, b) return (a - b) ^ 2 end, function(a, b) return 2 * (a - b) end, function(a, b) return 2 * (b - a) end },
    { "l1", function(a, b) return math.abs(a - b) end, function(a, b) return clip((a - b) * 1e300, 1) end,
      function(a, b) return clip((b - a) * 1e300, 1) end },
    { "huber", function(a, b)
      local d = math.abs(a - b)
      return d <= 0.7 and d * d / 2 or 0.7 * (d - 0.35)
    end, function(a, b) return clip(a - b, 0.7) end, function(a, b) return clip(b - a, 0.7) end, { delta = 0.7 } },
    { "bce_with_logits", function(a, b) return -(b * math.log(1 / (1 + math.exp(-a))) + (1 - b) * math.log(1 / (1 + math.exp(a)))) end,
      function(a, b) return 1 / (1 + math.exp(-a)) - b end, function(a) return -a end },
    { "kl_div", function(a, b) return b * (math.log(b) - a) end, function(_, b) return -b end,
      function(a, b) return math.log(b) - a + 1 end },
    { "kl_div", function(a, b) return math.exp(b) * (b - a) end, function(_, b) return -math.exp(b) end,
      function(a, b) return math.exp(b) * (b - a + 1) end, { log_target = true } },
  }
  for _, row in ipairs(list) do
    local name, value, da, db, options = table.unpack(row, 1, 5)
    it(name .. (options and options.log_target and " of logarithms" or "") .. ", value and gradients, every reduction", function()
      for _, dtype in ipairs { "f64", "f32" } do
        local tol = dtype == "f64" and { rtol = 1e-10, atol = 1e-12 } or { rtol = 3e-5, atol = 3e-6 }
        for _, n in ipairs { 1, 7, 100, 20000 } do
          local r = helper.random(n)
          local a0 = helper.tensor(function() return 2 * r.normal() end, { n }, { dtype = dtype })
          local b0 = helper.tensor(function() return 0.05 + r() end, { n }, { dtype = dtype })
          local a, b = a0:totable(), b0:totable()
          local each, ga, gb, total = {}, {}, {}, 0
          for i = 1, n do
            each[i], ga[i], gb[i] = value(a[i], b[i]), da(a[i], b[i]), db(a[i], b[i])
            total = total + each[i]
          end
          for _, reduction in ipairs { "none", "sum", "mean", name == "kl_div" and "batchmean" or nil } do
            local o = { reduction = reduction }
            for key, v in pairs(options or {}) do o[key] = v end
            local x, y = a0:clone(), b0:clone()
            x.requires_grad, y.requires_grad = true, true
            local loss = moe[name](x, y, o)
            local by = (reduction == "mean" or reduction == "batchmean") and n or 1
            assert.close(reduction == "none" and each or total / by, loss, tol)
            loss:sum():backward()
            assert.close(ga, x.grad * by, tol)
            assert.close(gb, y.grad * by, tol)
          end
        end
      end
    end)
  end

  it("batchmean divides by the first size", function()
    local a, b = moe.randn(4, 3), moe.rand(4, 3)
    assert.close(moe.kl_div(a, b, { reduction = "sum" }):item() / 4, moe.kl_div(a, b, { reduction = "batchmean" }):item(), { rtol = 1e-5 })
  end)

  it("kl_div: nothing where the target is 0; bce: extreme logits", function()
    assert.close({ 0, math.log(0.5) * 0.5 + 1 }, moe.kl_div(moe.tensor { -inf, -2 }, moe.tensor { 0, 0.5 }, { reduction = "none" }),
      { rtol = 1e-5 })
    assert.close({ 0, 1000, 0, 1000 }, moe.bce_with_logits(moe.tensor { 1000, 1000, -1000, -1000 }, moe.tensor { 1, 0, 0, 1 },
      { reduction = "none" }))
  end)

  it("take strided views and mixed types", function()
    local x, y = moe.randn(3, 4), moe.randn(3, 4)
    for _, name in ipairs { "mse", "l1", "huber" } do
      local e = moe[name](x, y)
      for _, view in ipairs(helper.views(x)) do assert.close(e, moe[name](view[2], y), { rtol = 1e-6 }) end
      assert.equal("f64", moe[name](x:to "f64", y).dtype)
      assert.equal("f32", moe[name](x, y:to "i64").dtype)
      assert.equal("bf16", moe[name](x:to "bf16", y:to "bf16").dtype)
    end
  end)

  it("of nothing: NaN as the mean, 0 as the sum", function()
    local m = moe.mse(moe.zeros(0), moe.zeros(0)):item()
    assert.is_true(m ~= m)
    assert.equal(0, moe.mse(moe.zeros(0), moe.zeros(0), "sum"):item())
  end)

  it("refuse to broadcast", function()
    for _, name in ipairs { "mse", "l1", "huber", "kl_div", "bce_with_logits" } do
      assert.matches(name .. ": input and target must have one shape: input is %[2, 3%], target is %[3%]",
        helper.error_of(moe[name], moe.zeros(2, 3), moe.zeros(3)))
    end
    assert.matches("huber: delta must be positive, got 0", helper.error_of(moe.huber, moe.zeros(2), moe.zeros(2), 0))
  end)
end)

describe("cross entropy as PyTorch computes it", function()
  local fixture = dofile "spec/fixture/cross_entropy.lua"
  for _, case in ipairs(fixture.cases) do
    local name = ("%s targets, weight %s, smoothing %g, %s"):format(case.kind, case.weight, case.smoothing, case.reduction)
    it(name, function()
      for dtype, tol in pairs { f64 = 1e-12, f32 = 2e-5 } do
        local x = moe.tensor(fixture.logits, { dtype = dtype, requires_grad = true })
        local target = case.kind == "class" and moe.tensor(fixture.target, i64) or moe.tensor(fixture.probs, { dtype = dtype })
        local loss = moe.cross_entropy(x, target, {
          weight = case.weight and moe.tensor(fixture.weight, { dtype = dtype }) or nil,
          ignore_index = case.kind == "class" and 0 or nil,
          label_smoothing = case.smoothing, reduction = case.reduction,
        })
        assert.close(case.loss, loss, { rtol = tol, atol = tol })
        local total = case.reduction == "none" and (loss * moe.tensor({ 1, 2, 3, 4, 5 }, { dtype = dtype })):sum() or loss
        total:backward()
        assert.close(case.grad, x.grad, { rtol = tol, atol = tol })
      end
    end)
  end
end)
