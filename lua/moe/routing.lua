--- moe.routing: who works on what. A routing lists assignments (token, expert, weight) sorted by expert; any number of
-- experts for a token and of tokens for an expert. Everything that consumes sparsity consumes one.
--
-- Fields: num_tokens, num_experts, num_assignments; token, expert, weight [A] (weight is differentiable), offsets
-- [E + 1]: expert e has the rows offsets[e] .. offsets[e + 1] - 1; dropped, masked, unassigned: how many
-- assignments were lost to an expert's capacity, to the mask, and to a router that named none; dropped_token,
-- dropped_expert; and, where the router has them, probs and logits [T, E], index [T, k], mask [T]. A router of one's
-- own may set further fields.

local core = require "moe.core"
local options = require "moe.nn.options"
local sparse = core._sparse
local methods = sparse.methods

local M = {}

local EXTRAS <const> = { mask = { "userdata" }, probs = { "userdata" }, logits = { "userdata" } }

-- Hangs probs and logits [T, E] on a fresh routing.
local function adorn(name, routing, o)
  for _, key in ipairs { "probs", "logits" } do
    local t = o[key]
    if t then
      local shape = core.is_tensor(t) and t.shape
      if not shape or #shape ~= 2 or shape[1] ~= routing.num_tokens or shape[2] ~= routing.num_experts then
        error(("%s: option '%s' must be a tensor [%d, %d], got %s"):format(name, key, routing.num_tokens, routing.num_experts,
          shape and "[" .. table.concat(shape, ", ") .. "]" or "a " .. type(t)), 3)
      end
      routing[key] = t
    end
  end
  return routing
end

local function read(name, given)
  if given == nil then return {} end
  return options.read(name, given, EXTRAS, 2)
end

--- A routing from each token's choice: index [T, k] of experts, 0 for none; weight [T, k], or nil for 1.
-- Options: mask [T] (true: the token takes part), probs, logits [T, E].
function M.topk(index, weight, num_experts, extras)
  local o = read("routing.topk", extras)
  return adorn("routing.topk", sparse.topk(index, weight, num_experts, o.mask), o)
end

--- A routing from gates [T, E]: those that are not zero, whatever their number. Options as in topk.
function M.dense(gates, extras)
  local o = read("routing.dense", extras)
  return adorn("routing.dense", sparse.dense(gates, o.mask), o)
end

--- A routing from each expert's choice: index [E, C] of tokens, 0 for none; weight [E, C], or nil for 1; num_tokens: how
-- many tokens there are. Options as in topk.
function M.experts(index, weight, num_tokens, extras)
  local o = read("routing.experts", extras)
  return adorn("routing.experts", sparse.experts(index, weight, num_tokens, o.mask), o)
end

local SOFT <const> = { across = { "integer" } }

