-- What low-rank experts and adapters share: two thin matrices an expert, whose output is added to that of a frozen base.
--
-- y = base(x) + scale * sum over a token's experts of g_e (w_out_e act(w_in_e x + b_in_e) + b_out_e): the networks of mlp, by
-- the same kernel, with w_out = 0 to begin with, so that the whole is the base.

local core = require "moe.core"
local nn = require "moe.nn"
local base = require "moe.experts.base"
local sparse = core._sparse

local M = {}

local Beside = nn.module("beside", base.Bank)
Beside.own_values = true -- a model leaves them as they are: what starts at zero, and the base

--- Option rows: those of every bank that have a meaning here, `base`, `scale`, and one's own.
function M.rows(own)
  local rows = base.rows(own)
  rows.base, rows.scale = { "table|userdata" }, { "number" }
  for _, key in ipairs { "intermediate_size", "bias" } do
    if not own[key] then rows[key] = nil end
  end
  return rows
end

-- The weight [d_out, d_model] of a base: the tensor itself, a linear layer's, or nil for other modules.
local function weight_of(under)
  if core.is_tensor(under) then return under end
  local weight = under.weight
  return core.is_tensor(weight) and #weight.shape == 2 and weight or nil
end

local function check_base(name, o)
  local under = o.base
  local shape = core.is_tensor(under) and under.shape
  if shape and #shape ~= 2 or not shape and not nn.is_module(under) then
    error(("%s: option 'base' must be a module or a weight [d_out, d_model], got a %s"):format(name,
      shape and "tensor [" .. table.concat(shape, ", ") .. "]" or type(under)), 4)
  end
  local weight = weight_of(under)
  if not weight then return end
  local d_out, d_model = table.unpack(weight.shape)
  if (o.d_model or d_model) ~= d_model or (o.d_out or d_out) ~= d_out then
    error(("%s: the base's weight is [%d, %d], wanted [%d, %d] (d_out, d_model)"):format(name, d_out, d_model, o.d_out or d_out,
      o.d_model or d_model), 4)
  end
  o.d_out, o.dtype, o.device = d_out, o.dtype or weight.dtype, o.device or weight.device
end

--- Reads the options and takes the base in, frozen; nil when this is a description, without the sizes that weights need.
function Beside:setup(name, given, rows)
  local o = base.Bank.setup(self, name, given, rows) or self._options
  if o.base then check_base(name, o) end
  if not o.d_model then return end
  self.d_out = o.d_out or o.d_model
  if core.is_tensor(o.base) then
    self:buffer("base", o.base:detach()) -- its storage, without a gradient
  elseif o.base then
    self.base = o.base:freeze()
  end
  return o
end

--- The sum over the experts: in and out [E, r, d_model], [E, d_out, r], their biases or nil.
function Beside:add(x, routing, w_in, w_out, b_in, b_out)
  local y = sparse.ffn(x, w_in, w_out, b_in, b_out, routing, self._options.act or "identity", false)
  return self.scale == 1 and y or y * self.scale
end

-- Without a routing ctx may come second, as a model calls its FFNs.
function Beside:forward(x, routing, ctx)
  if type(routing) == "table" then routing, ctx = nil, routing end
  local y, under = base.Bank.forward(self, x, routing, ctx), self.base
  if under == nil then return y end
  return (core.is_tensor(under) and x:linear(under) or (under(x))) + y
end

--- What tostring shows, `width` being the name of the size between the two matrices.
function M.extra(self, width)
  local o = self._options
  local parts = { ("%s=%d, unbound"):format(width, o[width]) }
  if self.d_model then parts[1] = ("%d x %d -> %d -> %d"):format(self.num_experts, self.d_model, o[width], self.d_out) end
  if o.act then parts[#parts + 1] = "act=" .. o.act end
  if self.scale and self.scale ~= 1 then parts[#parts + 1] = ("scale=%g"):format(self.scale) end
  return table.concat(parts, ", ")
end

M.Beside = Beside

return M
