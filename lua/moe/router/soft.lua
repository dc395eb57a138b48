-- Soft MoE: every expert works on weighted averages of tokens, every token gets a weighted average of all results.

local core = require "moe.core"
local nn = require "moe.nn"
local base = require "moe.router.base"
local routings = require "moe.routing"

--- Soft mixing: each expert has `slots` slots, each slot is an average of tokens, each token gets an average of all slots.
-- L = norm(X) (scale norm(Phi))^T [T, S], S = num_experts x slots; dispatch D = softmax of L over the tokens, combine
-- C = softmax over the slots; slots = D^T X, Y = C experts(slots). Nothing is dropped and nothing needs balancing; the cost
-- follows the slots, whatever the number of experts. Parameters weight (Phi) [S, d_model] and, with `normalize` (default true:
-- l2 norm of every token and of every row of Phi), scale [1].
-- Options: slots (of each expert, default 1), normalize, scale (its start, default 1: slots that are near to the mean of all
-- tokens; short trainings want more), init. Where ctx.shape has a batch, each sequence is
-- mixed by itself. A masked token is in no slot and gets 0. routing.dispatch, routing.combine_matrix [B, T, E, slots] (without a
-- batch [T, E, slots]); routing.probs: the sum of C over an expert's slots. There is no causal form: every token
-- sees all others of its sequence, so this is for encoders (see mixture_of_tokens for language models).
-- Puigcerver, Riquelme, Mustafa, Houlsby 2023 (arXiv 2308.00951), section 2; the normalisation is that of its section 2.3.
local Soft = nn.module("soft", base.Router)

local ROWS <const> = base.rows {
  slots = { "integer", 1 }, normalize = { "boolean", true }, scale = { "number", 1 }, init = { "string|number|function" },
}

-- Far below every logit, yet finite: a sequence of masked tokens alone stays free of NaN.
local NEVER <const> = -1e30

function Soft:init(given)
  local bound = self:setup(given, ROWS)
  local o = self._options
  if o.slots < 1 then self:fail("option 'slots' must be at least 1, got %d", o.slots) end
  if not bound then return end
  self.slots = o.slots
  self:projection("", self.num_experts * o.slots)
  if o.normalize then
    self.scale = nn.parameter(core.full({ 1 }, o.scale, { dtype = o.dtype or "f32", device = o.device }), { decay = false })
  end
end

-- The logits of all slots [T, S]. Rows of length 1: rms_norm divides by the root of the mean, d^(1/2) of it is left over on
-- either side. The scale goes to whichever side is the smaller.
function Soft:slot_logits(x)
  x = self:input(x)
  local w, d = self.weight, self.d_model
  if self.scale then
    local scale = self.scale / d
    x, w = x:rms_norm(nil, 1e-6 / d), w:rms_norm(nil, 1e-6 / d)
    if x:size(1) < w:size(1) then x = x * scale else w = w * scale end
  end
  return x:linear(w)
end

function Soft:route(x, ctx)
  self:ready()
  ctx = ctx or {}
  local E, slots = self.num_experts, self.slots
  local batch, time = self:sequences(x, ctx)
  local logits = self:slot_logits(x):reshape { batch, time, E * slots }
  local out = ctx.mask and ctx.mask:reshape { batch, time, 1 }:logical_not()
  local function mix(dim)
    if not out then return logits:softmax(dim) end
    return (dim == 2 and logits:masked_fill(out, NEVER) or logits):softmax(dim):masked_fill(out, 0)
  end
  local shape = { batch, time, E, slots }
  if not ctx.shape or #ctx.shape < 2 then table.remove(shape, 1) end
  local combine = mix(3):reshape(shape)
  local routing = routings.soft(mix(2):reshape(shape), combine)
  -- the sum over an expert's slots, as a product: rows of a few numbers are many
  local ones = core.ones({ slots }, { dtype = combine.dtype, device = combine.device })
  routing.probs = combine:reshape { batch * time * E, slots }:matmul(ones):reshape { batch * time, E }
  routing.mask = ctx.mask
  return routing
end

function Soft.traits(_, o)
  return { ("slots=%d"):format(o.slots), not o.normalize and "normalize=false" or nil }
end

return Soft
