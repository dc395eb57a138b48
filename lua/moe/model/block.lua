-- One layer of a language model: a mixer and a feed-forward network (either may be missing) on the residual stream.

local moe = require "moe"
local nn = moe.nn
local options = require "moe.nn.options"

--- A layer on the residual stream, f being first the mixer and then the ffn, norm_placement saying where the norm stands:
--   pre       x = x + f(norm(x))                 the stream itself is never normed (Xiong et al. 2020, arXiv 2002.04745)
--   post      x = norm(x + f(x))                 as the first Transformer (Vaswani et al. 2017, arXiv 1706.03762, section 3.1)
--   sandwich  x = x + post_norm(f(norm(x)))      (CogView, arXiv 2105.13290, section 2.4; Gemma 2)
-- residual = "parallel": both see the same input, x = x + mixer(norm1(x)) + ffn(norm1(x)), one norm before (after, of the sum,
-- with post) instead of two (PaLM, arXiv 2204.02311, section 2). Without a mixer or without an ffn the layer is the other alone.
-- x [batch, time, d_model] -> the same.
local Block = nn.module "block"

local ROWS = {
  d_model = { "integer", options.required },
  mixer = { "any" },                      -- y [, state] = mixer(x [, state, ctx])
  ffn = { "any" },                        -- y [, routing] = ffn(x [, ctx])
  norm = { { "layernorm", "rmsnorm" }, "layernorm" },
  norm_eps = { "number" },
  norm_bias = { "boolean", false },
  norm_placement = { { "pre", "post", "sandwich" }, "pre" },
  residual = { { "serial", "parallel" }, "serial" },
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
  local sandwich = o.norm_placement == "sandwich"
  self._post, self._parallel = o.norm_placement == "post", o.residual == "parallel" and o.mixer and o.ffn and true or false
  if o.mixer then
    self.norm1 = Block.make_norm(o)
    self.mixer = o.mixer
    if sandwich then self.post_norm1 = Block.make_norm(o) end
  end
  if o.ffn then
    if not self._parallel then self.norm2 = Block.make_norm(o) end
    self.ffn = o.ffn
    if sandwich then self.post_norm2 = Block.make_norm(o) end
  end
  if o.dropout > 0 then self.dropout = nn.dropout(o.dropout) end
end

-- f's output on its way to the stream.
local function out(self, y, norm)
  if norm then y = norm(y) end
  if self.dropout then y = self.dropout(y) end
  return y
end

local function mix(self, h, state, ctx)
  if state or ctx then return self.mixer(h, state, ctx) end
  return (self.mixer(h))
end

local function feed(self, h, ctx)
  if ctx then return self.ffn(h, ctx) end
  return self.ffn(h)
end

--- x [batch, time, d_model] -> y, the state after it (where one was given), what else the ffn returned (a routing).
function Block:forward(x, state, ctx)
  local y, routing
  if self._parallel then
    local h = self._post and x or self.norm1(x)
    y, state = mix(self, h, state, ctx)
    x = x + out(self, y, self.post_norm1)
    y, routing = feed(self, h, ctx)
    x = x + out(self, y, self.post_norm2)
    return self._post and self.norm1(x) or x, state, routing
  end
  if self.mixer then
    y, state = mix(self, self._post and x or self.norm1(x), state, ctx)
    x = x + out(self, y, self.post_norm1)
    if self._post then x = self.norm1(x) end
  end
  if not self.ffn then return x, state end
  y, routing = feed(self, self._post and x or self.norm2(x), ctx)
  x = x + out(self, y, self.post_norm2)
  return self._post and self.norm2(x) or x, state, routing
end

--- The empty state of a batch.
function Block:state(batch) return self.mixer and self.mixer:state(batch) or {} end

return Block
