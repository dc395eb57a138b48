--- Static for Dynamic: Towards a Deeper Understanding of Dynamic Facial Expressions Using Static Expression Data (S4D). Yin Chen, Jia
-- Li, Yu Zhang, Zhenzhen Hu, Shiguang Shan, Meng Wang, Richang Hong 2024 (arXiv 2409.06154).
--
-- A transformer over patches learns from still images and from clips by filling in masked patches (the same places in all frames of a
-- clip), then is tuned for a task of each with a mixture of adapter experts beside every FFN:
--   y = FFN(x) + sum_i g_i up_i relu(down_i x),  g = softmax(W_task x)
-- It differs from the default layer in that all experts work, beside a network that stays as it is, and that each task has a gate
-- of its own, so that tasks share what helps and keep apart what conflicts. Chosen here: the form of the gate, four experts, and that
-- only adapters, gates and heads are tuned. Toy data: patterns that a still shows and a clip fades in or out.

local moe = require "moe"
local nn = moe.nn
local lab = require "moe.recipe.lab"
local pictures = require "moe.recipe.pictures"

local M = {
  title = "S4D: a mixture of adapter experts for still and moving pictures", paper = "arXiv 2409.06154", number = 54,
  claim = "as many parameters in adapters do better with gates by task than shared by both tasks; at the start they are the base",
  outcome = "reproduced (three seeds): 0.868 right answers against 0.779 for as many parameters in one shared adapter after 300 " ..
    "steps, the clips gaining (they reach 0.93 when tuned alone); one gate by token for both tasks does as well (0.87), and " ..
    "after 600 steps both ways are even (0.95)",
}

-- A gate a task: every expert by a softmax.
local Gates = nn.module "moae_gates"

function Gates:init(d, E)
  self.tasks = nn.list()
  for _ = 1, 2 do self.tasks:append(moe.router.topk { d_model = d, num_experts = E, top_k = E, norm_topk_prob = false }) end
end

function Gates:route(x, ctx) return self.tasks[ctx.task]:route(x, ctx) end

--- Freezes a model but for its heads and puts adapters beside its FFNs, in place: "moae", experts of width `rank` with a gate a task;
-- "shared", one adapter with as many parameters, gates counted.
function M.adapt(model, kind, E, rank)
  model:freeze()
  model.heads:unfreeze()
  local d = model.d_model
  for _, b in ipairs(model.blocks) do
    if kind == "moae" then
      local adapters = moe.experts.adapter { d_model = d, num_experts = E, base = b.ffn, intermediate_size = rank, scale = E }
      b.ffn = moe.layer { d_model = d, num_experts = E, router = Gates(d, E), experts = adapters }
    else
      local one = moe.experts.adapter { d_model = d, num_experts = 1, base = b.ffn, intermediate_size = E * rank + E + E // 4 }
      b.ffn = nn.lambda(function(x) return one(x) end) -- without the context, which a bank would take for a routing
      b.ffn.adapter = one
    end
  end
  return model
end

--- Tunes a copy of the base for both tasks, one batch of each a step; { stills, clips: share of right answers, parameters (trained) }.
function M.tune(base, kind, o)
  moe.manual_seed(o.seed)
  local model = pictures.vit(#base.blocks)
  model:load_state_dict(base:state_dict())
  M.adapt(model, kind, o.num_experts or 4, o.rank or 4)
  pictures.fit(model, o.steps, o.lr or 8e-3, function()
    local a, ya = pictures.moving(48, false)
    local b, yb = pictures.moving(48, true)
    return moe.loss.cross_entropy(model(a, 1), ya) + moe.loss.cross_entropy(model(b, 2), yb)
  end)
  local function right(task)
    moe.manual_seed(1000) -- the same pictures for all
    local x, y = pictures.moving(2000, task == 2)
    return moe.no_grad(function() return model(x, task):argmax(-1):eq(y):to("f32"):mean():item() end)
  end
  return { stills = right(1), clips = right(2), parameters = model:num_parameters(true), model = model }
end

--- Both ways of sharing: rows { name, mean share of right answers of the two tasks }.
function M.demo(report, given)
  local o, rows = given or {}, {}
  local base = o.base or pictures.pretrain { steps = o.pretrain or 200 }
  for i, kind in ipairs { "shared", "moae" } do
    local values, last = {}, nil
    for j, seed in ipairs(o.seeds or { 1, 2, 3 }) do
      last = M.tune(base, kind, { seed = seed, steps = o.steps or 300 })
      values[j] = (last.stills + last.clips) / 2
    end
    local mean, spread = lab.mean(values)
    rows[i] = { ("%s, %d trained"):format(kind, last.parameters), mean, spread = spread, parameters = last.parameters }
    if report then report(rows[i][1], mean, spread, last.stills, last.clips) end
  end
  return rows
end

return M
