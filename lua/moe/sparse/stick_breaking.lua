-- Stick-breaking attention, composed of plain operations: the matrix of weights is made.

local core = require "moe.core"
local options = require "moe.nn.options"

local ROWS <const> = {
  seen = { "userdata" }, mask = { "userdata" }, diagonal = { "boolean", false }, scale = { "number" },
}

local function check(q, k, v)
  for name, t in pairs { q = q, k = k, v = v } do
    if not core.is_tensor(t) or #t.shape ~= 4 then
      error(("stick_breaking: %s must be a tensor [batch, heads, positions, size], got %s"):format(name,
        core.is_tensor(t) and "[" .. table.concat(t.shape, ", ") .. "]" or "a " .. type(t)), 3)
    end
  end
  local a, b, c = q.shape, k.shape, v.shape
  if a[1] ~= b[1] or a[4] ~= b[4] or b[1] ~= c[1] or b[2] ~= c[2] or b[3] ~= c[3] or b[2] == 0 or a[2] % b[2] ~= 0 then
    error(("stick_breaking: q [%s], k [%s] and v [%s] do not fit: wanted [b, h, t, d], [b, hkv, s, d], [b, hkv, s, dv], h a "
      .. "multiple of hkv"):format(table.concat(a, ", "), table.concat(b, ", "), table.concat(c, ", ")), 3)
  end
end

--- Stick-breaking attention: y_i = sum_j p_ij v_j, p_ij = b_ij prod_{j < k < i} (1 - b_ik), b_ij = sigmoid(scale q_i . k_j): the
-- newest key that wants a query takes its share of what is left, so that order needs no position codes. Rows of p sum to at most
-- 1. In log space: log p_ij = log b_ij + sum_{j < k < i} log(1 - b_ik), a reverse cumulative sum of log-sigmoids. q [b, h, t,
-- d], k [b, hkv, s, d], v [b, hkv, s, dv] -> y [b, h, t, dv] and what is left of each stick [b, h, t]. Options: scale (1 /
-- sqrt(d)); diagonal (false): whether a position sees itself; query i sees the keys before s - t + i (up to it), or the first
-- seen [b, h, t] (i64); mask (bool, broadcasts to [b, h, t, s], true: may attend). O(t s) memory. Shen et al. 2023, ModuleFormer
-- (arXiv 2306.04640, eq. 4-5); Tan et al. 2024 (arXiv 2410.17980).
local function stick_breaking(q, k, v, given)
  local o = options.read("stick_breaking", given, ROWS, 2)
  check(q, k, v)
  local b, h, t, d = table.unpack(q.shape)
  local kv, s = k:size(2), k:size(3)
  local like = { dtype = q.dtype, device = q.device }
  if s == 0 then return core.zeros({ b, h, t, v:size(4) }, like), core.ones({ b, h, t }, like) end
  -- heads that share keys are further queries of one head
  local rows = h // kv * t
  local z = q:reshape { b, kv, rows, d }:matmul(k:transpose(3, 4)) * (o.scale or 1 / math.sqrt(math.max(d, 1)))
  local seen = o.seen
  if not seen then seen = core.arange(s - t + 1, s):to "i64":reshape { 1, 1, t }:expand { b, h, t } - (o.diagonal and 0 or 1) end
  if seen.dtype ~= "i64" or #seen.shape ~= 3 or seen:size(1) ~= b or seen:size(2) ~= h or seen:size(3) ~= t then
    error(("stick_breaking: seen must be i64 [%d, %d, %d], got %s [%s]"):format(b, h, t, seen.dtype, table.concat(seen.shape, ", ")), 2)
  end
  local allowed = core.arange(1, s):to "i64":le(seen:reshape { b, kv, rows, 1 })
  if o.mask then allowed = allowed:logical_and(o.mask:expand { b, h, t, s }:reshape { b, kv, rows, s }) end
  local left = core.where(allowed, (-z):logsigmoid(), 0):cumsum(-1, true)
  -- without key j's own factor: its neighbour's sum, not a difference, which would lose all digits for large scores
  left = left:narrow(-1, 2, s - 1):pad { 0, 1 }
  local p = core.where(allowed, (z:logsigmoid() + left):exp(), 0)
  return p:matmul(v):reshape { b, h, t, v:size(4) }, (1 - p:sum(-1)):reshape { b, h, t }
end

return { attention = stick_breaking }
