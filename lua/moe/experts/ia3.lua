-- Experts that are vectors.

local nn = require "moe.nn"
local core = require "moe.core"
local base = require "moe.experts.base"

--- Vectors that scale activations: y = (sum over a token's experts of g_e l_e) * x. The vectors are merged, then scale, which is the
-- same as mixing the scaled activations and costs one product. Parameter vectors [E, d_model], 1 at the start: with weights that sum to
-- one the bank begins as the identity. Options: d_model and num_experts.
-- Liu et al. 2022 (IA3, arXiv 2205.05638, section 3.3); as experts: Zadouri et al. 2023 (MoV, arXiv 2309.05444, section 2).
local IA3 = nn.module("ia3", base.Bank)

local ROWS <const> = {
  d_model = { "integer" }, num_experts = { "integer" }, dtype = { "string" }, device = { "string" },
}

function IA3:init(given)
  local o = self:setup("experts.ia3", given, ROWS)
  if not o then return end
  self.vectors = nn.parameter(core.ones({ self.num_experts, self.d_model }, { dtype = o.dtype or "f32", device = o.device }),
    { decay = false })
end

function IA3:work(x, routing)
  if routing then return x * routing:mix(self.vectors) end
  if self.num_experts > 1 then error(("experts.ia3: %d experts need a routing"):format(self.num_experts), 0) end
  return x * self.vectors[1]
end

function IA3:extra()
  return self.d_model and ("%d x %d"):format(self.num_experts, self.d_model) or "unbound"
end

return IA3
