local moe = require "moe"
local helper = require "spec.helper"
local schedule = moe.schedule

local function at(f, ...)
  local out = {}
  for i, step in ipairs { ... } do out[i] = f(step) end
  return out
end

describe("schedules", function()
  it("constant", function()
    assert.same({ 1, 1 }, at(schedule.constant(), 1, 1000))
    assert.same({ 0.25, 0.5, 1, 1 }, at(schedule.constant { warmup = 4 }, 1, 2, 4, 5))
  end)

  it("linear", function()
    local f = schedule.linear { warmup = 10, steps = 110, min = 0.2 }
    assert.close({ 0.1, 0.9, 1, 0.6, 0.2, 0.2 }, at(f, 1, 9, 10, 60, 110, 1000))
  end)

  it("cosine", function()
    local f = schedule.cosine { warmup = 100, steps = 1100, min = 0.1 }
    assert.close({ 0.01, 0.5, 1, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.25)), 0.55, 0.1, 0.1 },
      at(f, 1, 50, 100, 350, 600, 1100, 5000))
    assert.close({ 3, 0 }, at(schedule.cosine { steps = 10, max = 3 }, 0, 10), { atol = 1e-12 })
  end)

  it("wsd", function()
    local f = schedule.wsd { warmup = 10, steps = 100, decay = 20, min = 0.5 }
    assert.close({ 0.1, 1, 1, 1, 0.75, 0.5, 0.5 }, at(f, 1, 10, 50, 80, 90, 100, 200))
    assert.close({ 1, 0.5 }, at(schedule.wsd { steps = 100 }, 90, 95))
  end)

  it("compose with functions", function()
    local base = schedule.linear { steps = 10 }
    local f = function(step) return base(step) * 2 end
    assert.close({ 1.8 }, at(f, 1))
  end)

  it("anneal from one value to another", function()
    local linear = schedule.anneal { from = 2, to = 1, start = 10, steps = 20 }
    assert.close({ 2, 2, 1.5, 1, 1 }, at(linear, 1, 10, 15, 20, 99))
    local exponential = schedule.anneal { from = 8, to = 0.5, steps = 4, shape = "exponential" }
    assert.close({ 4, 2, 1, 0.5, 0.5 }, at(exponential, 1, 2, 3, 4, 5))
    local cosine = schedule.anneal { from = 0, to = 4, steps = 4, shape = "cosine" }
    assert.close({ 4 * 0.5 * (1 - math.cos(math.pi / 4)), 2, 4 }, at(cosine, 1, 2, 4))
    local growing = schedule.anneal { from = 1, to = 4, steps = 6, whole = true }
    assert.same({ 2, 2, 3, 3, 4, 4, 4 }, at(growing, 1, 2, 3, 4, 5, 6, 7))
    assert.same({ 3, 5, 5 }, at(schedule.anneal { from = 3, to = 5, start = 2, steps = 2 }, 1, 2, 3)) -- one switch
  end)

  it("stages", function()
    local f = schedule.stages { { 1, 4 }, { 5, 2 }, { 9, "one" } }
    assert.same({ 4, 4, 4, 2, 2, "one", "one" }, at(f, 0, 1, 4, 5, 8, 9, 100))
  end)

  it("sparsify by step and layer", function()
    local switch = schedule.sparsify { from = { 8, 4 }, to = 1, steps = 100 }
    assert.same({ 8, 8, 1, 1 }, { switch(1, 1), switch(99, 1), switch(100, 1), switch(101, 1) })
    assert.same({ 4, 1, 1 }, { switch(99, 2), switch(99, 3), switch(100, 2) })
    local slow = schedule.sparsify { from = 4, steps = 9, start = 0 }
    assert.same({ 4, 4, 3, 3, 3, 2, 2, 2, 1, 1 }, at(slow, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10))
    local late = schedule.sparsify { from = 3, to = 2, start = 4, steps = 6 }
    assert.same({ 3, 3, 3, 2 }, at(late, 1, 4, 5, 6))
    local between = schedule.sparsify { from = 5, start = 10, steps = 18 }
    assert.same({ 5, 5, 4, 4, 3, 3, 2, 2, 1 }, at(between, 10, 11, 12, 13, 14, 15, 16, 17, 18))
    assert.equal(1, schedule.sparsify({ from = 1, steps = 3 })(1))
    assert.equal("integer", math.type(slow(5)))
  end)

  it("capacity by depth: six patterns, one total", function()
    local function over(o, L)
      local f, out = schedule.capacity(o), {}
      for l = 1, L do out[l] = f(l, L) end
      return out
    end
    assert.same({ 8, 8, 8, 8, 8 }, over({ pattern = "uniform", mean = 8 }, 5))
    assert.same({ 12, 10, 8, 6, 4 }, over({ pattern = "descending", mean = 8 }, 5))
    assert.same({ 4, 6, 8, 10, 12 }, over({ pattern = "ascending", mean = 8 }, 5))
    local exact = { 8 - 8 / 3, 8 + 2 / 3, 12, 8 + 2 / 3, 8 - 8 / 3 }
    assert.close(exact, over({ pattern = "pyramid_up", mean = 8, whole = false }, 5))
    assert.same({ 5, 9, 12, 9, 5 }, over({ pattern = "pyramid_up", mean = 8 }, 5))
    assert.same({ 12, 8, 4, 8, 12 }, over({ pattern = "pyramid_down", mean = 8.8, spread = 4.8 / 8.8 }, 5))
    assert.same({ 8, 12, 8, 4, 8 }, over({ pattern = "wave", mean = 8 }, 5))
    assert.same({ 12, 4 }, over({ pattern = "descending", mean = 8 }, 2))
    assert.same({ 8 }, over({ pattern = "wave", mean = 8 }, 1))
    assert.close({ 8, 12, 8, 4, 8, 12, 8, 4, 8 }, over({ pattern = "wave", mean = 8, waves = 2, whole = false }, 9))
    assert.same({ 1, 2 }, over({ pattern = "ascending", mean = 1.5, spread = 1 / 3 }, 2))
    for _, pattern in ipairs { "uniform", "descending", "ascending", "pyramid_up", "pyramid_down", "wave" } do
      for L = 1, 9 do
        for _, mean in ipairs { 2, 3.5, 8, 16 } do
          local counts, shares, sum, share = over({ pattern = pattern, mean = mean }, L),
            over({ pattern = pattern, mean = mean, whole = false, waves = 2 }, L), 0, 0
          for l = 1, L do
            assert.is_true(counts[l] >= 1 and math.type(counts[l]) == "integer")
            assert.is_true(shares[l] >= mean / 2 - 1e-9 and shares[l] <= mean * 1.5 + 1e-9)
            sum, share = sum + counts[l], share + shares[l]
          end
          assert.equal(math.floor(L * mean + 0.5), sum)
          assert.close(L * mean, share, { rtol = 1e-12 })
        end
      end
    end
  end)

  it("depth and the share of tokens by depth", function()
    local function over(f, L)
      local out = {}
      for l = 1, L do out[l] = f(l, L) end
      return out
    end
    assert.close({ 1, 0.75, 0.5 }, over(schedule.depth { from = 1, to = 0.5 }, 3))
    assert.close({ 8, 4, 2 }, over(schedule.depth { from = 8, to = 2, shape = "exponential" }, 3))
    assert.same({ 3, 3, 2, 2 }, over(schedule.depth { from = 3.4, to = 1.6, whole = true }, 4))
    assert.same({ 7 }, over(schedule.depth { from = 7, to = 2 }, 1))
    local share = over(schedule.shifted_cosine {}, 5)
    assert.close({ 1, 0.5 + 0.25 * math.sqrt(2), 0.5, 0.5 - 0.25 * math.sqrt(2), 0 }, share, { atol = 1e-12 })
    assert.close({ 1, 0.75, 0.25 }, over(schedule.shifted_cosine { shift = 0.25 }, 3))
    assert.close({ 0.8, 0.3, 0.1 }, over(schedule.shifted_cosine { shift = -0.2, least = 0.1 }, 3))
    assert.same({ 1, 0.125, 1, 0.125 }, over(schedule.alternate(), 4))
    assert.same({ 1, 1, 0.5 }, over(schedule.alternate { every = 3, share = 0.5 }, 3))
    assert.close({ 1, 0.5, 0.5, 0.25 }, over(schedule.prune { at = { 2, 4 }, keep = 0.5 }, 4))
  end)

  it("now: a number as it is, a function at the context's step and layer", function()
    assert.equal(3, schedule.now(3))
    assert.equal(25, schedule.now(function(step, layer) return step * 10 + layer end, { step = 2, layer_number = 5 }))
    assert.matches("temperature is a function of the step, but ctx has no step",
      helper.error_of(schedule.now, function() end, {}, "temperature"))
  end)

  it("tell what is wrong", function()
    local function wrong(pattern, f, ...) assert.matches(pattern, helper.error_of(f, ...)) end
    wrong("unknown option 'warmpu' %(did you mean 'warmup'", schedule.cosine, { warmpu = 1, steps = 3 })
    wrong("'steps' is missing", schedule.cosine, {})
    wrong("warmup %(5%) is longer than steps %(3%)", schedule.linear, { warmup = 5, steps = 3 })
    wrong("must be a finite number", schedule.constant, { warmup = 0 / 0 })
    wrong("must be a finite number", schedule.constant, { warmup = "x" })
    wrong("longer than steps", schedule.wsd, { warmup = 5, decay = 6, steps = 10 })
    wrong("a table of options", schedule.linear, 3)
    wrong("option 'to' is missing", schedule.anneal, { from = 1, steps = 2 })
    wrong("two numbers of one sign", schedule.anneal, { from = 1, to = 0, steps = 2, shape = "exponential" })
    wrong("start %(5%) is after steps %(2%)", schedule.anneal, { from = 1, to = 0, steps = 2, start = 5 })
    wrong("entry 2 begins at step 1, not after 1", schedule.stages, { { 1, 4 }, { 1, 2 } })
    wrong("wants a list", schedule.stages, {})
    wrong("entry 1 must be { step, value }", schedule.stages, { 4 })
    wrong("from must be a whole number of at least to = 2, got 1", schedule.sparsify, { from = 1, to = 2, steps = 5 })
    wrong("from%[2%] must be a whole number", schedule.sparsify, { from = { 4, 0 }, steps = 5 })
    wrong("needs the number of the layer", schedule.sparsify { from = { 4 }, steps = 5 }, 1)
    wrong("'pattern' must be one of uniform", schedule.capacity, { pattern = "pyramid", mean = 4 })
    wrong("less than one expert", schedule.capacity, { pattern = "wave", mean = 1 })
    wrong("less than one expert", schedule.capacity, { pattern = "uniform", mean = 0.5 })
    wrong("spread must lie in %[0, 1%], got 2", schedule.capacity, { pattern = "wave", mean = 1, spread = 2 })
    wrong("layer 3 of 2", schedule.capacity { pattern = "wave", mean = 4 }, 3, 2)
    wrong("num_layers%) must be a whole number from 1, got false", schedule.depth { from = 1, to = 2 }, 1)
    wrong("keep must lie in", schedule.prune, { at = { 1 }, keep = 0 })
    wrong("at%[1%] must be the number of a layer", schedule.prune, { at = { "x" } })
  end)
end)
