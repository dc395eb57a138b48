-- Balance by a controller instead of a loss.

local core = require "moe.core"

local M = {}

local Bias = {}
Bias.__index = Bias
Bias.__call = function() return nil end
Bias.__tostring = function(self) return ("moe.loss.selection_bias(%s)"):format(tostring(self.rate)) end

function Bias.start(_, state, num_experts)
  state.count, state.seen, state.steps = core.zeros({ num_experts }, { dtype = "i64" }), false, 0
end

function Bias.observe(_, routing, _, state)
  state.count:add_(routing:demand())
  state.seen = true
end

function Bias:after_step(layer, state)
  if not state.seen then return end
  state.seen = false
  state.steps = state.steps + 1
  local rate = self.rate
  if type(rate) ~= "number" then rate = rate(state.steps) end
  core.no_grad(function()
    local load = state.count:to "f32"
    layer.router.expert_bias:add_((load:mean() - load):sign() * rate)
    state.count:mul_(0)
  end)
end

--- Balance without a loss, by the selection bias of the router. After each optimizer step the selection bias of an expert
-- moves by `rate` towards the mean load, b_e <- b_e + rate * sign(mean load - load_e), the load being that of all forwards of
-- the step, before capacity. rate: a number, or a function of the step. Needs a router with selection_bias = true;
-- moe.layer's `bias_update_rate` sets up both. (Wang et al. 2024, arXiv 2408.15664, algorithm 1.)
function M.selection_bias(rate)
  if type(rate) ~= "number" and type(rate) ~= "function" then
    error("loss.selection_bias: argument 1 (rate) must be a number or a function of the step, got a " .. type(rate), 2)
  end
  return setmetatable({ name = "selection_bias", rate = rate }, Bias)
end

return M
