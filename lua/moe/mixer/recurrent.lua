-- What mixers over linear recurrences share: the call, the state and its check, projections, short convolutions, norms.
--
-- A mixer is a class of this base: init(given) makes the weights; mix(x, state, cu) answers x [batch, time, d_model] with y and
-- the state behind it; sizes() names the tensors of the state: { name = { size, ... } } without the batch.

local core = require "moe.core"
local nn = require "moe.nn"
local options = require "moe.nn.options"

local M = {}

-- --- parts ---

--- Option rows: those of every mixer of this kind, and one's own.
function M.rows(extra)
  local rows = { d_model = { "integer", options.required }, dtype = { "string" }, device = { "string" } }
  for name, row in pairs(extra) do rows[name] = row end
  return rows
end

function M.linear(o, from, to, bias)
  return nn.linear { in_features = from, out_features = to, bias = bias or false, dtype = o.dtype, device = o.device }
end

--- Two projections through a narrow middle: the names "0" and "1" are those of the field's state dicts.
function M.low_rank(o, from, rank, to, bias)
  return { [0] = M.linear(o, from, rank), [1] = M.linear(o, rank, to, bias) }
end

function M.through(pair, x) return pair[1](pair[0](x)) end

--- A parameter of that shape, in f32 unless the module's type is wider, without weight decay: decays, time steps, gains.
function M.plain(o, shape, fill)
  local t = core.zeros(shape, { dtype = o.dtype == "f64" and "f64" or "f32", device = o.device })
  if type(fill) == "number" then t:fill_(fill) elseif fill then fill(t) end
  return nn.parameter(t, { decay = false })
end

--- The bias of a time step dt = softplus(.. + bias) such that dt starts between low and high, even in its logarithm: the
-- inverse of softplus, dt + log(1 - exp(-dt)) (Mamba).
function M.step_bias(low, high, floor)
  return function(t)
    nn.init.uniform_(t, math.log(low), math.log(high))
    local dt = t:exp():clamp(floor or 0)
    t:copy_(dt + (-(-dt):expm1()):log())
  end
end

--- log(a), a even between low and high: the logarithm of a decay rate.
function M.log_uniform(low, high)
  return function(t)
    nn.init.uniform_(t, low, high)
    t:copy_(t:clamp(1e-4):log())
  end
end

--- x / |x| over the last dimension.
function M.unit(x)
  local d = x:size(-1)
  return core.rms_norm(x, nil, 1e-6 / math.max(d, 1)) * d ^ -0.5
end

