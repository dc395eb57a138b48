-- What goes from one value to another over the steps: temperatures, thresholds, the experts of a token.

local options = require "moe.nn.options"

local M = {}

local ANNEAL <const> = {
  from = { "number", options.required }, to = { "number", options.required }, steps = { "number", options.required },
  start = { "number", 0 }, shape = { { "linear", "exponential", "cosine" }, "linear" }, whole = { "boolean", false },
}

-- The way from a to b at p in [0, 1].
local SHAPES <const> = {
  linear = function(a, b, p) return a + (b - a) * p end,
  exponential = function(a, b, p) return a * (b / a) ^ p end,
  cosine = function(a, b, p) return b + (a - b) * 0.5 * (1 + math.cos(math.pi * p)) end,
}
M._shapes = SHAPES

local function check_shape(name, o)
  if o.shape == "exponential" and o.from * o.to <= 0 then
    error(("%s: an exponential way needs two numbers of one sign other than 0, got %g and %g"):format(name, o.from, o.to), 3)
  end
end
M._check_shape = check_shape

--- From one value to another between the steps `start` and `steps`, and flat on both sides. With p = (step - start) / (steps
-- - start): "linear" from + (to - from) p, "exponential" from * (to / from)^p, "cosine" by half a cosine. whole = true
-- rounds. A temperature: anneal{ from = 2, to = 0.3, steps = 1000, shape = "exponential" } (Jang et al. 2017, arXiv
-- 1611.01144; linear in EvoMoE, arXiv 2112.14397); a growing k: anneal{ from = 1, to = 8, steps = 1000, whole = true }
-- (SMoE-Dropout, arXiv 2303.01610).
function M.anneal(given)
  local o = options.read("schedule.anneal", given, ANNEAL)
  check_shape("schedule.anneal", o)
  if o.start > o.steps then error(("schedule.anneal: start (%g) is after steps (%g)"):format(o.start, o.steps), 2) end
  local way = SHAPES[o.shape]
  return function(step)
    local span = o.steps - o.start
    local p = step >= o.steps and 1 or step <= o.start and 0 or (step - o.start) / span
    local v = p == 0 and o.from or p == 1 and o.to or way(o.from, o.to, p)
    return o.whole and math.floor(v + 0.5) or v
  end
end

--- The value of the last stage that has begun. stages{ { 1, 4 }, { 500, 2 }, { 900, 1 } } is 4 up to step 499, then 2, then 1
-- from step 900 on. The first stage counts from the beginning. A value may be anything.
function M.stages(list)
  if type(list) ~= "table" or #list == 0 then error("schedule.stages: wants a list of { step, value }", 2) end
  for i, stage in ipairs(list) do
    if type(stage) ~= "table" or type(stage[1]) ~= "number" or stage[2] == nil then
      error(("schedule.stages: entry %d must be { step, value }"):format(i), 2)
    elseif i > 1 and stage[1] <= list[i - 1][1] then
      error(("schedule.stages: entry %d begins at step %g, not after %g"):format(i, stage[1], list[i - 1][1]), 2)
    end
  end
  return function(step)
    local value = list[1][2]
    for i = 2, #list do
      if step < list[i][1] then break end
      value = list[i][2]
    end
    return value
  end
end

local SPARSIFY <const> = {
  from = { "integer|table", options.required }, to = { "integer", 1 }, steps = { "number", options.required },
  start = { "number" },
}

--- Progressive sparsification of the experts of a token, a function (step, layer), for `top_k` of a router. `from` up to the
-- step `start`, `to` from the step `steps` on; between them whole numbers for equally many steps each. Without `start` it is
-- one switch at `steps`. from: a number, or a list by layer; layers beyond the list have `to` throughout: balance breaks down
-- in the lowest layers, which begin with more. (Sigma-MoE-Tiny, arXiv 2512.16248, which switches late in training.)
function M.sparsify(given)
  local o = options.read("schedule.sparsify", given, SPARSIFY)
  local by_layer = type(o.from) == "table" and o.from
  for i, k in ipairs(by_layer or { o.from }) do
    if math.type(k) ~= "integer" or k < o.to then
      error(("schedule.sparsify: from%s must be a whole number of at least to = %d, got %s"):format(
        by_layer and "[" .. i .. "]" or "", o.to, tostring(k)), 2)
    end
  end
  if o.to < 1 then error(("schedule.sparsify: to must be at least 1, got %d"):format(o.to), 2) end
  local start = o.start or o.steps
  if start > o.steps then error(("schedule.sparsify: start (%g) is after steps (%g)"):format(start, o.steps), 2) end
  return function(step, layer)
    local from = o.from
    if by_layer then
      if math.type(layer) ~= "integer" then error("schedule.sparsify: a list of `from` needs the number of the layer", 2) end
      from = by_layer[layer] or o.to
    end
    if step >= o.steps then return o.to end
    if step <= start then return from end
    return from - math.floor((step - start) / (o.steps - start) * (from - o.to))
  end
end

--- What an option that may be a schedule is now. It is itself, or, of a function, its value at ctx.step and ctx.layer_number.
-- `name` is for the error where ctx has no step.
function M.now(value, ctx, name)
  if type(value) ~= "function" then return value end
  if type(ctx) ~= "table" or not ctx.step then
    error((type(name) == "string" and name or "the value") .. " is a function of the step, but ctx has no step (schedule.now)", 0)
  end
  return value(ctx.step, ctx.layer_number)
end

return M
