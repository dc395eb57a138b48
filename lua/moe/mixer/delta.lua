-- DeltaNet.

local nn = require "moe.nn"
local Delta = require "moe.mixer.delta_rule"

--- DeltaNet: q, k, v through projections, causal convolutions of conv_size with SiLU; q and k of length 1; with beta =
-- sigmoid(b_proj x) each head replaces what its key holds: S = S + beta k (v - S^T k)^T; y = o_proj RMSNorm_head(S^T q / sqrt(dk)).
-- x [batch, time, d_model] -> the same; heads of expand_k d_model / num_heads keys and expand_v d_model / num_heads values;
-- allow_neg_eigval: beta up to 2. The state: q_conv, k_conv, v_conv [batch, conv_size - 1, width], recurrent [batch, heads, dk, dv].
-- Source: Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", 2024, arXiv 2406.06484.
local DeltaNet = nn.module("delta", Delta)

local ROWS <const> = Delta.rows { expand_k = { "number", 1 }, expand_v = { "number", 1 } }

function DeltaNet:init(given)
  local o = self:options("delta", given, ROWS)
  local h = Delta.count(o)
  local function share(by, name)
    return self:divided(math.tointeger(o.d_model * by // 1), h, ("num_heads = %d (%s * d_model in heads)"):format(h, name))
  end
  self:setup(o, h, share(o.expand_k, "expand_k"), share(o.expand_v, "expand_v"))
end

return DeltaNet
