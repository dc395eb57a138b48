-- What routers share: options kept for bind, the projection to logits, noise and jitter.
--
-- A router is a class of this base: init(given) calls self:setup, which gives the options when the sizes are known, and
-- makes its weights; route(x, ctx) answers x [T, d_model] with a routing.

local core = require "moe.core"
local nn = require "moe.nn"
local options = require "moe.nn.options"
require "moe.routing" -- the methods of routings

local M = {}

local COMMON <const> = {
  d_model = { "integer" }, num_experts = { "integer" }, dtype = { "string" }, device = { "string" },
}

-- The options of a projection, for routers that have logits.
local LINEAR <const> = {
  bias = { "boolean", false }, init = { "string|number|function" },
  noise = { "string|number" }, noise_in_eval = { "boolean", false }, jitter = { "number", 0 },
}

--- Option rows: those of every router, of a projection where `linear` is set, and one's own.
function M.rows(own, linear)
  local rows = {}
  for k, v in pairs(COMMON) do rows[k] = v end
  for k, v in pairs(linear and LINEAR or {}) do rows[k] = v end
  for k, v in pairs(own) do rows[k] = v end
  return rows
end

local Router = nn.module "router"

local function name_of(self) return "router." .. getmetatable(self).__name end

--- Raises "router.<name>: text".
function Router:fail(text, ...) error(name_of(self) .. ": " .. text:format(...), 0) end

--- Reads the options; nil when this is a description, without the sizes that weights need.
function Router:setup(given, rows)
  local o = options.read(name_of(self), given, rows, 3)
  self._options = o
  if o.noise and o.noise ~= "learned" and type(o.noise) ~= "number" then
    self:fail("option 'noise' must be \"learned\" or a standard deviation, got %q", o.noise)
  end
  if o.jitter and not (o.jitter >= 0 and o.jitter < 1) then self:fail("option 'jitter' must be in [0, 1), got %g", o.jitter) end
  for _, key in ipairs { "d_model", "num_experts" } do
    if o[key] and o[key] < 1 then self:fail("option '%s' must be at least 1, got %d", key, o[key]) end
  end
  if not o.d_model then return end
  if not o.num_experts then self:fail "option 'num_experts' is missing" end
  self.d_model, self.num_experts = o.d_model, o.num_experts
  return o
end

--- The same router for these sizes: itself when it has weights already, else a new one.
function Router:bind(sizes)
  if self.d_model then
    for _, key in ipairs { "d_model", "num_experts" } do
      if sizes[key] and sizes[key] ~= self[key] then
        error(("%s: the router has %s = %d, the layer wants %d"):format(name_of(self), key, self[key], sizes[key]), 2)
      end
    end
    return self
  end
  local given = {}
  for k, v in pairs(self._options) do given[k] = v end
  for _, key in ipairs { "d_model", "num_experts", "dtype", "device" } do given[key] = given[key] or sizes[key] end
  if self.takes_selection_bias then given.selection_bias = given.selection_bias or sizes.selection_bias end
  return getmetatable(self)(given)
end

--- Changes options of a router that was made: those that its class lists in `settable`, checked by its `check`, where it
-- has one, and taken over by its `changed`. Returns the router: layer.router:set{ top_k = 2 }.
function Router:set(given)
  local new = options.read(name_of(self) .. ":set", given, self.settable or {}, 2)
  local o = {}
  for k, v in pairs(self._options) do o[k] = v end
  for k, v in pairs(new) do o[k] = v end
  if self.check then self:check(o) end
  self._options = o
  if self.changed then self:changed(o) end
  return self
end

--- Makes the parameter prefix .. "weight" [rows, d_model] and, with `bias`, prefix .. "bias" [rows].
function Router:projection(prefix, rows, columns)
  local o = self._options
  local d = columns or self.d_model
  local settings = { dtype = o.dtype or "f32", device = o.device }
  local r = 1 / math.sqrt(d)
  local w = core.zeros({ rows or self.num_experts, d }, settings)
  if o.init ~= nil then nn.init.apply(w, o.init) else nn.init.uniform_(w, -r, r) end
  self[prefix .. "weight"] = nn.parameter(w)
  if o.bias then
    local b = core.zeros({ rows or self.num_experts }, settings)
    if o.init == nil then nn.init.uniform_(b, -r, r) end
    self[prefix .. "bias"] = nn.parameter(b, { decay = false })
  end
  if o.noise == "learned" and prefix == "" then self:projection("noise_", rows, columns) end
