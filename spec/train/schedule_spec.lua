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

  it("tell what is wrong", function()
    local function wrong(pattern, f, ...) assert.matches(pattern, helper.error_of(f, ...)) end
    wrong("unknown option 'warmpu' %(did you mean 'warmup'", schedule.cosine, { warmpu = 1, steps = 3 })
    wrong("'steps' is missing", schedule.cosine, {})
    wrong("warmup %(5%) is longer than steps %(3%)", schedule.linear, { warmup = 5, steps = 3 })
    wrong("must be a finite number", schedule.constant, { warmup = 0 / 0 })
    wrong("must be a finite number", schedule.constant, { warmup = "x" })
    wrong("longer than steps", schedule.wsd, { warmup = 5, decay = 6, steps = 10 })
    wrong("a table of options", schedule.linear, 3)
  end)
end)
