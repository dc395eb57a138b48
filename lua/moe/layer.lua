--- moe.layer: a sparse layer, router -> routing -> experts.
--
--   local layer = moe.layer{ d_model = 256, num_experts = 16, router = moe.router.topk{ top_k = 2 },
--     experts = moe.experts.swiglu{ intermediate_size = 512 }, balance = { moe.loss.switch(0.01) } }
--   local y, routing = layer(x)            -- x: [.., d_model]
--   (loss + routing:aux()):backward()
--
-- Options: d_model, num_experts; router (a description, a module, or a function (x, ctx) -> routing; two experts a token by
-- softmax when absent), experts (a bank, or a function (x, routing, ctx) -> y), shared (a bank that sees every token) and
-- shared_combine: "add", "gate" (times sigmoid of a projection), "average" (over k + 1) or "residual" (a learned mixture
-- of the two); balance: losses and controllers, see moe.balance; bias_update_rate: balance by the selection bias;
-- capacity_factor, eval_capacity_factor, min_capacity: at most factor x assignments / experts an expert (dropless when
-- absent); drop_policy: "probs", "position", "random", or a function (routing, ctx) -> priorities [A]; force: "uniform", a
-- recorded routing.index, or a function (x, ctx) -> index. `layer.force` can be set later.
--
-- layer(x, ctx): what the caller puts into ctx (step, token ids, mask, ...) reaches routers, losses and experts. The layer adds
-- shape (x's leading sizes), x (as [T, d_model]) and layer (itself), and leaves in the caller's table `routing`, its own, and
-- `routings`, those of all layers so far: moe.loss.aux(ctx) adds up their losses. A fresh ctx for each forward.

local moe = require "moe"
local core = moe.core
local nn = require "moe.nn"
local options = require "moe.nn.options"
local balance = require "moe.balance"
local routers = require "moe.router"
local sparse = core._sparse

local Layer = nn.module "moe.layer"

local ROWS <const> = {
  d_model = { "integer", options.required }, num_experts = { "integer", options.required },
  router = { "function|table|userdata" }, experts = { "function|table|userdata", options.required }, shared = { "function|table|userdata" },
  shared_combine = { { "add", "gate", "average", "residual" }, "add" },
  balance = { "function|table" }, bias_update_rate = { "number|function" },
  capacity_factor = { "number" }, eval_capacity_factor = { "number" }, min_capacity = { "integer", 1 },
  drop_policy = { "string|function", "probs" },
  force = { "string|userdata|function" }, dtype = { "string" }, device = { "string" },
}

-- Whom an expert keeps: a policy of routing:limit, or a function (routing, ctx) -> priorities [A], the largest stay.
local DROPS <const> = {
  probs = "probs", position = "position",
  random = function(routing) return core.rand(routing.num_assignments) end,
}

-- The load of more experts than this is not kept: it would cost more than the layer itself.
local COUNTED_EXPERTS <const> = 65536

local function fail(text, ...) error("layer: " .. text:format(...), 3) end

-- A description (a table with bind) becomes the thing itself, sized for this layer.
local function bound(what, sizes)
  if type(what) == "table" and type(what.bind) == "function" then return what:bind(sizes) end
  return what
end

local function callable(v)
  local mt = getmetatable(v)
  return type(v) == "function" or type(mt) == "table" and mt.__call ~= nil
end

local function dense_parameter(o, rows)
  local r = 1 / math.sqrt(o.d_model)
  return nn.parameter(nn.init.uniform_(core.zeros({ rows, o.d_model }, { dtype = o.dtype or "f32", device = o.device }), -r, r))
end

function Layer:init(given)
  local o = options.read("layer", given, ROWS, 2)
  for _, key in ipairs { "d_model", "num_experts" } do
    if o[key] < 1 then fail("option '%s' must be at least 1, got %d", key, o[key]) end
  end
  for _, key in ipairs { "capacity_factor", "eval_capacity_factor" } do
    if o[key] and (o[key] <= 0 or o[key] ~= o[key]) then fail("option '%s' must be positive, got %g", key, o[key]) end
  end
  if type(o.drop_policy) == "string" and not DROPS[o.drop_policy] then
    fail("option 'drop_policy' must be probs, position, random or a function (routing, ctx), got %q", o.drop_policy)
  end
  local sizes = { d_model = o.d_model, num_experts = o.num_experts, dtype = o.dtype, device = o.device }
  local losses = o.balance or {}
  if callable(losses) then losses = { losses } end
  losses = table.move(losses, 1, #losses, 1, {})
  if o.bias_update_rate then losses[#losses + 1] = balance.selection_bias(o.bias_update_rate) end
  self._losses, self._state = losses, {}
  for i, loss in ipairs(losses) do
    if not callable(loss) then fail("balance[%d] must be a function (routing, ctx), got a %s", i, type(loss)) end
    self._state[i] = {}
    if type(loss) == "table" and loss.start then loss:start(self._state[i], o.num_experts, self) end
    if type(loss) == "table" and loss.name == "selection_bias" then sizes.selection_bias = true end
  end
  self._options = o
  self.d_model, self.num_experts, self.force = o.d_model, o.num_experts, o.force
  self.router = bound(o.router or routers.topk { top_k = math.min(2, o.num_experts) }, sizes)
  if sizes.selection_bias and (type(self.router) == "function" or not self.router.expert_bias) then
    fail "the selection-bias controller needs a router with selection_bias = true"
  end
  self.experts = bound(o.experts, sizes)
  if o.shared then
    self.shared = bound(o.shared, { d_model = o.d_model, num_experts = 1, dtype = o.dtype, device = o.device })
    if o.shared_combine == "gate" then self.shared_gate = dense_parameter(o, 1) end
    if o.shared_combine == "residual" then self.coefficient = dense_parameter(o, 2) end
  end
  -- made here and written in place: what a forward inside moe.scope makes does not outlive it
  if o.num_experts <= COUNTED_EXPERTS then self._load = core.zeros({ o.num_experts }, { dtype = "i64" }) end
  self:reset_stats()
end

local function top_k_of(self) return type(self.router) ~= "function" and self.router.top_k or 1 end

-- The forced choice of a layer: nil, or an index [T, k] for routers that take ctx.choice.
local function forced_choice(self, x, ctx)
  local force = ctx.choice or self.force
  if force == nil or core.is_tensor(force) then return force end
  if force == "uniform" then
    if type(self.router) == "table" and self.router.follow then self.router:follow(ctx) end
    return routers.uniform_choice(x:size(1), top_k_of(self), self.num_experts)
  end
  if type(force) == "string" then error(("layer: unknown force '%s' (\"uniform\", an index tensor, or a function)"):format(force), 0) end
  return force(x, ctx)
end

-- "layer 3: the router (topk)", as far as they are known.
local function names_of(self, ctx)
  local router = self.router
  local mt = getmetatable(router)
  local kind = type(router) == "function" and "a function" or type(mt) == "table" and rawget(mt, "__name") or "of one's own"
  return ("%s: the router (%s)"):format(ctx.layer_number and "layer " .. ctx.layer_number or "layer", kind)
end

local function route(self, x, ctx)
  local router = self.router
  if type(router) == "function" then return router(x, ctx) end
  return router:route(x, ctx)
end

-- x [T, d] -> routing, checked, with the capacity applied. What a router raises is passed on under both names.
function Layer:decide(x, ctx)
  ctx.choice = forced_choice(self, x, ctx)
  local ok, routing = pcall(route, self, x, ctx)
  if not ok then
    if type(routing) ~= "string" then error(routing, 0) end
    error(("%s: %s"):format(names_of(self, ctx), routing), 0)
  elseif not sparse.is_routing(routing) then
    error(("%s must return a routing (moe.routing.topk, dense, experts or soft), got a %s"):format(names_of(self, ctx), type(routing)), 0)
  elseif routing.num_tokens ~= x:size(1) or routing.num_experts ~= self.num_experts then
    error(("%s returned %d tokens and %d experts, wanted %d and %d"):format(names_of(self, ctx), routing.num_tokens,
      routing.num_experts, x:size(1), self.num_experts), 0)
  end
  local o = self._options
  local factor = o.capacity_factor
  if not self.training and o.eval_capacity_factor then factor = o.eval_capacity_factor end
  if factor and not routing.dispatch then
    local capacity = math.max(o.min_capacity, math.ceil(factor * routing.num_assignments / self.num_experts))
    local drop = DROPS[o.drop_policy] or o.drop_policy
    if type(drop) == "function" then drop = drop(routing, ctx) end
    routing = routing:limit(capacity, drop)
  end
  return routing
end

-- Losses, controllers and statistics see a forward once: not when moe.checkpoint runs it again.
local function account(self, routing, ctx)
  local training, again = self.training, moe.recomputing()
  for i, loss in ipairs(self._losses) do
    local state = self._state[i]
    if training then
      local value = loss(routing, ctx, state)
      if value ~= nil then routing:add_aux(type(loss) == "table" and loss.name or "balance" .. i, value) end
      if type(loss) == "table" and loss.observe and not again then loss:observe(routing, ctx, state) end
    end
  end
  if not again then
    local s = self._stats
    if self._load then self._load:add_(routing:load()) end
    s.forwards = s.forwards + 1
    s.tokens = s.tokens + routing.num_tokens
    s.assignments = s.assignments + routing.num_assignments
    s.dropped = s.dropped + routing.dropped
    s.masked = s.masked + routing.masked
  end
end

local COMBINE <const> = {
  add = function(_, _, y, z) return y + z end,
  gate = function(self, x, y, z) return y + x:linear(self.shared_gate):sigmoid() * z end,
  average = function(self, _, y, z)
    local k = top_k_of(self)
    return (y * k + z) / (k + 1)
  end,
  residual = function(self, x, y, z)
    local c = x:linear(self.coefficient):softmax(-1)
    return y * c:narrow(2, 1, 1) + z * c:narrow(2, 2, 1)
  end,
}

--- x [.., d_model] -> y [.., d_model], routing.
function Layer:forward(x, ctx)
  if not core.is_tensor(x) then error(("layer: argument 1 (x) must be a tensor, got a %s"):format(type(x)), 2) end
  if ctx ~= nil and type(ctx) ~= "table" then error(("layer: argument 2 (ctx) must be a table, got a %s"):format(type(ctx)), 2) end
  local shape = x.shape
  if #shape == 0 or shape[#shape] ~= self.d_model then
    error(("layer: x is [%s], wanted [.., %d] (d_model)"):format(table.concat(shape, ", "), self.d_model), 2)
  end
  local leading, tokens = {}, 1
  for i = 1, #shape - 1 do
    leading[i] = shape[i]
    tokens = tokens * shape[i]
  end
  local rows = #shape == 2 and x or x:reshape { tokens, self.d_model }
  local mask = ctx and ctx.mask
  local own = setmetatable({ layer = self, x = rows, shape = leading, mask = mask and mask:reshape { -1 } or nil }, { __index = ctx })
  local routing = self:decide(rows, own)
  local bank, y = self.experts
  if type(bank) == "function" then y = bank(rows, routing, own) else y = bank:forward(rows, routing, own) end
  if self.shared then y = COMBINE[self._options.shared_combine](self, rows, y, self.shared(rows)) end
  account(self, routing, own)
  if ctx and not moe.recomputing() then
    ctx.routing = routing
    local list = ctx.routings
    if not list then
      list = {}
      ctx.routings = list
    end
    list[#list + 1] = routing
  end
  if #shape ~= 2 then
    leading[#shape] = y:size(2)
    y = y:reshape(leading)
    leading[#shape] = nil
  end
  return y, routing
end

--- Called once an optimizer step (the trainer does): controllers move what they control.
function Layer:after_step(ctx)
  for i, loss in ipairs(self._losses) do
    if type(loss) == "table" and loss.after_step then loss:after_step(self, self._state[i], ctx or {}) end
  end
end

--- What the layer did since the last reset: load (a list of assignments per expert), entropy, max_over_mean, dead (idle
-- experts), tokens, assignments, dropped, masked, forwards. stats{ reset = true } starts anew. A layer
-- of more than 65536 experts keeps no load.
function Layer:stats(given)
  local o = options.read("stats", given, { reset = { "boolean", false } })
  local s = self._stats
  local out = { forwards = s.forwards, tokens = s.tokens, assignments = s.assignments, dropped = s.dropped, masked = s.masked }
  local load = self._load and self._load:totable() or {}
  local total, most, dead, entropy = 0, 0, 0, 0.0
  for _, n in ipairs(load) do
    total = total + n
    most = math.max(most, n)
    if n == 0 then dead = dead + 1 end
  end
  for _, n in ipairs(load) do
    if n > 0 then entropy = entropy - n / total * math.log(n / total) end
  end
  out.load, out.entropy, out.dead = load, entropy, dead
  out.max_over_mean = total > 0 and most * #load / total or 1.0
  if o.reset then self:reset_stats() end
  return out
end

function Layer:reset_stats()
  if self._load then self._load:mul_(0) end
  self._stats = { forwards = 0, tokens = 0, assignments = 0, dropped = 0, masked = 0 }
end

for name, f in pairs(require "moe.sparse.resize") do Layer[name] = f end -- prune, extend

function Layer:extra()
  local o = self._options
  local parts = { ("d_model=%d, num_experts=%d"):format(o.d_model, o.num_experts) }
  if o.capacity_factor then
    local drop = DROPS[o.drop_policy] and o.drop_policy or "function"
    parts[#parts + 1] = ("capacity_factor=%g, drop=%s"):format(o.capacity_factor, drop)
  end
  if type(o.router) == "function" then parts[#parts + 1] = "router=function" end
  for _, loss in ipairs(self._losses) do
    if type(loss) == "table" then parts[#parts + 1] = tostring(loss):gsub("^moe%.loss%.", "") end
  end
  return table.concat(parts, ", ")
end

return Layer