--- [batch, time, heads * d] as [batch, time, heads, d].
function M.heads(x, h)
  local s = x.shape
  return x:reshape { s[1], s[2], h, s[3] // h }
end

--- [batch, time, heads, d] as [batch, time, heads * d].
function M.join(x)
  local s = x.shape
  return x:reshape { s[1], s[2], s[3] * s[4] }
end

--- f(part, s) for each packed sequence of x along time, joined; sequences without a time are left out.
function M.each_sequence(x, cu, f)
  local at, parts = cu:totable(), {}
  for s = 1, #at - 1 do
    local n = at[s + 1] - at[s]
    if n > 0 then parts[#parts + 1] = f(x:narrow(2, at[s] + 1, n), s) end
  end
  return #parts > 0 and core.cat(parts, 2) or x
end

--- x one time later, with the last x before it (zeros) in front; and the last x of all, [batch, d_model].
function M.shift(x, before, cu)
  local b, t, d = table.unpack(x.shape)
  if cu then return M.each_sequence(x, cu, function(part) return (M.shift(part)) end) end
  before = before and before:unsqueeze(2) or core.zeros({ b, 1, d }, { dtype = x.dtype, device = x.device })
  local all = core.cat({ before, x }, 2)
  return all:narrow(2, 1, t), all:select(2, t + 1)
end

--- A causal convolution of each channel over time, weight [channels, 1, width] as a Conv1d of groups = channels has it.
local Conv = nn.module "short_conv"

function Conv:init(o, channels, width, bias)
  local r = width ^ -0.5
  local like = { dtype = o.dtype, device = o.device }
  self.weight = nn.parameter(nn.init.uniform_(core.zeros({ channels, 1, width }, like), -r, r))
  if bias then self.bias = nn.parameter(nn.init.uniform_(core.zeros({ channels }, like), -r, r)) end
end

function Conv:forward(x, state, cu)
  local weight = self.weight:squeeze(2)
  local function run(part, before) return core.causal_conv1d(part, weight, self.bias, before, "silu") end
  if cu then return M.each_sequence(x, cu, function(part) return (run(part)) end) end
  return run(x, state)
end

function Conv:size() return { self.weight:size(3) - 1, self.weight:size(1) } end

M.Conv = Conv

-- --- the base ---

local Recurrent = nn.module "recurrent"

local function shape_text(s) return "[" .. table.concat(s, ", ") .. "]" end

--- Reads options, and checks those that count something and what must divide what.
function Recurrent:options(name, given, rows)
  local o = options.read(name, given, M.rows(rows), 2)
  for key, v in pairs(o) do
    if math.type(v) == "integer" and v < 1 then error(("%s: option '%s' must be at least 1, got %d"):format(name, key, v), 4) end
  end
  self._options, self.d_model = o, o.d_model
  return o
end

--- n, when `by` divides it; else an error that names both.
function Recurrent:divided(n, by, what)
  if n % by ~= 0 or n // by < 1 then
    error(("%s: %s does not divide into %d: it is %s"):format(getmetatable(self).__name, what, by, n), 4)
  end
  return math.tointeger(n // by)
end

-- Every tensor of the state as { shape with the batch, dtype }.
local function state_rows(self, batch)
  local rows, dtype = {}, self._options.dtype
  for name, size in pairs(self:sizes()) do
    rows[name] = { { batch, table.unpack(size) }, name == "recurrent" and (dtype == "f64" and "f64" or "f32") or dtype or "f32" }
  end
  return rows
end

--- The empty state of a batch: { recurrent = [batch, heads, dk, dv] in f32 at least, and what else the mixer carries }.
function Recurrent:state(batch)
  local state = {}
  for name, row in pairs(state_rows(self, batch or 1)) do
    state[name] = core.zeros(row[1], { dtype = row[2], device = self._options.device })
  end
  if self._positions then state.position = 0 end
  return state
end

local function check_state(self, name, state, batch)
  if type(state) ~= "table" then
    error(("%s: the state must be a table as mixer:state(batch) gives it, got a %s"):format(name, type(state)), 3)
  end
  local rows, names = state_rows(self, batch), {}
  for key in pairs(rows) do names[#names + 1] = key end
  table.sort(names)
  for _, key in ipairs(names) do
    local t, row = state[key], rows[key]
    local got = core.is_tensor(t) and shape_text(t.shape) or t == nil and "nothing" or "a " .. type(t)
    if got ~= shape_text(row[1]) then
      error(("%s: state.%s must be %s, got %s"):format(name, key, shape_text(row[1]), got), 3)
    end
  end
  if self._positions and math.type(state.position) ~= "integer" then
    error(("%s: state.position must be an integer, got %s"):format(name, tostring(state.position)), 3)
  end
end

local function check_lengths(name, cu, shape)
  if not core.is_tensor(cu) then error(("%s: ctx.cu_seqlens must be a tensor, got a %s"):format(name, type(cu)), 3) end
  if shape[1] ~= 1 then error(("%s: cu_seqlens packs sequences into a batch of 1, but the batch is %d"):format(name, shape[1]), 3) end
  local at = cu:dim() == 1 and not cu.dtype:find "f" and cu:totable() or {}
  local good = at[1] == 0 and at[#at] == shape[2]
  for i = 2, #at do good = good and at[i - 1] <= at[i] end
  if not good then
    error(("%s: cu_seqlens must be integers that rise from 0 to the %d positions of x"):format(name, shape[2]), 3)
  end
end

--- x [batch, time, d_model] -> y of the same shape; with a state also the state after it. ctx.cu_seqlens [n + 1], cumulative
-- lengths from 0: sequences packed into a batch of 1, each from an empty state.
function Recurrent:forward(x, state, ctx)
  local name = getmetatable(self).__name
  if not core.is_tensor(x) or x:dim() ~= 3 or x:size(3) ~= self.d_model then
    error(("%s: x must be [batch, time, %d], got %s"):format(name, self.d_model,
      core.is_tensor(x) and shape_text(x.shape) or "a " .. type(x)), 2)
  end
  local cu = ctx and ctx.cu_seqlens
  if cu then
    if state then error(name .. ": packed sequences start anew: there can be no state with cu_seqlens", 2) end
    check_lengths(name, cu, x.shape)
  end
  if state then check_state(self, name, state, x:size(1)) end
  local y, after = self:mix(x, state or {}, cu, ctx)
  if not state then return y end
  if self._positions then after.position = state.position + x:size(2) end
  return y, after
end

M.Recurrent = Recurrent

return M
