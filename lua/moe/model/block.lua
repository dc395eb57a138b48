-- One layer of a language model: x + mixer(norm(x)), then x + ffn(norm(x)).

local moe = require "moe"
local nn = moe.nn
local options = require "moe.nn.options"

local Block = nn.module "block"

local ROWS = {
  d_model = { "integer", options.required },
  mixer = { "any", options.required },    -- y [, state] = mixer(x [, state, ctx])
  ffn = { "any" },                        -- y [, routing] = ffn(x [, ctx]); absent: the mixer alone
  norm = { { "layernorm", "rmsnorm" }, "layernorm" },
  norm_eps = { "number" },
  norm_bias = { "boolean", false },
  dropout = { "number", 0 },
}

-- Options norm, norm_eps, norm_bias, d_model.
function Block.make_norm(o)
  local settings = { size = o.d_model, eps = o.norm_eps }
  if o.norm == "layernorm" then settings.bias = o.norm_bias end
  return nn[o.norm](settings)
end

function Block:init(given)
  local o = options.read("block", given, ROWS)
  self.norm1 = Block.make_norm(o)
  self.mixer = o.mixer
  if o.ffn then
    self.norm2 = Block.make_norm(o)
    self.ffn = o.ffn
  end
  if o.dropout > 0 then self.dropout = nn.dropout(o.dropout) end
end

--- x [batch, time, d_model] -> y, the state after it (where one was given), what else the ffn returned (a routing).
function Block:forward(x, state, ctx)
  local y
  if state or ctx then
    y, state = self.mixer(self.norm1(x), state, ctx)
  else
    y = self.mixer(self.norm1(x))
  end
  if self.dropout then y = self.dropout(y) end
  x = x + y
  if not self.ffn then return x, state end
  local z, routing
  if ctx then
    z, routing = self.ffn(self.norm2(x), ctx)
  else
    z, routing = self.ffn(self.norm2(x))
  end
  if self.dropout then z = self.dropout(z) end
  return x + z, state, routing
end

return Block
