-- Multipliers of a learning rate, or of a coefficient: a warm-up, then a shape.

local check = require("moe.options").check

local M = {}

-- Options with defaults; `known` maps names to defaults, or to `required`.
local required = {}
local function read(fname, options, known)
  options = check(fname, options, known, 4)
  local out = {}
  for k, v in pairs(options) do
    if type(v) ~= "number" or v ~= v or math.abs(v) == math.huge then
      error(("%s: %s must be a finite number, got %s"):format(fname, k, tostring(v)), 3)
    end
    out[k] = v
  end
  for k, default in pairs(known) do
    if out[k] == nil then
      if default == required then error(("%s: the option '%s' is missing"):format(fname, k), 3) end
      out[k] = default
    end
  end
  if out.steps and out.warmup > out.steps then
    error(("%s: warmup (%g) is longer than steps (%g)"):format(fname, out.warmup, out.steps), 3)
  end
  return out
end

-- A rise over the warm-up, then shape(p) for p in [0, 1].
local function ramp(o, shape)
  local span = o.max - o.min
  return function(step)
    if step < o.warmup then return o.max * step / o.warmup end
    local rest = o.steps - o.warmup
    local p = rest > 0 and math.min(1, (step - o.warmup) / rest) or 1
    return o.min + span * shape(p)
  end
end

--- 1 (or `max`) after the warm-up.
function M.constant(options)
  local o = read("constant", options, { warmup = 0, max = 1 })
  return function(step)
    return step < o.warmup and o.max * step / o.warmup or o.max
  end
end

--- A straight line down from the end of the warm-up to `min` at `steps`.
function M.linear(options)
  local o = read("linear", options, { warmup = 0, steps = required, min = 0, max = 1 })
  return ramp(o, function(p) return 1 - p end)
end

--- Half a cosine down from the end of the warm-up to `min` at `steps` (Loshchilov and Hutter, SGDR, 2017).
function M.cosine(options)
  local o = read("cosine", options, { warmup = 0, steps = required, min = 0, max = 1 })
  return ramp(o, function(p) return 0.5 * (1 + math.cos(math.pi * p)) end)
end

--- Warm-up, stable, decay (Hu et al., MiniCPM, 2024): flat until `decay` steps before `steps` (default a tenth of them),
-- then a straight line down to `min`.
function M.wsd(options)
  local o = read("wsd", options, { warmup = 0, steps = required, decay = -1, min = 0, max = 1 })
  if o.decay < 0 then o.decay = o.steps / 10 end
  if o.warmup + o.decay > o.steps then
    error(("wsd: warmup (%g) and decay (%g) are longer than steps (%g)"):format(o.warmup, o.decay, o.steps), 2)
  end
  return function(step)
    if step < o.warmup then return o.max * step / o.warmup end
    local left = o.steps - step
    if left >= o.decay then return o.max end
    return o.min + (o.max - o.min) * math.max(0, left) / o.decay
  end
end

return M
