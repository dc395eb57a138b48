-- Choice in two steps: tokens choose experts, experts choose patches.

local core = require "moe.core"
local nn = require "moe.nn"
local base = require "moe.router.base"
local sparse = core._sparse

--- Data selection on top of expert selection: a token likes its `top_k` experts by p = softmax(x W^T); of the patches of
-- `patch_size` neighbouring tokens (1), each expert then takes at most the share `share` of those of a sequence in which it is
-- liked most, by the mean over a patch of p where it was among the token's best. Work is where both agree, so that a token may
-- have fewer experts than top_k, or none. Weights are 1, with the gradient of p (1 + p - its value): experts that are slices of
-- one network add up to it, exactly when all are on; and with top_k = num_experts and share = 1 there is no choice and no
-- router's gradient. `causal`: a patch is judged by its first token and against the patch at the same place in the other
-- sequences of the batch, so that nothing depends on later tokens (ours; the paper compares within the sequence). Options:
-- top_k, patch_size, share (0.5), causal (false), and bias, noise, jitter, init. ctx.shape tells the sequences. Yang et al.
-- 2025, Union of Experts (arXiv 2503.02495, section 3.2).
local Patches = nn.module("patches", base.Router)

local ROWS <const> = base.rows({
  top_k = { "integer", 2 }, patch_size = { "integer", 1 }, share = { "number", 0.5 }, causal = { "boolean", false },
}, true)

function Patches:init(given)
  local bound = self:setup(given, ROWS)
  local o = self._options
  for _, key in ipairs { "top_k", "patch_size" } do
    if o[key] < 1 then self:fail("option '%s' must be at least 1, got %d", key, o[key]) end
  end
  if not (o.share > 0 and o.share <= 1) then self:fail("option 'share' must be in (0, 1], got %g", o.share) end
  if o.num_experts and o.top_k > o.num_experts then
    self:fail("top_k is %d, but there are %d experts", o.top_k, o.num_experts)
  end
  if bound then self:projection "" end
end

-- liked [B, time, E] -> bool [B, time, E]: the expert has taken the token's patch.
local function taken(o, liked, B, time)
  local E, s = liked:size(3), o.patch_size
  local patches = (time + s - 1) // s
  local score = liked
  if s > 1 then
    local short = patches * s - time
    local whole = (short > 0 and liked:pad { 0, 0, 0, short } or liked):reshape { B, patches, s, E }
    if o.causal then
      score = whole:select(3, 1)
    else
      local size = core.full({ patches }, s)
      size:narrow(1, patches, 1):sub_(short)
      score = whole:sum(3) / size:reshape { 1, patches, 1 }:to(whole.dtype)
    end
  end
  local over = o.causal and 1 or 2 -- rivals: the sequences, or the patches of one
  local n = math.ceil(o.share * score:size(over) - 1e-9)
  local _, index = score:topk(n, over)
  local keep = core.zeros(score.shape, { device = score.device }):scatter(over, index, 1):ne(0):logical_and(score:gt(0))
  if s == 1 then return keep end
  return keep:unsqueeze(3):expand { B, patches, s, E }:reshape { B, patches * s, E }:narrow(2, 1, time)
end

function Patches:route(x, ctx)
  ctx = ctx or {}
  local o, T, E = self._options, x:size(1), self.num_experts
  local logits = self:logits(x, ctx)
  local p = logits:softmax(-1)
  local gates
  if T == 0 then
    gates = p
  elseif o.top_k == E and o.share == 1 then
    gates = core.ones_like(p:detach())
  else
    local own = p:detach()
    local _, index = own:topk(o.top_k)
    local liked = core.zeros_like(own):scatter(2, index, own:gather(2, index))
    if ctx.mask then liked = liked * ctx.mask:reshape { T, 1 }:to(liked.dtype) end
    local B, time = self:sequences(x, ctx)
    local on = taken(o, liked:reshape { B, time, E }, B, time):reshape { T, E }:logical_and(liked:gt(0))
    gates = core.where(on, p - own + 1, 0)
  end
  local routing = sparse.dense(gates, ctx.mask)
  routing.logits, routing.probs = logits, p
  return routing
end

function Patches.traits(_, o)
  return { ("top_k=%d, share=%g, patch_size=%d"):format(o.top_k, o.share, o.patch_size) }
end

return Patches
