-- Choosing among n^2 slots by two halves of a key, each of n.

local moe = require "moe"
local core = moe.core
local nn = moe.nn
local options = require "moe.nn.options"

local M = {}

-- The options of a choice, for the modules that contain one, too.
local ROWS <const> = {
  d_model = { "integer", options.required }, num_keys = { "integer", options.required }, top_k = { "integer", 32 },
  heads = { "integer", 4 }, key_dim = { "integer" }, query_norm = { { "batch", "layer", "none" }, "batch" },
  query_bias = { "boolean", true }, rank = { "integer", 1 }, dtype = { "string" }, device = { "string" },
}

--- Chooses top_k of num_keys^2 slots for each head of a token, and never makes an array of them all: with queries q of two
-- halves and keys K, K' [num_keys, key_dim / 2] for each half and head, slot (i, j) scores q_1 . K_i + q_2 . K'_j, and the
-- best slots are among the best top_k of each half (moe.product_key_topk). score [T, heads, top_k], index [T, heads, top_k] =
-- keys(x [T, d_model]); slot (i, j) has the number (i - 1) num_keys + j. The choice is made by the products of all keys; the
-- gradient is that of the chosen scores, and costs nothing for the other keys. Options: query_norm of q: "batch" (as in the
-- paper), "layer" (each head by itself) or "none"; key_dim (of q of one head, even; d_model / 2); query_bias.
-- Lample et al. 2019 (arXiv 1907.05242, section 3.1-3.2).
--
-- rank r > 1: scores s_i^T C s'_j with r keys for each half, s_i = (q_1 . K_ai)_a, and a learned core C [r, r] (Tucker's
-- decomposition): rows and columns are filtered by C's leading singular vectors u, v, the top_k largest of |u . s_i| and of
-- |v . s'_j| (without the bars half of the best slots are missed: two negative factors make a good product), and the top_k^2
-- pairs of these get their whole score. keys:core_loss() is what keeps C near rank 1, so that the filter finds what is best:
-- the mean over the other singular values of max(0, sigma - margin)^2. UltraMem (arXiv 2411.12364, section 3.2).
-- Parameters query.*, norm.*, keys [2, rank, heads, num_keys, key_dim / 2], core [rank, rank].
local Keys = nn.module "product_keys"
M.product_keys = Keys

