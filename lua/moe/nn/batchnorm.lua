-- Normalisation over the batch.

local core = require "moe.core"
local protocol = require "moe.nn.module"
local options = require "moe.nn.options"
local moe = require "moe"

--- (x - mean) / sqrt(var + eps) * weight + bias, mean and variance over all but the last dimension: x [.., size], weight and
-- bias [size]. In training those of the batch (variance: divided by n), which also move the buffers running_mean and
-- running_var by `momentum` (variance: divided by n - 1), once a forward; in evaluation the buffers. Options: size, eps
-- (1e-5), momentum (0.1). A batch of one row cannot be normalised in training: an error. Ioffe and Szegedy 2015 (arXiv
-- 1502.03167).
local BatchNorm = protocol.module "batchnorm"

local ROWS <const> = {
  size = { "integer", options.required }, eps = { "number", 1e-5 }, momentum = { "number", 0.1 },
  dtype = { "string" }, device = { "string" },
}

function BatchNorm:init(given)
  local o = options.read("batchnorm", math.type(given) == "integer" and { size = given } or given, ROWS, 2)
  if o.size < 1 then error(("batchnorm: option 'size' must be at least 1, got %d"):format(o.size), 3) end
  local settings = { dtype = o.dtype or "f32", device = o.device }
  self.size, self.eps, self.momentum = o.size, o.eps, o.momentum
  self.weight = protocol.parameter(core.ones({ o.size }, settings), { decay = false })
  self.bias = protocol.parameter(core.zeros({ o.size }, settings), { decay = false })
  self:buffer("running_mean", core.zeros({ o.size }, settings))
  self:buffer("running_var", core.ones({ o.size }, settings))
end

function BatchNorm:forward(x)
  local shape = x.shape
  if #shape < 2 or shape[#shape] ~= self.size then
    error(("batchnorm: x is [%s], wanted [.., %d]"):format(table.concat(shape, ", "), self.size), 2)
  end
  if not self.training then
    return (x - self.running_mean) * (self.running_var + self.eps):rsqrt() * self.weight + self.bias
  end
  local rows = x:reshape { -1, self.size }
  local n = rows:size(1)
  if n < 2 then error(("batchnorm: %d row to normalise over in training, wanted at least 2"):format(n), 2) end
  local mean = rows:mean(1)
  local gap = rows - mean
  local var = (gap * gap):mean(1)
  if not moe.recomputing() then
    core.no_grad(function()
      self.running_mean:add_((mean - self.running_mean) * self.momentum)
      self.running_var:add_((var * (n / (n - 1)) - self.running_var) * self.momentum)
    end)
  end
  return (gap * (var + self.eps):rsqrt() * self.weight + self.bias):reshape(shape)
end

function BatchNorm:extra() return ("%d"):format(self.size) end

return BatchNorm
