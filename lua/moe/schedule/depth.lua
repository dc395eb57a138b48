-- Functions (layer, num_layers) of the depth: how many experts, which share of the tokens.

local options = require "moe.nn.options"
local anneal = require "moe.schedule.anneal"

local M = {}

local function check_layer(name, layer, num_layers)
  for i, v in ipairs { layer or false, num_layers or false } do
    if math.type(v) ~= "integer" or v < 1 then
      error(("%s: argument %d (%s) must be a whole number from 1, got %s"):format(name, i, i == 1 and "layer" or "num_layers",
        tostring(v)), 3)
    end
  end
  if layer > num_layers then error(("%s: layer %d of %d"):format(name, layer, num_layers), 3) end
end

local function check_share(name, option, v)
  if not (v >= 0 and v <= 1) then error(("%s: %s must lie in [0, 1], got %g"):format(name, option, v), 3) end
end

-- Place of a layer, 0 at the lowest, 1 at the highest.
local function place(layer, num_layers) return num_layers > 1 and (layer - 1) / (num_layers - 1) or 0 end

local PATTERNS <const> = {
  uniform = function() return 0 end,
  descending = function(p) return 1 - p end,
  ascending = function(p) return p end,
  pyramid_up = function(p) return 1 - math.abs(2 * p - 1) end,
  pyramid_down = function(p) return math.abs(2 * p - 1) end,
  wave = function(p, waves) return 0.5 * (1 + math.sin(2 * math.pi * waves * p)) end,
}

local CAPACITY <const> = {
  pattern = { { "uniform", "descending", "ascending", "pyramid_up", "pyramid_down", "wave" }, options.required },
  mean = { "number", options.required }, spread = { "number", 0.5 }, waves = { "number", 1 }, whole = { "boolean", true },
}

-- The pattern over the layers, shifted to the mean 0 and scaled to the largest distance 1.
local function centred(o, num_layers)
  local v, mean, most = {}, 0.0, 0.0
  for l = 1, num_layers do
    v[l] = PATTERNS[o.pattern](place(l, num_layers), o.waves)
    mean = mean + v[l] / num_layers
  end
  for l = 1, num_layers do
    v[l] = v[l] - mean
    most = math.max(most, math.abs(v[l]))
  end
  for l = 1, num_layers do v[l] = most > 1e-12 and v[l] / most or 0.0 end
  return v
end

-- Whole numbers that add up to the rounded sum: floors first, then one more for the largest remainders, the lowest layers first.
local function round_all(v)
  local out, order, sum = {}, {}, 0.0
  for l, x in ipairs(v) do
    out[l], order[l], sum = math.floor(x + 1e-9), l, sum + x
  end
  local left = math.floor(sum + 0.5)
  for _, n in ipairs(out) do left = left - n end
  local function remainder(l) return math.floor((v[l] - out[l]) * 1e6 + 0.5) end -- equals are equal after rounding too
  table.sort(order, function(a, b)
    local ra, rb = remainder(a), remainder(b)
    if ra ~= rb then return ra > rb end
    return a < b
  end)
  for i = 1, left do out[order[i]] = out[order[i]] + 1 end
  return out
end

--- How many experts a layer has (or may use), a function (layer, num_layers). It is mean * (1 + spread * s), where s runs in [-1,
-- 1] after the pattern and has mean 0, so that the total over the layers is num_layers * mean in each pattern. Patterns over
-- the depth: "uniform", "descending", "ascending", "pyramid_up" (most in the middle), "pyramid_down" (fewest in the middle),
-- "wave" (`waves` periods of a sine). Whole numbers that keep the (rounded) total, or with whole = false shares. (The six
-- patterns of DynaMoE, Gülmez 2026, arXiv 2603.01697; that all of them keep one total is the choice of this library.)
function M.capacity(given)
  local o = options.read("schedule.capacity", given, CAPACITY)
  if not (o.mean > 0 and o.mean < math.huge) then error(("schedule.capacity: mean must be above 0, got %g"):format(o.mean), 2) end
  check_share("schedule.capacity", "spread", o.spread)
  if o.pattern == "uniform" then o.spread = 0 end
  if o.whole and o.mean * (1 - o.spread) < 1 - 1e-9 then
    error(("schedule.capacity: mean %g with spread %g leaves a layer less than one expert"):format(o.mean, o.spread), 2)
  end
  return function(layer, num_layers)
    check_layer("schedule.capacity", layer, num_layers)
    local v = centred(o, num_layers)
    for l = 1, num_layers do v[l] = o.mean * (1 + o.spread * v[l]) end
    return (o.whole and round_all(v) or v)[layer]
  end
