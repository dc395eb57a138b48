-- A synthetic task as a loader: options, published settings by name, and rows each drawn from its own stream.

local core = require "moe.core"
local options = require "moe.nn.options"
local hint = require("moe.options").hint
local Loader = require "moe.data.loader"
local Generator = require "moe.data.generator"

local M = {}

M.IGNORE = -100 -- what cross_entropy leaves out

local COMMON <const> = {
  setting = { "string" }, batch_size = { "integer", 32 }, seed = { "integer", 1 }, examples = { "integer" }, seq_len = { "integer" },
}

local function next_batch(self)
  local n = self.batch_size
  if self.examples then
    n = math.min(n, self.examples - self.at)
    if n < 1 then
      self.at = 0
      return nil
    end
  end
  local xs, ys = {}, {}
  for r = 1, n do xs[r], ys[r] = self.row(Generator.new(self.seed, self.at + r)) end
  self.at = self.at + n
  local y = core.tensor(ys, { dtype = "i64" })
  return { x = core.tensor(xs, { dtype = "i64" }), y = y, mask = y:ne(M.IGNORE), tokens = n * self.seq_len }
end

--- A loader of a task. rows: its options beside the common ones; settings: { name = options }; make(o, fail) checks the
-- options, by fail(format, ..), and returns row(generator) -> x, y (lists of seq_len tokens from 1; y IGNORE where nothing is
-- asked) and the number of kinds of tokens.
function M.loader(name, given, rows, settings, make)
  if given ~= nil and type(given) ~= "table" then
    error(("%s: takes a table of options, got a %s"):format(name, type(given)), 3)
  end
  local all = {}
  for k, v in pairs(COMMON) do all[k] = v end
  for k, v in pairs(rows) do all[k] = v end
  local merged = {}
  if given and given.setting ~= nil then
    local setting = settings[given.setting]
    if not setting then
      local names = {}
      for k in pairs(settings) do names[#names + 1] = k end
      table.sort(names)
      error(("%s: there is no setting '%s'%s; known: %s"):format(name, tostring(given.setting), hint(given.setting, settings),
        table.concat(names, ", ")), 3)
    end
    for k, v in pairs(setting) do merged[k] = v end
  end
  for k, v in pairs(given or {}) do merged[k] = v end
  local o = options.read(name, merged, all, 2)
  local function fail(message, ...) error(name .. ": " .. message:format(...), 4) end
  for _, key in ipairs { "batch_size", "examples", "seq_len", "vocab_size" } do
    if o[key] and o[key] < 1 then error(("%s: %s must be at least 1, got %d"):format(name, key, o[key]), 3) end
  end
  local row, vocab_size = make(o, fail)
  return setmetatable({
    row = row, vocab_size = vocab_size, seq_len = o.seq_len, batch_size = o.batch_size, seed = o.seed, examples = o.examples, at = 0,
    kind = name, fields = { at = 0, seed = math.mininteger }, endless = o.examples == nil, next = next_batch, options = o,
    text = ("moe.data.loader: %s, batches of [%d, %d] of %d kinds of tokens, %s"):format(name, o.batch_size, o.seq_len, vocab_size,
      o.examples and o.examples .. " examples" or "without end"),
  }, Loader)
end

--- n times the value.
function M.filled(n, value)
  local out = {}
  for i = 1, n do out[i] = value end
  return out
end

return M
