-- Memories of n-grams, addressed by hashing.

local moe = require "moe"
local core = moe.core
local nn = moe.nn
local options = require "moe.nn.options"
local keys = require "moe.memory.keys"

--- Hashed n-gram memory (Engram). The ids of a token and the ones before it, made canonical, are hashed as 2-grams ..
-- max_ngram-grams by `heads` hashes each (moe.ngram_hash) into tables of prime sizes from table_size on; the rows join to e_t.
-- The hidden state gates what they say: k = W_K e, v = W_V e, a = sigmoid(rms(h) . rms(k) / sqrt(d_model)), u = a v, and
-- y = u + silu(conv(rms(u))), conv causal, depthwise, of kernel_size taps max_ngram apart, at the start 0. y [batch, time,
-- d_model] = memory(h, ctx) with ctx.token_ids [batch, time]; add it to h. The rows depend on ids alone: memory:fetch(ids)
-- reads them ahead of the model's work, and ctx.ngram_rows = { [memory] = that } is then used in their place. A step updates
-- the rows that it read. Whole sequences from their start: there is no state for decoding in pieces. Options: d_model,
-- vocab_size, table_size (65537, rows of a hash), heads (4), max_ngram (3), embed_dim (of a row, 16), kernel_size (4),
-- canonical: a list [vocab_size] of the id that stands for each (upper and lower case, say), seed (1; another for each layer).
-- Parameters tables [rows, embed_dim], key_proj.*, value_proj.*, norms, conv [d_model, kernel_size]. Cheng et al. 2026
-- (arXiv 2601.07372, section 2).
local Ngram = nn.module "ngram_memory"

local ROWS <const> = {
  d_model = { "integer", options.required }, vocab_size = { "integer", options.required }, table_size = { "integer", 65537 },
  heads = { "integer", 4 }, max_ngram = { "integer", 3 }, embed_dim = { "integer", 16 }, kernel_size = { "integer", 4 },
  canonical = { "table|userdata" }, seed = { "integer", 1 }, dtype = { "string" }, device = { "string" },
}

local function is_prime(n)
  if n < 2 then return false end
  for d = 2, math.floor(math.sqrt(n)) do
    if n % d == 0 then return false end
  end
  return true
end

