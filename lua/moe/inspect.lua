--- moe.inspect: what routers do, over many tokens, layers and checkpoints. What a single routing tells of itself is among its
-- methods: load, importance, entropy, coactivation, max_over_mean, dead.
--
--   local routings = moe.inspect.routings(model, ids)                         -- one a sparse layer
--   local counts = moe.inspect.specialisation(routings[1], kind_of_token, 4)  -- [4, num_experts]
--   print(moe.inspect.information(counts), moe.inspect.change(routings[1], later[1]))

local moe = require "moe"
local core = moe.core
local options = require "moe.nn.options"
local routing_of = require "moe.routing"

local M = {}

local function want_routing(name, i, r)
  if not routing_of.is_routing(r) then
    error(("inspect.%s: argument %d must be a routing, got a %s"):format(name, i, core.is_tensor(r) and "tensor" or type(r)), 3)
  elseif r.dispatch then
    error(("inspect.%s: a soft routing has no assignments of tokens"):format(name), 3)
  end
  return r
end

local function want_model(name, model)
  if not moe.nn.is_module(model) then
    error(("inspect.%s: argument 1 must be a model, got a %s"):format(name, core.is_tensor(model) and "tensor" or type(model)), 3)
  end
end

local function want_table(name, what, t)
  if type(t) ~= "table" then error(("inspect.%s: argument 1 must be %s, got a %s"):format(name, what, type(t)), 3) end
end

--- The routings of a forward of model(x, ctx), one a sparse layer: without gradients and in eval mode, so that nothing counts
-- or moves. ctx: the table that the model is called with (default a fresh one).
function M.routings(model, x, ctx)
  want_model("routings", model)
  ctx = ctx or {}
  local training = model.training
  if training then model:eval() end
  local ok, message = pcall(core.no_grad, function() model(x, ctx) end)
  if training then model:train() end
  if not ok then error(message, 0) end
  return ctx.routings or model.routings or {}
end

-- --- who gets what ---