function Keys:init(given)
  local o = options.read("product_keys", given, ROWS, 2)
  o.key_dim = o.key_dim or math.max(2, o.d_model // 4 * 2)
  for _, key in ipairs { "d_model", "num_keys", "top_k", "heads", "key_dim", "rank" } do
    if o[key] < 1 then error(("product_keys: option '%s' must be at least 1, got %d"):format(key, o[key]), 3) end
  end
  if o.key_dim % 2 ~= 0 then error(("product_keys: option 'key_dim' must be even, got %d"):format(o.key_dim), 3) end
  local most = o.rank > 1 and o.num_keys or o.num_keys ^ 2
  if o.top_k > most then error(("product_keys: top_k is %d, wanted 1 to %d"):format(o.top_k, most), 3) end
  self._options, self.num_slots, self.top_k = o, o.num_keys ^ 2 // 1 | 0, o.top_k
  local settings, half = { dtype = o.dtype or "f32", device = o.device }, o.key_dim // 2
  self.query = nn.linear {
    in_features = o.d_model, out_features = o.heads * o.key_dim, bias = o.query_bias, dtype = o.dtype, device = o.device,
  }
  if o.query_norm == "batch" then
    self.norm = nn.batchnorm { size = o.heads * o.key_dim, dtype = o.dtype, device = o.device }
  elseif o.query_norm == "layer" then
    self.norm = nn.layernorm { size = o.key_dim, dtype = o.dtype, device = o.device }
  end
  local keys = core.zeros({ 2, o.rank, o.heads, o.num_keys, half }, settings)
  self.keys = nn.parameter(nn.init.uniform_(keys, -1 / math.sqrt(half), 1 / math.sqrt(half)))
  if o.rank > 1 then -- near rank 1, where the filter is exact
    local c = core.full({ o.rank, o.rank }, 1 / o.rank, settings)
    self.core = nn.parameter(c + core.randn_like(c) * (0.1 / o.rank), { decay = false })
  end
end

-- x [T, d] -> q [2, heads, T, half]
function Keys:queries(x)
  local o, tokens = self._options, x:size(1)
  local q = self.query(x)
  if o.query_norm == "batch" and tokens > 0 then q = self.norm(q) end
  q = q:reshape { tokens, o.heads, o.key_dim }
  if o.query_norm == "layer" then q = self.norm(q) end
  return q:reshape { tokens, o.heads, 2, o.key_dim // 2 }:permute { 3, 2, 1, 4 }:contiguous()
end

-- Of places [2, heads, T, k] in each half: the products with q of all ranks' keys there: [2, rank, heads, T, k].
function Keys:products(q, places)
  local o = self._options
  local s = places.shape
  local half, k = o.key_dim // 2, s[4]
  local first = core.arange(0, 2 * o.rank * o.heads - 1):to(places.device):reshape { 2, o.rank, o.heads, 1, 1 } * o.num_keys
  local index = first + places:unsqueeze(2)
  local x = q:unsqueeze(2)
  if o.rank > 1 then x = x:expand { 2, o.rank, o.heads, s[3], half } end
  return core.memory_dots(self.keys:reshape { -1, half }, index:reshape { 2 * o.rank, o.heads, s[3], k },
    x:reshape { 2 * o.rank, o.heads, s[3], half }, false):reshape { 2, o.rank, o.heads, s[3], k }
end

-- Products of rows and columns [rank, ..] -> scores [..].
function Keys:join(rows, columns)
  local shape = rows[1].shape
  return (rows:flatten(2) * self.core:matmul(columns:flatten(2))):sum(1):reshape(shape)
end

local function best_pairs(self, q)
  local n = self._options.num_keys
  local s = q:matmul(self.keys:squeeze(2):transpose(3, 4))
  local _, slot = core.product_key_topk(s[1], s[2], self.top_k)
  return core.stack { (slot - 1):floor_divide(n) + 1, (slot - 1):remainder(n) + 1 }
end

--- The leading singular vectors u, v [rank] of the core: what rows and columns are filtered by.
function Keys:filters()
  local u, _, v = self.core:detach():svd()
  return u:select(2, 1), v:select(2, 1)
end

local function filtered_pairs(self, q)
  local o, k = self._options, self.top_k
  local u, v = self:filters()
  local filter = core.stack { u, v }:reshape { 2, o.rank, 1, 1, 1 }
  local s = q:matmul((self.keys * filter):sum(2):transpose(3, 4))
  local _, place = s:abs():topk(k) -- the best products have factors of large magnitude, both of one sign
  local p = self:products(q, place)
  local grid = p[1]:permute { 2, 3, 4, 1 }:matmul(self.core):matmul(p[2]:permute { 2, 3, 1, 4 }) -- [heads, T, k, k]
  local _, pair = grid:flatten(3):topk(k)
  return core.stack {
    place[1]:gather(-1, (pair - 1):floor_divide(k) + 1), place[2]:gather(-1, (pair - 1):remainder(k) + 1),
  }
end

--- The scores of all slots [T, heads, num_keys^2], for tests and small n.
function Keys:all_scores(x)
  local o = self._options
  local s = self:queries(x):unsqueeze(2):matmul(self.keys:transpose(4, 5)) -- [2, rank, heads, T, n]
  local n, all = o.num_keys
  if o.rank == 1 then
    all = s[1][1]:unsqueeze(4) + s[2][1]:unsqueeze(3)
  else
    all = s[1]:permute { 2, 3, 4, 1 }:matmul(self.core):matmul(s[2]:permute { 2, 3, 1, 4 })
  end
  return all:reshape { o.heads, x:size(1), n * n }:transpose(1, 2)
end

function Keys:forward(x)
  local o = self._options
  local q = self:queries(x)
  local choose = o.rank > 1 and filtered_pairs or best_pairs
  local places = core.no_grad(choose, self, q)
  local p = self:products(q, places)
  local score = o.rank > 1 and self:join(p[1], p[2]) or p:sum { 1, 2 }
  local slot = (places[1] - 1) * o.num_keys + places[2]
  return score:transpose(1, 2), slot:transpose(1, 2)
end

--- The mean over the core's singular values but the largest of max(0, sigma - margin)^2 (arXiv 2411.12364, eq. 12); 0 for rank 1.
function Keys:core_loss(margin)
  local r = self._options.rank
  if r == 1 then return core.zeros {} end
  local u, _, v = self.core:detach():svd()
  local sigma = (u:t():matmul(self.core):matmul(v)):diagonal():narrow(1, 2, r - 1) -- its slope by C is u v^T
  return (sigma - (margin or 0)):relu():square():mean()
end

function Keys:extra()
  local o = self._options
  local rank = o.rank > 1 and (", rank=%d"):format(o.rank) or ""
  return ("%d^2 slots, top_k=%d, heads=%d, key_dim=%d%s"):format(o.num_keys, o.top_k, o.heads, o.key_dim, rank)
end

-- --- what the memories share ---

--- The options of a memory, for the rows of its module: those of the choice, and its own.
function M.rows(own)
  local rows = { score = { { "softmax", "sigmoid", "relu", "identity" }, "softmax" }, value_dim = { "integer" } }
  for k, v in pairs(ROWS) do rows[k] = v end
  for k, v in pairs(own or {}) do rows[k] = v end
  return rows
end

--- Reads a memory's options and gives it keys, and projections where its values have another size than d_model.
function M.setup(self, name, given, rows)
  local o = options.read(name, given, rows, 3)
  if o.value_dim and o.value_dim < 1 then
    error(("%s: option 'value_dim' must be at least 1, got %d"):format(name, o.value_dim), 4)
  end
  local of_keys = {}
  for k in pairs(ROWS) do of_keys[k] = o[k] end
  self._options = o
  self.d_model, self.value_dim = o.d_model, o.value_dim or o.d_model
  self.keys = Keys(of_keys)
  self.num_slots = self.keys.num_slots
  return o
end

--- A table [rows, columns] of normal numbers: kept out of weight decay, which would reach a row as often as it is read.
function M.table(o, rows, columns, std)
  local t = core.randn(rows, columns, { dtype = o.dtype or "f32", device = o.device })
  return nn.parameter(t:mul_(std), { decay = false })
end

local SCORES <const> = {
  softmax = function(s) return s:softmax(-1) end, sigmoid = function(s) return s:sigmoid() end,
  relu = function(s) return s:relu() end, identity = function(s) return s end,
}

--- What the rows x [T, d_model] read: index, weight [T, heads top_k]. A masked token (ctx.mask, true: it takes part) reads nothing.
function M.choice(self, x, ctx)
  local score, index = self.keys(x)
  local tokens = x:size(1)
  local weight = SCORES[self._options.score](score):flatten(2)
  index = index:flatten(2)
  local mask = ctx and ctx.mask
  if mask then index = index:masked_fill(mask:reshape { tokens, 1 }:logical_not(), 0) end
  return index, weight
end

--- Checks x [.., d_model] and calls work(rows [T, d_model]) -> [T, d_out]; the result with x's leading sizes.
function M.by_rows(name, self, x, work)
  if not core.is_tensor(x) then error(("%s: argument 1 (x) must be a tensor, got a %s"):format(name, type(x)), 3) end
  local shape, tokens = x.shape, 1
  if shape[#shape] ~= self.d_model then
    error(("%s: x is [%s], wanted [.., %d] (d_model)"):format(name, table.concat(shape, ", "), self.d_model), 3)
  end
  for i = 1, #shape - 1 do tokens = tokens * shape[i] end
  local y = work(x:reshape { tokens, self.d_model })
  shape[#shape] = y:size(2)
  return y:reshape(shape)
end

return M
