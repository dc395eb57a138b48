-- Running modules on some of the positions of a batch of sequences: their order is kept, and what was not chosen is
-- not computed.

local core = require "moe.core"
local low = core._module

local M = {}

-- The fields of a context as a plain table, those behind its metatables too.
local function flat(ctx)
  local out = {}
  while type(ctx) == "table" do
    for k, v in pairs(ctx) do
      if out[k] == nil then out[k] = v end
    end
    local mt = getmetatable(ctx)
    ctx = mt and mt.__index
  end
  return out
end

-- ctx for some rows: tensors [sizes.., ..] with these leading sizes become those of the rows `index` (from 1), with leading
-- sizes `to`.
function M.context(ctx, sizes, index, to)
  local out = flat(ctx)
  local count = 1
  for _, n in ipairs(sizes) do count = count * n end
  for name, t in pairs(out) do
    if type(name) == "string" and core.is_tensor(t) then
      local shape, fits = t.shape, #t.shape >= #sizes
      for i, n in ipairs(sizes) do fits = fits and shape[i] == n end
      if fits then
        local rest = table.move(shape, #sizes + 1, #shape, 2, { count })
        local wanted = table.move(shape, #sizes + 1, #shape, #to + 1, table.move(to, 1, #to, 1, {}))
        out[name] = t:reshape(rest):index_select(1, index):reshape(wanted)
      end
    end
  end
  return out
end

-- What layers inside have left in the inner context goes to the outer one.
function M.report(ctx, inner)
  if ctx and inner then ctx.routings, ctx.routing = inner.routings, inner.routing end
end

-- Whether a block is called as block(x, state, ctx): all but those C layers that are no mixers.
function M.takes_context(block) return not low.is(block) or (pcall(block.state, block, 0)) end

-- The lengths of the sequences of x [B, T, d] as a list: B times T, or those of ctx.cu_seqlens.
function M.lengths(name, B, T, ctx)
  local out = {}
  local packed = ctx and ctx.cu_seqlens
  if not packed then
    for b = 1, B do out[b] = T end
    return out
  end
  local at = packed:totable()
  if B ~= 1 or at[1] ~= 0 or at[#at] ~= T then
    error(("%s: cu_seqlens must rise from 0 to the %d positions of a batch of 1"):format(name, T), 0)
  end
  for s = 2, #at do out[s - 1] = at[s] - at[s - 1] end
  return out
end

-- bool [1, T, T]: positions of the same of the sequences packed one after another, and where in its own each is (from 0).
function M.packed_mask(name, lengths, B, T)
  local at, number, position = lengths:totable(), {}, {}
  if B ~= 1 or at[1] ~= 0 or at[#at] ~= T then
    error(("%s: cu_seqlens must rise from 0 to the %d positions of a batch of 1"):format(name, T), 0)
  end
  for s = 2, #at do
    for i = at[s - 1] + 1, at[s] do number[i], position[i] = s, i - at[s - 1] - 1 end
  end
  if #number ~= T then error(("%s: cu_seqlens must not fall"):format(name), 0) end
  number = core.tensor(number, { dtype = "i64" })
  return number:reshape { 1, T, 1 }:eq(number:reshape { 1, 1, T }), core.tensor(position, { dtype = "i64" })
end

--- block(rows) for the chosen positions `token` (i64 [A], from 1, ascending) of x [B, T, d], whose sequences have these lengths:
-- the sequences as a batch where as many of each were chosen, else packed, with ctx.cu_seqlens. [A, d], the inner context.
function M.run(name, block, picked, token, B, T, lengths, ctx)
  local A, d = picked:size(1), picked:size(2)
  if ctx and ctx.attn_mask then error(name .. ": an attn_mask cannot follow the chosen tokens", 0) end
  local counts, at, s, position = {}, 0, 1, token:totable()
  for i = 1, #lengths do counts[i] = 0 end
  for _, t in ipairs(position) do
    while t > at + lengths[s] do at, s = at + lengths[s], s + 1 end
    counts[s] = counts[s] + 1
  end
  local even = true
  for i = 2, #counts do even = even and counts[i] == counts[1] end
  local shape = even and { #counts, A // #counts } or { 1, A }
  local inner
  if ctx or not even then
    inner = M.context(ctx or {}, { B, T }, token, shape)
    inner.mask, inner.cu_seqlens = nil, nil -- a masked token is never chosen
    if not even then
      local cu = { 0 }
      for i, n in ipairs(counts) do cu[i + 1] = cu[i] + n end
      inner.cu_seqlens = core.tensor(cu, { dtype = "i64", device = picked.device })
    end
  end
  local rows = picked:reshape { shape[1], shape[2], d }
  local y
  if inner and M.takes_context(block) then y = block(rows, nil, inner) else y = block(rows) end
  local out = core.is_tensor(y) and y.shape
  if not out or #out ~= 3 or out[1] ~= shape[1] or out[2] ~= shape[2] then
    error(("%s: the block gave %s for x [%d, %d, %d]"):format(name,
      out and "[" .. table.concat(out, ", ") .. "]" or "a " .. type(y), shape[1], shape[2], d), 0)
  end
  return y:reshape { A, out[3] }, inner
end

return M