--- How often tokens of each group went to each expert: counts i64 [num_groups, num_experts]. group: index tensor of num_tokens
-- elements (a domain, a kind of character, the token's number), 0 for tokens that do not count. `counts` of an earlier call goes on.
function M.specialisation(routing, group, num_groups, counts)
  want_routing("specialisation", 1, routing)
  if not core.is_tensor(group) or group:numel() ~= routing.num_tokens then
    error(("inspect.specialisation: argument 2 (group) must be an index tensor of %d tokens, got %s"):format(routing.num_tokens,
      core.is_tensor(group) and "[" .. table.concat(group.shape, ", ") .. "]" or "a " .. type(group)), 2)
  elseif math.type(num_groups) ~= "integer" or num_groups < 1 then
    error(("inspect.specialisation: argument 3 (num_groups) must be a count, got %s"):format(tostring(num_groups)), 2)
  end
  local E = routing.num_experts
  local of_row = group:reshape { -1 }:to "i64":index_select(1, routing.token)
  if of_row:numel() > 0 and (of_row:amin():item() < 0 or of_row:amax():item() > num_groups) then
    error(("inspect.specialisation: group has values outside of 0 to %d"):format(num_groups), 2)
  end
  local cell = of_row * E + routing.expert -- group 0 fills the first E cells, which are cut off
  local fresh = core.bincount(cell, (num_groups + 1) * E):reshape { num_groups + 1, E }:narrow(1, 2, num_groups)
  return counts and counts + fresh or fresh
end

--- How much the group tells of the expert: mutual information of counts [groups, experts] over the entropy of the
-- groups. 0: experts do not care for groups, 1: an expert serves one group alone.
function M.information(counts)
  if not core.is_tensor(counts) or #counts.shape ~= 2 then
    error("inspect.information: argument 1 must be a tensor of counts [groups, experts], got "
      .. (core.is_tensor(counts) and "[" .. table.concat(counts.shape, ", ") .. "]" or "a " .. type(counts)), 2)
  end
  local rows = counts:to "f64"
  local total = rows:sum():item()
  if total == 0 then return 0.0 end
  local joint = rows / total
  local group, expert = joint:sum(2, true), joint:sum(1, true)
  local function entropy(p) return -(p * (p + 1e-300):log()):sum():item() end
  local h = entropy(group)
  return h > 0 and (h + entropy(expert) - entropy(joint)) / h or 0.0
end

-- --- change ---

-- Incidence of tokens and experts as a list of distinct cells, token by token: t * E + e.
local function cells(routing)
  return ((routing.token - 1) * routing.num_experts + routing.expert):sort()
end

--- The change between two routings of the same tokens (two checkpoints, or clean and noised input): the share of
-- the first one's assignments that the second does not have, and the share of tokens with a different set of experts.
function M.change(before, after)
  want_routing("change", 1, before)
  want_routing("change", 2, after)
  if before.num_tokens ~= after.num_tokens or before.num_experts ~= after.num_experts then
    error(("inspect.change: the routings are of %d tokens, %d experts and of %d tokens, %d experts"):format(before.num_tokens,
      before.num_experts, after.num_tokens, after.num_experts), 2)
  end
  local a, b = cells(before):totable(), cells(after):totable()
  local E, moved, tokens = before.num_experts, 0, {}
  local i, j = 1, 1
  while i <= #a or j <= #b do
    local x, y = a[i] or math.huge, b[j] or math.huge
    if x ~= y then tokens[(math.min(x, y) - 1) // E] = true end
    if x < y then moved = moved + 1 end
    if x <= y then i = i + 1 end
    if y <= x then j = j + 1 end
  end
  local count = 0
  for _ in pairs(tokens) do count = count + 1 end
  return #a > 0 and moved / #a or 0.0, before.num_tokens > 0 and count / before.num_tokens or 0.0
end

-- --- local consistency ---

local SEGMENT <const> = { length = { "integer", 16 }, cache = { "number", 2 }, time = { "integer" } }

--- How alike neighbouring tokens are routed (Liang et al. 2025, arXiv 2505.16056). Sequences of `time` tokens (default: all of
-- them are one) are cut into segments of `length`. srp, segment routing best performance: the best F1 with which one fixed group
-- of experts, of any size, covers a segment's assignments: 2 hits / (length x size + assignments), averaged over segments. sch,
-- segment cache best hit rate: the share of assignments that the cache x k most wanted experts of their segment cover, k the mean number of
-- experts a token. A table { srp, sch, segments }.
function M.segments(routing, given)
  want_routing("segments", 1, routing)
  local o = options.read("inspect.segments", given, SEGMENT)
  local T, E = routing.num_tokens, routing.num_experts
  local time = o.time or math.max(T, 1)
  if o.length < 1 or time < 1 or T % time ~= 0 then
    error(("inspect.segments: %d tokens are no sequences of time = %d in segments of length = %d"):format(T, time, o.length), 2)
  end
  local token, expert = routing.token:totable(), routing.expert:totable()
  local per_sequence = (time + o.length - 1) // o.length
  local count = {} -- of a segment: expert -> assignments
  for i = 1, #token do
    local t = token[i] - 1
    local s = t // time * per_sequence + t % time // o.length + 1
    count[s] = count[s] or {}
    count[s][expert[i]] = (count[s][expert[i]] or 0) + 1
  end
  local size = math.min(E, math.max(1, math.floor(o.cache * (T > 0 and #token / T or 0) + 0.5)))
  local srp, segments, hits = 0.0, T // time * per_sequence, 0
  for s, by in pairs(count) do
    local sorted, total = {}, 0
    for _, n in pairs(by) do
      sorted[#sorted + 1] = n
      total = total + n
    end
    table.sort(sorted, function(a, b) return a > b end)
    local at = (s - 1) % per_sequence * o.length
    local length, covered, best = math.min(o.length, time - at), 0, 0.0
    for n, c in ipairs(sorted) do
      covered = covered + c
      if n <= size then hits = hits + c end
      best = math.max(best, 2 * covered / (length * n + total))
    end
    srp = srp + best
  end
  return { srp = segments > 0 and srp / segments or 0.0, sch = #token > 0 and hits / #token or 0.0, segments = segments }
end

-- --- traces ---

local Trace = {}
Trace.__index = Trace
Trace.__name = "moe.inspect.trace"
Trace.__tostring = function(self) return ("moe.inspect.trace: %d routings to %s"):format(self.count, self.path) end

-- As an entry of a layer's `balance` it records every training forward.
function Trace:__call(routing, ctx)
  self:record(routing, ctx.step, ctx.layer_number)
  return nil
end

-- Every token's experts and weights, in the order of the router where it has one, else of experts; 0 fills up.
local function choices(routing)
  if routing.index and routing.dropped == 0 and #routing.index.shape == 2 and routing.index:size(1) == routing.num_tokens then
    local weight = routing.gate
    return routing.index:totable(), weight and weight:detach():reshape(routing.index.shape):totable()
  end
  local index, weights, most = {}, {}, 0
  for t = 1, routing.num_tokens do index[t], weights[t] = {}, {} end
  local token, expert, weight = routing.token:totable(), routing.expert:totable(), routing.weight:detach():totable()
  for i, t in ipairs(token) do
    table.insert(index[t], expert[i])
    table.insert(weights[t], weight[i])
    most = math.max(most, #index[t])
  end
  for t = 1, routing.num_tokens do
    for i = #index[t] + 1, most do index[t][i], weights[t][i] = 0, 0 end
  end
  return index, weights
end

--- Writes one routing as a line of JSON: { step, layer, tokens, experts, index = [[..]], weight = [[..]] }.
function Trace:record(routing, step, layer)
  want_routing("trace", 1, routing)
  local index, weight = choices(routing)
  local line = moe.io.json_encode { step = step or 0, layer = layer or 0, tokens = routing.num_tokens,
    experts = routing.num_experts, index = index, weight = weight }:gsub("\n%s*", "") -- one line
  local ok, message = self.file:write(line, "\n")
  if ok then ok, message = self.file:flush() end
  if not ok then error(("inspect.trace: %s: %s"):format(self.path, message), 2) end
  self.count = self.count + 1
  return self
end

function Trace:close()
  if self.file then self.file:close() end
  self.file = nil
end

--- A trace of routings to a file, a line of JSON each: t:record(routing, step, layer), or in a layer's `balance`, where it
-- records every training forward (ctx.step and ctx.layer_number, which trainer and model set). nil, message for a file that cannot
-- be written. t:close() ends it.
function M.trace(path)
  if type(path) ~= "string" then error("inspect.trace: argument 1 must be the path of a file, got a " .. type(path), 2) end
  local file, message = io.open(path, "w")
  if not file then return nil, message end
  return setmetatable({ file = file, path = path, count = 0 }, Trace)
end

local function whole_rows(rows, tokens, most)
  if type(rows) ~= "table" or #rows ~= tokens then return false end
  for _, row in ipairs(rows) do
    if type(row) ~= "table" or #row ~= #rows[1] then return false end
    for _, v in ipairs(row) do
      if type(v) ~= "number" or most and (math.type(v) ~= "integer" or v < 0 or v > most) then return false end
    end
  end
  return true
end

--- The records of a trace, a list of { step, layer, tokens, experts, index, weight }; nil, message for what is none.
function M.read_trace(path)
  if type(path) ~= "string" then error("inspect.read_trace: argument 1 must be the path of a file, got a " .. type(path), 2) end
  local file, message = io.open(path)
  if not file then return nil, message end
  local records = {}
  for line in file:lines() do
    local r, wrong = moe.io.json_decode(line)
    if type(r) == "table" and not (math.type(r.tokens) == "integer" and math.type(r.experts) == "integer"
        and whole_rows(r.index, r.tokens, r.experts) and (r.weight == nil or whole_rows(r.weight, r.tokens))) then
      r, wrong = nil, "not a routing"
    end
    if type(r) ~= "table" then
      file:close()
      return nil, ("%s: line %d: %s"):format(path, #records + 1, wrong or "not a routing")
    end
    records[#records + 1] = r
  end
  file:close()
  return records
end

--- The routing of a record, with its weights as constants.
function M.recorded(record)
  want_table("recorded", "a record of a trace", record)
  local index = core.tensor(record.index, { dtype = "i64" })
  return routing_of.topk(index, record.weight and core.tensor(record.weight), record.experts)
end

--- A function (x, ctx) -> index [T, k] for a layer's `force`: the recorded choice of ctx.step and ctx.layer_number; records without a
-- step serve every step. An error where there is no record of that size.
function M.replay(records)
  want_table("replay", "a list of records", records)
  local by = {}
  for i, r in ipairs(records) do
    if type(r) ~= "table" then error(("inspect.replay: entry %d is no record, it is a %s"):format(i, type(r)), 2) end
    by[("%d %d"):format(r.step or 0, r.layer or 0)] = r
  end
  return function(x, ctx)
    local step, layer = ctx.step or 0, ctx.layer_number or 0
    local r = by[("%d %d"):format(step, layer)] or by[("0 %d"):format(layer)] or by[("%d 0"):format(step)] or by["0 0"]
    if not r then error(("inspect.replay: no record of step %d, layer %d"):format(step, layer), 0) end
    if r.tokens ~= x:size(1) then
      error(("inspect.replay: step %d, layer %d was recorded for %d tokens, not %d"):format(step, layer, r.tokens, x:size(1)), 0)
    end
    return core.tensor(r.index, { dtype = "i64" })
  end
end

--- Sets `force` of every sparse layer of a model: "uniform", a recorded index, a function (x, ctx) -> index, or nil to let the routers
-- decide again. Gives how many layers there are.
function M.force(model, force)
  want_model("force", model)
  local count = 0
  for _, m in model:named_modules() do
    if type(m) == "table" and m.decide and m.num_experts then
      m.force = force
      count = count + 1
    end
  end
  return count
end

return M
