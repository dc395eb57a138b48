-- Token choice by the nearest of clusters that follow the tokens.

local moe = require "moe"
local core = require "moe.core"
local nn = require "moe.nn"
local Prototype = require "moe.router.prototype"

--- prototype whose prototypes are centres of clusters, without a gradient: in training each token belongs to its nearest
-- centre c_e, and c_e <- decay c_e + (1 - decay) mean of its tokens; a centre without tokens stays. What a forward saw is
-- taken in by the next training forward, so that a recomputed one decides as the first did. `from_data` (default): the first
-- training forward places the centres, on tokens spread over the batch, moved by `init_steps` (5) rounds of k-means; else
-- they are drawn as `init` says. The weights of the choices are scores of the distances, through which x has a gradient.
-- Options: decay (0.99), from_data, init_steps, and those of prototype. Buffers weight [E, d] (centres), seen_sum [E, d],
-- seen_count [E], placed [1]. Roy et al. 2020, Routing Transformer (arXiv 2003.05997, section 4.1: the moving averages,
-- there on unit vectors: metric = "cosine").
local KMeans = nn.module("kmeans", Prototype)

KMeans.rows = { decay = { "number", 0.99 }, from_data = { "boolean", true }, init_steps = { "integer", 5 } }
for k, v in pairs(Prototype.rows) do KMeans.rows[k] = v end

function KMeans:check(o, k)
  Prototype.check(self, o, k)
  if not (o.decay >= 0 and o.decay <= 1) then self:fail("option 'decay' must be in [0, 1], got %g", o.decay) end
  if o.init_steps < 0 then self:fail("option 'init_steps' must not be negative, got %d", o.init_steps) end
end

function KMeans:projection(prefix)
  Prototype.projection(self, prefix)
  local settings = { dtype = self.weight.dtype, device = self.weight.device }
  self:buffer("weight", self.weight:detach())
  self:buffer("seen_sum", core.zeros({ self.num_experts, self.d_model }, settings))
  self:buffer("seen_count", core.zeros({ self.num_experts }, settings))
  self:buffer("placed", core.zeros({ 1 }, { dtype = "i64" }))
end

-- a copy: the centres move while a backward may still want them
function KMeans:affinity(x) return Prototype.affinity(self, x, self.weight:clone()) end

-- The tokens that take part (nil: all), and they as they are counted: unit vectors where angles decide.
local function points(self, x, mask)
  x = self:input(x:detach()):to(self.weight.dtype)
  local which = mask and mask:nonzero():reshape { -1 }
  if which then x = x:index_select(1, which) end
  return which, self._options.metric == "cosine" and self.unit(x) or x
end

-- Sum [E, d] and number [E] of the points x, which belong to the centres `near`.
local function clusters(self, x, near)
  return core.zeros_like(self.weight):index_add(1, near, x), core.bincount(near, self.num_experts):to(x.dtype)
end

local function move(self, sum, count, rate)
  local kept = count:gt(0):to(sum.dtype):reshape { -1, 1 } * rate
  self.weight:add_((sum / count:clamp(1):reshape { -1, 1 } - self.weight) * kept)
end

-- Centres on tokens at even distances, then k-means.
local function place(self, x)
  local n, E = x:size(1), self.num_experts
  if n == 0 then return end
  local at = {}
  for e = 1, E do at[e] = (e - 1) * n // E + 1 end
  self.weight:copy_(x:index_select(1, core.tensor(at, { dtype = "i64", device = x.device })))
  for _ = 1, self._options.init_steps do
    local sum, count = clusters(self, x, Prototype.affinity(self, x):argmax(-1))
    move(self, sum, count, 1)
  end
  self.placed:fill_(1)
end

local function learn(self, x)
  if self._options.from_data and self.placed:item() == 0 then return place(self, x) end
  move(self, self.seen_sum, self.seen_count, 1 - self._options.decay)
end

function KMeans:route(x, ctx)
  self:ready()
  ctx = ctx or {}
  local first, which, seen = self.training and not moe.recomputing(), nil, nil
  if first then
    which, seen = core.no_grad(points, self, x, ctx.mask)
    core.no_grad(learn, self, seen)
  end
  local routing = Prototype.route(self, x, ctx)
  if first then
    core.no_grad(function()
      local near = (routing.clean_logits or routing.logits):argmax(-1)
      local sum, count = clusters(self, seen, which and near:index_select(1, which) or near)
      self.seen_sum:copy_(sum)
      self.seen_count:copy_(count)
    end)
  end
  return routing
end

KMeans.forward = KMeans.route

return KMeans