-- So many different primes from `least` on.
local function primes(least, count)
  local out = {}
  while #out < count do
    if is_prime(least) then out[#out + 1] = least end
    least = least + 1
  end
  return out
end

-- Odd multipliers of 62 bits from a seed: one for each place of an n-gram.
local function multipliers(seed, count)
  local state, out = seed, {}
  for i = 1, count do
    state = state + 0x9E3779B97F4A7C15 -- splitmix64
    local z = state
    z = (z ~ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ~ (z >> 27)) * 0x94D049BB133111EB
    out[i] = (z ~ (z >> 31)) >> 2 | 1
  end
  return out
end

local function canonical_table(o)
  local list = o.canonical
  if core.is_tensor(list) then list = list:totable() end
  if #list ~= o.vocab_size then
    error(("ngram_memory: canonical has %d ids, vocab_size is %d"):format(#list, o.vocab_size), 4)
  end
  for i, id in ipairs(list) do
    if math.type(id) ~= "integer" or id < 1 or id > o.vocab_size then
      error(("ngram_memory: canonical[%d] is %s, wanted an id of 1..%d"):format(i, tostring(id), o.vocab_size), 4)
    end
  end
  return core.tensor(list, { dtype = "i64", device = o.device })
end

function Ngram:init(given)
  local o = options.read("ngram_memory", given, ROWS, 2)
  for _, key in ipairs { "d_model", "vocab_size", "table_size", "heads", "embed_dim", "kernel_size" } do
    if o[key] < 1 then error(("ngram_memory: option '%s' must be at least 1, got %d"):format(key, o[key]), 3) end
  end
  if o.max_ngram < 2 then error(("ngram_memory: option 'max_ngram' must be at least 2, got %d"):format(o.max_ngram), 3) end
  self._options, self.d_model = o, o.d_model
  self._sizes, self._multipliers = primes(o.table_size, (o.max_ngram - 1) * o.heads), multipliers(o.seed, o.max_ngram)
  local rows, settings = 0, { dtype = o.dtype or "f32", device = o.device }
  for _, size in ipairs(self._sizes) do rows = rows + size end
  if o.canonical then self:buffer("canonical", canonical_table(o)) end
  self.tables = keys.table(o, rows, o.embed_dim, 0.02)
  local width = #self._sizes * o.embed_dim
  local function linear()
    return nn.linear { in_features = width, out_features = o.d_model, bias = false, dtype = o.dtype, device = o.device }
  end
  local function norm() return nn.rmsnorm { size = o.d_model, dtype = o.dtype, device = o.device } end
  self.key_proj = linear()
  self.value_proj = linear()
  self.query_norm = norm()
  self.key_norm = norm()
  self.value_norm = norm()
  self.conv = nn.parameter(core.zeros({ o.d_model, o.kernel_size }, settings))
end

--- The rows of the tables that ids [.., time] name: [.., time, (max_ngram - 1) heads].
function Ngram:rows(ids)
  if not core.is_tensor(ids) then error("ngram_memory: ids must be a tensor, got a " .. type(ids), 2) end
  if self.canonical then ids = self.canonical:index_select(1, ids:reshape { -1 }):reshape(ids.shape) end
  return core.ngram_hash(ids, self._multipliers, self._sizes)
end

--- What the memory holds for ids [.., time]: [.., time, (max_ngram - 1) heads embed_dim]. Needs nothing of the model's work.
function Ngram:fetch(ids) return core.embedding(self.tables, self:rows(ids), { sparse = true }):flatten(-2) end

-- Depthwise and causal over time, taps `step` apart: the sequence is dealt out into `step` sequences of every step-th time.
local function dilated(x, weight, step)
  local b, t, d = table.unpack(x.shape)
  local long = (t + step - 1) // step * step
  if long > t then x = x:pad { 0, 0, 0, long - t } end
  local dealt = x:reshape { b, long // step, step, d }:transpose(2, 3):reshape { b * step, long // step, d }
  local y = core.causal_conv1d(dealt, weight, { activation = "silu" })
  y = y:reshape { b, step, long // step, d }:transpose(2, 3):reshape { b, long, d }
  return long > t and y:narrow(2, 1, t) or y
end

function Ngram:forward(h, ctx)
  local s = core.is_tensor(h) and h.shape
  if not s or #s ~= 3 or s[3] ~= self.d_model then
    error(("ngram_memory: argument 1 (h) must be [batch, time, %d], got %s"):format(self.d_model,
      s and "[" .. table.concat(s, ", ") .. "]" or "a " .. type(h)), 2)
  end
  local ids = ctx and ctx.token_ids
  local e = ctx and ctx.ngram_rows and ctx.ngram_rows[self]
  if not e then
    if not ids then error("ngram_memory: ctx.token_ids [batch, time] is missing", 2) end
    e = self:fetch(ids)
  end
  if #e.shape ~= 3 or e:size(1) ~= s[1] or e:size(2) ~= s[2] then
    error(("ngram_memory: rows of [%s] tokens do not fit h [%s]"):format(table.concat(e.shape, ", ", 1, #e.shape - 1),
      table.concat(s, ", ")), 2)
  end
  local match = (self.query_norm(h) * self.key_norm(self.key_proj(e))):sum(-1, true) / math.sqrt(self.d_model)
  local u = match:sigmoid() * self.value_proj(e)
  if s[1] * s[2] == 0 then return u end
  return u + dilated(self.value_norm(u), self.conv, self._options.max_ngram)
end

function Ngram:extra()
  local o = self._options
  return ("2..%d-grams, %d hashes each, %d rows of %d"):format(o.max_ngram, o.heads, self.tables:size(1), o.embed_dim)
end

return Ngram
