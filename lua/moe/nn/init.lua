-- moe.nn: layers, containers, activations, and classes of one's own.

local core = require "moe.core"
local protocol = require "moe.nn.module"

local nn = {
  module = protocol.module,
  parameter = protocol.parameter,
  is_module = protocol.is_module,
  decays = protocol.decays,
  Module = protocol.Module,
  init = require "moe.nn.initializers",
}

for _, part in ipairs { require "moe.nn.containers", require "moe.nn.activations", require "moe.nn.poly", core._module.make.nn or {} } do
  for name, value in pairs(part) do nn[name] = value end
end

-- Routings used elsewhere than in feed-forward networks: loaded when named, for they are built on moe.layer.
return require "moe.lazy"(nn, {
  batchnorm = "moe.nn.batchnorm", masks = "moe.nn.masks", relative = "moe.nn.relative", rope_scaling = "moe.nn.rope:scaling",
  mixture_of_depths = "moe.sparse.depths", mixture_of_blocks = "moe.sparse.blocks", sliced_linear = "moe.sparse.sliced",
  by_modality = "moe.sparse.modality:by_modality", modality_block = "moe.sparse.modality:modality_block",
  product_keys = "moe.memory.keys:product_keys", product_key_memory = "moe.memory.product_key",
  peer = "moe.memory.peer", ngram_memory = "moe.memory.ngram",
})
