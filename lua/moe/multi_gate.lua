--- moe.multi_gate: several gates, one a task, over experts that all, some or one of them see; each expert works once.
--
--   local mmoe = moe.multi_gate{ d_model = 16, num_tasks = 3, shared = 4, experts = moe.experts.mlp{ intermediate_size = 32 } }
--   local ys, routings = mmoe(x)                        -- x [.., 16] -> a list of one y [.., 16] a task
--
-- y_t = sum over the experts e that gate t sees of g_t,e f_e(x_e), g_t = softmax(W_t x_t) (score = "sigmoid": each by
-- itself). Which they are: `shared` experts, which all gates see; `groups` = { { 1, 2 }, { 3 } } of tasks with `per_group`
-- experts each, which the tasks of the group see; `own` experts of each task; in this order, numbered from 1. Or `visible`:
-- a list of experts for each gate. Shared alone is MMoE (Ma et al. 2018, eq. 5-7), shared and own CGC, and stacked PLE (Tang
-- et al. 2020, section 4.1-4.2); groups are HoME's (Wang et al. 2024, arXiv 2408.05430). Inputs: one tensor for all, or a
-- list { x_1, .. }, from which gate t takes gate_input[t] and expert e expert_input[e] (lists of numbers, 1 when absent),
-- all of one shape. gate_bias: boolean (false). `self_gate`: the experts that gate t alone sees have
-- another, private weight s, added to g: sigmoid(S_t x_t) for one expert, softmax(S_t x_t) for several, so that they learn
-- whatever the gate prefers (HoME too). Parameters gates.t.weight [n_t, d_model], gates.t.bias [n_t], self_gates.t and
-- those of the bank under `experts`. The second result: routings of dense gates over all experts, [T, E], one a task, with
-- probs: what moe.loss and the statistics want.

local moe = require "moe"
local core = moe.core
local nn = moe.nn
local options = require "moe.nn.options"

local MultiGate = nn.module "multi_gate"

local ROWS <const> = {
  d_model = { "integer", options.required }, experts = { "table|userdata", options.required }, num_tasks = { "integer" },
  shared = { "integer", 0 }, own = { "integer", 0 }, groups = { "table" }, per_group = { "integer", 1 }, visible = { "table" },
  gate_input = { "table" }, expert_input = { "table" }, gate_bias = { "boolean", false },
  self_gate = { "boolean", false }, score = { { "softmax", "sigmoid" }, "softmax" },
  dtype = { "string" }, device = { "string" },
}

local function fail(text, ...) error("multi_gate: " .. text:format(...), 4) end

-- The experts that each task sees, by shared, groups and own, and how many there are.
local function layout(o)
  local n, total = o.num_tasks, o.shared
  if not n or n < 1 then fail("option 'num_tasks' must be at least 1, got %s (or give 'visible')", tostring(n)) end
  for _, key in ipairs { "shared", "own", "per_group" } do
    if o[key] < 0 then fail("option '%s' must not be negative, got %d", key, o[key]) end
  end
  local visible = {}
  local function add(t, count)
    for e = total + 1, total + count do table.insert(visible[t], e) end
  end
  for t = 1, n do
    visible[t] = {}
    for e = 1, o.shared do visible[t][e] = e end
  end
  for g, tasks in ipairs(o.groups or {}) do
    for _, t in ipairs(type(tasks) == "table" and tasks or fail("groups[%d] is a %s, wanted a list of tasks", g, type(tasks))) do
      if not visible[t] then fail("groups[%d] names task %s, wanted 1 to %d", g, tostring(t), n) end
      add(t, o.per_group)
    end
    total = total + o.per_group
  end
  for t = 1, n do
    add(t, o.own)
    total = total + o.own
  end
  return visible, total
end

local function check_visible(visible)
  local total = 0
  for t, list in ipairs(visible) do
    if type(list) ~= "table" then fail("visible[%d] is a %s, wanted a list of experts", t, type(list)) end
    for _, e in ipairs(list) do
      if math.type(e) ~= "integer" or e < 1 then fail("visible[%d] names expert %s, wanted numbers from 1", t, tostring(e)) end
      total = math.max(total, e)
    end
  end
  if total == 0 then fail "no gate sees an expert" end
  return visible, total
end

local function inputs_of(name, list, n)
  for i = 1, list and n or 0 do
    if math.type(list[i]) ~= "integer" or list[i] < 1 then
      fail("%s[%d] is %s, wanted the number of an input", name, i, tostring(list[i]))
    end
  end
  return list or {}
end

