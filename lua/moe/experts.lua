--- moe.experts: what works on routed tokens. A bank of networks keeps its weights in single tensors [num_experts, ...],
-- so that one grouped product serves them all.
--
-- A bank answers bank(x, routing [, ctx]) for x [T, d_model]; without a routing, a bank of one expert is a dense network
-- on x [.., d_model]. One made without d_model is a description: bind{ d_model =, num_experts = } makes the bank,
-- as moe.layer does.

local core = require "moe.core"
local nn = require "moe.nn"
local options = require "moe.nn.options"
local routing_of = require "moe.routing"
local sparse = core._sparse

local M = {}

local function want_positive(name, o, keys)
  for _, key in ipairs(keys) do
    if o[key] and o[key] < 1 then error(("%s: option '%s' must be at least 1, got %d"):format(name, key, o[key]), 4) end
  end
end

-- A parameter [E, ...]: every expert is initialised as a layer of its own.
local function bank_parameter(o, shape, init, fan_in)
  local w = core.zeros(shape, { dtype = o.dtype or "f32", device = o.device })
  for e = 1, shape[1] do
    if init == nil then
      nn.init.uniform_(w[e], -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
    elseif #shape > 2 then
      nn.init.apply(w[e], init)
    end
  end
  return nn.parameter(w, #shape < 3 and { decay = false } or nil)
end

-- What the banks share: options kept for bind, the call, the text.
local Bank = nn.module "bank"

local COMMON <const> = {
  d_model = { "integer" }, num_experts = { "integer" }, intermediate_size = { "integer", options.required },
  d_out = { "integer" }, init = { "string|number|function" }, bias = { "boolean", false }, dtype = { "string" }, device = { "string" },
}

local function rows_with(extra)
  local rows = {}
  for k, v in pairs(COMMON) do rows[k] = v end
  for k, v in pairs(extra) do rows[k] = v end
  return rows
end

--- The same bank for these sizes: itself when it has weights already, else a new one.
function Bank:bind(sizes)
  local o = self._options
  if self.d_model then
    for _, key in ipairs { "d_model", "num_experts" } do
      if sizes[key] and sizes[key] ~= self[key] then
        error(("%s: the bank has %s = %d, the layer wants %d"):format(getmetatable(self).__name, key, self[key], sizes[key]), 2)
      end
    end
    return self
  end
  local given = {}
  for k, v in pairs(o) do given[k] = v end
  for _, key in ipairs { "d_model", "num_experts", "dtype", "device" } do given[key] = given[key] or sizes[key] end
  return getmetatable(self)(given)
end

function Bank:setup(name, given, rows)
  local o = options.read(name, given, rows, 3)
  want_positive(name, o, { "d_model", "num_experts", "intermediate_size", "d_out" })
  self._options = o
  self.intermediate_size = o.intermediate_size
  if not o.d_model then return end
  self.d_model, self.num_experts, self.d_out = o.d_model, o.num_experts or 1, o.d_out or o.d_model
  return o
end

-- x [T, d_model], routing -> y [T, d_out]; the dense network without a routing.
function Bank:forward(x, routing)
  if not self.d_model then
    error(("%s: this is a description without weights: give d_model and num_experts"):format(getmetatable(self).__name), 0)
  end
  if routing == nil then return self:work(x, nil) end
  return routing_of.through(routing, x, function(rows) return self:work(rows, routing) end)
end

function Bank:extra()
  local parts = {}
  if self.d_model then
    parts[1] = ("%d x %d -> %d -> %d"):format(self.num_experts, self.d_model, self.intermediate_size, self.d_out)
  else
    parts[1] = ("intermediate_size=%d, unbound"):format(self.intermediate_size)
  end
  if self._options.act then parts[2] = "act=" .. self._options.act end
  return table.concat(parts, ", ")
end

local ACTS <const> = { "silu", "gelu", "gelu_tanh", "relu", "relu2", "tanh", "sigmoid", "identity" }

-- --- gated networks ---

local GLU_ROWS <const> = rows_with { act = { ACTS, "silu" } }
local SWIGLU_ROWS <const> = rows_with {}

local function gated(name, rows)
  local Class = nn.module(name, Bank)
  function Class:init(given)
    local o = self:setup("experts." .. name, given, rows)
    if not o then return end
    local E, d, I = self.num_experts, self.d_model, self.intermediate_size
    self.gate_up_proj = bank_parameter(o, { E, 2 * I, d }, o.init, d)
    self.down_proj = bank_parameter(o, { E, self.d_out, I }, o.init, I)
    if o.bias then
      self.gate_up_bias = bank_parameter(o, { E, 2 * I }, o.init, d)
      self.down_bias = bank_parameter(o, { E, self.d_out }, o.init, I)
    end
  end
  function Class:work(x, routing)
    return sparse.ffn(x, self.gate_up_proj, self.down_proj, self.gate_up_bias, self.down_bias, routing, self._options.act or "silu", true)
  end
  return Class
end

--- SwiGLU networks: down(silu(gate x) * up x). Parameters gate_up_proj [E, 2 I, d] (gate first), down_proj [E, d, I].
-- Options: intermediate_size, bias, init, d_out; d_model and num_experts (one) for a bank of its own.
M.swiglu = gated("swiglu", SWIGLU_ROWS)

--- The same with another activation `act` of the gate: "gelu" is GEGLU, "relu" ReGLU, "sigmoid" GLU.
M.glu = gated("glu", GLU_ROWS)

-- --- plain networks ---

local Mlp = nn.module("mlp", Bank)
local MLP_ROWS <const> = rows_with { act = { ACTS, "gelu" } }

function Mlp:init(given)
  local o = self:setup("experts.mlp", given, MLP_ROWS)
  if not o then return end
  local E, d, I = self.num_experts, self.d_model, self.intermediate_size
  self.up_proj = bank_parameter(o, { E, I, d }, o.init, d)
  self.down_proj = bank_parameter(o, { E, self.d_out, I }, o.init, I)
  if o.bias then
    self.up_bias = bank_parameter(o, { E, I }, o.init, d)
    self.down_bias = bank_parameter(o, { E, self.d_out }, o.init, I)
  end
end

function Mlp:work(x, routing)
  return sparse.ffn(x, self.up_proj, self.down_proj, self.up_bias, self.down_bias, routing, self._options.act, false)
end

--- Plain networks: down(act(up x)). Parameters up_proj [E, I, d], down_proj [E, d, I], with `bias` also up_bias and
-- down_bias. Options as in swiglu, and act: silu, gelu, gelu_tanh, relu, relu2, tanh, sigmoid, identity.
M.mlp = Mlp

-- --- experts in Lua ---

local Map = nn.module "map"

function Map:init(f)
  local kind = type(f)
  if kind ~= "function" and not nn.is_module(f) and kind ~= "table" then
    error("experts.map: argument 1 must be a function (xe, e), a module or a list of them, got a " .. kind, 3)
  end
  self.experts = f
end

function Map:bind() return self end

function Map:forward(x, routing, ctx)
  local f = self.experts
  local function work(e, xe)
    local g = f
    if type(f) == "table" and not nn.is_module(f) then
      g = f[e]
      if g == nil then error(("experts.map: the list has no expert %d"):format(e), 0) end
      if type(g) ~= "function" then return g(xe) end
    end
    return g(xe, e, ctx)
  end
  if routing == nil then return work(1, x) end
  return routing_of.through(routing, x, function(rows)
    local gathered = routing:gather(rows)
    local offsets, parts, width = routing.offsets:totable(), {}, nil
    for e = 1, routing.num_experts do
      local n = offsets[e + 1] - offsets[e]
      if n > 0 then
        local ye = work(e, gathered:narrow(1, offsets[e], n))
        if ye ~= nil then
          local s = core.is_tensor(ye) and ye.shape
          if not s or #s ~= 2 or s[1] ~= n or (width and s[2] ~= width) then
            error(("experts.map: expert %d gave %s for %d rows, wanted a tensor [%d, %s]"):format(e,
              s and "[" .. table.concat(s, ", ") .. "]" or "a " .. type(ye), n, n, width or "d"), 0)
          end
          width = s[2]
        end
        parts[#parts + 1] = ye or n -- nil: an expert that gives nothing
      end
    end
    width = width or rows:size(2)
    for i, part in ipairs(parts) do
      if type(part) == "number" then parts[i] = core.zeros({ part, width }, { dtype = rows.dtype, device = rows.device }) end
    end
    if #parts == 0 then return core.zeros({ rows:size(1), width }, { dtype = rows.dtype, device = rows.device }) end
    return routing:combine(#parts == 1 and parts[1] or core.cat(parts, 1))
  end)
end

--- Experts of one's own: f(xe, e, ctx) -> [n, d_out] for the rows xe [n, d_model] of expert e; nil stands for zeros. Or a
-- list of modules or functions, one an expert; modules' parameters are the bank's.
M.map = Map

return M
