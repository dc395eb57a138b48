-- Who may attend to whom: bool [queries, keys] for attn_mask and moe.attention, true where a query may see a key. The last
-- query stands at the last key. Unions and intersections by logical_or and logical_and. What is only a window, a triangle or
-- packed sequences needs no mask: the options window, causal and cu_seqlens cost nothing where nothing is seen.

local core = require "moe.core"
local options = require "moe.nn.options"

local M = {}

local function count(name, what, n, least)
  if math.type(n) ~= "integer" or n < least then
    error(("masks.%s: %s must be an integer of at least %d, got %s"):format(name, what, least, tostring(n)), 3)
  end
  return n
end

local function sizes(name, t, s) return count(name, "queries", t, 0), count(name, "keys", s or t, 0) end

-- Positions of queries [t, 1] and of keys [1, s], from 0.
local function positions(t, s)
  local keys = core.arange(0, s - 1):to "i64"
  return (core.arange(0, t - 1):to "i64" + (s - t)):reshape { t, 1 }, keys:reshape { 1, s }
end

local function both(mask, causal, far) return causal and mask:logical_and(far:ge(0)) or mask end

--- Keys up to the query: moe.nn.masks.causal(queries [, keys]).
function M.causal(t, s)
  t, s = sizes("causal", t, s)
  local i, j = positions(t, s)
  return (i - j):ge(0)
end

local WINDOW <const> = { window = { "integer", options.required }, dilation = { "integer", 1 }, causal = { "boolean", true } }

--- `window` keys around the query at steps of `dilation`: the distance is a multiple of it, less than window * dilation.
-- moe.nn.masks.dilated(queries, keys, { window =, dilation = 1, causal = true }). Beltagy et al. 2020 (arXiv 2004.05150).
function M.dilated(t, s, given)
  t, s = sizes("dilated", t, s)
  local o = options.read("masks.dilated", given, WINDOW)
  count("dilated", "window", o.window, 1)
  count("dilated", "dilation", o.dilation, 1)
  local i, j = positions(t, s)
  local far = i - j
  local near = far:abs():lt(o.window * o.dilation)
  return both(near:logical_and(far:abs():remainder(o.dilation):eq(0)), o.causal, far)
end

--- Blocks of `size` positions that see themselves: moe.nn.masks.block(queries, keys, size [, causal = true]).
function M.block(t, s, size, causal)
  t, s = sizes("block", t, s)
  count("block", "size", size, 1)
  local i, j = positions(t, s)
  return both(i:floor_divide(size):eq(j:floor_divide(size)), causal ~= false, i - j)
end

--- The first `n` positions see all and are seen by all: moe.nn.masks.global(queries, keys, n [, causal = true]).
function M.global(t, s, n, causal)
  t, s = sizes("global", t, s)
  count("global", "n", n, 0)
  local i, j = positions(t, s)
  return both(i:lt(n):logical_or(j:lt(n)), causal ~= false, i - j)
end

--- Sequences packed one after another: moe.nn.masks.packed(cu_seqlens [, cu_seqlens of the keys]), cumulative lengths from 0.
function M.packed(cu, cu_k)
  local function numbers(list)
    local at, out = core.is_tensor(list) and list:totable() or list, {}
    for n = 2, #at do
      if at[n] < at[n - 1] then error("masks.packed: cu_seqlens must not fall", 3) end
      for i = at[n - 1] + 1, at[n] do out[i] = n end
    end
    return core.tensor(out, { dtype = "i64" })
  end
  local q, k = numbers(cu), numbers(cu_k or cu)
  return q:reshape { -1, 1 }:eq(k:reshape { 1, -1 })
end

local BIGBIRD <const> = {
  block_size = { "integer", 64 }, num_random = { "integer", 3 }, num_global = { "integer", 1 }, window = { "integer", 3 },
  causal = { "boolean", false },
}

--- BigBird: in blocks of block_size positions, each sees `window` blocks around it (odd; itself in the middle), the first and last
-- num_global blocks, which see all, and num_random others drawn by moe's random numbers (moe.manual_seed). causal: keys up to the
-- query alone, global blocks are then the first ones. moe.nn.masks.bigbird(positions, { block_size = 64, num_random = 3,
-- num_global = 1, window = 3, causal = false }). Zaheer et al. 2020 (arXiv 2007.14062, section 2).
function M.bigbird(t, given)
  count("bigbird", "positions", t, 0)
  local o = options.read("masks.bigbird", given, BIGBIRD)
  count("bigbird", "block_size", o.block_size, 1)
  for _, name in ipairs { "num_random", "num_global", "window" } do count("bigbird", name, o[name], 0) end
  if t == 0 then return core.zeros({ 0, 0 }, { dtype = "bool" }) end
  local n = (t + o.block_size - 1) // o.block_size
  local i, j = positions(n, n)
  local seen = (i - j):abs():mul(2):lt(o.window)
  local last = o.causal and n or n - o.num_global
  seen = seen:logical_or(j:lt(o.num_global)):logical_or(i:lt(o.num_global)):logical_or(j:ge(last)):logical_or(i:ge(last))
  local fresh = both(seen:logical_not(), o.causal, i - j)
  local k = math.min(o.num_random, n)
  if k > 0 then
    local order = core.rand(n, n):masked_fill(fresh:logical_not(), -1)
    local _, index = order:topk(k)
    local drawn = core.zeros(n, n):scatter(2, index, core.ones(n, k)):gt(0)
    seen = seen:logical_or(drawn:logical_and(fresh))
  end
  local block = core.arange(0, t - 1):to "i64":floor_divide(o.block_size) + 1
  local mask = seen:index_select(1, block):index_select(2, block)
  local row, column = positions(t, t)
  return both(mask, o.causal, row - column)
end

--- Distances of the cells of a grid, row by row: [h w, h w] floats, for terms that fall with them (moe.nn.relative.gaussian).
function M.grid(h, w)
  count("grid", "height", h, 1)
  count("grid", "width", w, 1)
  local cell = core.arange(0, h * w - 1):to "i64"
  local y, x = cell:floor_divide(w):to "f32", cell:remainder(w):to "f32"
  local function square(a) return (a:reshape { -1, 1 } - a:reshape { 1, -1 }):square() end
  return (square(y) + square(x)):sqrt()
end

return M
