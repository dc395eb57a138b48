-- Networks whose weights are rounded to few levels.

local nn = require "moe.nn"
local base = require "moe.experts.base"
local activation = require "moe.experts.activation"

local M = {}

-- `weights`: levels, scale of moe.fake_quantize from the options
local function class(name, extra, weights)
  local rows = activation.rows("silu", {
    gated = { "boolean", true }, activation_bits = { "integer" }, per = { { "expert", "row" }, "expert" },
  })
  for k, v in pairs(extra) do rows[k] = v end
  local Class = nn.module(name, base.Bank)

  function Class:init(given)
    local o = self:setup("experts." .. name, given, rows)
    activation.check("experts." .. name, self._options, 3)
    for _, key in ipairs { "bits", "activation_bits" } do
      local bits = self._options[key]
      if bits and (bits < 2 or bits > 16) then
        error(("experts.%s: option '%s' must lie in 2..16, got %d"):format(name, key, bits), 3)
      end
    end
    if not o then return end
    local E, d, I = self.num_experts, self.d_model, self.intermediate_size
    local key, wide = "up", I
    if o.gated then key, wide = "gate_up", 2 * I end
    self[key .. "_proj"] = base.parameter(o, { E, wide, d }, o.init, d)
    self.down_proj = base.parameter(o, { E, self.d_out, I }, o.init, I)
    if o.bias then
      self[key .. "_bias"] = base.parameter(o, { E, wide }, o.init, d)
      self.down_bias = base.parameter(o, { E, self.d_out }, o.init, I)
    end
    activation.attach(self, o)
    if o.activation_bits then
      local levels = (1 << o.activation_bits - 1) - 1
      self.before = function(_, x) return x:fake_quantize(levels) end
    end
  end

  --- The weights w [E, n, k] as the network uses them.
  function Class:rounded(w)
    local levels, scale = weights(self._options)
    return w:fake_quantize(levels, scale, self._options.per == "row" and 1 or 2)
  end

  function Class:work(x, routing)
    local w = self.gate_up_proj or self.up_proj
    return activation.network(self, x, routing, self:rounded(w), self:rounded(self.down_proj),
      self.gate_up_bias or self.up_bias, self.down_bias, self._options.gated)
  end
  return Class
end

--- Networks with ternary weights: as glu or mlp, but every matrix W of an expert is used as s clip(round(W / s), -1, 1), s = mean |W|;
-- the gradient passes straight through to W. Options of low_bit but bits. Costs a pass over all experts' weights a forward.
-- Ma et al. 2024 (BitNet b1.58, arXiv 2402.17764, eqs. 1-3); straight-through: Bengio et al. 2013 (arXiv 1308.3432).
M.ternary = class("ternary", {}, function() return 1, "absmean" end)

--- Networks with weights of few bits: W is used as s round(W / s), s = max |W| / (2^(bits-1) - 1); the gradient passes
-- straight through. Options: bits (4); per: "expert" (one s a matrix) or "row" (one an output); activation_bits: what enters each
-- product is rounded likewise, row by row (8 in BitNet); gated (true: as glu with gate_up_proj; false: as mlp with up_proj); act,
-- order, eps, bias, init, d_out as in mlp.
-- Levels as for the activations of BitNet (Wang et al. 2023, arXiv 2310.11453, eq. 4, symmetric here).
M.low_bit = class("low_bit", { bits = { "integer", 4 } }, function(o) return (1 << o.bits - 1) - 1, "absmax" end)

return M
