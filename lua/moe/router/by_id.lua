-- Routing by what is known of a token: its task, modality, domain, or the token itself.

local core = require "moe.core"
local nn = require "moe.nn"
local TopK = require "moe.router.topk"
local routings = require "moe.routing"

--- Routing by an id that the caller knows: `key` names the field of ctx that holds it ("task_ids", "modality_ids",
-- "domain_ids", "token_ids", or one of one's own), ids from 1, one a token, one a sequence (ctx.shape tells), or a number
-- for all. With `table`: id -> expert, fixed: a list of experts and lists of experts, { 1, { 2, 3 }, 1 }, or a tensor [n] or
-- [n, k], 0 for none; each of a token's experts has an equal weight. Gururangan et al. 2021, DEMix (arXiv 2108.05036) route
-- so by domain, VLMo (Bao et al. 2021, arXiv 2111.02358) by modality. Without, a learned embedding of gates: logits =
-- weight[id] of `weight` [num_ids, E], then all options of topk (score, top_k, norm_topk_prob ..); Kudugunta et al. 2021
-- (arXiv 2110.03742) route so by task. Options: key ("task_ids"), table or num_ids. ctx.choice forces the experts, ctx.mask
-- leaves tokens out.
local ById = nn.module("by_id", TopK)

ById.rows = { key = { "string", "task_ids" }, table = { "table|userdata" }, num_ids = { "integer" } }
for k, v in pairs(TopK.rows) do ById.rows[k] = v end
for _, k in ipairs { "bias", "noise", "noise_in_eval", "jitter" } do ById.rows[k] = nil end

-- A list of experts and lists of experts as numbers [n][k], with 0 where a list is shorter than the longest.
local function filled(self, list)
  local n, width, rows = #list, 1, {}
  for _, v in ipairs(list) do width = math.max(width, type(v) == "table" and #v or 1) end
  for id = 1, n do
    local row = type(list[id]) == "table" and list[id] or { list[id] }
    rows[id] = {}
    for i = 1, width do
      local e = row[i] or 0
      if math.type(e) ~= "integer" then self:fail("the table has %s for id %d, wanted an expert or a list of experts", tostring(e), id) end
      rows[id][i] = e
    end
  end
  return rows
end

--- The table [n, k] as an i64 buffer, checked.
function ById:keep_table(t, device)
  if not core.is_tensor(t) then t = core.tensor(filled(self, t), { dtype = "i64" }) end
  if #t.shape == 1 then t = t:reshape { -1, 1 } end
  if #t.shape ~= 2 or t.dtype:find "^[bf]" or #t == 0 then
    self:fail("the table is a %s tensor [%s], wanted experts [ids] or [ids, k]", t.dtype, table.concat(t.shape, ", "))
  end
  t = t:to "i64"
  local low, high = t:min():item(), t:max():item()
  if low < 0 or high > self.num_experts then
    self:fail("the table names expert %d, wanted 1 to %d (0: none)", low < 0 and low or high, self.num_experts)
  end
  self:buffer("table", device and t:to(device) or t:clone())
  self.num_ids, self.top_k = t:size(1), t:size(2)
end

function ById:check(o, k)
  if not o.table then TopK.check(self, o, k) end
  if o.d_model and not (o.table or o.num_ids) then self:fail "wants a 'table' of experts, or 'num_ids' for learned gates" end
  if o.table and o.num_ids then self:fail "options 'table' and 'num_ids' exclude each other: a table is not learned" end
  if o.num_ids and o.num_ids < 1 then self:fail("option 'num_ids' must be at least 1, got %d", o.num_ids) end
end

function ById:init(given)
  local o = given or {}
  -- a table has its own number of experts a token
  if type(o) == "table" and o.table then
    if not self:setup(given, self.rows) then return self:check(self._options) end
    self:check(self._options)
    return self:keep_table(self._options.table, self._options.device)
  end
  TopK.init(self, given)
end

function ById:projection()
  local o = self._options
  self.num_ids = o.num_ids
  local w = core.zeros({ o.num_ids, self.num_experts }, { dtype = o.dtype or "f32", device = o.device })
  if o.init ~= nil then nn.init.apply(w, o.init) else nn.init.uniform_(w, -1, 1) end
  self.weight = nn.parameter(w)
end

--- The ids of the tokens x [T, d_model]: i64 [T], each from 1 to num_ids; 1 for masked ones.
function ById:ids(x, ctx)
  local key, tokens = self._options.key, x:size(1)
  local ids, given = ctx[key], ctx[key]
  if math.type(ids) == "integer" then ids = core.full({ tokens }, ids, { dtype = "i64", device = x.device }) end
  if not core.is_tensor(ids) or ids.dtype:find "^[bf]" then
    self:fail("ctx.%s is %s, wanted a tensor of integers, one a token (%d)", key, core.is_tensor(ids) and "of " .. ids.dtype or
      "a " .. type(given), tokens)
  end
  if ids:numel() ~= tokens then
    local batch, time = self:sequences(x, ctx)
    if ids:numel() ~= batch then
      self:fail("ctx.%s is [%s], wanted one a token (%d) or one a sequence (%d)", key, table.concat(ids.shape, ", "), tokens, batch)
    end
    ids = ids:reshape { batch, 1 }:expand { batch, time }
  end
  ids = ids:reshape { -1 }:to "i64"
  if ctx.mask then ids = core.where(ctx.mask, ids, 1):to "i64" end
  if tokens > 0 then
    local low, high = ids:min():item(), ids:max():item()
    if low < 1 or high > self.num_ids then
      self:fail("ctx.%s has the id %d, wanted 1 to %d", key, low < 1 and low or high, self.num_ids)
    end
  end
  return ids
end

function ById:logits(x, ctx)
  self:ready()
  return self:masked(self.weight:index_select(1, self:ids(x, ctx or {})), ctx)
end

function ById:route(x, ctx)
  self:ready()
  ctx = ctx or {}
  if not self.table then return TopK.route(self, x, ctx) end
  local index = ctx.choice or self.table:index_select(1, self:ids(x, ctx))
  local dtype = x.dtype == "f64" and "f64" or "f32"
  local share = index:gt(0):to(dtype):sum(-1, true):clamp(1):reciprocal():expand(index.shape):contiguous()
  local routing = routings.topk(index, share, self.num_experts, ctx.mask and { mask = ctx.mask })
  routing.top_k = self.top_k
  return routing
end

ById.forward = ById.route

function ById:traits(o)
  return { ("key=%s, %s"):format(o.key, self.table and ("table [%d, %d]"):format(self.num_ids, self.top_k)
    or o.num_ids and ("%d learned ids"):format(o.num_ids) or "a table") }
end

return ById
