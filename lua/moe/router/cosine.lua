-- Token choice by the angle between a token and its experts.

local core = require "moe.core"
local nn = require "moe.nn"
local base = require "moe.router.base"
local TopK = require "moe.router.topk"

--- topk with logits by cosines: s_e = <P x, v_e> / (|P x| |v_e|) / t, with a projection P to `proj_dim` (256) dimensions,
-- a vector v_e an expert and a learned temperature t = exp(-a) >= `min_temperature` (0.01), a starting at log(1 /
-- `temperature`) (0.5). Bounded logits keep tokens from collapsing onto the experts' directions. All options of topk but
-- the learned noise. Parameters proj [proj_dim, d], proj_bias (with bias), weight [E, proj_dim], log_scale a [1]. Chi et
-- al. 2022, X-MoE (arXiv 2204.09179, eq. 5-7); sizes and the bound are Tutel's.
local Cosine = nn.module("cosine", TopK)

Cosine.rows = { proj_dim = { "integer", 256 }, temperature = { "number", 0.5 }, min_temperature = { "number", 0.01 } }
for k, v in pairs(TopK.rows) do Cosine.rows[k] = v end

function Cosine:check(o, k)
  TopK.check(self, o, k)
  if o.proj_dim < 1 then self:fail("option 'proj_dim' must be at least 1, got %d", o.proj_dim) end
  if o.noise == "learned" then self:fail "option 'noise' must be a standard deviation, got \"learned\"" end
  if not (o.min_temperature > 0 and o.temperature >= o.min_temperature) then
    self:fail("option 'temperature' must be at least min_temperature = %g, above 0, got %g", o.min_temperature, o.temperature)
  end
end

function Cosine:projection()
  local o = self._options
  local project = base.Router.projection
  project(self, "proj_", o.proj_dim)
  self.proj, self.proj_weight = self.proj_weight, nil
  local bias = o.bias
  o.bias = false
  project(self, "", self.num_experts, o.proj_dim)
  o.bias = bias
  local settings = { dtype = o.dtype or "f32", device = o.device }
  self.log_scale = nn.parameter(core.full({ 1 }, -math.log(o.temperature), settings), { decay = false })
end

-- 1 / |v| of each row.
local function inverse_norm(v) return 1 / (v:norm(2, -1, true) + 1e-12) end

--- The temperature that is in force, a number.
function Cosine:temperature()
  return math.max(math.exp(-self.log_scale:item()), self._options.min_temperature)
end

function Cosine:affinity(x)
  local w, p = self.weight, x:linear(self.proj, self.proj_bias)
  local scale = self.log_scale:clamp(nil, -math.log(self._options.min_temperature)):exp()
  return p:linear(w * inverse_norm(w) * scale) * inverse_norm(p)
end

return Cosine
