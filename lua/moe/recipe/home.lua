--- HoME: Hierarchy of Multi-Gate Experts for Multi-Task Learning at Kuaishou (Wang et al. 2024, arXiv 2408.05430).
--
-- Tasks in groups, mixtures of experts by a gate a task (moe.multi_gate), and four repairs, each an option:
--   norm           E(x) = swish(batchnorm(W x)) instead of relu(W x): experts' outputs are alike, and none is dead
--   hierarchy      z_s, z_g = gates over (shared), (shared and the group's) meta experts of x; then y_t = gate over the
--                  shared experts of z_s and the group's and the task's own experts of z_g: nobody else sees these
--   feature_gate   each expert has an input of its own, x * 2 sigmoid(U V x), of rank 2: gradients of tasks do not meet in x
--   self_gate      experts that a gate alone sees have a private weight too (sigmoid), so that a rare task's own expert learns
-- All off, this is MMoE (own = 0) or CGC. The numbers of experts and widths are ours; so is that U starts at zero.

local moe = require "moe"
local nn = moe.nn
local ground = require "moe.recipe.home_tasks"

local M = {
  title = "HoME: hierarchy of multi-gate experts", paper = "arXiv 2408.05430", number = 137,
  claim = "no dead activations, more weight on rare tasks' own experts, mean AUC no worse than MMoE's",
  outcome = "reproduced (three seeds): mean AUC 0.869 against 0.842 (MMoE of as many parameters) and 0.840 (CGC); zeros 0 % against 44 %; "
    .. "weight on rare tasks' own experts 0.59 against 0.29 without the two gates, by the private weight: the gates alone give 0.28",
}

local Expert = nn.module "home.expert"

function Expert:init(d, out, o)
  self.linear = nn.linear { in_features = d, out_features = out }
  if o.norm then self.norm = nn.batchnorm { size = out } end
  if o.feature_gate then
    self.down = nn.linear { in_features = d, out_features = 2, bias = false }
    self.up = nn.linear { in_features = 2, out_features = d, bias = false, init = "zeros" }
  end
end

function Expert:forward(x)
  if self.down then x = x * self.up(self.down(x)):sigmoid() * 2 end
  local h = self.linear(x)
  self._last = self.norm and self.norm(h):silu() or h:relu()
  return self._last
end

local Home = nn.module "home"

--- Options: d_in, groups (lists of tasks), num_tasks, width of the experts (16), shared (2), per_group (2), own (1), and the
-- four repairs.
function Home:init(o)
  local n, width, shared, own = o.num_tasks, o.width or 16, o.shared or 2, o.own or 1
  local function experts(count, d)
    local list = {}
    for e = 1, count do list[e] = Expert(d, width, o) end
    return list
  end
  local level, first = { d_model = o.d_in, num_tasks = n, shared = shared, own = own, self_gate = o.self_gate }, shared
  if o.hierarchy then
    local gates, gate_input, expert_input = {}, {}, {} -- gate 1 of the meta experts sees the shared ones alone
    local function take(count, input)
      for _ = 1, count do table.insert(expert_input, input) end
    end
    take(shared, 1)
    for g, tasks in ipairs(o.groups) do
      gates[g] = { g + 1 }
      take(o.per_group or 2, g + 1)
      for _, t in ipairs(tasks) do gate_input[t] = g + 1 end
    end
    first = #expert_input -- experts before the tasks' own
    for t = 1, n do take(own, gate_input[t]) end
    self.meta = moe.multi_gate {
      d_model = o.d_in, num_tasks = #o.groups + 1, shared = shared, groups = gates, per_group = o.per_group or 2,
      experts = experts(first, o.d_in), self_gate = o.self_gate,
    }
    level.d_model, level.groups, level.per_group = width, o.groups, o.per_group or 2
    level.gate_input, level.expert_input = gate_input, expert_input
  end
  level.experts = experts(first + n * own, level.d_model)
  self.tasks, self.towers = moe.multi_gate(level), {}
  for t = 1, n do self.towers[t] = nn.sequential(nn.linear(width, 8), nn.relu(), nn.linear(8, 1)) end
end

--- x [B, d_in] -> logits [B, num_tasks], and the routings of the tasks' gates.
function Home:forward(x)
  local ys, routings = self.tasks(self.meta and self.meta(x) or x)
  for t, y in ipairs(ys) do ys[t] = self.towers[t](y) end
  return moe.cat(ys, 2), routings
end

M.model = Home

M.variants = {
  mmoe = { own = 0, shared = 20, width = 20 },  -- as many parameters as HoME
  cgc = { own = 1, shared = 14, width = 20 },
  ungated = { norm = true, hierarchy = true },  -- HoME without the two gates
  home = { norm = true, hierarchy = true, feature_gate = true, self_gate = true },
}

--- Trains a model of the options on six tasks: what moe.recipe.home_tasks says of it.
function M.run(o, seed, steps) return ground.run(Home, o, seed, steps or 200) end

--- MMoE, CGC and HoME on six tasks: rows { name, value }.
function M.demo(report)
  local rows = {}
  for _, name in ipairs { "mmoe", "cgc", "ungated", "home" } do
    local r = M.run(M.variants[name], 1)
    table.insert(rows, { name .. ": mean AUC", r.mean })
    table.insert(rows, { name .. ": share of dead activations", r.dead })
    table.insert(rows, { name .. ": weight on rare tasks' own experts", (r.own[3] + r.own[6]) / 2 })
    if report then report(("%s: mean AUC %.3f"):format(name, r.mean)) end
  end
  return rows
end

return M
