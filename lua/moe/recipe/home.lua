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
  local function experts(n, d)
    local list = {}
    for e = 1, n do list[e] = Expert(d, o.width or 16, o) end
    return list
  end
  local n, width, groups = o.num_tasks, o.width or 16, o.groups
  local shared, per_group, own = o.shared or 2, o.per_group or 2, o.own or 1
  local level = { d_model = o.d_in, num_tasks = n, shared = shared, own = own, self_gate = o.self_gate }
  if o.hierarchy then
    local visible, expert_input, gate_input = { {} }, {}, {}
    for e = 1, shared do visible[1][e], expert_input[e] = e, 1 end
    for g, tasks in ipairs(groups) do
      visible[g + 1] = table.move(visible[1], 1, shared, 1, {})
      for _ = 1, per_group do
        expert_input[#expert_input + 1] = g + 1
        table.insert(visible[g + 1], #expert_input)
      end
      for _, t in ipairs(tasks) do gate_input[t] = g + 1 end
    end
    self.meta = moe.multi_gate {
      d_model = o.d_in, visible = visible, experts = experts(shared + #groups * per_group, o.d_in), self_gate = o.self_gate,
    }
    for t = 1, n do
      for _ = 1, own do expert_input[#expert_input + 1] = gate_input[t] end
    end
    level.d_model, level.groups, level.per_group = width, groups, per_group
    level.expert_input, level.gate_input = expert_input, gate_input
  end
  local total = shared + (level.groups and #groups * per_group or 0) + n * own
  level.experts = experts(total, level.d_model)
  self.tasks = moe.multi_gate(level)
  self.towers = {}
  for t = 1, n do self.towers[t] = nn.sequential(nn.linear(width, 8), nn.relu(), nn.linear(8, 1)) end
end

--- x [B, d_in] -> logits [B, num_tasks], and the routings of the tasks' gates.
function Home:forward(x)
  local ys, routings = self.tasks(self.meta and self.meta(x) or x)
  for t, y in ipairs(ys) do ys[t] = self.towers[t](y) end
  return moe.cat(ys, 2), routings
end

M.Home = Home

--- The share of zeros in what the experts gave for x: activations without a gradient.
function M.dead(model, x)
  local zero, all = 0, 0
  moe.no_grad(function() return model(x) end)
  for _, m in model:named_modules() do
    if m._last then
      zero, all = zero + m._last:eq(0):to("i64"):sum():item(), all + m._last:numel()
    end
  end
  return zero / all
end

--- Trains a model of the options on six tasks: what moe.recipe.home_tasks says of it, and dead, the share of zeros.
function M.run(o, seed, steps)
  moe.manual_seed(seed)
  local model = Home(setmetatable({ d_in = ground.d_in, num_tasks = ground.num_tasks, groups = ground.groups }, { __index = o }))
  local out, x = ground.run(model, o.own or 1, steps or 200)
  out.dead = M.dead(model, x)
  return out
end

M.variants = {
  mmoe = { own = 0, shared = 20, width = 20 },  -- as many parameters as HoME
  cgc = { own = 1, shared = 14, width = 20 },
  ungated = { norm = true, hierarchy = true },  -- HoME without the two gates
  home = { norm = true, hierarchy = true, feature_gate = true, self_gate = true },
}

--- MMoE, CGC and HoME on six tasks: rows { name, value }.
function M.demo(report)
  local rows = {}
  for _, name in ipairs { "mmoe", "cgc", "ungated", "home" } do
    local r = M.run(M.variants[name], 1)
    rows[#rows + 1] = { name .. ": mean AUC", r.mean }
    rows[#rows + 1] = { name .. ": share of dead activations", r.dead }
    rows[#rows + 1] = { name .. ": weight on rare tasks' own experts", (r.own[3] + r.own[6]) / 2 }
    if report then report(("%s: mean AUC %.3f"):format(name, r.mean)) end
  end
  return rows
end

function M.model(o) return Home(o) end

return M
