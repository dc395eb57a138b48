-- Token choice by logits that know how sure they are.

local nn = require "moe.nn"
local TopK = require "moe.router.topk"

--- The k best experts by logits from `samples` passes with dropout on the input (Monte Carlo dropout), z_m = W dropout_m(x):
-- l = mean_m(z_m) / sqrt(1 + pi/8 var_m(z_m)), the logits whose softmax stands for the mean softmax of normal logits. An expert
-- whose logit wavers counts for less. With dropout = 0 it is the topk router.
-- Options: dropout (0.1), samples (4), in_eval (true: passes in evaluation too; false: plain logits there); those of topk.
-- Zhang et al. 2023 (MoFME, arXiv 2312.16610: an ensemble by dropout whose mean and variance normalise the logits); the form of the
-- normalisation is chosen here: MacKay 1992 ("The evidence framework applied to classification networks"); dropout as an
-- ensemble: Gal and Ghahramani 2015 (arXiv 1506.02142).
local Uncertain = nn.module("uncertain", TopK)

Uncertain.rows = { dropout = { "number", 0.1 }, samples = { "integer", 4 }, in_eval = { "boolean", true } }
for k, v in pairs(TopK.rows) do Uncertain.rows[k] = v end

function Uncertain:check(o, k)
  TopK.check(self, o, k)
  if not (o.dropout >= 0 and o.dropout < 1) then self:fail("option 'dropout' must be in [0, 1), got %g", o.dropout) end
  if o.samples < 2 then self:fail("option 'samples' must be at least 2, got %d", o.samples) end
end

--- Mean and variance [T, num_experts] of the logits of x [T, d_model] over the passes.
function Uncertain:spread(x)
  local o = self._options
  local T, M = x:size(1), o.samples
  local z = x:unsqueeze(1):expand({ M, T, self.d_model }):dropout(o.dropout, true):linear(self.weight, self.bias)
  local mean = z:mean(1)
  return mean, (z - mean):square():mean(1)
end

function Uncertain:affinity(x)
  local o = self._options
  if o.dropout == 0 or not (self.training or o.in_eval) then return TopK.affinity(self, x) end
  local mean, variance = self:spread(x)
  return mean / (variance * (math.pi / 8) + 1):sqrt()
end

function Uncertain:traits(o)
  local parts = TopK.traits(self, o)
  parts[#parts + 1] = ("dropout=%g, samples=%d"):format(o.dropout, o.samples)
  return parts
end

return Uncertain
