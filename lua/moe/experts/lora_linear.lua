-- A frozen linear layer with routed low-rank experts.

local moe = require "moe"
local nn = moe.nn
local options = require "moe.nn.options"

--- A linear layer tuned by low-rank experts, its router inside: y = W0 x + b + scale * sum over a token's experts of
-- g_e B_e A_e x; with one expert plain LoRA, without a router. y, routing = m(x [.., d_model], ctx). A moe.layer: its methods,
-- balance losses and names (router.weight, experts.lora_A, experts.base.weight).
-- Options: base (a linear layer or a weight [d_out, d_model]; frozen), num_experts (1), top_k (2), rank, alpha, scale, init (as
-- in moe.experts.lora); router, balance, and the other options of moe.layer.
-- Hu et al. 2021 (arXiv 2106.09685); Gao et al. 2024 (arXiv 2402.08562, eq. 3-5).
local LoraLinear = nn.module("lora_linear", moe.layer)

local BANK <const> = { rank = true, alpha = true, scale = true, init = true, base = true }
local ROWS <const> = {
  base = { "table|userdata", options.required }, rank = { "integer", options.required }, alpha = { "number" }, scale = { "number" },
  init = { "string|number|function" }, num_experts = { "integer", 1 }, top_k = { "integer" },
  router = { "function|table|userdata" }, balance = { "function|table" }, bias_update_rate = { "number|function" },
  capacity_factor = { "number" }, eval_capacity_factor = { "number" }, min_capacity = { "integer" },
  drop_policy = { "string|function" }, force = { "string|userdata|function" },
}

function LoraLinear:init(given)
  local o = options.read("lora_linear", given, ROWS, 2)
  local weight = moe.core.is_tensor(o.base) and o.base or nn.is_module(o.base) and o.base.weight
  if not moe.core.is_tensor(weight) or #weight.shape ~= 2 then
    error("lora_linear: option 'base' must be a linear layer or a weight [d_out, d_model], got " ..
      (weight and moe.core.is_tensor(weight) and "a weight [" .. table.concat(weight.shape, ", ") .. "]" or "a " .. type(o.base)), 3)
  end
  if o.top_k and o.router then error("lora_linear: give top_k or a router that has its own, not both", 3) end
  local bank, settings = {}, { d_model = weight:size(2), dtype = weight.dtype, device = weight.device }
  for k, v in pairs(o) do
    if BANK[k] then bank[k] = v else settings[k] = v end
  end
  if o.num_experts == 1 then
    settings.router = function() error("lora_linear: one expert has no router", 0) end -- never asked
  else
    settings.router = o.router or moe.router.topk { top_k = o.top_k or 2 }
  end
  settings.top_k, settings.experts = nil, moe.experts.lora(bank)
  moe.layer.init(self, settings)
end

function LoraLinear:forward(x, ctx)
  if self.num_experts == 1 then return self.experts(x) end
  return moe.layer.forward(self, x, ctx)
end

--- The linear layer (or the weight) with expert e (default 1) merged in.
function LoraLinear:merge(e) return self.experts:merge(e) end

return LoraLinear
