local moe = require "moe"
local helper = require "spec.helper"

local function router(o)
  moe.manual_seed(o.seed or 5)
  o.seed, o.d_model, o.num_experts = nil, 4, 6
  return moe.router.random(o)
end

describe("moe.router.random with a fixed projection", function()
  it("is token choice by weights that never train", function()
    local m = router { top_k = 2 }
    local plain = moe.router.topk { d_model = 4, num_experts = 6, top_k = 2 }
    plain.weight:detach():copy_(m.weight)
    local x = moe.randn(9, 4)
    local a, b = m:route(x), plain:route(x)
    assert.same(b.index:totable(), a.index:totable())
    assert.close(b.weight, a.weight)
    assert.close(b.probs, a.probs)
    assert.equal(0, #m:parameters())
    assert.same({ 6, 4 }, m:state_dict().weight.shape)
  end)

  it("grows k by the step, within 1 and all, and evaluates with the last", function()
    local m = router { top_k = function(step) return 0.4 + step / 2 end }
    local x = moe.randn(3, 4)
    local got = {}
    for step = 1, 14 do got[step] = m:route(x, { step = step }).index:size(2) end
    assert.same({ 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 6, 6 }, got)
    m:route(x, { step = 5 })
    m:eval()
    assert.equal(3, m:route(x).index:size(2))
    m.top_k = 4 -- by hand
    assert.equal(4, m:route(x).index:size(2))
    local all = router { top_k = 1, inference = "all" }
    all:eval()
    assert.equal(6, all:route(x).index:size(2))
    all:train()
    assert.equal(1, all:route(x).index:size(2))
  end)
end)

describe("moe.router.random that draws", function()
  local x = moe.randn(12, 4)

  it("draws anew each time, for the batch or for each token, repeatably from a seed", function()
    local m = router { draw = "batch", top_k = 2 }
    local function rows(r)
      local index = r.index:totable()
      for _, row in ipairs(index) do assert.is_true(row[1] ~= row[2]) end
      return index
    end
    moe.manual_seed(1)
    local seen, first = {}, nil
    for _ = 1, 40 do
      local index = rows(m:route(x))
      first = first or index
      for t = 2, 12 do assert.same(index[1], index[t]) end
      seen[index[1][1]], seen[index[1][2]] = true, true
    end
    for e = 1, 6 do assert.is_true(seen[e]) end -- each fails to come with a chance of (2/3)^40
    moe.manual_seed(1)
    assert.same(first, rows(m:route(x)))
    local by_token = rows(router { draw = "token", top_k = 2 }:route(x))
    local different = 0
    for t = 2, 12 do
      if by_token[t][1] ~= by_token[1][1] or by_token[t][2] ~= by_token[1][2] then different = different + 1 end
    end
    assert.is_true(different > 0)
  end)

  it("draws every expert as often as any other", function()
    local m = router { draw = "token", top_k = 2 }
    local load = m:route(moe.zeros(6000, 4)):load():totable()
    -- mean 2000, deviation sqrt(6000 / 3 * 2 / 3) = 36.5
    for e = 1, 6 do assert.is_true(math.abs(load[e] - 2000) < 5 * 36.5, load[e]) end
  end)

  it("weighs the drawn evenly; all of them at inference, if told", function()
    local m = router { draw = "batch", top_k = 3, inference = "all" }
    assert.close(moe.full({ 36 }, 1 / 3), m:route(x).weight)
    m:eval()
    local routing = m:route(x)
    assert.equal(72, routing.num_assignments)
    assert.close(moe.full({ 72 }, 1 / 6), routing.weight)
    local still = router { draw = "batch" }
    still:eval()
    assert.equal(12, still:route(x).num_assignments)
  end)

  it("gives several runs in one batch different experts", function()
    for _, draw in ipairs { "batch", "token" } do
      local m = router { draw = draw, top_k = 2 }
      for _ = 1, 10 do
        local index = m:route(x, { draws = 3 }).index:totable()
        for t = 1, 4 do
          local seen = {}
          for run = 0, 2 do
            for _, e in ipairs(index[4 * run + t]) do
              assert.is_nil(seen[e])
              seen[e] = true
            end
            if draw == "batch" then assert.same(index[4 * run + 1], index[4 * run + t]) end
          end
        end
      end
    end
  end)

  it("takes a forced choice and a mask, and no tokens", function()
    local m = router { draw = "token" }
    local choice = moe.full({ 12, 1 }, 3, { dtype = "i64" })
    local mask = moe.arange(1, 12):gt(4)
    local routing = m:route(x, { choice = choice, mask = mask })
    assert.same({ 0, 0, 8, 0, 0, 0 }, routing:load():totable())
    assert.equal(4, routing.masked)
    assert.equal(0, m:route(moe.zeros(0, 4)).num_assignments)
  end)

  it("names what is wrong", function()
    assert.matches("top_k is 7, but there are 6 experts", helper.error_of(router, { top_k = 7 }))
    assert.matches("'draw' must be one of batch, token", helper.error_of(router, { draw = "all" }))
    local m = router { draw = "token", top_k = 2 }
    assert.matches("ctx.draws = 4 runs of 2 experts each, but there are 6",
      helper.error_of(function() m:route(x, { draws = 4 }) end))
    assert.matches("12 tokens cannot be cut into ctx.draws = 5",
      helper.error_of(function() router { draw = "token" }:route(x, { draws = 5 }) end))
  end)
end)
