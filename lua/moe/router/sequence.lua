-- One decision for a whole sequence.

local core = require "moe.core"
local nn = require "moe.nn"
local base = require "moe.router.base"
local routings = require "moe.routing"

--- One decision a sequence: the router inside sees a summary of the sequence, and all of its tokens follow.
-- s = mean, first or last of the tokens x_1 .. x_T that are not masked; y_t = sum over the choice of router(s) of weight x expert(x_t).
-- Options: router (any that answers by index or gates; default topk), top_k (of the default one, default 2), from: "mean",
-- "first", "last" or "running": s_t is the mean of x_1 .. x_t, so that each token has a decision of its own and none sees
-- the future. Sequences come from ctx.shape; without one all tokens are one sequence. The routing's probs and logits are those of the
-- sequences, repeated for their tokens. Routing by sentence: Kudugunta et al. 2021 (arXiv 2110.03742), section 3.
local Sequence = nn.module("sequence", base.Router)

local ROWS <const> = base.rows {
  router = { "table" }, top_k = { "integer" }, from = { { "mean", "first", "last", "running" }, "mean" },
}

function Sequence:init(given)
  local bound = self:setup(given, ROWS)
  local o = self._options
  if o.router and o.top_k then self:fail "give 'router' or 'top_k' (of the default router), not both" end
  if o.router and type(o.router.bind) ~= "function" then self:fail "option 'router' must be a router" end
  if not bound then return end
  local inner = o.router or require("moe.router").topk { top_k = o.top_k or math.min(2, self.num_experts) }
  self.router = inner:bind { d_model = self.d_model, num_experts = self.num_experts, dtype = o.dtype, device = o.device }
  self.top_k = self.router.top_k
end

-- The position of the first or last token that is real, [B], from 1 (1 where none is).
local function edge(real, from, time)
  local place = core.arange(1, time)
  if from == "first" then place = time + 1 - place end
  local far = (real * place:to(real.dtype)):max(-1) -- 0 where none is real
  if from == "first" then far = time + 1 - far end
  return far:clamp(1, time):to "i64"
end

-- x [B, T, d] -> s [B, d], or [B, T, d] for the running mean. real [B, T] or nil.
local function summary(x, real, from)
  local batch, time, d = table.unpack(x.shape)
  if from == "mean" then
    if not real then return x:mean(2) end
    return (x * real:unsqueeze(-1)):sum(2) / real:sum(-1, true):clamp(1)
  elseif from == "running" then
    if not real then return x:cumsum(2) / core.arange(1, time):to(x.dtype):reshape { time, 1 } end
    return (x * real:unsqueeze(-1)):cumsum(2) / real:cumsum(2):clamp(1):unsqueeze(-1)
  elseif not real then
    return x:select(2, from == "first" and 1 or -1)
  end
  local at = edge(real, from, time):reshape { batch, 1, 1 }:expand { batch, 1, d }
  return x:gather(2, at):select(2, 1)
end

function Sequence:route(x, ctx)
  self:ready()
  ctx = ctx or {}
  local batch, time = self:sequences(x, ctx)
  if batch * time == 0 then return self.router:route(x, ctx) end
  local mask, from = ctx.mask, self._options.from
  local grouped = self:input(x):reshape { batch, time, self.d_model }
  local real = mask and mask:reshape { batch, time }:to(grouped.dtype)
  local s = summary(grouped, real, from)
  if from == "running" then return self.router:route(s:reshape { batch * time, self.d_model }, ctx) end

  local choice = ctx.choice and ctx.choice:reshape { batch, time, -1 }:select(2, 1)
  local inner = { shape = { batch }, choice = choice, mask = real and real:sum(-1):gt(0) }
  local one = self.router:route(s, setmetatable(inner, {
    __index = function(_, key)
      if key ~= "mask" and key ~= "choice" then return ctx[key] end
    end,
  }))
  local function repeated(t)
    return t and t:unsqueeze(2):expand { batch, time, t:size(2) }:reshape { batch * time, t:size(2) }
  end
  local extras = { mask = mask, probs = repeated(one.probs), logits = repeated(one.logits) }
  local routing
  if one.index then
    routing = routings.topk(repeated(one.index), repeated(one.gate), self.num_experts, extras)
  elseif one.gate then
    routing = routings.dense(repeated(one.gate), extras)
  else
    self:fail "the router inside must answer by an index or by gates, not by a soft routing"
  end
  routing.top_k = one.top_k
  return routing
end

function Sequence.traits(_, o) return { "from=" .. o.from } end

return Sequence
