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

for _, part in ipairs { require "moe.nn.containers", require "moe.nn.activations", core._module.make.nn or {} } do
  for name, value in pairs(part) do nn[name] = value end
end

return nn
