--- Losses: those of the operation table under one name, and the balance losses of sparse layers (moe.balance).
local core = require "moe.core"
local balance = require "moe.balance"

local M = {}
for _, name in ipairs { "cross_entropy", "mse", "l1", "huber", "nll", "kl_div", "bce_with_logits" } do
  M[name] = core[name]
end
for name, value in pairs(balance) do M[name] = value end
for name, value in pairs(require "moe.consistency") do M[name] = value end
for name, value in pairs(require "moe.sparsity") do M[name] = value end

return M
