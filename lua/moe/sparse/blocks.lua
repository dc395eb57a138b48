-- Whole modules as experts.

local moe = require "moe"
local core = moe.core
local nn = moe.nn
local options = require "moe.nn.options"
local chosen_of = require "moe.sparse.chosen"

local function one(block, rows, inner)
  if inner and chosen_of.takes_context(block) then return (block(rows, nil, inner)) end
  return (block(rows))
end

-- Work of a bank: f(e, first, n) -> [n, d] for the assignments first .. first + n - 1 of expert e, joined.
local function each_expert(routing, empty, f)
  local offsets, parts = routing.offsets:totable(), {}
  for e = 1, routing.num_experts do
    local n = offsets[e + 1] - offsets[e]
    if n > 0 then parts[#parts + 1] = f(e, offsets[e], n) end
  end
  if #parts == 0 then return empty end
  return #parts == 1 and parts[1] or core.cat(parts, 1)
end

local function by_token(blocks, residual, rows, routing, ctx)
  local B, T = ctx.shape[1], ctx.shape[2]
  local lengths = chosen_of.lengths("mixture_of_blocks", B, T, ctx.outer)
  local picked, token = routing:gather(rows), routing.token
  local y = each_expert(routing, picked, function(e, first, n)
    local own, at = picked:narrow(1, first, n), token:narrow(1, first, n)
    local out, inner = chosen_of.run("mixture_of_blocks", blocks[e], own, at, B, T, lengths, ctx.outer)
    chosen_of.report(ctx.outer, inner)
    return out
  end)
  if residual then return rows + routing:combine(y - picked) end
  return routing:combine(y)
end

local function by_sequence(blocks, residual, _, routing, ctx)
  local x, outer = ctx.whole, ctx.outer
  local B, T, d = x:size(1), x:size(2), x:size(3)
  local rows = x:reshape { B, T * d }
  local picked, sequence = routing:gather(rows), routing.token
  local y = each_expert(routing, picked, function(e, first, n)
    local inner = outer and chosen_of.context(outer, { B }, sequence:narrow(1, first, n), { n })
    local out = one(blocks[e], picked:narrow(1, first, n):reshape { n, T, d }, inner)
    chosen_of.report(outer, inner)
    return out:reshape { n, T * d }
  end)
  if residual then return rows + routing:combine(y - picked) end
  return routing:combine(y)
end

local Bank = nn.module "blocks"
function Bank:init(blocks, work, residual)
  for i, block in ipairs(blocks) do self[i] = block end
  self._work, self._residual = work, residual
end
function Bank:forward(rows, routing, ctx) return self._work(self, self._residual, rows, routing, ctx) end

--- Blocks as experts: each token (per = "token") or each sequence ("sequence") goes through the whole modules that a router chose
-- for it, y = sum_i g_i block_i(x); with `residual` (blocks whose result contains their input) y = x + sum_i g_i (block_i(x) -
-- x). A block gets the chosen tokens of each sequence as a shorter one, in their order: attention inside is among them; or whole
-- sequences. One that nobody chose is not called. y, state (none), routing = m(x [batch, time, d_model], nil, ctx), so that it
-- can stand for a layer of a model; a moe.layer: its methods, losses, force and statistics. Fields of ctx that are [batch, time,
-- ..] (or [batch, ..]) follow. A block is called as block(x) or block(x, nil, ctx). Options: blocks (a list), d_model, per
-- ("token"), router, top_k (1), residual (true), pool: what the router of sequences sees, "mean" over time (it looks ahead in
-- causal models), "first", or a function (x, ctx) -> [batch, d_model]; balance, force, bias_update_rate. Parameters router.*,
-- experts.1.*, experts.2.* ..
local Blocks = nn.module("mixture_of_blocks", moe.layer)

local ROWS <const> = {
  blocks = { "table", options.required }, d_model = { "integer", options.required }, per = { { "token", "sequence" }, "token" },
  router = { "function|table|userdata" }, top_k = { "integer" }, residual = { "boolean", true }, pool = { "string|function", "mean" },
  balance = { "function|table" }, bias_update_rate = { "number|function" }, force = { "string|userdata|function" },
}

local POOL <const> = {
  mean = function(x, ctx)
    local mask = ctx and ctx.mask
    if not mask then return x:mean(2) end
    local keep = mask:to(x.dtype):unsqueeze(-1)
    return (x * keep):sum(2) / keep:sum(2):clamp(1)
  end,
  first = function(x) return x:select(2, 1) end,
}

function Blocks:init(given)
  local o = options.read("mixture_of_blocks", given, ROWS, 2)
  for i, block in ipairs(o.blocks) do
    if not nn.is_module(block) then error(("mixture_of_blocks: block %d must be a module, got a %s"):format(i, type(block)), 3) end
  end
  if #o.blocks == 0 then error("mixture_of_blocks: option 'blocks' is an empty list", 3) end
  if type(o.pool) == "string" and not POOL[o.pool] then
    error(("mixture_of_blocks: option 'pool' must be mean, first or a function (x, ctx), got %q"):format(o.pool), 3)
  elseif o.router and o.top_k then
    error("mixture_of_blocks: top_k is the router's: give either it or a router", 3)
  end
  moe.layer.init(self, {
    d_model = o.d_model, num_experts = #o.blocks, router = o.router or moe.router.topk { top_k = o.top_k or 1 },
    experts = Bank(o.blocks, o.per == "token" and by_token or by_sequence, o.residual), balance = o.balance,
    bias_update_rate = o.bias_update_rate, force = o.force,
  })
  self._blocks = o
end

function Blocks:forward(x, state, ctx)
  local o = self._blocks
  if state ~= nil then error("mixture_of_blocks: has no state: tokens of one sequence go different ways", 2) end
  local shape = core.is_tensor(x) and x.shape
  if not shape or #shape ~= 3 or shape[3] ~= o.d_model then
    error(("mixture_of_blocks: x must be [batch, time, %d], got %s"):format(o.d_model,
      shape and "[" .. table.concat(shape, ", ") .. "]" or "a " .. type(x)), 2)
  end
  local inner = setmetatable({ outer = ctx }, { __index = ctx })
  local y, routing
  if o.per == "token" then
    y, routing = moe.layer.forward(self, x, inner)
  else
    if ctx and ctx.cu_seqlens then error("mixture_of_blocks: sequences are chosen whole, they cannot be packed", 2) end
    local pool = POOL[o.pool] or o.pool
    inner.whole = x
    if ctx and ctx.mask then inner.mask = ctx.mask:any(2) end
    y, routing = moe.layer.forward(self, pool(x, ctx), inner)
    y = y:reshape { shape[1], shape[2], -1 }
  end
  if ctx then ctx.routing, ctx.routings = inner.routing, inner.routings end
  return y, nil, routing
end

return Blocks