-- For each gate the places in its list of the experts that no other gate sees.
local function sole(visible)
  local seen, places = {}, {}
  for _, list in ipairs(visible) do
    for _, e in ipairs(list) do seen[e] = (seen[e] or 0) + 1 end
  end
  for t, list in ipairs(visible) do
    places[t] = {}
    for i, e in ipairs(list) do
      if seen[e] == 1 then table.insert(places[t], i) end
    end
  end
  return places
end

function MultiGate:init(given)
  local o = options.read("multi_gate", given, ROWS, 2)
  self._options = o
  local visible, E
  if o.visible then visible, E = check_visible(o.visible) else visible, E = layout(o) end
  for t, list in ipairs(visible) do
    if #list == 0 then fail("task %d sees no expert", t) end
  end
  self.d_model, self.num_experts, self.num_tasks = o.d_model, E, #visible
  self._visible = visible
  self._gate_input = inputs_of("gate_input", o.gate_input, #visible)
  self._expert_input = inputs_of("expert_input", o.expert_input, E)
  self.experts = o.experts
  if not nn.is_module(o.experts) and #o.experts > 0 then self.experts = moe.experts.map(o.experts) end
  self.experts = self.experts:bind { d_model = o.d_model, num_experts = E, dtype = o.dtype, device = o.device }
  local gates = {}
  for t, list in ipairs(visible) do gates[t] = nn.linear { in_features = o.d_model, out_features = #list, bias = o.gate_bias } end
  self.gates = gates
  if o.self_gate then
    self._sole, self.self_gates = sole(visible), {}
    for t, list in ipairs(self._sole) do
      if #list > 0 then
        self.self_gates[t] = nn.linear { in_features = o.d_model, out_features = #list, bias = o.gate_bias }
      end
    end
  end
  for _, list in ipairs { gates, self.self_gates or {} } do
    for _, gate in pairs(list) do
      if o.dtype then gate:to(o.dtype) end
    end
  end
end

-- All experts' outputs [E, T, d_out]: rows in order of experts, so that one routing serves the bank.
local function work(self, inputs, ctx)
  local E, parts = self.num_experts, {}
  local T = inputs[1]:size(1)
  for e = 1, E do
    local i = self._expert_input[e] or 1
    parts[e] = inputs[i] or error(("multi_gate: expert %d takes input %d, but there are %d"):format(e, i, #inputs), 0)
  end
  local index = core.arange(1, E * T):to "i64":reshape { E, T }
  local routing = moe.routing.experts(index, nil, E * T)
  local z = self.experts(core.cat(parts, 1), routing, ctx)
  return z:reshape { E, T, z:size(2) }
end

local function rows_of(self, x, i)
  if not core.is_tensor(x) or x:size(-1) ~= self.d_model then
    error(("multi_gate: input %d is %s, wanted [.., %d]"):format(i, core.is_tensor(x) and "[" .. table.concat(x.shape, ", ") .. "]" or
      "a " .. type(x), self.d_model), 0)
  end
  return x:reshape { -1, self.d_model }
end

--- x [.., d_model], or a list of inputs -> a list of y [.., d_out], one a task; a list of routings.
function MultiGate:forward(x, ctx)
  local list, inputs = core.is_tensor(x) and { x } or x, {}
  if type(list) ~= "table" or #list == 0 then error("multi_gate: argument 1 must be a tensor or a list of them, got a " .. type(x), 2) end
  for i, v in ipairs(list) do inputs[i] = rows_of(self, v, i) end
  local z, shape, o = work(self, inputs, ctx), list[1].shape, self._options
  local T, d = z:size(2), z:size(3)
  shape[#shape] = d
  local ys, routings = {}, {}
  for t, seen in ipairs(self._visible) do
    local i = self._gate_input[t] or 1
    local xt = inputs[i] or error(("multi_gate: gate %d takes input %d, but there are %d"):format(t, i, #inputs), 0)
    local logits = self.gates[t](xt)
    local g = o.score == "softmax" and logits:softmax(-1) or logits:sigmoid()
    local own = self.self_gates and self.self_gates[t]
    if own then
      local s = own(xt)
      s = s:size(2) == 1 and s:sigmoid() or s:softmax(-1)
      g = g:index_add(2, core.tensor(self._sole[t], { dtype = "i64", device = g.device }), s)
    end
    local which = core.tensor(seen, { dtype = "i64", device = z.device })
    local y = (z:index_select(1, which) * g:t():reshape { #seen, T, 1 }):sum(1)
    ys[t] = y:reshape(shape)
    local all = core.zeros({ T, self.num_experts }, { dtype = g.dtype, device = g.device }):index_copy(2, which, g)
    routings[t] = moe.routing.dense(all, { probs = all })
  end
  return ys, routings
end

function MultiGate:extra()
  return ("d_model=%d, %d tasks over %d experts"):format(self.d_model, self.num_tasks, self.num_experts)
end

return MultiGate
