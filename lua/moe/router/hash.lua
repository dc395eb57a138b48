-- Fixed experts by a hash of the token.

local nn = require "moe.nn"
local base = require "moe.router.base"
local ById = require "moe.router.by_id"

--- Experts by a fixed hash of the token's id (ctx.token_ids, or the field `key`): nothing is learned, nothing needs
-- balancing. With top_k hashes a token has top_k different experts, each with the weight 1 / top_k. Ids count from 1 to
-- `vocab_size`. `method`: "random": each id's experts drawn at random, from `seed`; "balanced": ids in order of falling
-- `frequencies` (a list or tensor of counts, all equal when absent; equals in random order), each to the expert that has the
-- least so far; "modulo": the i-th expert of an id is (id - 1 + (i - 1) floor(E / top_k)) mod E + 1. Or `table`: one's own,
-- as in by_id. Roller et al. 2021, Hash layers (arXiv 2106.04426, section 3.1; several hashes: section 3.2, where they cut
-- one expert into pieces).
local Hash = nn.module("hash", ById)

Hash.rows = base.rows {
  top_k = { "integer", 1 }, method = { { "random", "balanced", "modulo" }, "random" }, vocab_size = { "integer" }, seed = { "integer", 1 },
  frequencies = { "table|userdata" }, key = { "string", "token_ids" }, table = { "table|userdata" },
}
Hash.takes_selection_bias = false

-- A stream of numbers 0 .. n - 1 from a seed (splitmix64), the same everywhere.
local function stream(seed)
  local state = seed
  return function(n)
    state = state + 0x9E3779B97F4A7C15
    local z = state
    z = (z ~ z >> 30) * 0xBF58476D1CE4E5B9
    z = (z ~ z >> 27) * 0x94D049BB133111EB
    return math.tointeger(((z ~ z >> 31) >> 11) % n)
  end
end

local METHODS <const> = {}

function METHODS.modulo(id, k, E)
  local row = {}
  for i = 1, k do row[i] = (id - 1 + (i - 1) * (E // k)) % E + 1 end
  return row
end

-- k different numbers of 1 .. E: the beginning of a shuffle, of which only the swaps are kept.
local function draw(next_number, k, E)
  local row, moved = {}, {}
  for i = 1, k do
    local j = i + next_number(E - i + 1)
    row[i] = moved[j] or j
    moved[j] = moved[i] or i
  end
  return row
end

local function random_table(o)
  local next_number, rows = stream(o.seed), {}
  for id = 1, o.vocab_size do rows[id] = draw(next_number, o.top_k, o.num_experts) end
  return rows
end

local function counts_of(self, o)
  local f = o.frequencies
  if f == nil then return nil end
  if type(f) == "userdata" then f = f:totable() end
  if #f ~= o.vocab_size then self:fail("there are %d frequencies, but vocab_size is %d", #f, o.vocab_size) end
  for id, n in ipairs(f) do
    if type(n) ~= "number" or not (n >= 0 and n < math.huge) then
      self:fail("the frequency of id %d is %s, wanted a count", id, tostring(n))
    end
  end
  return f
end

-- Greedy: the heaviest id first, to the experts that carry the least. A heap of experts by (carried, number).
local function balanced_table(self, o)
  local counts, V, E, k = counts_of(self, o), o.vocab_size, o.num_experts, o.top_k
  local order = draw(stream(o.seed), V, V)
  if counts then
    local place = {}
    for i, id in ipairs(order) do place[id] = i end
    table.sort(order, function(a, b)
      if counts[a] ~= counts[b] then return counts[a] > counts[b] end
      return place[a] < place[b]
    end)
  end
  local heap, carried, rows = {}, {}, {}
  for e = 1, E do heap[e], carried[e] = e, 0 end
  local function before(a, b) return carried[a] < carried[b] or carried[a] == carried[b] and a < b end
  local function sink(i, n)
    while true do
      local least = i
      for child = 2 * i, math.min(2 * i + 1, n) do
        if before(heap[child], heap[least]) then least = child end
      end
      if least == i then return end
      heap[i], heap[least] = heap[least], heap[i]
      i = least
    end
  end
  local function rise(i)
    while i > 1 and before(heap[i], heap[i // 2]) do
      heap[i], heap[i // 2] = heap[i // 2], heap[i]
      i = i // 2
    end
  end
  for _, id in ipairs(order) do
    local row, n = {}, E
    for i = 1, k do -- off the heap, so that the next one is another
      row[i] = heap[1]
      heap[1] = heap[n]
      n = n - 1
      sink(1, n)
    end
    for i = 1, k do
      carried[row[i]] = carried[row[i]] + (counts and counts[id] or 1)
      n = n + 1
      heap[n] = row[i]
      rise(n)
    end
    rows[id] = row
  end
  return rows
end

function Hash:init(given)
  local bound = self:setup(given, self.rows)
  local o = self._options
  if o.top_k < 1 then self:fail("option 'top_k' must be at least 1, got %d", o.top_k) end
  if o.num_experts and o.top_k > o.num_experts then
    self:fail("top_k is %d, but there are %d experts", o.top_k, o.num_experts)
  end
  if not o.table and not o.vocab_size then self:fail "option 'vocab_size' is missing (or give a 'table')" end
  if o.vocab_size and o.vocab_size < 1 then self:fail("option 'vocab_size' must be at least 1, got %d", o.vocab_size) end
  if not bound then return end
  local rows = o.table
  if not rows and o.method == "random" then
    rows = random_table(o)
  elseif not rows and o.method == "balanced" then
    rows = balanced_table(self, o)
  elseif not rows then
    rows = {}
    for id = 1, o.vocab_size do rows[id] = METHODS.modulo(id, o.top_k, o.num_experts) end
  end
  self:keep_table(rows, o.device)
end

function Hash.traits(_, o) return { ("top_k=%d, method=%s"):format(o.top_k, o.table and "table" or o.method) } end

return Hash
