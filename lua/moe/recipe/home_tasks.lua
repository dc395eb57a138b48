-- The ground of the recipe home: six tasks in two groups over one input, and how well scores order labels.

local moe = require "moe"

local M = { num_tasks = 6, groups = { { 1, 2, 3 }, { 4, 5, 6 } }, rare = { 3, 6 }, d_in = 12 }

-- n numbers of the logistic distribution.
local function noise(n)
  local u = moe.rand(n, 1):clamp(1e-6, 1 - 1e-6)
  return (u / (1 - u)):log()
end

--- n examples: x [n, 12], y [n, 6] of 0 and 1. A group has functions of its own, each task a mixture of them and a part of
-- its own; the third task of each group is rare. Inputs differ in size, as features of users and items do. The tasks are the
-- same for every seed.
function M.make(n, seed)
  moe.manual_seed(77)
  local d, group, own, mix = M.d_in, {}, {}, {}
  local scale = (moe.randn(d) * 0.8):exp()
  for g = 1, 2 do group[g] = moe.randn(d, 6) / d ^ 0.5 end
  for t = 1, 6 do own[t], mix[t] = moe.randn(d, 2) / d ^ 0.5, moe.randn(6, 1) end
  moe.manual_seed(1000 + seed)
  local x, ys = moe.randn(n, d), {}
  for t = 1, 6 do
    local latent = (x:matmul(group[(t - 1) // 3 + 1]) * 1.5):sin():matmul(mix[t]) + (x:matmul(own[t]) * 2):tanh():sum(-1, true)
    ys[t] = (latent * 2 + noise(n)):gt(t % 3 == 0 and 6 or 0):to "f32"
  end
  return x * scale, moe.cat(ys, 2)
end

--- The area under the ROC curve of scores [n] for labels [n] of 0 and 1: the chance that a positive one has the higher score,
-- equals counting half.
function M.auc(score, label)
  local s, y = score:totable(), label:totable()
  local order, ranks, positive = {}, 0, 0
  for i = 1, #s do order[i] = i end
  table.sort(order, function(a, b) return s[a] < s[b] end)
  local i = 1
  while i <= #s do
    local j = i
    while j < #s and s[order[j + 1]] == s[order[i]] do j = j + 1 end
    for k = i, j do
      if y[order[k]] == 1 then ranks, positive = ranks + (i + j) / 2, positive + 1 end
    end
    i = j + 1
  end
  return (ranks - positive * (positive + 1) / 2) / (positive * (#s - positive))
end

-- The share of zeros in what experts last gave, where they keep it as _last: activations without a gradient.
local function dead(model)
  local zero, all = 0, 0
  for _, m in model:named_modules() do
    if m._last then
      zero, all = zero + m._last:eq(0):to("i64"):sum():item(), all + m._last:numel()
    end
  end
  return zero / all
end

--- Trains make(o), o with d_in, num_tasks and groups (a model x -> logits [B, 6], routings; `tasks`: its moe.multi_gate, whose last
-- experts are o.own, default 1, of each task) on 3,000 examples for so many steps of 128, and evaluates it on 4,000 others: { auc =
-- of each task, mean, own = share of the gates' weight on the task's own experts, dead = share of zeros, parameters }.
function M.run(make, o, seed, steps)
  local x, y = M.make(3000, 1)
  local vx, vy = M.make(4000, 2)
  moe.manual_seed(seed)
  local model = make(setmetatable({ d_in = M.d_in, num_tasks = M.num_tasks, groups = M.groups }, { __index = o }))
  local own = o.own or 1
  local optimizer = moe.optim.adamw(model, { lr = 5e-3, weight_decay = 1e-3 })
  for _ = 1, steps do
    local at = moe.randint(1, 3000, 128)
    optimizer:zero_grad()
    moe.loss.bce_with_logits(model(x:index_select(1, at)), y:index_select(1, at)):backward()
    optimizer:step()
  end
  model:eval()
  local logits, routings = moe.no_grad(function() return model(vx) end)
  local out = { auc = {}, mean = 0, own = {}, parameters = model:num_parameters(), dead = dead(model) }
  local first = model.tasks.num_experts - M.num_tasks * own
  for t = 1, M.num_tasks do
    out.auc[t] = M.auc(logits:select(2, t), vy:select(2, t))
    out.mean = out.mean + out.auc[t] / M.num_tasks
    local sum, private = 0, 0
    for e, w in ipairs(routings[t].probs:mean(1):totable()) do
      sum = sum + w
      if e > first + (t - 1) * own and e <= first + t * own then private = private + w end
    end
    out.own[t] = private / sum
  end
  return out
end

return M
