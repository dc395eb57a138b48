-- One network, modulated by every expert in its own way.

local nn = require "moe.nn"
local base = require "moe.experts.base"
local activation = require "moe.experts.activation"

--- One shared network whose hidden activations expert i modulates: y = sum over a token's experts of
-- g_i (down (gamma_i * h + beta_i) + down_bias), h = act(up x + up_bias). The sum is linear in h: the vectors are mixed first, and a
-- token costs one network whatever its number of experts. Parameters up_proj [I, d], down_proj [d_out, I], up_bias,
-- down_bias; gamma [E, I], 1 at the start, and beta [E, I], 0.
-- Options: intermediate_size; act as in mlp by name, a module or a function (h); bias (true); shift (true; false: no beta, as IA3
-- scales); spread (0): the deviation of gamma and beta from those starts; init, d_out; d_model and num_experts.
-- Zhang et al. 2023 (MoFME, arXiv 2312.16610); modulation: Perez et al. 2017 (FiLM, arXiv 1709.07871, eq. 2).
local Film = nn.module("film", base.Bank)

local ROWS <const> = activation.rows("gelu", {
  bias = { "boolean", true }, shift = { "boolean", true }, spread = { "number", 0 },
})

-- One linear map, initialised as base.parameter does an expert.
local function matrix(o, rows, columns)
  local w = base.parameter(o, { 1, rows, columns }, o.init, columns)
  return nn.parameter(w:detach()[1])
end

function Film:init(given)
  local o = self:setup("experts.film", given, ROWS)
  local act = self._options.act
  activation.check("experts.film", self._options, 3)
  if act == "poly_relu" or act == "poly_norm" then
    error(("experts.film: the network is shared: give moe.nn.%s() as 'act'"):format(act), 3)
  end
  if not o then return end
  local E, d, I = self.num_experts, self.d_model, self.intermediate_size
  self.up_proj, self.down_proj = matrix(o, I, d), matrix(o, self.d_out, I)
  if o.bias then
    self.up_bias = base.parameter(o, { 1, I }, nil, d):detach()[1]
    self.down_bias = base.parameter(o, { 1, self.d_out }, nil, I):detach()[1]
    for _, key in ipairs { "up_bias", "down_bias" } do nn.parameter(self[key], { decay = false }) end
  end
  activation.attach(self, o)
  local function vectors(mean)
    return base.parameter(o, { E, I }, nil, 1):detach():normal_(mean, o.spread)
  end
  self.gamma = nn.parameter(vectors(1), { decay = false })
  if o.shift then self.beta = nn.parameter(vectors(0), { decay = false }) end
end

function Film:work(x, routing)
  local h = activation.apply(self, x:linear(self.up_proj, self.up_bias))
  if routing == nil then
    if self.num_experts > 1 then error(("experts.film: %d experts need a routing"):format(self.num_experts), 0) end
    h = h * self.gamma[1]
    if self.beta then h = h + self.beta[1] end
    return h:linear(self.down_proj, self.down_bias)
  end
  h = h * routing:mix(self.gamma)
  if self.beta then h = h + routing:mix(self.beta) end
  local y = h:linear(self.down_proj)
  if not self.down_bias then return y end
  return y + routing:total():to(y.dtype):unsqueeze(2) * self.down_bias
end

return Film
