-- Symbolic-MoE: who is recruited, what the schedule loads, and what the whole gains.
require "spec.helper"
local moe = require "moe"
local symbolic = require "moe.recipe.symbolic_moe"
local ground = require "moe.recipe.symbolic_moe_skills"
local pools = require "moe.recipe.symbolic_moe_pool"

local profile = {
  score = { { prv = 4, srt = -2, nxt = 0, sum = 0 }, { prv = 1, srt = 5, nxt = 0, sum = 0 }, { prv = -3, srt = 1, nxt = 0, sum = 0 } },
  share = { 0.5, 0.3, 0.2 },
}

local function asks(text) return { text = text .. ":abc=" } end

-- Random weights: what they answer is fixed, whatever it is.
local function untrained(n)
  local states = {}
  for m = 1, n do
    moe.manual_seed(m)
    local model = pools.build()
    moe.no_grad(function()
      for _, p in ipairs(model:parameters()) do p:mul_(6) end
    end)
    states[m] = model:state_dict()
  end
  return states
end

describe("recipe symbolic_moe", function()
  it("asks questions with their answers", function()
    for _, q in ipairs(ground.questions(60, 3)) do
      local skill, a, b, c = q.text:match "^(%a%a%a):(%w)(%w)(%w)=$"
      local list = { a, b, c }
      if skill == "srt" then
        table.sort(list)
        assert.equal(table.concat(list), q.answer)
      elseif skill == "sum" then
        assert.equal(a + b + c, tonumber(q.answer))
      else
        local step = skill == "nxt" and 1 or 7
        assert.equal(q.answer, (a .. b .. c):gsub(".", function(l) return string.char((l:byte() - 97 + step) % 8 + 97) end), nil)
      end
      assert.same({ skill }, ground.tag(q))
    end
  end)

  it("recruits by skill and competence", function()
    local chosen, weights = symbolic.recruit(profile, asks "prv", 3)
    assert.same({ 1, 2, 3 }, chosen)
    local e = { math.exp(4 * 0.5), math.exp(1 * 0.3), math.exp(-3 * 0.2) }
    local sum = e[1] + e[2] + e[3]
    assert.close({ e[1] / sum, e[2] / sum, e[3] / sum }, weights, { rtol = 1e-12 })
    assert.same({ 2, 3 }, (symbolic.recruit(profile, asks "srt", 2)))
    assert.same({ 1, 2 }, (symbolic.recruit(profile, asks "nxt", 2))) -- nobody knows: the first
    local sharp = select(2, symbolic.recruit(profile, asks "prv", 1, { temperature = 0.1 }))
    assert.is_true(sharp[1] > 0.999)
  end)

  it("draws recruits in proportion where told", function()
    local r = require("spec.helper").random(4)
    local first, n = { 0, 0, 0 }, 4000
    local _, weights = symbolic.recruit(profile, asks "prv", 3)
    for _ = 1, n do
      local chosen = symbolic.recruit(profile, asks "prv", 2, { sample = r })
      assert.is_true(chosen[1] ~= chosen[2])
      first[chosen[1]] = first[chosen[1]] + 1
    end
    for m = 1, 3 do assert.is_true(math.abs(first[m] / n - weights[m]) < 0.03) end
  end)

  it("profiles models by what they get right", function()
    local pool, questions = pools.pool(untrained(2)), ground.questions(12, 5)
    local answers = pool:answer(2, questions)
    for i = 1, 12, 2 do questions[i].answer = answers[i] end -- model 2 is right on every other one
    local p = symbolic.profile(pool, questions)
    local wanted, right = { prv = 0, srt = 0, nxt = 0, sum = 0 }, { 0, 0 }
    for m = 1, 2 do
      for i, a in ipairs(pool:answer(m, questions)) do
        local hit = a == questions[i].answer
        right[m] = right[m] + (hit and 1 or 0)
        local skill = ground.tag(questions[i])[1]
        if m == 2 then wanted[skill] = wanted[skill] + (hit and 1 or -1) end
      end
    end
    assert.same(wanted, p.score[2])
    assert.is_true(right[2] >= 6)
    assert.close({ right[1] / (right[1] + right[2]), right[2] / (right[1] + right[2]) }, p.share)
  end)

  it("loads each used model once when grouped, with the same answers", function()
    local questions, r = ground.questions(40, 7), require("spec.helper").random(2)
    local recruits, used, changes, last = {}, {}, 0, nil
    for i = 1, 40 do
      local a = r(1, 4)
      recruits[i] = { a, (a + r(0, 1)) % 4 + 1 } -- of five models the fifth is never used
      for _, m in ipairs(recruits[i]) do
        used[m] = true
        if m ~= last then changes, last = changes + 1, m end
      end
    end
    local count = 0
    for _ in pairs(used) do count = count + 1 end
    local states = untrained(5)
    local naive, grouped = pools.pool(states), pools.pool(states)
    local wanted = {}
    for i, list in ipairs(recruits) do
      wanted[i] = {}
      for j, m in ipairs(list) do wanted[i][j] = naive:answer(m, { questions[i] })[1] end
    end
    assert.same(wanted, grouped:answers(questions, recruits))
    assert.equal(4, count)
    assert.equal(count, grouped.loads)
    assert.equal(changes, naive.loads)
  end)

  it("aggregates by weighted vote, or by what a model finds likely", function()
    assert.equal("b", symbolic.vote(nil, { "a", "b", "b" }, { 0.5, 0.3, 0.3 }))
    assert.equal("a", symbolic.vote(nil, { "a", "b" }, { 0.5, 0.5 }))
    local pool, q = pools.pool(untrained(2)), { text = "srt:cab=" }
    local own = pool:answer(1, { q })[1]
    local score = pool:likelihood(1, q, { own, "abc", "123" }):totable()
    local p = 0
    local logits = moe.no_grad(function() return pool.model(ground.encode { q.text .. "abc" }):log_softmax(-1) end)
    local ids = ground.encode { q.text .. "abc" }
    for i = 8, 10 do p = p + logits[1][i][ids[1][i + 1]] end
    assert.close(p, score[2], { rtol = 1e-4 })
    local picked = symbolic.judge(pool, 1)(q, { "abc", own, "123" })
    assert.equal(score[1] >= score[2] and score[1] >= score[3] and own or score[2] >= score[3] and "abc" or "123", picked)
    -- the test: one who knows finds all, one who takes the first a third
    local known = ground.questions(90, 4)
    assert.equal(1, symbolic.test_aggregator(function(question) return question.answer end, known))
    assert.close(1 / 3, symbolic.test_aggregator(function(_, list) return list[1] end, known), { rtol = 0.05 })
  end)

  it("beats the best single model and random pairs", function()
    local row = {}
    for _, r in ipairs(symbolic.demo(nil, 150, 1)) do row[r[1]] = r[2] end
    local recruited = row["2 recruits, weighted vote"]
    assert.is_true(recruited > row["best single model"] + 0.1)
    assert.is_true(recruited > row["2 models at random, vote"] + 0.2)
    assert.is_true(row["2 recruits, the model that judges best"] > row["2 models at random, vote"])
    assert.is_true(row["how often that model finds the right one of three"] > 0.4)
  end)
end)
