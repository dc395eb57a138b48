-- The ground of the recipe symbolic_moe: questions of four skills, and tiny language models, each schooled in one of them.

local moe = require "moe"

local M = { skills = { "prv", "srt", "nxt", "sum" }, answer_size = 3 }

local CHARS <const> = "abcdefgh0123456789:=prvsntxum"
local id_of, char_of = {}, {}
for c in CHARS:gmatch "." do
  if not id_of[c] then
    char_of[#char_of + 1] = c
    id_of[c] = #char_of
  end
end

local function letters(list)
  local out = {}
  for i, v in ipairs(list) do out[i] = string.char(96 + v) end
  return table.concat(out)
end

-- What each skill makes of three numbers 1 .. 8.
local ANSWERS <const> = {
  prv = function(a) return letters { (a[1] + 6) % 8 + 1, (a[2] + 6) % 8 + 1, (a[3] + 6) % 8 + 1 } end,
  srt = function(a)
    table.sort(a)
    return letters(a)
  end,
  nxt = function(a) return letters { a[1] % 8 + 1, a[2] % 8 + 1, a[3] % 8 + 1 } end,
  sum = function(a) return ("%03d"):format(a[1] + a[2] + a[3]) end,
}

-- A stream of numbers 1 .. n from a seed.
local function stream(seed)
  local s = seed * 6364136223846793005 + 1442695040888963407
  return function(n)
    s = s * 6364136223846793005 + 1442695040888963407
    return (s >> 33) % n + 1
  end
end

--- n questions { text = "prv:cab=", answer = "bha" }; share[skill]: how likely each is (all alike when absent).
function M.questions(n, seed, share)
  local draw, list = stream(seed), {}
  for i = 1, n do
    local skill, at = nil, draw(1000) / 1000
    for _, name in ipairs(M.skills) do
      at = at - (share and share[name] or 1 / #M.skills)
      if not skill and at <= 1e-9 then skill = name end
    end
    skill = skill or M.skills[#M.skills]
    local a = { draw(8), draw(8), draw(8) }
    local text = skill .. ":" .. (skill == "sum" and table.concat(a) or letters(a)) .. "="
    list[i] = { text = text, answer = ANSWERS[skill](a) }
  end
  return list
end

--- ids [n, length] of texts of equal length.
function M.encode(texts)
  local rows = {}
  for i, text in ipairs(texts) do
    rows[i] = {}
    for j = 1, #text do rows[i][j] = id_of[text:sub(j, j)] end
  end
  return moe.tensor(rows, { dtype = "i64" })
end

--- A model without its weights yet.
function M.build()
  return moe.model.lm {
    vocab_size = #char_of, d_model = 32, num_layers = 2, num_heads = 4, max_seq_len = 11, ffn_hidden = 64,
    embedding_init = "normal(0.1)", init = "normal(0.1)",
  }
end

-- Texts with their answers -> what goes in, and targets of the answers alone (0: not judged).
local function batch_of(list)
  local texts, given = {}, #list[1].text
  for i, q in ipairs(list) do texts[i] = q.text .. q.answer end
  local ids = M.encode(texts)
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
  for _, name in ipairs(M.skills) do share[name] = name == skill and own or (1 - own) / (#M.skills - 1) end
  local optimizer = moe.optim.adamw(model, { lr = 1e-2 })
  for step = 1, steps do
    local x, y = batch_of(M.questions(64, seed * 10000 + step, share))
    optimizer:zero_grad()
    moe.loss.cross_entropy(model(x), y, { ignore_index = 0 }):backward()
    optimizer.groups[1].lr = 1e-2 * math.min(1, step / 10, 1.1 - step / steps)
    optimizer:step()
  end
  return model:state_dict()
end

--- The greedy answers of a model to a list of questions, as one batch.
function M.answer(model, questions)
  local texts = {}
  for i, q in ipairs(questions) do texts[i] = q.text end
  return moe.no_grad(function()
    local ids = M.encode(texts)
    for _ = 1, M.answer_size do
      local last = model(ids):narrow(2, ids:size(2), 1):argmax(-1)
      ids = moe.cat({ ids, last }, 2)
    end
    local out = {}
    for i, row in ipairs(ids:totable()) do
      local chars = {}
      for j = #texts[i] + 1, #row do chars[#chars + 1] = char_of[row[j]] end
      out[i] = table.concat(chars)
    end
    return out
  end)
end

--- The logarithms of a model's probabilities of answers to one question.
function M.likelihood(model, question, answers)
  local list = {}
  for i, a in ipairs(answers) do list[i] = { text = question.text, answer = a } end
  return moe.no_grad(function()
    local x, y = batch_of(list)
    local shape = y.shape
    local loss = moe.loss.cross_entropy(model(x):reshape { shape[1] * shape[2], -1 }, y:reshape { -1 }, {
      ignore_index = 0, reduction = "none",
    })
    return (-loss:reshape(shape):sum(-1)):totable()
  end)
end

-- Models of which one is in memory at a time.
local Pool = {}
Pool.__index = Pool

--- A pool of models by their state dicts; pool.loads counts how often weights were brought in.
function M.pool(states) return setmetatable({ states = states, model = M.build():eval(), loads = 0 }, Pool) end

function Pool:load(m)
  if self.at ~= m then
    self.model:load_state_dict(self.states[m])
    self.at, self.loads = m, self.loads + 1
  end
  return self.model
end

return M
