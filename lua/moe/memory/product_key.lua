-- A memory of values behind product keys.

local moe = require "moe"
local core = moe.core
local nn = moe.nn
local keys = require "moe.memory.keys"

--- Product-key memory: y = sum over heads and their top_k slots of g_s v_s, g the softmax of a head's chosen scores, v rows of
-- values [num_keys^2, value_dim]. x [.., d_model] -> [.., d_model]. Slots are chosen as by moe.nn.product_keys; a step reads and
-- updates the chosen rows alone (their gradient is row-sparse), so that a memory of a million entries costs about what
-- a small one does. Options: d_model, num_keys (of each half), top_k (32), heads (4), key_dim, query_norm ("batch"), rank (1), value_dim
-- (d_model; another size adds out_proj [d_model, value_dim]), score ("softmax", "sigmoid", "relu" or "identity" of the chosen
-- scores). memory:choice(x) -> index, weight [T, heads top_k]. Lample et al. 2019 (arXiv 1907.05242, eq. 1-3).
local Memory = nn.module "product_key_memory"

local ROWS <const> = keys.rows()

function Memory:init(given)
  local o = keys.setup(self, "product_key_memory", given, ROWS)
  self.values = keys.table(o, self.num_slots, self.value_dim, self.value_dim ^ -0.5)
  if self.value_dim ~= o.d_model then
    self.out_proj = nn.linear { in_features = self.value_dim, out_features = o.d_model, bias = false, dtype = o.dtype, device = o.device }
  end
end

Memory.choice = keys.choice

function Memory:forward(x, ctx)
  return keys.by_rows("product_key_memory", self, x, function(rows)
    local index, weight = self:choice(rows, ctx)
    local y = core.memory_mix(self.values, index, weight)
    return self.out_proj and self.out_proj(y) or y
  end)
end

return Memory
