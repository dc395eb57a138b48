-- A token decides together with its neighbours.

local core = require "moe.core"
local nn = require "moe.nn"
local base = require "moe.router.base"
local routings = require "moe.routing"

--- A token takes the mean decision of its neighbours: gates G = S softmax(U W^T), then the top_k best of each row of G,
-- weighed by G (`norm_topk_prob`, default for k > 1: to sum to 1). U [T, d_model] the tokens of a sequence, W `weight`
-- [E, d_model], S [T, T] with rows that sum to 1:
-- source = "similarity": S = softmax(U Ws U^T / tau), Ws `similarity` [d_model, d_model] (starting as the identity), tau
-- `temperature` (default sqrt(d_model)); with `rank`, Ws is similarity_query times the transpose of similarity_key, both
-- [d_model, rank] (starting as the first columns of the identity), at 2 rank / d_model of the cost.
-- source = "attention": S is ctx.attention_map, [B, T, T] or [B, heads, T, T], of which
-- the mean over the heads is taken (moe.mixer.with_map puts it there). S = 1 is plain token choice.
-- Options: top_k, source, causal (default true: a token has no neighbours to its right), temperature, norm_topk_prob, bias,
-- init, noise, jitter as in topk. Masked tokens are nobody's neighbours. Sequences come from ctx.shape; without one all tokens are
-- one sequence. It needs whole sequences: a token decoded by itself has no neighbours.
-- routing.probs = G, routing.similarity = S [B, T, T].
-- Nguyen, Tran, Nguyen, Baraniuk 2025 (arXiv 2505.00792), sections 2 and 3.
local Neighbour = nn.module("neighbour", base.Router)

local ROWS <const> = base.rows({
  top_k = { "integer", 2 }, source = { { "similarity", "attention" }, "similarity" }, causal = { "boolean", true },
  temperature = { "number|function" }, norm_topk_prob = { "boolean" }, rank = { "integer" },
}, true)

local NEVER <const> = -1e30 -- finite: a row without a neighbour stays free of NaN

function Neighbour:init(given)
  local bound = self:setup(given, ROWS)
  local o = self._options
  if o.top_k < 1 then self:fail("option 'top_k' must be at least 1, got %d", o.top_k) end
  if o.num_experts and o.top_k > o.num_experts then self:fail("top_k is %d, but there are %d experts", o.top_k, o.num_experts) end
  if type(o.temperature) == "number" and (o.temperature <= 0 or o.temperature ~= o.temperature) then
    self:fail("option 'temperature' must be positive, got %g", o.temperature)
  end
  if o.top_k == 1 and o.norm_topk_prob then
    self:fail "norm_topk_prob with top_k = 1 makes every weight 1 and cuts the router off from its gradient"
  end
  if o.rank and (o.rank < 1 or o.d_model and o.rank > o.d_model) then
    self:fail("option 'rank' must be at least 1 and at most d_model, got %d", o.rank)
  end
  if not bound then return end
  self.top_k = o.top_k
  if type(o.temperature) ~= "function" then self.temperature = o.temperature or math.sqrt(self.d_model) end
  self:projection ""
  if o.source ~= "similarity" then return end
  local function identity() return core.eye(self.d_model, { dtype = o.dtype or "f32", device = o.device }) end
  if o.rank then
    self.similarity_query = nn.parameter(identity():narrow(2, 1, o.rank):contiguous())
    self.similarity_key = nn.parameter(identity():narrow(2, 1, o.rank):contiguous())
  else
    self.similarity = nn.parameter(identity())
  end
end

-- [1, T, T] or [B, T, T]: true where j may be a neighbour of i.
local function allowed(self, batch, time, mask)
  local keep
  if self._options.causal then keep = core.ones({ 1, time, time }, { dtype = "bool" }):tril() end
  if mask then
    local real = mask:reshape { batch, 1, time }
    keep = keep and keep:logical_and(real) or real
  end
  return keep
end

local function from_map(self, ctx, batch, time)
  local map = ctx.attention_map
  local s = core.is_tensor(map) and map.shape
  if not s then self:fail("source = \"attention\" needs ctx.attention_map, a tensor [%d, heads, %d, %d]", batch, time, time) end
  local n = #s
  if n < 3 or n > 4 or s[1] ~= batch or s[n - 1] ~= time or s[n] ~= time then
    self:fail("ctx.attention_map is [%s], wanted [%d, %d, %d], or with heads after the batch", table.concat(s, ", "), batch, time,
      time)
  end
  return n == 4 and map:mean(2) or map
end

-- S [B, T, T]. A map loses what is not allowed, and its rows sum to 1 again.
function Neighbour:neighbours(x, ctx, batch, time)
  local keep = allowed(self, batch, time, ctx.mask)
  if self._options.source == "attention" then
    local map = from_map(self, ctx, batch, time)
    if not keep then return map end
    map = map:masked_fill(keep:logical_not(), 0)
    local sum = map:sum(-1, true)
    return map / sum:masked_fill(sum:eq(0), 1)
  end
  local u = x:reshape { batch, time, self.d_model }
  local query = u:matmul(self.similarity or self.similarity_query)
  local key = self.similarity and u or u:matmul(self.similarity_key)
  local s = query:matmul(key:transpose(2, 3)) / self:scheduled("temperature", ctx)
  if keep then s = s:masked_fill(keep:logical_not(), NEVER) end
  return s:softmax(-1)
end

function Neighbour:route(x, ctx)
  self:ready()
  ctx = ctx or {}
  local E, k, norm = self.num_experts, self.top_k, self._options.norm_topk_prob
  local batch, time = self:sequences(x, ctx)
  local logits = self:logits(x, ctx)
  local own = logits:softmax(-1):reshape { batch, time, E }
  local similarity = self:neighbours(x:to(own.dtype), ctx, batch, time)
  local gates = similarity:to(own.dtype):matmul(own):reshape { batch * time, E }
  if ctx.mask then gates = gates:masked_fill(ctx.mask:reshape { batch * time, 1 }:logical_not(), 0) end
  if norm == nil then norm = k > 1 end
  -- relu leaves gates as they are: no gate is negative
  local weight, index = core.router_topk(gates, {
    top_k = k, score = "relu", norm_topk_prob = norm, mask = ctx.mask, choice = ctx.choice,
  })
  local routing = routings.topk(index, weight, E, ctx.mask and { mask = ctx.mask })
  routing.logits, routing.probs, routing.similarity, routing.top_k = logits, gates, similarity, k
  return routing
end

function Neighbour.traits(_, o)
  return { ("top_k=%d, source=%s"):format(o.top_k, o.source), not o.causal and "causal=false" or nil }
end

return Neighbour
