-- The models of the recipe symbolic_moe: tiny language models, each schooled in one skill, of which one is in memory at a time.

local moe = require "moe"
local ground = require "moe.recipe.symbolic_moe_skills"

local M = {}

--- A model without its weights yet.
function M.build()
  return moe.model.lm {
    vocab_size = ground.vocab_size, d_model = 32, num_layers = 2, num_heads = 4, max_seq_len = 11, ffn_hidden = 64,
    embedding_init = "normal(0.1)", init = "normal(0.1)",
  }
end

-- Texts with their answers -> what goes in, and targets of the answers alone (0: not judged).
local function batch_of(list)
  local texts, given = {}, #list[1].text
  for i, q in ipairs(list) do texts[i] = q.text .. q.answer end
  local ids = ground.encode(texts)
  local length = ids:size(2) - 1
  local y = ids:narrow(2, 2, length):clone()
  y:narrow(2, 1, given - 1):fill_(0)
  return ids:narrow(2, 1, length), y
end

--- The weights of a model that saw a share `own` (0.8) of questions of one skill and the rest of the others.
function M.school(skill, seed, steps, own)
  moe.manual_seed(seed)
  own = own or 0.8
  local model, share = M.build(), {}
  for _, name in ipairs(ground.skills) do share[name] = name == skill and own or (1 - own) / (#ground.skills - 1) end
  local optimizer = moe.optim.adamw(model, { lr = 1e-2 })
  for step = 1, steps do
    local x, y = batch_of(ground.questions(64, seed * 10000 + step, share))
    optimizer:zero_grad()
    moe.loss.cross_entropy(model(x), y, { ignore_index = 0 }):backward()
    optimizer.groups[1].lr = 1e-2 * math.min(1, step / 10, 1.1 - step / steps)
    optimizer:step()
  end
  return model:state_dict()
end

-- Models of which one is in memory at a time.
local Pool = {}
Pool.__index = Pool

--- A pool of models by their state dicts; pool.loads counts how often weights were brought in.
function M.pool(states) return setmetatable({ states = states, model = M.build():eval(), loads = 0 }, Pool) end

--- A pool of models schooled for so many steps, one a skill.
function M.schooled(steps, seed, report)
  local states = {}
  for m, skill in ipairs(ground.skills) do
    states[m] = M.school(skill, 10 * seed + m, steps)
    if report then report(("schooled in %s"):format(skill)) end
  end
  return M.pool(states)
end

--- Model m, loaded where it is not the one in memory.
function Pool:load(m)
  if self.at ~= m then
    self.model:load_state_dict(self.states[m])
    self.at, self.loads = m, self.loads + 1
  end
  return self.model
end

--- The greedy answers of model m to a list of questions, as one batch.
function Pool:answer(m, questions)
  local model, texts = self:load(m), {}
  for i, q in ipairs(questions) do texts[i] = q.text end
  local ids = ground.encode(texts)
  moe.no_grad(function()
    for _ = 1, ground.answer_size do ids = moe.cat({ ids, model(ids):narrow(2, ids:size(2), 1):argmax(-1) }, 2) end
  end)
  local out = {}
  for i, row in ipairs(ids:totable()) do out[i] = ground.decode(row, #texts[i] + 1) end
  return out
end

--- answers[i][j] of the j-th recruit of question i, recruits[i][j]: each model that is asked at all is loaded once and answers its
-- questions as one batch.
function Pool:answers(questions, recruits)
  local out, places = {}, {}
  for m = 1, #self.states do places[m] = {} end
  for i, list in ipairs(recruits) do
    out[i] = {}
    for j, m in ipairs(list) do table.insert(places[m], { i, j }) end
  end
  for m, list in ipairs(places) do
    local own = {}
    for n, at in ipairs(list) do own[n] = questions[at[1]] end
    for n, answer in ipairs(#own > 0 and self:answer(m, own) or {}) do out[list[n][1]][list[n][2]] = answer end
  end
  return out
end

--- The logarithms of model m's probabilities of answers to one question, a tensor.
function Pool:likelihood(m, question, answers)
  local model, list = self:load(m), {}
  for i, a in ipairs(answers) do list[i] = { text = question.text, answer = a } end
  return moe.no_grad(function()
    local x, y = batch_of(list)
    local shape = y.shape
    local loss = moe.loss.cross_entropy(model(x):reshape { shape[1] * shape[2], -1 }, y:reshape { -1 }, {
      ignore_index = 0, reduction = "none",
    })
    return -loss:reshape(shape):sum(-1)
  end)
end

return M
