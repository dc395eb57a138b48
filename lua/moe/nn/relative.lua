-- Terms of a score that go by the distance of a key from its query. A module called with n gives [num_heads, 2 n - 1], the
-- `relative` of moe.attention and of an attention layer's context (the middle: no distance); called with a tensor of distances
-- (key - query) it gives [num_heads, ..], a mask to be added. None needs a [time, time] tensor.

local core = require "moe.core"
local nn = require "moe.nn"
local options = require "moe.nn.options"

local M = {}

local function class(name, rows)
  local C = nn.module("relative." .. name)
  rows.num_heads = { "integer", options.required }
  function C:init(given)
    local o = options.read("relative." .. name, given, rows, 2)
    if o.num_heads < 1 then error(("relative.%s: num_heads must be at least 1, got %d"):format(name, o.num_heads), 3) end
    self._options = o
    self:start(o)
  end
  function C:forward(n)
    if core.is_tensor(n) then return self:of(n) end
    if math.type(n) ~= "integer" or n < 1 then
      error(("relative.%s: takes a count of positions or a tensor of distances, got %s"):format(name, tostring(n)), 3)
    end
    return self:of(core.arange(1 - n, n - 1))
  end
  function C:extra() return ("%d heads"):format(self._options.num_heads) end
  M[name] = C
  return C
end

-- A number a head, to be broadcast over distances.
local function by_head(t, distance)
  local shape = { t:size(1) }
  for i = 1, #distance.shape do shape[i + 1] = 1 end
  return t:reshape(shape)
end

local function slopes(H)
  local out = {}
  local function geometric(n, first, step, most)
    for i = first, n, step do
      if #out < most then out[#out + 1] = 2 ^ (-8 * i / n) end
    end
  end
  local whole = 1 << math.floor(math.log(H, 2) + 1e-9)
  geometric(whole, 1, 1, whole)
  geometric(2 * whole, 1, 2, H) -- of the next power of two every other one
  return out
end

--- Attention with linear biases: -slope_h |distance|, slope_h = 2^(-8 h / num_heads) (numbers of heads that are no power of two
-- take the rest from the next). moe.nn.relative.alibi{ num_heads }. Press et al. 2022 (arXiv 2108.12409).
local Alibi = class("alibi", {})
function Alibi:start(o) self.slopes = core.tensor(slopes(o.num_heads)) end
function Alibi:of(distance)
  return by_head(self.slopes, distance) * -distance:to(self.slopes.dtype):abs():unsqueeze(1)
end

