--- Data: text as token streams, and loaders of batches.
--
--   local text = moe.data.text("input.txt", { level = "chars", split = { 0.9, 0.1 } })
--   local train = text.train:batches{ batch_size = 12, seq_len = 64, random = true, seed = 1 }
--   local val = text.val:batches{ batch_size = 12, seq_len = 64 }
--   for batch in val do print(batch.x, batch.y) end       -- [12, 64] each, counting from 1; y lies one token further
--
--   local loader = moe.data.batches(x, y, { batch_size = 32, shuffle = true, seed = 1 })
--   local task = moe.data.synthetic.mqar { setting = "zoology_64", batch_size = 32 }   -- batch.x, batch.y, batch.mask
--
-- A loader is called for the next batch; nil ends a pass, and the call after it begins the next. Loaders with
-- random = true never end. loader:state() is a small table (where the loader is), loader:restore(state) goes there.

local core = require "moe.core"
local files = core._files
local low = core._data
local check_options = require("moe.options").check
local Loader = require "moe.data.loader"

local M = {}

local function fail(level, message, ...) error(message:format(...), level + 1) end

local function count(fname, options, name, default, least)
  local v = options[name]
  if v == nil then v = default end
  if v == nil then fail(3, "%s: the option '%s' is missing", fname, name) end
  if math.type(v) ~= "integer" or v < least then
    fail(3, "%s: %s must be a whole number of at least %d, got %s", fname, name, least, tostring(v))
  end
  return v
end

local function flag(fname, options, name)
  local v = options[name]
  if v ~= nil and type(v) ~= "boolean" then fail(3, "%s: %s must be true or false, got %s", fname, name, tostring(v)) end
  return v or false
end

-- --- text ---

