-- Mixture of depths: a block that works on some tokens and lets the others pass.

local moe = require "moe"
local core = moe.core
local nn = moe.nn
local options = require "moe.nn.options"
local chosen_of = require "moe.sparse.chosen"
require "moe.routing" -- the methods of routings
local sparse = core._sparse

--- Mixture of depths: of each sequence the `capacity` share of tokens with the largest scores r_t = w . x_t goes through the
-- block, among themselves and in their order; the others skip it: y_t = x_t + g(r_t) (block(x)_t - x_t) for the chosen, y_t =
-- x_t else. With capacity = 1 and weight = "none" it is the block. y, state, routing = m(x [batch, time, d_model] [, state,
-- ctx]); the routing is over one expert, the block. ctx.mask: masked tokens are never chosen; fields of ctx that are [batch,
-- time, ..] follow the tokens; the block is called as block(x [, state, ctx]) and may get ctx.cu_seqlens where sequences kept
-- different numbers. An empty choice calls nothing. Which tokens are largest is known only when the sequence is whole.
-- `sampling`, outside of training: "router": those with r_t > 0, where an auxiliary cross entropy has taught r to tell the
-- chosen; "predictor": a small network on x (no gradient into x) decides in its place, y the same; "threshold": r_t above the
-- running mean of the least chosen score; "topk": as in training. A state (m:state(batch): one of the block's for each sequence)
-- needs no other rule. Options: block, d_model, capacity (0.125; m.capacity may be set later), weight: g as "score" (r),
-- "sigmoid", "tanh" or "none"; residual (true: the block's result contains its input); sampling ("router"), aux (0.01, the
-- coefficient), momentum (0.99, of the threshold), init. Parameters router.weight [1, d], block.*, predictor.*. Raposo et al.
-- 2024 (arXiv 2404.02258, eq. 1, section 3.5).
local Depths = nn.module("mixture_of_depths")

local ROWS <const> = {
  block = { "table|userdata", options.required }, d_model = { "integer", options.required }, capacity = { "number", 0.125 },
  weight = { { "score", "sigmoid", "tanh", "none" }, "score" }, residual = { "boolean", true },
  sampling = { { "router", "predictor", "threshold", "topk" }, "router" }, aux = { "number", 0.01 }, momentum = { "number", 0.99 },
  init = { "string|number|function" },
}

local WEIGHT <const> = {
  score = function(r) return r end, sigmoid = function(r) return r:sigmoid() end, tanh = function(r) return r:tanh() end,
}

local function fail(text, ...) error("mixture_of_depths: " .. text:format(...), 0) end

function Depths:init(given)
  local o = options.read("mixture_of_depths", given, ROWS, 2)
  if o.d_model < 1 then fail("option 'd_model' must be at least 1, got %d", o.d_model) end
  self._options, self.capacity = o, o.capacity
  self.router = nn.linear { in_features = o.d_model, out_features = 1, bias = false }
  if o.init ~= nil then nn.init.apply(self.router.weight:detach(), o.init) end
  self.block = o.block
  if o.sampling == "predictor" then
    local hidden = math.max(1, o.d_model // 2)
    self.predictor = nn.sequential(nn.linear(o.d_model, hidden), nn.relu(), nn.linear(hidden, 1))
  elseif o.sampling == "threshold" then
    self:buffer("threshold", core.zeros { 1 })
    self:buffer("updates", core.zeros({ 1 }, { dtype = "i64" }))
  end
end

-- The share of each sequence with the largest scores: bool [tokens]. score [tokens], -inf where masked.
local function largest(score, lengths, share)
  local marks, at = {}, 0
  local even = true
  for i = 2, #lengths do even = even and lengths[i] == lengths[1] end
  local parts = even and { { #lengths, lengths[1] or 0 } } or {}
  if not even then
    for i, n in ipairs(lengths) do parts[i] = { 1, n } end
  end
  for i, part in ipairs(parts) do
    local b, t = part[1], part[2]
    local k = math.ceil(share * t - 1e-9)
    local s = score:narrow(1, at + 1, b * t):reshape { b, t }
    at = at + b * t
    marks[i] = core.zeros({ b, t }, { device = score.device })
    if k > 0 then
      local _, index = s:topk(k)
      marks[i] = marks[i]:scatter(2, index, 1)
    end
    marks[i] = marks[i]:reshape { -1 }
  end
  return (#marks == 1 and marks[1] or core.cat(marks, 1)):ne(0)
end

-- Who goes through the block: bool [tokens]; the auxiliary loss, or nil.
function Depths:choose(rows, score, real, lengths)
  local o, share = self._options, self.capacity
  if type(share) ~= "number" or not (share >= 0 and share <= 1) then fail("capacity must be a share in [0, 1], got %s", tostring(share)) end
  local s = score:detach()
  if s:isnan():any():item() then fail "the router's score is NaN" end
  if real then s = core.where(real, s, -math.huge) end
  local guess = o.sampling == "predictor" and self.predictor(rows:detach()):reshape { -1 } or score
  if not self.training and o.sampling ~= "topk" then
    local above = o.sampling == "threshold" and self.threshold or 0
    local chosen = o.sampling == "threshold" and s:ge(above:to(s.dtype)) or guess:detach():gt(0)
    return real and chosen:logical_and(real) or chosen
  end
  local chosen = largest(s, lengths, share)
  if real then chosen = chosen:logical_and(real) end
  if not self.training then return chosen end
  if o.sampling == "threshold" and not moe.recomputing() and chosen:any():item() then
    local least = core.where(chosen, s, math.huge):amin():to "f32"
    local keep = self.updates:item() == 0 and 0 or o.momentum
    core.no_grad(function() self.threshold:mul_(keep):add_(least * (1 - keep)) end)
    self.updates:add_(1)
  elseif (o.sampling == "router" or o.sampling == "predictor") and o.aux > 0 and rows:size(1) > 0 then
    local loss = core.bce_with_logits(guess, chosen:to(guess.dtype), "none")
    if real then loss = loss * real:to(loss.dtype) end
    return chosen, loss:sum() * (o.aux / math.max(1, real and real:to "i64":sum():item() or rows:size(1)))
  end
  return chosen
end

-- The block on the chosen rows; with a state, each sequence continues its own.
local function through(self, x, routing, lengths, state, ctx)
  local B, T, d = x:size(1), x:size(2), x:size(3)
  local picked = routing:gather(x:reshape { B * T, d })
  if not state then
    if routing.num_assignments == 0 then return picked, picked end
    local y, inner = chosen_of.run("mixture_of_depths", self.block, picked, routing.token, B, T, lengths, ctx)
    chosen_of.report(ctx, inner)
    return picked, y
  end
  local after, parts, at = {}, {}, 1
  local count = core.bincount((routing.token - 1):floor_divide(T) + 1, B):totable()
  for b = 1, B do
    local n = count[b]
    after[b] = state[b]
    if n > 0 then
      local inner = ctx and chosen_of.context(ctx, { B, T }, routing.token:narrow(1, at, n), { 1, n })
      if inner then inner.mask = nil end
      local y
      y, after[b] = self.block(picked:narrow(1, at, n):reshape { 1, n, d }, state[b], inner)
      chosen_of.report(ctx, inner)
      parts[#parts + 1] = y:reshape { n, d }
      at = at + n
    end
  end
  return picked, #parts > 0 and core.cat(parts, 1) or picked, after
end

--- x [batch, time, d_model] -> y, the state after it (where one was given), the routing.
function Depths:forward(x, state, ctx)
  local o = self._options
  local shape = core.is_tensor(x) and x.shape
  if not shape or #shape ~= 3 or shape[3] ~= o.d_model then
    fail("x must be [batch, time, %d], got %s", o.d_model, shape and "[" .. table.concat(shape, ", ") .. "]" or "a " .. type(x))
  end
  local B, T, d = shape[1], shape[2], shape[3]
  local lengths = chosen_of.lengths("mixture_of_depths", B, T, ctx)
  local rows, mask = x:reshape { B * T, d }, ctx and ctx.mask
  if mask then mask = mask:reshape { -1 } end
  local wide = (x.dtype == "f32" or x.dtype == "f64") and rows or rows:to "f32"
  local score = wide:linear(self.router.weight):reshape { -1 }
  local chosen, aux = self:choose(wide, score, mask, lengths)
  local g = WEIGHT[o.weight]
  local routing = sparse.topk(chosen:to "i64":reshape { -1, 1 }, g and g(score):reshape { -1, 1 }, 1, mask)
  routing.logits, routing.top_k = score:reshape { -1, 1 }, 1
  if aux then routing:add_aux("depths", aux) end
  local picked, y, after = through(self, x, routing, lengths, state, ctx)
  if ctx and not moe.recomputing() then
    local list = ctx.routings or {}
    list[#list + 1] = routing
    ctx.routings, ctx.routing = list, routing
  end
  if g or not o.residual then
    y = rows + routing:combine(o.residual and y - picked or y, g ~= nil)
  else
    y = core.where(chosen:reshape { -1, 1 }, routing:combine(y, false), rows) -- not x + (y - x): to the bit
  end
  return y:reshape { B, T, d }, after, routing
end

--- The state of a batch of empty sequences: one of the block's for each.
function Depths:state(batch)
  local state = {}
  for b = 1, batch or 1 do state[b] = (self.block.mixer or self.block):state(1) end
  return state
end

function Depths:extra()
  local o = self._options
  return ("capacity=%g, weight=%s, sampling=%s"):format(self.capacity, o.weight, o.sampling)
end

return Depths
