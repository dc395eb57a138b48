-- Bottleneck adapters beside a frozen base.

local nn = require "moe.nn"
local base = require "moe.experts.base"
local beside = require "moe.experts.beside"

--- Parallel bottleneck adapters: y = base(x) + scale * sum over a token's experts of g_e (up_e act(down_e x)). Parameters
-- down_proj [E, I, d_model], up_proj [E, d_out, I], which is 0 at the start, and with `bias` down_bias [E, I], up_bias [E,
-- d_out], 0. Options: intermediate_size I (the bottleneck), act (relu; as in mlp), bias (true), scale (1); base: a module,
-- mostly a dense FFN, or a weight [d_out, d_model], frozen when taken; init (of down_proj), d_out; d_model and num_experts (one)
-- for a bank of its own. Houlsby et al. 2019 (arXiv 1902.00751); the parallel form and the scale: He et al. 2021 (arXiv
-- 2110.04366, table 1).
local Adapter = nn.module("adapter", beside.Beside)

local ROWS <const> = beside.rows {
  intermediate_size = { "integer", require("moe.nn.options").required }, bias = { "boolean", true }, act = { base.ACTS, "relu" },
}

function Adapter:init(given)
  local o = self:setup("experts.adapter", given, ROWS)
  if not o then return end
  local E, I = self.num_experts, o.intermediate_size
  self.scale = o.scale or 1
  self.down_proj = base.parameter(o, { E, I, self.d_model }, o.init, self.d_model)
  self.up_proj = base.parameter(o, { E, self.d_out, I }, "zeros")
  if o.bias then
    self.down_bias = base.parameter(o, { E, I }, "zeros")
    self.up_bias = base.parameter(o, { E, self.d_out }, "zeros")
  end
end

function Adapter:work(x, routing)
  return self:add(x, routing, self.down_proj, self.up_proj, self.down_bias, self.up_bias)
end

function Adapter:extra() return beside.extra(self, "intermediate_size") end

return Adapter
