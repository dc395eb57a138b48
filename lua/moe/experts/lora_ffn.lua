-- A frozen dense feed-forward network with routed low-rank experts on its linear layers.

local moe = require "moe"
local nn = moe.nn

local GATED <const> = { swiglu = true, geglu = true, reglu = true }
local ACT <const> = {
  gelu = function(x) return x:gelu() end, gelu_tanh = function(x) return x:gelu "tanh" end, relu = function(x) return x:relu() end,
  relu2 = function(x) return x:relu_squared() end, silu = function(x) return x:silu() end,
}
ACT.swiglu, ACT.geglu, ACT.reglu = ACT.silu, ACT.gelu, ACT.relu

--- A dense feed-forward network whose linear layers are each a moe.experts.lora_linear with a router of its own: fields `up` (of
-- a gated network the two halves as one, gate first) and `down`. y, routing = m(x [.., d_model], ctx), the routing of `down`;
-- its aux losses include those of `up`. With one expert plain LoRA and no routing.
-- Options: base, a moe.nn.ffn, whose weights are taken (frozen, not copied); the others are those of moe.experts.lora_linear.
-- Gao et al. 2024 (arXiv 2402.08562, section 3).
local LoraFfn = nn.module "lora_ffn"

function LoraFfn:init(given)
  local o, base = {}, type(given) == "table" and given.base
  local linear = base and not moe.core.is_tensor(base) and nn.is_module(base) and base.down_proj
  if not linear or not linear.weight or not ACT[base.activation] then
    error("lora_ffn: option 'base' must be a moe.nn.ffn, got " .. (base == nil and "nothing" or "a " .. type(base)), 3)
  end
  for k, v in pairs(given) do o[k] = v end
  self.activation = base.activation
  local function tune(name, part)
    o.base = part.weight
    self[name] = moe.experts.lora_linear(o)
    if part.bias then self:buffer(name .. "_bias", part.bias:detach()) end
  end
  tune("up", GATED[base.activation] and base.gate_up_proj or base.up_proj)
  tune("down", linear)
end

function LoraFfn:forward(x, ctx)
  local h, first = self.up(x, ctx)
  if self.up_bias then h = h + self.up_bias end
  local act = ACT[self.activation]
  if GATED[self.activation] then
    local gate, up = h:chunk(2, -1)
    h = act(gate) * up
  else
    h = act(h)
  end
  local y, routing = self.down(h, ctx)
  if first and first.losses then routing:add_aux("up", first:aux()) end
  if self.down_bias then y = y + self.down_bias end
  return y, routing
end

function LoraFfn:extra() return "activation=" .. self.activation end

return LoraFfn
