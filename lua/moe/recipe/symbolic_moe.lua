--- Symbolic Mixture-of-Experts: Adaptive Skill-based Routing for Heterogeneous Reasoning (Chen, Yun, Stengel-Eskin, Chen and
-- Bansal 2025, arXiv 2503.05641).
--
--   P[m][s] = sum over validation questions with skill s: +1 where model m is right, -1 where it is wrong
--   w(m, q) = softmax_m(sum_{s in q} P[m][s] G(m) / T),  G(m) = m's share of all right answers;  recruit the k best, or draw k
--
-- Whole models are the experts, and words the router: nothing is trained. A tagger names the skills of a question, each
-- recruit answers, an aggregator makes one answer of the k. Which aggregator is tested beforehand: of a right and two wrong
-- answers it must find the right one. Questions are grouped by recruit, so that each model is loaded once. Here a tagger by
-- keyword, tiny language models (symbolic_moe_skills), and answers aggregated by weighted vote or by a model's likelihood.

local moe = require "moe"
local ground = require "moe.recipe.symbolic_moe_skills"

local M = {
  title = "Symbolic-MoE: skill-based recruiting of whole models", paper = "arXiv 2503.05641", number = 146,
  claim = "recruiting beats the best single model and random k; grouped, each used model is loaded once",
  outcome = "reproduced with four tiny models (three seeds): 0.979 right with 2 recruits by weighted vote against 0.573 (best single) and "
    .. "0.405 (random 2); 4 loads instead of one a change of model, equal answers; a small model as judge: 0.818",
}

