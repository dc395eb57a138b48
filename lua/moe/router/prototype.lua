-- Token choice by the distance to a point an expert.

local core = require "moe.core"
local nn = require "moe.nn"
local TopK = require "moe.router.topk"

--- topk with logits by prototypes, a vector p_e an expert: `metric` = "euclidean": -|x - p_e|^2 / t, so that a softmax over
-- them is the posterior of a mixture of Gaussians of variance t / 2; "cosine": <x, p_e> / (|x| |p_e|) / t. `temperature` t
-- (1), learned as exp(log_temperature) with `learned_temperature`. All options of topk but the bias and the learned noise.
-- Parameter weight [E, d]: the prototypes; log_temperature [1]. Snell et al. 2017, prototypical networks (arXiv 1703.05175,
-- eq. 2), as a router.
local Prototype = nn.module("prototype", TopK)

Prototype.rows = {
  metric = { { "euclidean", "cosine" }, "euclidean" }, temperature = { "number", 1 }, learned_temperature = { "boolean", false },
}
for k, v in pairs(TopK.rows) do Prototype.rows[k] = v end
Prototype.rows.bias = nil

function Prototype:check(o, k)
  TopK.check(self, o, k)
  if o.noise == "learned" then self:fail "option 'noise' must be a standard deviation, got \"learned\"" end
  if not (o.temperature > 0 and o.temperature < math.huge) then self:fail("option 'temperature' must be above 0, got %g", o.temperature) end
end

function Prototype:projection(prefix)
  TopK.projection(self, prefix)
  local o = self._options
  if o.learned_temperature then
    local t = core.full({ 1 }, math.log(o.temperature), { dtype = o.dtype or "f32", device = o.device })
    self.log_temperature = nn.parameter(t, { decay = false })
  end
end

--- Rows of v with length 1.
function Prototype.unit(v) return v / ((v * v):sum(-1, true) + 1e-12):sqrt() end

--- The logits of x [T, d] by the prototypes p [E, d].
function Prototype:affinity(x, p)
  local o = self._options
  p = p or self.weight
  local near
  if o.metric == "cosine" then
    near = self.unit(x):linear(self.unit(p))
  else
    near = x:linear(p) * 2 - (x * x):sum(-1, true) - (p * p):sum(-1)
  end
  if self.log_temperature then return near * (-self.log_temperature):exp() end
  return o.temperature == 1 and near or near / o.temperature
end

function Prototype:traits(o)
  local parts = TopK.traits(self, o)
  parts[#parts + 1] = "metric=" .. o.metric
  return parts
end

return Prototype