--- Learned numbers for buckets of distances, exact when near, logarithmic up to max_distance, one beyond: weight [num_buckets,
-- num_heads]. bidirectional: half of the buckets are for keys behind the query. moe.nn.relative.t5{ num_heads,
-- num_buckets = 32, max_distance = 128, bidirectional = false }. Raffel et al. 2020 (arXiv 1910.10683, section 2.1).
local T5 = class("t5", {
  num_buckets = { "integer", 32 }, max_distance = { "integer", 128 }, bidirectional = { "boolean", false },
})
function T5:start(o)
  local own = o.bidirectional and o.num_buckets // 2 or o.num_buckets
  if own < 2 or o.max_distance <= own // 2 then
    error(("relative.t5: max_distance = %d must be beyond the %d exact ones"):format(o.max_distance, own // 2), 4)
  end
  self.weight = nn.parameter(core.randn(o.num_buckets, o.num_heads) * o.num_heads ^ -0.5)
end
-- Numbers of the buckets, from 1.
function T5:buckets(distance)
  local o = self._options
  local d, n = distance:to "f32", o.num_buckets
  local base = core.zeros(d.shape)
  if o.bidirectional then
    n = n // 2
    base, d = d:gt(0):to "f32" * n, d:abs()
  else
    d = (-d):clamp(0)
  end
  local exact = n // 2
  local far = (d:clamp(exact) / exact):log() / math.log(o.max_distance / exact) * (n - exact) + (exact + 1e-4) -- floors to itself
  return (base + core.where(d:lt(exact), d, far:floor():clamp(0, n - 1)) + 1):to "i64"
end
function T5:of(distance)
  local bucket = self:buckets(distance)
  local bias = self.weight:t():index_select(2, bucket:reshape(-1))
  return bias:reshape { self._options.num_heads, table.unpack(distance.shape) }
end

--- Weights that fall by a factor gamma_h a step: |distance| log gamma_h, gamma_h = 1 - 2^(-5 - h), h from 0, as retention has
-- them, or `gamma`, a number or a list. moe.nn.relative.decay{ num_heads, gamma = nil }. Sun et al. 2023 (arXiv 2307.08621).
local Decay = class("decay", { gamma = { "number|table" } })
function Decay:start(o)
  local log = {}
  for h = 1, o.num_heads do
    local gamma = type(o.gamma) == "table" and o.gamma[h] or o.gamma or 1 - 2 ^ (-4 - h)
    if type(gamma) ~= "number" or not (gamma > 0 and gamma <= 1) then
      error(("relative.decay: gamma of head %d must lie in (0, 1], got %s"):format(h, tostring(gamma)), 4)
    end
    log[h] = math.log(gamma)
  end
  self.log_gamma = core.tensor(log)
end
function Decay:of(distance)
  return by_head(self.log_gamma, distance) * distance:to(self.log_gamma.dtype):abs():unsqueeze(1)
end

--- A mixture of Gaussians of the distance as a factor of the weights, log sum_k a_k exp(-distance^2 / (2 s_k^2)) in the score:
-- log_a, log_s [num_heads, components], learned; s starts at `width` (8), twice as wide from component to component. On a grid
-- of patches: bias(moe.nn.masks.grid(h, w)) as the mask. With a = 1 and s without end it is attention without it.
-- moe.nn.relative.gaussian{ num_heads, components = 1, width = 8 }. Li and Zhang 2023 (arXiv 2309.05375).
local Gaussian = class("gaussian", { components = { "integer", 1 }, width = { "number", 8 } })
function Gaussian:start(o)
  if o.components < 1 or o.width <= 0 or o.width ~= o.width then
    error(("relative.gaussian: components = %d and width = %g must be positive"):format(o.components, o.width), 4)
  end
  self.log_a = nn.parameter(core.full({ o.num_heads, o.components }, -math.log(o.components)), { decay = false })
  local s = core.arange(0, o.components - 1) * math.log(2) + math.log(o.width)
  self.log_s = nn.parameter(s:expand { o.num_heads, o.components }:clone(), { decay = false })
end
function Gaussian:of(distance)
  local o = self._options
  local square = distance:to(self.log_s.dtype):square():unsqueeze(1)
  local each = {}
  for k = 1, o.components do
    local a, s = self.log_a:narrow(2, k, 1), self.log_s:narrow(2, k, 1)
    each[k] = (by_head(a, distance) - square * by_head((s * -2):exp() * 0.5, distance)):unsqueeze(1)
  end
  return o.components == 1 and each[1]:squeeze(1) or core.cat(each, 1):logsumexp(1)
end

--- An attention whose scores have such a term: moe.nn.relative.attention(moe.nn.attention{ ... }, moe.nn.relative.alibi{ ... }).
-- Called, continued and packed as the attention; y [, state] = m(x [, state, ctx]). Several layers may share one term.
local With = nn.module "relative.attention"
function With:init(attention, term)
  if not (nn.is_module(attention) and nn.is_module(term)) then
    error("relative.attention: takes a moe.nn.attention and a moe.nn.relative", 3)
  end
  self.attention, self.relative = attention, term
end
function With:state(batch) return self.attention:state(batch) end
function With:forward(x, state, ctx)
  local past = state and state.k and state.k:size(3) or 0
  local inner = setmetatable({ relative = self.relative(math.max(1, past + x:size(2))):to(x.dtype, x.device) }, { __index = ctx })
  if state then return self.attention(x, state, inner) end
  return (self.attention(x, nil, inner))
end
M.attention = With

return M
