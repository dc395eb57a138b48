-- ReLU routing: a gate that is open or shut, and differentiable throughout.

local nn = require "moe.nn"
local base = require "moe.router.gates"

--- Gates relu(W x), without a choice of k: an expert works where its gate is above zero, with the gate as its weight, and
-- the whole is differentiable (there is no jump where an expert comes in). A token may have any number of experts, or
-- none. How many are open on average is held by the controller moe.loss.relu_l1 { top_k = k } in the layer's balance.
-- Options: bias (default true: without one a gate over centred tokens is open for half of them, whatever its weights), noise,
-- jitter, init as in topk. routing.gate [T, E]; routing.probs: the gates of a token over their sum (zeros for a token without
-- any). Wang et al. 2024, ReMoE (arXiv 2412.14711, eq. 5).
local Relu = nn.module("relu", base.Gates)

local ROWS <const> = base.rows({}, true)
ROWS.bias = { "boolean", true }

function Relu:init(given)
  if self:setup(given, ROWS) then self:projection "" end
end

function Relu:route(x, ctx)
  ctx = ctx or {}
  local logits, clean, std = self:open(x, ctx)
  local gates = logits:relu()
  if ctx.choice then gates = self:choose(gates, ctx) end
  return self:routing(gates, ctx, self.normalised(gates), logits, clean, std)
end

return Relu
