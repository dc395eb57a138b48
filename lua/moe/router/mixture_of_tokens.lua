-- Mixture of Tokens: soft mixing across the examples of a batch, position by position.

local nn = require "moe.nn"
local base = require "moe.router.base"
local routings = require "moe.routing"

--- Mixture of Tokens: tokens at the same position of different examples form a group; each expert works on one average of
-- the group and hands its result back by the same weights. For a group of tokens x_1 .. x_G and expert e:
-- w_ge = softmax over the group of (weight_e . x_g) / temperature, y_g = sum_e w_ge expert_e(sum_h w_he x_h).
-- Times never mix, so a causal model stays one; examples do (in evaluation too: a group of one example is the sum of all
-- experts, and a temperature near 0 gives each expert the one token that wants it most).
-- Options: group_size (examples of a group; default the whole batch; the batch must be a multiple of it, or smaller), temperature
-- (a number, or a function of the step ctx.step; default 1), bias, init, noise, jitter as in topk. x without a batch is one
-- example. A masked token is in no average and gets 0. routing.dispatch = routing.combine_matrix [B, T, E, 1];
-- routing.probs: the weights, made to sum to 1 over the experts.
-- Antoniak et al. 2023 (arXiv 2310.15961), section 3.
local MixtureOfTokens = nn.module("mixture_of_tokens", base.Router)

local ROWS <const> = base.rows({ group_size = { "integer" }, temperature = { "number|function", 1 } }, true)

local NEVER <const> = -1e30 -- finite: a group of masked tokens alone stays free of NaN

function MixtureOfTokens:init(given)
  local bound = self:setup(given, ROWS)
  local o = self._options
  if o.group_size and o.group_size < 1 then self:fail("option 'group_size' must be at least 1, got %d", o.group_size) end
  if type(o.temperature) == "number" and (o.temperature <= 0 or o.temperature ~= o.temperature) then
    self:fail("option 'temperature' must be positive, got %g", o.temperature)
  end
  if not bound then return end
  if type(o.temperature) == "number" then self.temperature = o.temperature end
  self:projection ""
end

-- The examples of a group in this batch.
local function group_of(self, batch)
  local G = math.min(self._options.group_size or batch, batch)
  if G > 0 and batch % G ~= 0 then self:fail("a batch of %d examples is no multiple of group_size = %d", batch, G) end
  return math.max(G, 1)
end

function MixtureOfTokens:route(x, ctx)
  self:ready()
  ctx = ctx or {}
  local E = self.num_experts
  local batch, time = self:sequences(x, ctx)
  local G = group_of(self, batch)
  local logits = self:logits(x)
  local grouped = (logits / self:scheduled("temperature", ctx)):reshape { batch // G, G, time, E }
  local out = ctx.mask and ctx.mask:reshape { batch // G, G, time, 1 }:logical_not()
  if out then grouped = grouped:masked_fill(out, NEVER) end
  local weight = grouped:softmax(2)
  if out then weight = weight:masked_fill(out, 0) end
  local mixing = weight:reshape { batch, time, E, 1 }
  local routing = routings.soft(mixing, mixing, { across = G })
  local probs = weight:reshape { batch * time, E }
  routing.logits, routing.mask = logits, ctx.mask
  routing.probs = probs / (probs:sum(-1, true) + 1e-20)
  return routing
end

function MixtureOfTokens.traits(_, o)
  return {
    ("group_size=%s"):format(o.group_size or "batch"),
    ("temperature=%s"):format(type(o.temperature) == "number" and ("%g"):format(o.temperature) or "function"),
  }
end

return MixtureOfTokens