--- Dense mixing: dispatch, combine [T, E, slots], or [B, T, E, slots] for mixing within each sequence of a batch. An expert
-- works on its slots, which are dispatch-weighted sums of tokens; a token gets the combine-weighted sum of all slots:
-- slot_s = sum_t dispatch_ts x_t, y_t = sum_s combine_ts expert(slot_s). Options: across = n with a batch: the mixing is not within
-- the sequences, but, time by time, within groups of n consecutive examples.
function M.soft(dispatch, combine, given)
  local across = options.read("routing.soft", given, SOFT).across
  if not across then return sparse.soft(dispatch, combine) end
  local s = core.is_tensor(dispatch) and dispatch.shape
  if not s or #s ~= 4 or across < 1 or s[1] % across ~= 0 then
    error(("routing.soft: across = %d wants [B, T, E, slots] with B a multiple of it, got %s"):format(across,
      s and "[" .. table.concat(s, ", ") .. "]" or "a " .. type(dispatch)), 2)
  end
  -- to the lists of the routing a group of tokens is a sequence; their order matters to `through` alone
  local alike = { s[1] // across * s[2], across, s[3], s[4] }
  local routing = sparse.soft(dispatch:reshape(alike), combine:reshape(alike))
  routing.dispatch, routing.combine_matrix, routing.across = dispatch, combine, across
  return routing
end

--- Whether a value is a routing.
M.is_routing = sparse.is_routing

--- Runs work(rows) -> rows on what the experts see of x [T, d], and brings the result back: for a soft routing the slots,
-- else x itself.
function M.through(routing, x, work)
  if not sparse.is_routing(routing) then
    error("routing.through: argument 1 must be a routing, got a " .. type(routing), 2)
  elseif not core.is_tensor(x) then
    error("routing.through: argument 2 (x) must be a tensor, got a " .. type(x), 2)
  elseif type(work) ~= "function" and not (getmetatable(work) or {}).__call then
    error("routing.through: argument 3 (work) must be a function, got a " .. type(work), 2)
  end
  local dispatch, combine = routing.dispatch, routing.combine_matrix
  if not dispatch then return work(x) end
  -- tokens as [groups, members, positions]: the members of a group are mixed, each position by itself
  local s, across, dtype, d = dispatch.shape, routing.across, x.dtype, x:size(2)
  local slots = s[#s - 1] * s[#s]
  local g, m, p = #s == 4 and s[1] or 1, s[#s - 2], 1
  if across then g, m, p = g // across, across, m end
  -- views throughout: the products take transposed matrices as they are
  local mixed = dispatch:reshape { g, m, p, slots }:permute(1, 3, 4, 2):matmul(x:reshape { g, m, p, d }:transpose(2, 3))
  local y = work(mixed:reshape { g * p * slots, d }:to(dtype))
  d = y:size(2)
  y = combine:reshape { g, m, p, slots }:transpose(2, 3):matmul(y:reshape { g, p, slots, d })
  return y:transpose(2, 3):reshape { g * m * p, d }:to(dtype)
end

-- --- methods ---

-- Shares of the load as numbers; nil without a single assignment.
local function shares(routing)
  local load, total = routing:load():totable(), 0
  for _, n in ipairs(load) do total = total + n end
  return total > 0 and load or nil, total
end

--- The entropy of the load over the experts, in nats: log(num_experts) when they work evenly, 0 when one does all.
function methods.entropy(routing)
  local load, total = shares(routing)
  local h = 0.0
  for _, n in ipairs(load or {}) do
    if n > 0 then h = h - n / total * math.log(n / total) end
  end
  return h
end

--- The mean entropy of the tokens' probabilities, in nats: how undecided the router is. nil without probs.
function methods.token_entropy(routing)
  if not routing.probs then return nil end
  return core.no_grad(function()
    local p = routing.probs
    local h = (p * (p + 1e-30):log()):sum(-1)
    local mask = routing.mask
    local real = mask and mask:to "i64":sum():item() or routing.num_tokens
    return real > 0 and -h:sum():item() / real or 0.0
  end)
end

--- The load of the busiest expert over the mean load: 1 when they work evenly, num_experts when one does all.
function methods.max_over_mean(routing)
  local load, total = shares(routing)
  if not load then return 1.0 end
  return math.max(table.unpack(load)) * #load / total
end

--- How many experts have no token, and a list of them.
function methods.dead(routing)
  local which = {}
  for e, n in ipairs(routing:load():totable()) do
    if n == 0 then which[#which + 1] = e end
  end
  return #which, which
end

-- What experts see: tokens, or the slots of a soft routing.
local function rows_of(routing) return routing.dispatch and routing.num_assignments or routing.num_tokens end

--- The weights as a matrix [T, E], differentiable, 0 where an expert does not work on a token. Of a soft routing: [slots, E].
function methods.gates(routing)
  local T, E, w = rows_of(routing), routing.num_experts, routing.weight
  local at = (routing.token - 1) * E + routing.expert
  return core.zeros({ T * E }, { dtype = w.dtype, device = w.device }):index_add(1, at, w):reshape { T, E }
end

--- The sum of each token's weights: [T], differentiable.
function methods.total(routing)
  local w = routing.weight
  return core.zeros({ rows_of(routing) }, { dtype = w.dtype, device = w.device }):index_add(1, routing.token, w)
end

--- What a token's experts have, mixed by their weights: v [E, n] -> [T, n], row t being the sum over its experts e of w_te v_e.
function methods.mix(routing, v)
  local s = core.is_tensor(v) and v.shape
  if not s or #s ~= 2 or s[1] ~= routing.num_experts then
    error(("routing:mix: argument 1 must be a tensor [%d, n], a row an expert, got %s"):format(routing.num_experts,
      s and "[" .. table.concat(s, ", ") .. "]" or "a " .. type(v)), 2)
  end
  -- one product over all experts is cheaper than lines of v for every assignment unless these are few
  if routing.num_assignments * 16 >= rows_of(routing) * routing.num_experts then return routing:gates():to(v.dtype):matmul(v) end
  return routing:combine(v:index_select(1, routing.expert))
end

--- How often experts work on the same token: counts [E, E], symmetric, an expert's load on the diagonal.
function methods.coactivation(routing)
  return core.no_grad(function()
    local T, E = routing.num_tokens, routing.num_experts
    local seen = core.bincount((routing.token - 1) * E + routing.expert, T * E):reshape { T, E }:clamp(0, 1):to "f32"
    return seen:t():matmul(seen):to "i64"
  end)
end

--- Attaches an auxiliary loss under a name; a second one of that name is added to the first.
function methods.add_aux(routing, name, value)
  if type(value) ~= "number" and not core.is_tensor(value) then
    error(("routing:add_aux: argument 2 (%s) must be a scalar tensor or a number, got a %s"):format(tostring(name), type(value)), 2)
  end
  local losses = routing.losses
  if not losses then
    losses = {}
    routing.losses = losses
  end
  for _, entry in ipairs(losses) do
    if entry.name == name then
      entry.value = entry.value + value
      return routing
    end
  end
  losses[#losses + 1] = { name = name, value = value }
  return routing
end

--- The sum of the auxiliary losses as a scalar tensor, or the one of that name (nil when there is none).
function methods.aux(routing, name)
  local sum
  for _, entry in ipairs(routing.losses or {}) do
    if name == nil or entry.name == name then sum = sum and sum + entry.value or entry.value end
  end
  if sum == nil and name ~= nil then return nil end
  return core.is_tensor(sum) and sum or core.tensor(sum or 0)
end

--- The assignments as a table of lists { token =, expert =, weight =, offsets = }.
function methods.totable(routing)
  return {
    token = routing.token:totable(), expert = routing.expert:totable(), weight = routing.weight:detach():totable(),
    offsets = routing.offsets:totable(), num_tokens = routing.num_tokens, num_experts = routing.num_experts,
  }
end

local BARS <const> = { " ", "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█" }

--- One character an expert, higher for more tokens.
function methods.bar(routing)
  local load = routing:load():totable()
  local most = math.max(1, table.unpack(load, 1, math.min(#load, 64)))
  local out = {}
  for e = 1, math.min(#load, 64) do
    out[e] = load[e] == 0 and "·" or BARS[1 + math.max(1, math.ceil(load[e] / most * 8))]
  end
  return table.concat(out) .. (#load > 64 and "…" or "")
end

-- What tostring shows.
function methods.describe(routing)
  local n = routing.num_assignments
  local parts = { ("moe.Routing %d tokens -> %d experts, %d %s"):format(routing.num_tokens, routing.num_experts, n,
    routing.dispatch and "slots" or n == 1 and "assignment" or "assignments") }
  for _, key in ipairs { "dropped", "masked" } do
    if routing[key] > 0 then parts[#parts + 1] = ("%d %s"):format(routing[key], key) end
  end
  local text = table.concat(parts, ", ")
  if routing.dispatch then return text .. " (soft)" end
  local load = routing:load():totable()
  local shown = table.concat(load, " ", 1, math.min(#load, 16)) .. (#load > 16 and " …" or "")
  return ("%s\n  load |%s| %s\n  entropy %.3f of %.3f, busiest %.2f x the mean, %d idle"):format(text, routing:bar(), shown,
    routing:entropy(), math.log(routing.num_experts), routing:max_over_mean(), (routing:dead()))
end

return M
