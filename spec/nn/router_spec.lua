local moe = require "moe"
local helper = require "spec.helper"
local ref = require "spec.nn.moe_ref"

local function f64(t) return moe.tensor(t, { dtype = "f64" }) end

describe("moe.router_topk", function()
  it("follows the one order of steps, whatever the options", function()
    local r = helper.random(11)
    local scores = { "softmax", "sigmoid", "sqrtsoftplus", "relu" }
    for case = 1, 120 do
      local E, T = r(1, 12), r(1, 6)
      local o = { score = scores[r(1, 4)], score_after = r() < 0.4, routed_scaling_factor = r() < 0.5 and 2.5 or 1 }
      if E % 4 == 0 and r() < 0.7 then
        o.n_group = 4
        o.topk_group = r(1, 4)
        o.top_k = r(1, o.topk_group * (E // 4))
        if math.max(1, o.top_k // o.topk_group) > E // 4 or r() < 0.3 then o.group_top = 1 end
      else
        o.top_k = r(1, E)
      end
      o.norm_topk_prob = o.top_k > 1 and r() < 0.5
      local rows, bias = {}, r() < 0.5 and {} or nil
      for e = 1, bias and E or 0 do bias[e] = r.normal() end
      for t = 1, T do
        rows[t] = {}
        -- few distinct values: ties are common
        for e = 1, E do rows[t][e] = case % 3 == 0 and r(-2, 2) or 2 * r.normal() end
      end
      for _, dtype in ipairs { "f64", "f32" } do
        local call = { bias = bias and moe.tensor(bias, { dtype = dtype }) }
        for key, v in pairs(o) do call[key] = v end
        local weight, index, score = moe.router_topk(moe.tensor(rows, { dtype = dtype }), call)
        if dtype == "f64" then -- in f32 a tie may go either way against a reference in double
          o.bias = bias
          for t = 1, T do
            local i, w, s = ref.route(rows[t], o)
            assert.same(i, index[t]:totable())
            assert.close(w, weight[t], { rtol = 1e-10, atol = 1e-12 })
            assert.close(s, score[t], { rtol = 1e-10, atol = 1e-12 })
          end
          o.bias = nil
        else
          for t = 1, T do assert.close(select(3, ref.route(rows[t], o)), score[t], { rtol = 1e-4, atol = 1e-5 }) end
        end
      end
    end
  end)

  it("gives ties to the lowest expert", function()
    local _, index = moe.router_topk(moe.zeros(3, 7), { top_k = 4 })
    assert.same({ { 1, 2, 3, 4 }, { 1, 2, 3, 4 }, { 1, 2, 3, 4 } }, index:totable())
    local _, mixed = moe.router_topk(f64 { { 1, 5, 5, 1, 5 } }, { top_k = 4 })
    assert.same({ { 2, 3, 5, 1 } }, mixed:totable())
  end)

  it("moves choices by the bias and leaves the weights alone", function()
    local logits = f64 { { 1, 2, 3, 4 } }
    local weight, index, score = moe.router_topk(logits, { bias = f64 { 10, 0, 0, 0 }, top_k = 2, norm_topk_prob = false })
    assert.same({ { 1, 4 } }, index:totable())
    assert.close({ score:totable()[1][1], score:totable()[1][4] }, weight[1])
  end)

  it("lets masked tokens choose none", function()
    local weight, index, score = moe.router_topk(f64 { { 1, 2 }, { 3, 4 } }, { mask = moe.tensor { false, true }, top_k = 1 })
    assert.same({ { 0 }, { 2 } }, index:totable())
    assert.equal(0, weight[1][1])
    assert.same({ 0, 0 }, score[1]:totable())
  end)

  it("takes back a choice made before", function()
    moe.manual_seed(4)
    local logits = moe.randn(6, 5, { dtype = "f64" })
    local o = { top_k = 2, score = "sigmoid", norm_topk_prob = true, routed_scaling_factor = 1.5 }
    local weight, index = moe.router_topk(logits, o)
    o.choice = index
    local again, same = moe.router_topk(logits, o)
    assert.same(index:totable(), same:totable())
    assert.same(weight:totable(), again:totable())
    assert.matches("choice has a value outside of 1 to 5", helper.error_of(function()
      return moe.router_topk(logits, { top_k = 2, choice = moe.full({ 6, 2 }, 6, { dtype = "i64" }) })
    end))
  end)

  it("refuses logits that are not finite, and tokens with too few experts to choose from", function()
    local nan, inf = 0 / 0, math.huge
    local function says(message, rows, options)
      assert.matches(message, helper.error_of(function() return moe.router_topk(moe.tensor(rows), options or { top_k = 2 }) end))
    end
    says("router_topk: the logit of token 2 for expert 3 is NaN", { { 1, 2, 3 }, { 1, 2, nan } })
    says("the logit of token 1 for expert 1 is infinite", { { inf, 2, 3 } })
    says("token 2 may choose among 1 of 3 experts %(the others are masked%), wanted 2", { { 1, 2, 3 }, { -inf, 0, -inf } })
    says("token 1 may choose among 0 of 3 experts", { { -inf, -inf, -inf } }, { top_k = 1 })
    says("the groups chosen for a token leave fewer than top_k = 2", { { 5, -inf, 0, 0 } }, { top_k = 2, n_group = 2, group_top = 1 })
    -- a masked token may hold anything, and -inf is a way to leave experts out
    local mask = moe.tensor({ 1, 0 }):gt(0)
    local weight, index = moe.router_topk(moe.tensor { { -inf, 0, 0 }, { nan, nan, nan } }, { mask = mask, top_k = 2 })
    assert.same({ { 2, 3 }, { 0, 0 } }, index:totable())
    assert.close({ { 0.5, 0.5 }, { 0, 0 } }, weight)
  end)

  it("chooses among many experts", function()
    moe.manual_seed(9)
    local logits = moe.randn(3, 20000)
    local _, index = moe.router_topk(logits, { top_k = 16 })
    local _, wanted = logits:topk(16)
    assert.same(wanted:totable(), index:totable())
  end)

  it("names what is wrong", function()
    local x = moe.ones(2, 4)
    local cases = {
      { "top_k is 5, wanted 1 to 4", { top_k = 5 } },
      { "top_k is 0", { top_k = 0 } },
      { "n_group is 3, wanted a divisor", { n_group = 3 } },
      { "topk_group is 3", { n_group = 2, topk_group = 3 } },
      { "leave only 2", { n_group = 2, top_k = 3, group_top = 1 } },
      { "group_top is 3", { n_group = 2, group_top = 3 } },
      { "norm_topk_prob with top_k = 1", { top_k = 1, norm_topk_prob = true } },
      { "must be finite", { routed_scaling_factor = 0 / 0 } },
      { "bias is a f32 tensor %[3%]", { bias = moe.ones(3) } },
      { "mask is a f32", { mask = moe.ones(2) } },
      { "choice is %[1, 2%], wanted %[2, 2%]", { choice = moe.ones({ 1, 2 }, { dtype = "i64" }) } },
      { "tok_k", { tok_k = 1 } },
    }
    for _, case in ipairs(cases) do
      assert.matches(case[1], helper.error_of(function() return moe.router_topk(x, case[2]) end))
    end
    assert.matches("wanted floats %[tokens, experts%]", helper.error_of(function() return moe.router_topk(moe.ones(4)) end))
  end)
end)

describe("moe.router.topk", function()
  local function router(o)
    o.d_model, o.num_experts = o.d_model or 5, o.num_experts or 4
    moe.manual_seed(3)
    return moe.router.topk(o)
  end

  it("routes by its projection, weights and probabilities included", function()
    local m = router { top_k = 2, bias = true, score = "sigmoid" }
    local x = moe.randn(7, 5)
    local routing = m:route(x)
    local logits = x:matmul(m.weight:t()) + m.bias
    assert.close(logits, routing.logits)
    assert.close(moe.ones(7), routing.probs:sum(-1), { rtol = 1e-5 })
    assert.close(logits:sigmoid() / logits:sigmoid():sum(-1, true), routing.probs, { rtol = 1e-5 })
    local sums = moe.zeros(7):index_add(1, routing.token, routing.weight)
    assert.close(moe.ones(7), sums, { rtol = 1e-5 })
    assert.equal(14, routing.num_assignments)
  end)

  it("draws noise in training alone, unless told", function()
    local x = moe.randn(6, 5)
    for _, noise in ipairs { "learned", 0.5 } do
      local m = router { top_k = 2, noise = noise, bias = true }
      local clean = x:matmul(m.weight:t()) + m.bias
      moe.manual_seed(8)
      local noisy = m:route(x).logits
      moe.manual_seed(8)
      local scale = noise == "learned" and (x:matmul(m.noise_weight:t()) + m.noise_bias):softplus() or noise
      assert.close(clean + moe.randn_like(clean:detach()) * scale, noisy, { rtol = 1e-5, atol = 1e-6 })
      m:eval()
      assert.close(clean, m:route(x).logits, { rtol = 1e-5, atol = 1e-6 })
      local always = router { top_k = 2, noise = noise, noise_in_eval = true }
      always:eval()
      assert.is_true((always:route(x).logits - x:matmul(always.weight:t())):abs():max():item() > 1e-3)
    end
    local m = router { jitter = 0.1 }
    local ratio = m:route(moe.ones(1, 5)).logits / m.weight:sum(-1)
    assert.is_true((ratio - 1):abs():max():item() > 1e-6)
    m:eval()
    assert.close(m.weight:sum(-1):reshape { 1, 4 }, m:route(moe.ones(1, 5)).logits, { rtol = 1e-5 })
  end)

  it("gets a gradient through weights, probabilities and logits", function()
    local m = router { top_k = 2, noise = "learned" }
    local routing = m:route(moe.randn(6, 5))
    routing.weight:narrow(1, 1, 3):sum():backward()
    assert.is_true(m.weight.grad:abs():sum():item() > 0)
    assert.is_true(m.noise_weight.grad:abs():sum():item() > 0)
  end)

  it("decides in f32 for a half-precision input", function()
    local m = router { top_k = 2 }
    assert.equal("f32", m:route(moe.randn(3, 5):to "bf16").logits.dtype)
  end)

  it("names what is wrong", function()
    local cases = {
      { "norm_topk_prob with top_k = 1", { top_k = 1, norm_topk_prob = true } },
      { "always 1", { top_k = 1, score_after = true } },
      { "top_k is 5, but there are 4 experts", { top_k = 5 } },
      { "'top_k' must be at least 1", { top_k = 0 } },
      { "must be one of softmax", { score = "softmx" } },
      { "unknown option 'topk' %(did you mean 'top_k'", { topk = 1 } },
      { "'jitter' must be in", { jitter = 1 } },
      { "'noise' must be", { noise = "lots" } },
    }
    for _, case in ipairs(cases) do assert.matches(case[1], helper.error_of(function() return router(case[2]) end)) end
    assert.matches("description", helper.error_of(function() return moe.router.topk { top_k = 2 }:route(moe.ones(2, 5)) end))
  end)
end)
