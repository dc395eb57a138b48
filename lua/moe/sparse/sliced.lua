-- Linear layers of which only slices work.

local moe = require "moe"
local core = moe.core
local nn = moe.nn
local options = require "moe.nn.options"

--- A linear layer sliced into groups of columns or rows, of which a routing over the groups says which work for a token; the
-- products are over those alone. side = "in": y = sum over a token's groups of g_g W[:, group g] x[group g], from in_features
-- sliced to all out_features; side = "out": y[group g] = g_g W[group g, :] x, zeros in groups that are not the token's. y = m(x
-- [T, in_features], routing over num_groups) -> [T, out_features]. Options: in_features, out_features, num_groups, side ("in"),
-- weighted (false: g = 1), init. Parameter weight: [groups, out, in / groups], or [groups, out / groups, in]. copy_from(linear)
-- takes a dense layer's; with every group on it is that layer. Chen et al. 2024, MoHD (arXiv 2412.05644).
local Sliced = nn.module("sliced_linear")

local ROWS <const> = {
  in_features = { "integer", options.required }, out_features = { "integer", options.required },
  num_groups = { "integer", options.required }, side = { { "in", "out" }, "in" }, weighted = { "boolean", false },
  init = { "string|number|function" },
}

function Sliced:init(given)
  local o = options.read("sliced_linear", given, ROWS, 2)
  local key = o.side == "in" and "in_features" or "out_features"
  if o.num_groups < 1 or o[key] < 1 or o[key] % o.num_groups ~= 0 then
    error(("sliced_linear: %s = %d is no multiple of num_groups = %d"):format(key, o[key], o.num_groups), 3)
  end
  self._options, self._slice = o, o[key] // o.num_groups
  local shape = o.side == "in" and { o.num_groups, o.out_features, self._slice } or { o.num_groups, self._slice, o.in_features }
  local w, r = core.zeros(shape), 1 / math.sqrt(o.in_features)
  if o.init ~= nil then
    for g = 1, o.num_groups do nn.init.apply(w[g], o.init) end
  else
    nn.init.uniform_(w, -r, r)
  end
  self.weight = nn.parameter(w)
end

function Sliced:forward(x, routing)
  local o, s, G = self._options, self._slice, self._options.num_groups
  if not moe.routing.is_routing(routing) or routing.dispatch then
    error("sliced_linear: argument 2 must be a routing with lists, got a " .. (type(routing)), 2)
  elseif routing.num_experts ~= G then
    error(("sliced_linear: the routing is over %d groups, wanted %d"):format(routing.num_experts, G), 2)
  end
  local shape = core.is_tensor(x) and x.shape
  if not shape or #shape ~= 2 or shape[1] ~= routing.num_tokens or shape[2] ~= o.in_features then
    error(("sliced_linear: x must be [%d, %d], got %s"):format(routing.num_tokens, o.in_features,
      shape and "[" .. table.concat(shape, ", ") .. "]" or "a " .. type(x)), 2)
  end
  local T = shape[1]
  local cell = (routing.token - 1) * G + routing.expert -- of [T, groups], from 1
  if o.side == "in" then
    return routing:combine(routing:linear(x:reshape { T * G, s }:index_select(1, cell), self.weight), o.weighted)
  end
  local y = routing:linear(routing:gather(x), self.weight)
  if o.weighted then y = y * routing.weight:unsqueeze(-1) end
  return core.zeros({ T * G, s }, { dtype = y.dtype, device = y.device }):index_copy(1, cell, y):reshape { T, o.out_features }
end

--- The weight of a dense layer [out_features, in_features], or of a moe.nn.linear without a bias.
function Sliced:copy_from(linear)
  local o, w = self._options, core.is_tensor(linear) and linear or linear.weight
  core.no_grad(function()
    if o.side == "in" then
      self.weight:copy_(w:reshape { o.out_features, o.num_groups, self._slice }:permute { 2, 1, 3 })
    else
      self.weight:copy_(w:reshape { o.num_groups, self._slice, o.in_features })
    end
  end)
  return self
end

function Sliced:extra()
  local o = self._options
  return ("%d -> %d, %d groups of its %sputs"):format(o.in_features, o.out_features, o.num_groups, o.side)
end

return Sliced