local Stream = {}
Stream.__index = Stream
Stream.__name = "moe.data.stream"
function Stream:__len() return self.last - self.first + 1 end
function Stream:__tostring() return ("moe.data.stream: %d tokens of %d kinds"):format(#self, self.text.vocab_size) end

--- All tokens, or those from `first` to `last`, as an index tensor of one dimension.
function Stream:ids(first, last)
  first, last = first or 1, last or #self
  if math.type(first) ~= "integer" or math.type(last) ~= "integer" or first < 1 or last > #self or first > last + 1 then
    fail(2, "ids: %s .. %s does not lie in 1 .. %d", tostring(first), tostring(last), #self)
  end
  return self.text.tokens:ids(self.first + first - 1, self.first + last - 1)
end

local batch_names <const> = { batch_size = 1, seq_len = 1, random = 1, seed = 1, drop_last = 1 }

local function next_random(self)
  local s = self.stream
  local x, y = s.text.tokens:random(s.first, s.last, self.batch_size, self.seq_len, self.seed, self.at)
  self.at = self.at + 1
  return { x = x, y = y, tokens = self.batch_size * self.seq_len }
end

local function next_in_order(self)
  local s = self.stream
  local rows = math.min(self.batch_size, self.windows - self.at)
  if rows < 1 or (self.drop_last and rows < self.batch_size) then
    self.at = 0
    return nil
  end
  local x, y = s.text.tokens:sequence(s.first + self.at * self.seq_len, rows, self.seq_len)
  self.at = self.at + rows
  return { x = x, y = y, tokens = rows * self.seq_len }
end

--- A loader of windows of seq_len tokens: batch.x and batch.y [batch_size, seq_len], y one token further than x.
-- random = true: windows that begin anywhere, drawn from `seed` (default 1) and never ending; else one after the other, the
-- last batch having fewer rows where they do not divide (drop_last = true leaves it out).
function Stream:batches(options)
  options = check_options("batches", options, batch_names)
  local loader = {
    stream = self, batch_size = count("batches", options, "batch_size", nil, 1),
    seq_len = count("batches", options, "seq_len", nil, 1), drop_last = flag("batches", options, "drop_last"),
    seed = count("batches", options, "seed", 1, math.mininteger), at = 0,
  }
  if loader.batch_size > 1 << 20 then fail(2, "batches: batch_size must be at most %d", 1 << 20) end
  if #self < loader.seq_len + 1 then
    fail(2, "batches: windows of %d tokens and the one after need more than the stream's %d tokens", loader.seq_len, #self)
  end
  local random = flag("batches", options, "random")
  loader.windows = (#self - 1) // loader.seq_len
  if loader.drop_last and not random and loader.windows < loader.batch_size then
    fail(2, "batches: drop_last leaves nothing of %d windows in batches of %d", loader.windows, loader.batch_size)
  end
  loader.kind = random and "random" or "sequence"
  loader.fields = random and { at = 0, seed = math.mininteger } or { at = 0 }
  loader.endless = random
  loader.next = random and next_random or next_in_order
  loader.text = ("moe.data.loader: batches of [%d, %d], %s"):format(loader.batch_size, loader.seq_len,
    random and "random windows" or ("%d windows in order"):format(loader.windows))
  return setmetatable(loader, Loader)
end

local Text = {}
Text.__index = Text
Text.__name = "moe.data.text"
function Text:__len() return #self.tokens end
function Text:__tostring()
  local parts = {}
  for _, name in ipairs(self.parts) do parts[#parts + 1] = ("%s %d"):format(name, #self[name]) end
  return ("moe.data.text: %d tokens (%s), %d kinds, level %s"):format(#self.tokens, table.concat(parts, ", "), self.vocab_size,
    self.level)
end

--- Text -> index tensor of one dimension. A character that is not in the vocabulary is an error.
function Text:encode(s)
  if type(s) ~= "string" then fail(2, "encode: argument 1 must be a string, got a %s", type(s)) end
  local ids = {}
  if self.level == "bytes" then
    for i = 1, #s do ids[i] = s:byte(i) + 1 end
  else
    if not utf8.len(s) then fail(2, "encode: the text is not UTF-8") end
    for _, code in utf8.codes(s) do
      local c = utf8.char(code)
      local id = self.index[c]
      if not id then fail(2, "encode: the character '%s' is not in the vocabulary", c) end
      ids[#ids + 1] = id
    end
  end
  if #ids == 0 then return core.zeros({ 0 }, { dtype = "i64" }) end
  return core.tensor(ids, { dtype = "i64" })
end

--- Token numbers (an index tensor of any shape, a list, or one number) -> text.
function Text:decode(ids)
  local list = ids
  if core.is_tensor(ids) then
    list = ids:reshape(-1):totable()
  elseif type(ids) == "number" then
    list = { ids }
  elseif type(ids) ~= "table" then
    fail(2, "decode: argument 1 must be an index tensor, a list of numbers or a number, got a %s", type(ids))
  end
  local out = {}
  for i, id in ipairs(list) do
    local c = self.vocab[id]
    if not c then fail(2, "decode: token %s does not lie in 1 .. %d", tostring(id), self.vocab_size) end
    out[i] = c
  end
  return table.concat(out)
end

-- Texts of the files below dir, in the order of their paths; hidden files and files with zero bytes are passed by.
local function read_tree(path, pattern, out, depth)
  local kind = files.kind(path)
  if kind == "directory" then
    if depth > 32 then return true end -- a link that leads back
    local names, message = files.list(path)
    if not names then return nil, message end
    for _, name in ipairs(names) do
      if name:sub(1, 1) ~= "." then
        local ok
        ok, message = read_tree(path .. "/" .. name, pattern, out, depth + 1)
        if not ok then return nil, message end
      end
    end
  elseif kind == "file" and (depth == 0 or not pattern or path:match(pattern)) then
    local text, message = files.read(path)
    if not text then return nil, message end
    if depth == 0 or not text:find("\0", 1, true) then out[#out + 1] = text end
  elseif depth == 0 then
    return files.read(path) -- tells why not
  end
  return true
end

local part_names <const> = { { "train" }, { "train", "val" }, { "train", "val", "test" } }

local function check_split(split)
  if split == nil then return { 1 } end
  if type(split) ~= "table" or not part_names[#split] then fail(3, "text: split must be a list of one to three shares") end
  local sum = 0
  for i, share in ipairs(split) do
    if type(share) ~= "number" or not (share > 0 and share <= 1) then
      fail(3, "text: split[%d] must be a number above 0 and at most 1, got %s", i, tostring(share))
    end
    sum = sum + share
  end
  if math.abs(sum - 1) > 1e-6 then fail(3, "text: the shares of split add up to %g, not to 1", sum) end
  return split
end

local text_names <const> = { level = 1, split = 1, pattern = 1 }

--- Text as tokens: of a file, of all files below a directory (those whose path matches `pattern`, a Lua pattern; hidden and
-- binary ones left out), or given: moe.data.text({ text = "..." }). level = "chars" (the default; the vocabulary is the text's
-- own characters, sorted) or "bytes" (256 tokens, any text). Text that is not UTF-8 has no characters: nil, message.
-- split = { 0.9, 0.1 } cuts the stream into train and val (a third share is test). The result has train, val, test (streams
-- with :batches and :ids), vocab (a list of strings), vocab_size, encode, decode. Files that cannot be read: nil, message.
function M.text(source, options)
  options = check_options("text", options, text_names)
  local level = options.level or "chars"
  if level ~= "chars" and level ~= "bytes" then
    fail(2, "text: level must be \"chars\" or \"bytes\", got %s", tostring(level))
  end
  if options.pattern ~= nil and type(options.pattern) ~= "string" then fail(2, "text: pattern must be a string") end
  local split = check_split(options.split)
  local text
  if type(source) == "table" and type(source.text) == "string" then
    text = source.text
  elseif type(source) == "string" then
    local parts = {}
    local ok, message = read_tree(source, options.pattern, parts, 0)
    if not ok then return nil, message end
    text = table.concat(parts)
  else
    fail(2, "text: argument 1 must be a path or { text = string }, got a %s", type(source))
  end
  local tokens, vocab
  if level == "bytes" then
    tokens, vocab = low.bytes(text), {}
    for i = 1, 256 do vocab[i] = string.char(i - 1) end
  else
    tokens, vocab = low.chars(text)
    if not tokens then
      return nil, type(source) == "string" and ("%s: %s"):format(source, vocab) or vocab
    end
  end
  local self = setmetatable({ tokens = tokens, vocab = vocab, vocab_size = #vocab, level = level, parts = part_names[#split],
    index = {} }, Text)
  for i, c in ipairs(vocab) do self.index[c] = i end
  local at, sum = 0, 0
  for i, name in ipairs(self.parts) do
    sum = sum + split[i]
    local stop = i == #split and #tokens or math.floor(#tokens * sum + 1e-9)
    self[name] = setmetatable({ text = self, first = at + 1, last = stop }, Stream)
    at = stop
  end
  return self
end

-- --- tensors ---

local tensor_names <const> = { batch_size = 1, shuffle = 1, seed = 1, drop_last = 1 }

-- Without a shuffle a batch is a view.
local function rows(self, t, first, n)
  if t == nil then return nil end
  if not self.shuffle then return t:narrow(1, first, n) end
  return core.no_grad(function() return t:index_select(1, self.order:narrow(1, first, n)) end)
end

local function next_rows(self)
  local n = math.min(self.batch_size, self.n - self.at)
  if n < 1 or (self.drop_last and n < self.batch_size) then
    self.at, self.epoch, self.order = 0, self.epoch + 1, nil
    return nil
  end
  if self.shuffle and (not self.order or self.order_of ~= self.epoch) then
    self.order, self.order_of = low.permutation(self.n, self.seed, self.epoch), self.epoch
  end
  local x, y = rows(self, self.x, self.at + 1, n), rows(self, self.y, self.at + 1, n)
  self.at = self.at + n
  return { x = x, y = y }
end

--- A loader of the rows of x [N, ...] and, where it is given, y [N, ...]: batch.x, batch.y. shuffle = true: in an order that
-- `seed` (default 1) and the number of the pass fix. drop_last = true leaves a smaller last batch out.
function M.batches(x, y, options)
  if options == nil and y ~= nil and not core.is_tensor(y) then y, options = nil, y end
  options = check_options("batches", options, tensor_names)
  for i, t in ipairs { x or false, y } do
    if not core.is_tensor(t) then fail(2, "batches: argument %d must be a tensor, got a %s", i, type(t or nil)) end
    if #t.shape == 0 then fail(2, "batches: argument %d must have rows, got a tensor without dimensions", i) end
  end
  local n = x.shape[1]
  if y and y.shape[1] ~= n then fail(2, "batches: x has %d rows, y has %d", n, y.shape[1]) end
  local loader = {
    x = x, y = y, n = n, at = 0, epoch = 0, batch_size = count("batches", options, "batch_size", nil, 1),
    seed = count("batches", options, "seed", 1, math.mininteger), shuffle = flag("batches", options, "shuffle"),
    drop_last = flag("batches", options, "drop_last"), kind = "rows", next = next_rows,
    fields = { at = 0, epoch = 0, seed = math.mininteger },
  }
  if n == 0 or loader.drop_last and n < loader.batch_size then
    fail(2, "batches: %d rows give no batch of %d", n, loader.batch_size)
  end
  loader.text = ("moe.data.loader: %d rows in batches of %d%s"):format(n, loader.batch_size, loader.shuffle and ", shuffled" or "")
  return setmetatable(loader, Loader)
end

return require "moe.lazy"(M, { synthetic = "moe.data.synthetic" })
