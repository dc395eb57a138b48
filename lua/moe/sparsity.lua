-- Losses that hold how many experts work, for routers whose gates open by themselves.

local core = require "moe.core"
local base = require "moe.balance.base"

local M = {}

-- The coefficient stays within these: it would grow without end where no gate can shut.
local LEAST <const>, MOST <const> = 1e-20, 1e4

local L1 = {}
L1.__index = L1
L1.__tostring = function(self) return ("moe.loss.relu_l1(top_k=%g)"):format(self.top_k) end

local ROWS <const> = {
  top_k = { "number" }, start = { "number", 1e-8 }, alpha = { "number", 1.2 }, balanced = { "boolean", true },
}

function L1:start(state, _, layer)
  state.coef = core.full({ 1 }, self.first, { dtype = "f64" })
  if layer then layer:buffer("l1_coef", state.coef) end
end

L1.__call = function(self, routing, _, state)
  local gate, T, E = base.need(routing, "gate", "relu_l1"), routing.num_tokens, routing.num_experts
  local shape = gate.shape
  if #shape ~= 2 or shape[1] ~= T or shape[2] ~= E then
    error(("loss.relu_l1: the gates are [%s], wanted [%d, %d], one an expert (moe.router.relu)"):format(
      table.concat(shape, ", "), T, E), 0)
  end
  local real = math.max(base.real_tokens(routing), 1)
  local mass = gate:sum(1)
  if self.balanced then mass = mass * routing:demand():to(gate.dtype) * (E / (self.top_k * real)) end
  return mass:sum() * (state.coef:item() / real)
end

function L1:observe(routing, _, state)
  local pool = self.pool
  pool.open = pool.open + routing.num_assignments + routing.dropped
  pool.wanted = pool.wanted + self.top_k * base.real_tokens(routing)
  state.seen = true
end

function L1:after_step(_, state)
  if not state.seen then return end
  state.seen = false
  local pool = self.pool
  if pool.wanted > 0 then -- the first layer of this step: its answer holds for all
    pool.factor = pool.open > pool.wanted and self.alpha or pool.open < pool.wanted and 1 / self.alpha or 1
    pool.open, pool.wanted = 0, 0
  end
  state.coef:mul_(pool.factor):clamp_(LEAST, MOST)
end

--- The L1 norm of the gates with a coefficient that holds the wanted sparsity, for moe.router.relu: (l / T) sum over tokens and
-- experts of f_e g_te, f_e = E / (k T) load_e (1 at an even load of k experts a token; without `balanced`: f_e = 1), so that
-- busy experts are pressed harder. After each optimizer step l <- l alpha^sign(open - k), held in [1e-20, 1e4], open being the
-- mean number of experts of a token in the step's forwards. Options: top_k, the mean wanted; start, the first l (1e-8); alpha
-- (1.2); balanced (default true). The layer keeps l in its buffer l1_coef [1]. Layers that share one object share one count, as
-- published; one made for each layer holds each layer. Wang et al. 2024, ReMoE (arXiv 2412.14711, eq. 6-9).
function M.relu_l1(given)
  local o = base.read("relu_l1", given, ROWS)
  if not (o.top_k and o.top_k > 0) then
    error("loss.relu_l1: option 'top_k', the mean number of experts a token, must be above 0, got " .. tostring(o.top_k), 2)
  elseif not (o.start > 0 and o.start < math.huge) then
    error(("loss.relu_l1: option 'start' must be above 0, got %g"):format(o.start), 2)
  elseif not (o.alpha > 1 and o.alpha < math.huge) then
    error(("loss.relu_l1: option 'alpha' must be above 1, got %g"):format(o.alpha), 2)
  end
  return setmetatable({
    name = "relu_l1", top_k = o.top_k, first = o.start, alpha = o.alpha, balanced = o.balanced,
    pool = { open = 0, wanted = 0, factor = 1 },
  }, L1)
end

return M