end

local DEPTH <const> = {
  from = { "number", options.required }, to = { "number", options.required },
  shape = { { "linear", "exponential", "cosine" }, "linear" }, whole = { "boolean", false },
}

--- From one value in the lowest layer to another in the highest, a function (layer, num_layers). Linear, exponential or by
-- half a cosine.
function M.depth(given)
  local o = options.read("schedule.depth", given, DEPTH)
  anneal._check_shape("schedule.depth", o)
  return function(layer, num_layers)
    check_layer("schedule.depth", layer, num_layers)
    local v = anneal._shapes[o.shape](o.from, o.to, place(layer, num_layers))
    return o.whole and math.floor(v + 0.5) or v
  end
end

local SHIFTED <const> = { shift = { "number", 0 }, least = { "number", 0 } }

--- The share of tokens that a layer keeps, a function (layer, num_layers). It is (1 + cos(pi p)) / 2 + shift, held in [least, 1],
-- with p = 0 in the lowest layer and 1 in the highest. `shift` moves the cost of all layers together: their mean is 1/2 +
-- shift where nothing is cut off. (Zhang et al. 2024, p-MoD, arXiv 2412.04449: a ratio that decays with the depth.)
function M.shifted_cosine(given)
  local o = options.read("schedule.shifted_cosine", given, SHIFTED)
  check_share("schedule.shifted_cosine", "least", o.least)
  return function(layer, num_layers)
    check_layer("schedule.shifted_cosine", layer, num_layers)
    return math.max(o.least, math.min(1, 0.5 * (1 + math.cos(math.pi * place(layer, num_layers))) + o.shift))
  end
end

local EVERY <const> = { every = { "integer", 2 }, share = { "number", 0.125 } }

--- The share of tokens that a layer works on when every n-th layer is sparse, a function (layer). It is `share` in the layers
-- every, 2 every, .., and 1 in the others. (Raposo et al. 2024, mixture of depths, arXiv 2404.02258: an eighth of the tokens
-- in every other layer.)
function M.alternate(given)
  local o = options.read("schedule.alternate", given, EVERY)
  if o.every < 1 then error(("schedule.alternate: every must be at least 1, got %d"):format(o.every), 2) end
  check_share("schedule.alternate", "share", o.share)
  return function(layer, num_layers)
    check_layer("schedule.alternate", layer, num_layers or layer)
    return layer % o.every == 0 and o.share or 1.0
  end
end

local PRUNE <const> = { at = { "table", options.required }, keep = { "number", 0.7 } }

--- The share of tokens that are left when some layers prune, a function (layer). It is keep^(layers of `at` up to this one).
-- (Rao et al. 2021, DynamicViT, arXiv 2106.02034: 0.7 after each of three layers.)
function M.prune(given)
  local o = options.read("schedule.prune", given, PRUNE)
  if not (o.keep > 0 and o.keep <= 1) then error(("schedule.prune: keep must lie in (0, 1], got %g"):format(o.keep), 2) end
  for i, l in ipairs(o.at) do
    if math.type(l) ~= "integer" then
      error(("schedule.prune: at[%d] must be the number of a layer, got %s"):format(i, tostring(l)), 2)
    end
  end
  return function(layer, num_layers)
    check_layer("schedule.prune", layer, num_layers or layer)
    local n = 0
    for _, l in ipairs(o.at) do
      if l <= layer then n = n + 1 end
    end
    return o.keep ^ n
  end
end

return M
