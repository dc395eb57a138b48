-- Token choice by a small network.

local core = require "moe.core"
local nn = require "moe.nn"
local base = require "moe.router.base"
local TopK = require "moe.router.topk"

--- Token choice whose logits come from a network of one hidden layer: A relu(B x), with B [hidden_size, d_model] and a row of A
-- for each expert; everything else as in topk. Options: those of topk, and hidden_size (d_model). Parameters hidden_weight (B),
-- weight (A) [E, hidden_size]. Shen et al. 2023, ModuleFormer (arXiv 2306.04640, eq. 2).
local Mlp = nn.module("mlp", TopK)

Mlp.rows = { hidden_size = { "integer" } }
for name, row in pairs(TopK.rows) do Mlp.rows[name] = row end

-- Every projection is of the hidden layer; the first one asked for makes it.
function Mlp:projection(prefix, rows, columns)
  local o = self._options
  if not self.hidden_weight then
    local h = o.hidden_size or self.d_model
    if h < 1 then self:fail("option 'hidden_size' must be at least 1, got %d", h) end
    local w, r = core.zeros({ h, self.d_model }, { dtype = o.dtype or "f32", device = o.device }), 1 / math.sqrt(self.d_model)
    if o.init ~= nil then nn.init.apply(w, o.init) else nn.init.uniform_(w, -r, r) end
    self.hidden_weight = nn.parameter(w)
  end
  base.Router.projection(self, prefix, rows, columns or self.hidden_weight:size(1))
end

function Mlp:input(x) return base.Router.input(self, x):linear(self.hidden_weight):relu() end

return Mlp
