-- A million experts of one hidden unit.

local moe = require "moe"
local core = moe.core
local nn = moe.nn
local keys = require "moe.memory.keys"

--- Parameter-efficient expert retrieval: expert s is a network of one hidden unit, e_s(x) = act(u_s . x) v_s, and y = sum over
-- heads and their top_k experts of g_s e_s(x), g the softmax of a head's chosen scores. x [.., d_model] -> [.., d_model]. Experts
-- are chosen as by moe.nn.product_keys out of num_keys^2; a step reads and updates the chosen ones alone. Parameters down_embed
-- (u), up_embed (v) [num_keys^2, value_dim]. Options: those of moe.nn.product_key_memory and act ("gelu", "relu",
-- "relu2", "silu", "identity"); a value_dim other than d_model puts in_proj before u and out_proj after v: values expanded
-- by one projection, as in UltraMemV2 (arXiv 2508.18756). He 2024 (arXiv 2407.04153, section 2).
local Peer = nn.module "peer"

local ACTS <const> = {
  gelu = function(x) return x:gelu() end, relu = function(x) return x:relu() end, relu2 = function(x) return x:relu_squared() end,
  silu = function(x) return x:silu() end, identity = function(x) return x end,
}

local ROWS <const> = keys.rows { act = { { "gelu", "relu", "relu2", "silu", "identity" }, "gelu" } }

function Peer:init(given)
  local o = keys.setup(self, "peer", given, ROWS)
  local width = self.value_dim
  self.down_embed = keys.table(o, self.num_slots, width, width ^ -0.5)
  self.up_embed = keys.table(o, self.num_slots, width, width ^ -0.5)
  if width ~= o.d_model then
    local settings = { bias = false, dtype = o.dtype, device = o.device }
    local function linear(a, b)
      settings.in_features, settings.out_features = a, b
      return nn.linear(settings)
    end
    self.in_proj = linear(o.d_model, width)
    self.out_proj = linear(width, o.d_model)
  end
end

Peer.choice = keys.choice

function Peer:forward(x, ctx)
  return keys.by_rows("peer", self, x, function(rows)
    local index, weight = self:choice(rows, ctx)
    local hidden = core.memory_dots(self.down_embed, index, self.in_proj and self.in_proj(rows) or rows)
    local y = core.memory_mix(self.up_embed, index, ACTS[self._options.act](hidden) * weight)
    return self.out_proj and self.out_proj(y) or y
  end)
end

return Peer
