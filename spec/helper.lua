-- What every spec may use: `local helper = require "spec.helper"`. Loading it registers assert.close:
--
--   assert.close(expected, got, { rtol = 1e-5, atol = 1e-8, nan = false })
--
-- compares numbers, nested tables of numbers and tensors (in any mix) by |got - expected| <= atol + rtol * |expected|,
-- shapes first, and on a failure prints the largest error and where it is.
local assert = require "luassert"

local helper = {}

-- The device that the specs run on; `spec/run.sh --device cuda` sets it.
helper.device = os.getenv "MOE_TEST_DEVICE" or "cpu"
-- Sanitizer builds are ten times slower: loops of a spec may be shorter there.
helper.sanitize = os.getenv "MOE_TEST_SANITIZE" == "1"

local function number_of(v)
  if v == true then return 1 elseif v == false then return 0 end
  return v
end

-- Values in row-major order and the shape of a number, a nested table or a tensor.
function helper.flatten(v)
  if type(v) == "userdata" then
    local shape = {}
    for i = 1, #v.shape do shape[i] = v.shape[i] end
    local flat = helper.flatten(v:totable())
    return flat, shape
  end
  if type(v) ~= "table" then return { number_of(v) }, {} end
  local flat, shape = {}, { #v }
  for i = 1, #v do
    local part, inner = helper.flatten(v[i])
    table.move(part, 1, #part, #flat + 1, flat)
    if i == 1 then
      table.move(inner, 1, #inner, 2, shape)
    elseif #inner ~= #shape - 1 then
      error("helper.flatten: ragged table", 2)
    end
  end
  return flat, shape
end

-- 1-based position in a shape of the i-th element (from 1), as "{2, 1}".
function helper.position(i, shape)
  local at, rest = {}, i - 1
  for d = #shape, 1, -1 do
    at[d] = rest % shape[d] + 1
    rest = rest // shape[d]
  end
  return "{" .. table.concat(at, ", ") .. "}"
end

local function shape_text(shape) return "[" .. table.concat(shape, ", ") .. "]" end

-- nil when close, else a message.
function helper.difference(expected, got, opts)
  opts = opts or {}
  local rtol, atol = opts.rtol or 1e-5, opts.atol or 1e-8
  local a, sa = helper.flatten(expected)
  local b, sb = helper.flatten(got)
  if #sa ~= #sb or shape_text(sa) ~= shape_text(sb) then
    -- A tensor knows the inner sizes of an empty shape; a table does not.
    if not (#a == 0 and #b == 0 and (type(expected) == "table" or type(got) == "table")) then
      return ("shapes differ: expected %s, got %s"):format(shape_text(sa), shape_text(sb))
    end
  end
  local worst, where, count, largest = 0, nil, 0, 0
  for i = 1, #a do
    local x, y = a[i], b[i]
    if type(x) ~= "number" or type(y) ~= "number" then
      return ("element %s is no number: expected %s, got %s"):format(helper.position(i, sa), tostring(x), tostring(y))
    end
    local err = math.abs(y - x)
    local over
    if x == y or (opts.nan and x ~= x and y ~= y) then
      over = -1
    elseif err ~= err or err == math.huge then
      over = math.huge
    else
      over = err - (atol + rtol * math.abs(x))
      if err > largest then largest = err end
    end
    if over > 0 then
      count = count + 1
      if where == nil or over > worst then worst, where = over, i end
    end
  end
  if where then
    local err = math.abs(b[where] - a[where])
    return ("%d of %d elements differ; the worst at %s of %s: expected %.9g, got %.9g "
      .. "(error %.3g, relative %.3g; allowed %g + %g * |expected|)"):format(count, #a, helper.position(where, sa),
      shape_text(sa), a[where], b[where], err, err / math.max(math.abs(a[where]), 1e-300), atol, rtol)
  end
  return nil, largest
end

local function close(state, arguments)
  local opts = arguments[3]
  local message = helper.difference(arguments[1], arguments[2], opts)
  for i = 1, arguments.n do arguments[i] = nil end -- the message says it better than a dump of both
  arguments.n = 0
  local name = opts and opts.name
  if message then rawset(state, "failure_message", name and name .. ": " .. message or message) end
  return message == nil
end
require("say"):set("assertion.close.positive", "Expected values to be close.")
require("say"):set("assertion.close.negative", "Expected values to differ.")
assert:register("assertion", "close", close, "assertion.close.positive", "assertion.close.negative")

-- A generator of one's own, so that a spec is the same in any order: r(), r(n), r(a, b) as math.random, r.normal().
function helper.random(seed)
  local s = (seed or 1) * 6364136223846793005 + 1442695040888963407
  local function next_unit()
    s = s * 6364136223846793005 + 1442695040888963407
    return (s >> 11) * (1.0 / (1 << 53))
  end
  local r = {}
  function r.normal()
    return math.sqrt(-2 * math.log(1 - next_unit())) * math.cos(2 * math.pi * next_unit())
  end
  -- A shape of ndim sizes in 1..max, odd ones mostly.
  function r.shape(ndim, max)
    local shape = {}
    for d = 1, ndim do
      local n = r(1, max or 7)
      if n % 2 == 0 and r() < 0.7 then n = n - 1 end
      shape[d] = n
    end
    return shape
  end
  return setmetatable(r, {
    __call = function(_, a, b)
      local u = next_unit()
      if a == nil then return u end
      if b == nil then a, b = 1, a end
      return a + math.floor(u * (b - a + 1))
    end,
  })
end

-- A tensor from values in row-major order (or a function that gives the i-th) and a shape, {} being a scalar.
function helper.tensor(values, shape, opts)
  local moe = require "moe"
  local n = 1
  for _, size in ipairs(shape) do n = n * size end
  local flat = {}
  for i = 1, n do
    if type(values) == "function" then flat[i] = values(i) else flat[i] = values[i] end
  end
  if n == 0 then return moe.zeros(shape, opts) end
  if #shape == 0 then return moe.tensor(flat[1], opts) end
  return moe.tensor(flat, opts):reshape(shape):detach()
end

-- x, as views that no kernel can take for contiguous: the same values, other strides. Gradients flow through.
-- Returns a list of { name, tensor }.
function helper.views(x)
  local moe = require "moe"
  local list = {}
  if #x.shape >= 2 then
    list[1] = { "transposed", x:transpose(1, -1):contiguous():transpose(1, -1) }
  end
  local junk = moe.no_grad(function() return x:clone() end)
  list[#list + 1] = { "strided", moe.stack({ junk, x }, { dim = -1 }):select(-1, 2) }
  return list
end

-- spec/fixture/<name>.safetensors as { name = tensor }, or spec/fixture/<name>.lua as the value it returns.
function helper.fixture(name)
  local path = "spec/fixture/" .. name
  local chunk = loadfile(path .. ".lua", "t", {})
  if chunk then return chunk() end
  local moe = require "moe"
  return assert(moe.io.load(path .. ".safetensors"))
end

-- Runs f and returns the message of the error that it must raise, as a string.
function helper.error_of(f, ...)
  local ok, message = pcall(f, ...)
  if ok then error("an error was expected, none came", 2) end
  if type(message) ~= "string" then error("the error is no string: " .. type(message), 2) end
  return message
end

-- Resident set of this process in bytes, or nil where the system does not tell.
function helper.resident()
  local file = io.open "/proc/self/statm"
  if not file then return nil end
  local _, pages = file:read("n", "n")
  file:close()
  return pages * 4096
end

-- A fresh temporary path; the caller removes it.
function helper.temporary(suffix)
  local path = os.tmpname()
  if suffix then
    os.remove(path)
    path = path .. suffix
  end
  return path
end

return helper
