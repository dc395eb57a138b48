local moe = require "moe"
local helper = require "spec.helper"

local function patches(o)
  moe.manual_seed(o.seed or 1)
  o.seed = nil
  o.d_model, o.num_experts = 4, 3
  return moe.router.patches(o)
end

-- By the rule, with loops: on[b][t][e].
local function reference(p, B, T, o)
  local liked, on = {}, {}
  for b = 1, B do
    liked[b] = {}
    for t = 1, T do
      local row, order = p[(b - 1) * T + t], { 1, 2, 3 }
      table.sort(order, function(i, j) return row[i] > row[j] end)
      liked[b][t] = { 0, 0, 0 }
      for i = 1, o.top_k do liked[b][t][order[i]] = row[order[i]] end
    end
  end
  local s = o.patch_size or 1
  local P = (T + s - 1) // s
  local function score(b, patch, e)
    local sum, n = 0, 0
    local last = math.min(T, o.causal and (patch - 1) * s + 1 or patch * s)
    for t = (patch - 1) * s + 1, last do sum, n = sum + liked[b][t][e], n + 1 end
    return sum / n
  end
  for b = 1, B do
    on[b] = {}
    for t = 1, T do
      on[b][t] = {}
      for e = 1, 3 do
        local patch, better = (t - 1) // s + 1, 0
        local mine = score(b, patch, e)
        for other = 1, o.causal and B or P do
          local its = o.causal and score(other, patch, e) or score(b, other, e)
          if its > mine then better = better + 1 end
        end
        on[b][t][e] = better < math.ceil(o.share * (o.causal and B or P)) and mine > 0 and liked[b][t][e] > 0
      end
    end
  end
  return on
end

describe("router.patches", function()
  for _, o in ipairs {
    { top_k = 2, share = 0.5 }, { top_k = 1, share = 0.3, patch_size = 2 }, { top_k = 2, share = 0.4, patch_size = 3, causal = true },
    { top_k = 3, share = 0.5, causal = true },
  } do
    local name = ("lets experts choose among the patches that like them: k %d of %d, share %g"):format(o.top_k, o.patch_size or 1, o.share)
    it(name, function()
      local rule = { top_k = o.top_k, share = o.share, patch_size = o.patch_size, causal = o.causal }
      local router, x = patches(o), moe.randn(3 * 7, 4)
      local routing = router:route(x, { shape = { 3, 7 } })
      local on, got = reference(routing.probs:totable(), 3, 7, rule), {}
      local token, expert = routing.token:totable(), routing.expert:totable()
      for a = 1, #token do got[token[a] .. " " .. expert[a]] = true end
      local count = 0
      for b = 1, 3 do
        for t = 1, 7 do
          for e = 1, 3 do
            assert.equal(on[b][t][e], got[((b - 1) * 7 + t) .. " " .. e] == true)
            if on[b][t][e] then count = count + 1 end
          end
        end
      end
      assert.equal(count, routing.num_assignments)
      assert.is_true(count > 0)
      assert.same(moe.ones(count):totable(), routing.weight:totable())
      routing.weight:pow(2):sum():backward()
      assert.is_true(router.weight.grad:abs():sum():item() > 0) -- that of the gate, though the weight is 1
    end)
  end

  it("is causal where it says so: later tokens change nothing before them", function()
    local router, x = patches { top_k = 2, patch_size = 2, causal = true }, moe.randn(2, 8, 4)
    local function on(input)
      local g = moe.zeros(16, 3)
      local r = router:route(input:reshape { 16, 4 }, { shape = { 2, 8 } })
      for a, t in ipairs(r.token:totable()) do g[t][r.expert:totable()[a]] = 1 end
      return g:reshape { 2, 8, 3 }
    end
    local other = x:clone()
    other:narrow(2, 5, 4):copy_(moe.randn(2, 4, 4))
    assert.same(on(x):narrow(2, 1, 4):totable(), on(other):narrow(2, 1, 4):totable())
  end)

  it("has no choice with all experts and all patches, and keeps masked tokens out", function()
    local router, x = patches { top_k = 3, share = 1 }, moe.randn(6, 4)
    local routing = router:route(x, { shape = { 2, 3 } })
    assert.equal(18, routing.num_assignments)
    assert.is_false(routing.weight.requires_grad)
    local mask = moe.tensor { 1, 0, 0, 1, 1, 1 }:ne(0)
    routing = patches({ top_k = 2, share = 1 }):route(x, { shape = { 2, 3 }, mask = mask })
    assert.equal(8, routing.num_assignments)
    assert.equal(0, patches({}):route(moe.zeros(0, 4), {}).num_assignments)
  end)

  it("says what is wrong", function()
    local function says(want, o)
      local message = helper.error_of(patches, o)
      assert.truthy(message:find(want, 1, true), message)
    end
    says("option 'share' must be in (0, 1], got 0", { share = 0 })
    says("option 'patch_size' must be at least 1", { patch_size = 0 })
    says("top_k is 4, but there are 3 experts", { top_k = 4 })
  end)
end)
