-- Low-rank experts beside a frozen base.

local core = require "moe.core"
local nn = require "moe.nn"
local base = require "moe.experts.base"
local beside = require "moe.experts.beside"

--- Low-rank experts: y = base(x) + scale * sum over a token's experts of g_e B_e A_e x. Parameters lora_A [E, rank, d_model],
-- from U(-r, r), r = 1 / sqrt(d_model), unless `init` says otherwise, and lora_B [E, d_out, rank], 0: at the start y is base(x).
-- One expert without a routing is plain LoRA. bank:delta(e) is scale * B_e A_e; bank:merge(e) gives the base with expert e in it.
-- Options: rank; alpha (default: rank), scale (default: alpha / rank); base: a module or a weight [d_out, d_model], frozen
-- when taken (absent: the sum alone); init, d_out; d_model and num_experts (one) for a bank of its own.
-- Hu et al. 2021 (arXiv 2106.09685, eq. 3); as experts: Zadouri et al. 2023 (arXiv 2309.05444).
local Lora = nn.module("lora", beside.Beside)

local ROWS <const> = beside.rows { rank = { "integer", require("moe.nn.options").required }, alpha = { "number" } }

function Lora:init(given)
  local o = self:setup("experts.lora", given, ROWS)
  local all = o or self._options
  if all.rank < 1 then error(("experts.lora: option 'rank' must be at least 1, got %d"):format(all.rank), 3) end
  if all.alpha and all.scale then error("experts.lora: give alpha or scale, not both (scale = alpha / rank)", 3) end
  if not o then return end
  self.rank, self.scale = o.rank, o.scale or (o.alpha or o.rank) / o.rank
  self.lora_A = base.parameter(o, { self.num_experts, o.rank, self.d_model }, o.init, self.d_model)
  self.lora_B = base.parameter(o, { self.num_experts, self.d_out, o.rank }, "zeros")
end

function Lora:work(x, routing) return self:add(x, routing, self.lora_A, self.lora_B) end

local function check_expert(self, name, e)
  if math.type(e) ~= "integer" or e < 1 or e > self.num_experts then
    error(("lora:%s: argument 1 (expert) must be one of 1..%d, got %s"):format(name, self.num_experts, tostring(e)), 3)
  end
end

--- What expert e (default 1) adds to the base's weight: scale * B_e A_e, [d_out, d_model]; differentiable.
function Lora:delta(e)
  e = e or 1
  check_expert(self, "delta", e)
  return self.lora_B[e]:matmul(self.lora_A[e]) * self.scale
end

--- The base with expert e (default 1) merged in: a weight [d_out, d_model], or a linear layer where the base is one. The
-- bank stays as it is.
function Lora:merge(e)
  e = e or 1
  check_expert(self, "merge", e)
  local under = self.base
  local weight = core.is_tensor(under) and under or under and under.weight
  if not core.is_tensor(weight) or #weight.shape ~= 2 then
    error("lora:merge: the bank has no base with a weight [d_out, d_model] to merge into", 2)
  end
  local merged = core.no_grad(function() return weight + self:delta(e) end)
  if core.is_tensor(under) then return merged end
  local linear = nn.linear { in_features = self.d_model, out_features = self.d_out, bias = core.is_tensor(under.bias) }
  linear:to(merged.dtype)
  linear:load_state_dict { weight = merged, bias = under.bias }
  return linear
end

function Lora:extra() return beside.extra(self, "rank") end

return Lora