--- The skills of a question, by keyword.
function M.tag(question)
  local found = {}
  for _, skill in ipairs(ground.skills) do
    if question.text:find(skill, 1, true) then found[#found + 1] = skill end
  end
  return found
end

--- What the models can do: score[m][skill], the sums of +1 and -1, and share[m], global competence.
function M.profile(pool, questions)
  local p, total = { score = {}, share = {} }, 0
  for m = 1, #pool.states do
    local score, right = {}, 0
    for _, skill in ipairs(ground.skills) do score[skill] = 0 end
    for i, answer in ipairs(ground.answer(pool:load(m), questions)) do
      local hit = answer == questions[i].answer
      right = right + (hit and 1 or 0)
      for _, skill in ipairs(M.tag(questions[i])) do score[skill] = score[skill] + (hit and 1 or -1) end
    end
    p.score[m], p.share[m], total = score, right, total + right
  end
  for m, right in ipairs(p.share) do p.share[m] = right / math.max(total, 1) end
  return p
end

--- The k recruits of a question, best first (equals by number), and their weights. o.temperature: T (1). o.sample, a
-- function of draws in [0, 1): recruits in proportion to the weights, without putting back, instead of the best.
function M.recruit(profile, question, k, o)
  o = o or {}
  local weight, order, sum, best = {}, {}, 0, -math.huge
  for m, score in ipairs(profile.score) do
    local s = 0
    for _, skill in ipairs(M.tag(question)) do s = s + score[skill] end
    weight[m], order[m] = s * profile.share[m] / (o.temperature or 1), m
    best = math.max(best, weight[m])
  end
  for m, w in ipairs(weight) do
    weight[m] = math.exp(w - best)
    sum = sum + weight[m]
  end
  for m, w in ipairs(weight) do weight[m] = w / sum end
  local key = weight
  if o.sample then -- Efraimidis and Spirakis 2006
    key = {}
    for m, w in ipairs(weight) do key[m] = math.log(1 - o.sample()) / math.max(w, 1e-300) end
  end
  table.sort(order, function(a, b) return key[a] > key[b] or key[a] == key[b] and a < b end)
  local chosen, weights = {}, {}
  for i = 1, k do chosen[i], weights[i] = order[i], weight[order[i]] end
  return chosen, weights
end

--- answers[i][j] of the j-th recruit of question i. Grouped: each model is loaded once and answers its questions as one
-- batch; else question after question.
function M.answers(pool, questions, recruits, grouped)
  local out = {}
  for i = 1, #questions do out[i] = {} end
  for m = 1, grouped and #pool.states or 0 do
    local own, at = {}, {}
    for i, list in ipairs(recruits) do
      for j, r in ipairs(list) do
        if r == m then own[#own + 1], at[#at + 1] = questions[i], { i, j } end
      end
    end
    local given = #own > 0 and ground.answer(pool:load(m), own) or {}
    for n, place in ipairs(at) do out[place[1]][place[2]] = given[n] end
  end
  for i, list in ipairs(grouped and {} or recruits) do
    for j, m in ipairs(list) do out[i][j] = ground.answer(pool:load(m), { questions[i] })[1] end
  end
  return out
end

--- The answer with the largest sum of weights; of equals the first.
function M.vote(_, answers, weights)
  local sum, best = {}, nil
  for j, a in ipairs(answers) do sum[a] = (sum[a] or 0) + weights[j] end
  for _, a in ipairs(answers) do
    if not best or sum[a] > sum[best] then best = a end
  end
  return best
end

--- An aggregator: the answer that model m finds likeliest.
function M.judge(pool, m)
  return function(question, answers)
    local best, score = 1, ground.likelihood(pool:load(m), question, answers)
    for j in ipairs(answers) do best = score[j] > score[best] and j or best end
    return answers[best]
  end
end

--- The share of questions for which an aggregator finds the right answer among it and two wrong ones: right answers to other
-- questions of the same skills.
function M.test_aggregator(aggregate, questions)
  local right = 0
  for i, q in ipairs(questions) do
    local list, skills = {}, table.concat(M.tag(q), " ")
    for j = 1, #questions - 1 do
      local other = questions[(i + j - 1) % #questions + 1]
      if #list < 2 and other.answer ~= q.answer and table.concat(M.tag(other), " ") == skills then list[#list + 1] = other.answer end
    end
    table.insert(list, i % 3 + 1 > #list and #list + 1 or i % 3 + 1, q.answer)
    if aggregate(q, list, { 1, 1, 1 }) == q.answer then right = right + 1 end
  end
  return right / #questions
end

--- The share of right final answers where choose(question, i) names the recruits and their weights.
function M.accuracy(pool, questions, choose, aggregate)
  local recruits, weights, right = {}, {}, 0
  for i, q in ipairs(questions) do recruits[i], weights[i] = choose(q, i) end
  local answers = M.answers(pool, questions, recruits, true)
  for i, q in ipairs(questions) do
    if (#answers[i] == 1 and answers[i][1] or aggregate(q, answers[i], weights[i])) == q.answer then right = right + 1 end
  end
  return right / #questions
end

--- Schools four models, one a skill, for `steps` (150) steps each and compares on 400 questions, k = 2: rows { name, value }.
function M.demo(report, steps, seed)
  local states = {}
  for m, skill in ipairs(ground.skills) do
    states[m] = ground.school(skill, 10 * (seed or 1) + m, steps or 150)
    if report then report(("schooled in %s"):format(skill)) end
  end
  local pool, known, asked = ground.pool(states), ground.questions(100, 901), ground.questions(400, 902)
  local profile = M.profile(pool, known)
  local rows, best, by = {}, 0, { vote = M.vote }
  local function row(name, value) rows[#rows + 1] = { name, value } end
  for m = 1, #states do best = math.max(best, M.accuracy(pool, asked, function() return { m }, { 1 } end)) end
  row("best single model", best)
  moe.manual_seed(seed or 1)
  row("2 models at random, vote", M.accuracy(pool, asked, function()
    local two = moe.randperm(#states):totable()
    return { two[1], two[2] }, { 0.5, 0.5 }
  end, M.vote))
  local judge, top = nil, -1
  for m = 1, #states do
    local found = M.test_aggregator(M.judge(pool, m), known)
    if found > top then judge, top = m, found end
  end
  by.judge = M.judge(pool, judge)
  local function recruit(q) return M.recruit(profile, q, 2) end
  row("2 recruits, weighted vote", M.accuracy(pool, asked, recruit, by.vote))
  row("2 recruits, the model that judges best", M.accuracy(pool, asked, recruit, by.judge))
  row("how often that model finds the right one of three", top)
  return rows
end

return M
