--- Balance and specialisation losses of sparse layers, under moe.loss: functions (routing, ctx) -> scalar, for moe.layer's
-- `balance`. The first argument of each is its coefficient, a number or a function (step, layer_number).
--
-- At perfect balance switch is 1 x its coefficient; importance, load and latency are 0; the other forms say what they are.
--
-- Anything that answers loss(routing, ctx, state) will do, a plain function too; nil means "nothing to add". `state` is a
-- table that belongs to the layer; `loss:start(state, num_experts, layer)`, where it is there, fills it once. One with
-- `loss:observe(routing, ctx, state)` sees every first training forward, and one with `loss:after_step(layer, state, ctx)`
-- is called once an optimizer step: see selection_bias. ctx is what the layer was called with, and layer, x [T, d_model], shape.

local core = require "moe.core"

local M = {}

-- One file a concept.
for _, file in ipairs { "switch", "spread", "logits", "entropy", "contrast", "bias" } do
  for name, f in pairs(require("moe.balance." .. file)) do M[name] = f end
end

--- The sum of the auxiliary losses of all routings of a forward: ctx.routings, which every moe.layer called with that ctx
-- has joined. A scalar tensor; 0 when there is none.
function M.aux(ctx)
  if ctx ~= nil and type(ctx) ~= "table" then
    error("loss.aux: argument 1 (ctx) must be the table that the layers were called with, got a " .. type(ctx), 2)
  end
  local sum
  for _, routing in ipairs(ctx and ctx.routings or {}) do
    if routing.losses then sum = sum and sum + routing:aux() or routing:aux() end
  end
  return sum or core.tensor(0)
end

return M