end

--- x as a router takes it: in f32 at least, with the jitter of training.
function Router:input(x)
  local jitter = self._options.jitter
  if x.dtype ~= "f64" and x.dtype ~= "f32" then x = x:to "f32" end
  if jitter and jitter > 0 and self.training then x = x * (core.rand_like(x:detach()) * (2 * jitter) + (1 - jitter)) end
  return x
end

--- What the logits [T, rows] of x [T, d_model] are made of; a router may measure otherwise.
function Router:affinity(x) return x:linear(self.weight, self.bias) end

--- The logits [T, rows] of x [T, d_model], noise included; -inf for experts that ctx.expert_mask (bool [rows] or
-- [T, rows], true: may be chosen) leaves out.
-- Where there was noise, also the logits before it and its standard deviation [T, rows] (or a number).
function Router:logits(x, ctx)
  self:ready()
  local o = self._options
  x = self:input(x)
  local clean = self:affinity(x)
  if not (o.noise and (self.training or o.noise_in_eval)) then return self:masked(clean, ctx) end
  local std = o.noise
  if std == "learned" then std = x:linear(self.noise_weight, self.noise_bias):softplus() end
  return self:masked(clean + core.randn_like(clean:detach()) * std, ctx), self:masked(clean, ctx), std
end

--- Logits with -inf where ctx.expert_mask is false.
function Router:masked(logits, ctx)
  local mask = ctx and ctx.expert_mask
  if mask == nil then return logits end
  local shape, want = core.is_tensor(mask) and mask.shape, logits.shape
  local n = shape and #shape
  if not shape or mask.dtype ~= "bool" or shape[n] ~= want[2] or n > 2 or n == 2 and shape[1] ~= want[1] then
    self:fail("ctx.expert_mask must be a bool tensor [%d] or [%d, %d], got %s", want[2], want[1], want[2],
      shape and ("%s [%s]"):format(mask.dtype, table.concat(shape, ", ")) or "a " .. type(mask))
  end
  return logits:masked_fill(mask:logical_not(), -math.huge)
end

--- How many sequences the tokens x [T, d_model] are, and of how many tokens each: by ctx.shape, {.., time}; one where it has
-- no batch.
function Router:sequences(x, ctx)
  local tokens, shape = x:size(1), ctx and ctx.shape
  if not shape or #shape < 2 then return 1, tokens end
  local time, batch = shape[#shape], 1
  for i = 1, #shape - 1 do batch = batch * shape[i] end
  if batch * time ~= tokens then
    self:fail("ctx.shape is {%s}, but there are %d tokens", table.concat(shape, ", "), tokens)
  end
  return batch, time
end

--- The value of an option that may be a function of the step: that at ctx.step, or the last one where there is no step. It is
-- kept in the field of the option's name; one that is a number may be changed there.
function Router:scheduled(name, ctx)
  local f = self._options[name]
  if type(f) == "function" and (ctx.step or self[name] == nil) then self[name] = f(ctx.step or 1) end
  return self[name]
end

--- Raises for a description without weights.
function Router:ready()
  if not self.d_model then self:fail "this is a description without weights: give d_model and num_experts" end
end

function Router:forward(x, ctx) return self:route(x, ctx or {}) end

--- What tostring shows between the brackets: the sizes, then what `self:traits(o)` lists.
function Router:extra()
  local parts = self.traits and self:traits(self._options) or {}
  if self.d_model then table.insert(parts, 1, ("%d -> %d"):format(self.d_model, self.num_experts)) end
  if self._options.noise then parts[#parts + 1] = "noise=" .. tostring(self._options.noise) end
  return table.concat(parts, ", ")
end

M.Router = Router

return M
