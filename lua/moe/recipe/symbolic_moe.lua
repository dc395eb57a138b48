--- Symbolic Mixture-of-Experts: Adaptive Skill-based Routing for Heterogeneous Reasoning (Chen, Yun, Stengel-Eskin, Chen and
-- Bansal 2025, arXiv 2503.05641).
--
--   P[m][s] = sum over validation questions with skill s: +1 where model m is right, -1 where it is wrong
--   w(m, q) = softmax_m(sum_{s in q} P[m][s] G(m) / T),  G(m) = m's share of all right answers;  recruit the k best, or draw k
--
-- Whole models are the experts, and words the router: nothing is trained. A tagger names the skills of a question, each
-- recruit answers, an aggregator makes one answer of the k. Which aggregator is tested beforehand: of a right and two wrong
-- answers it must find the right one. Questions are grouped by recruit, so that each model is loaded once. Here a tagger by
-- keyword, tiny language models (symbolic_moe_pool), and answers aggregated by weighted vote or by a model's likelihood.

local moe = require "moe"
local ground = require "moe.recipe.symbolic_moe_skills"
local pools = require "moe.recipe.symbolic_moe_pool"

local M = {
  title = "Symbolic-MoE: skill-based recruiting of whole models", paper = "arXiv 2503.05641", number = 146,
  claim = "recruiting beats the best single model and random k; grouped, each used model is loaded once",
  outcome = "reproduced with four tiny models (three seeds): 0.979 right with 2 recruits by weighted vote against 0.573 (best single) and "
    .. "0.405 (random 2); 4 loads instead of one a change of model, equal answers; a small model as judge: 0.818",
}

--- What the models can do: score[m][skill], the sums of +1 and -1, and share[m], global competence.
function M.profile(pool, questions)
  local p, total = { score = {}, share = {} }, 0
  for m = 1, #pool.states do
    local score, right = {}, 0
    for _, skill in ipairs(ground.skills) do score[skill] = 0 end
    for i, answer in ipairs(pool:answer(m, questions)) do
      local hit = answer == questions[i].answer
      right = right + (hit and 1 or 0)
      for _, skill in ipairs(ground.tag(questions[i])) do score[skill] = score[skill] + (hit and 1 or -1) end
    end
    p.score[m], p.share[m], total = score, right, total + right
  end
  for m, right in ipairs(p.share) do p.share[m] = right / math.max(total, 1) end
  return p
end

--- The k recruits of a question, best first (equals by number), and their weights. o.temperature: T (1). o.sample, a function of
-- draws in [0, 1): recruits in proportion to the weights, without putting back (Gumbel's noise), instead of the best.
function M.recruit(profile, question, k, o)
  local score, key, order, chosen, weights = {}, {}, {}, {}, {}
  for m, known in ipairs(profile.score) do
    local sum = 0
    for _, skill in ipairs(ground.tag(question)) do sum = sum + known[skill] end
    score[m], order[m] = sum * profile.share[m] / (o and o.temperature or 1), m
    key[m] = o and o.sample and score[m] - math.log(-math.log(1 - o.sample())) or score[m]
  end
  table.sort(order, function(a, b) return key[a] > key[b] or key[a] == key[b] and a < b end)
  local weight = moe.tensor(score, { dtype = "f64" }):softmax(-1):totable()
  for i = 1, k do chosen[i], weights[i] = order[i], weight[order[i]] end
  return chosen, weights
end

--- An aggregator: the answer with the largest sum of weights; of equals the first.
function M.vote(_, answers, weights)
  local sum, best = {}, answers[1]
  for j, a in ipairs(answers) do sum[a] = (sum[a] or 0) + weights[j] end
  for _, a in ipairs(answers) do best = sum[a] > sum[best] and a or best end
  return best
end

--- An aggregator: the answer that model m finds likeliest.
function M.judge(pool, m)
  return function(question, answers) return answers[pool:likelihood(m, question, answers):argmax(-1):item()] end
end

-- The share of questions of which an aggregator makes the right answer out of those given.
local function share_right(aggregate, questions, answers, weights)
  local right = 0
  for i, q in ipairs(questions) do
    if aggregate(q, answers[i], weights and weights[i] or { 1, 1, 1 }) == q.answer then right = right + 1 end
  end
  return right / #questions
end

--- The share of questions for which an aggregator finds the right answer among it and two wrong ones.
function M.test_aggregator(aggregate, questions) return share_right(aggregate, questions, ground.choices(questions)) end

--- The share of right final answers where choose(question) names the recruits and their weights.
function M.accuracy(pool, questions, choose, aggregate)
  local recruits, weights = {}, {}
  for i, q in ipairs(questions) do recruits[i], weights[i] = choose(q) end
  return share_right(aggregate, questions, pool:answers(questions, recruits), weights)
end

--- Schools four models, one a skill, for `steps` (150) steps each and compares on 400 questions, k = 2: rows { name, value }.
function M.demo(report, steps, seed)
  local pool, known, asked = pools.schooled(steps or 150, seed or 1, report), ground.questions(100, 901), ground.questions(400, 902)
  local profile, best, judge, top = M.profile(pool, known), 0, nil, -1
  for m = 1, #pool.states do
    best = math.max(best, M.accuracy(pool, asked, function() return { m }, { 1 } end, M.vote))
    local found = M.test_aggregator(M.judge(pool, m), known)
    if found > top then judge, top = M.judge(pool, m), found end
  end
  moe.manual_seed(seed or 1)
  local function random() return moe.randperm(#pool.states):narrow(1, 1, 2):totable(), { 0.5, 0.5 } end
  local function recruit(q) return M.recruit(profile, q, 2) end
  return {
    { "best single model", best },
    { "2 models at random, vote", M.accuracy(pool, asked, random, M.vote) },
    { "2 recruits, weighted vote", M.accuracy(pool, asked, recruit, M.vote) },
    { "2 recruits, the model that judges best", M.accuracy(pool, asked, recruit, judge) },
    { "how often that model finds the right one of three", top },
  }
end

return M
