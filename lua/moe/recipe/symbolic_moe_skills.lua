-- The ground of the recipe symbolic_moe: questions of four skills, in words and in numbers. symbolic_moe_pool has the models.

local moe = require "moe"

local CHARS <const> = "abcdefgh0123456789:=prvsntxum"
local id_of, char_of = {}, {}
for c in CHARS:gmatch "." do
  if not id_of[c] then
    char_of[#char_of + 1] = c
    id_of[c] = #char_of
  end
end

local M = { skills = { "prv", "srt", "nxt", "sum" }, answer_size = 3, vocab_size = #char_of }

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

--- The skills of a question, by keyword.
function M.tag(question)
  local found = {}
  for _, skill in ipairs(M.skills) do
    if question.text:find(skill, 1, true) then found[#found + 1] = skill end
  end
  return found
end

--- For each question its answer and two wrong ones, right answers to other questions of the same skills, in a changing order.
function M.choices(questions)
  local out = {}
  for i, q in ipairs(questions) do
    local list, skills = {}, table.concat(M.tag(q), " ")
    for j = 1, #questions - 1 do
      local other = questions[(i + j - 1) % #questions + 1]
      if #list < 2 and other.answer ~= q.answer and table.concat(M.tag(other), " ") == skills then list[#list + 1] = other.answer end
    end
    table.insert(list, math.min(i % 3, #list) + 1, q.answer)
    out[i] = list
  end
  return out
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

--- The text of a list of ids from place `first` on.
function M.decode(ids, first)
  local chars = {}
  for j = first, #ids do chars[#chars + 1] = char_of[ids[j]] end
  return table.concat(chars)
end

return M
