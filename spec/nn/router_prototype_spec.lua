-- Prototypes and k-means.
local moe = require "moe"
local helper = require "spec.helper"

local function made(kind, o)
  o.d_model, o.num_experts = o.d_model or 3, o.num_experts or 4
  moe.manual_seed(6)
  return moe.router[kind](o)
end

-- The logits by loops.
local function logits_of(x, p, metric, t)
  local out = {}
  for i, a in ipairs(x) do
    out[i] = {}
    for e, b in ipairs(p) do
      local dot, aa, bb, gap = 0, 0, 0, 0
      for d = 1, #a do
        dot, aa, bb, gap = dot + a[d] * b[d], aa + a[d] ^ 2, bb + b[d] ^ 2, gap + (a[d] - b[d]) ^ 2
      end
      out[i][e] = (metric == "cosine" and dot / math.sqrt(aa * bb) or -gap) / t
    end
  end
  return out
end

describe("moe.router.prototype", function()
  it("scores by distance or angle", function()
    for _, metric in ipairs { "euclidean", "cosine" } do
      local m = made("prototype", { metric = metric, temperature = 0.7, dtype = "f64" })
      local x = moe.randn(5, 3, { dtype = "f64" })
      local routing = m:route(x)
      assert.close(logits_of(x:totable(), m.weight:totable(), metric, 0.7), routing.logits, { rtol = 1e-9, atol = 1e-9 })
      local _, index = routing.logits:topk(2)
      assert.same(index:totable(), routing.index:totable())
      local learned = made("prototype", { metric = metric, temperature = 0.7, learned_temperature = true, dtype = "f64" })
      assert.close(routing.logits, learned:route(x).logits, { rtol = 1e-9 })
      assert.equal(13, learned:num_parameters())
    end
  end)

  it("is the posterior of Gaussians", function()
    local m = made("prototype", { temperature = 2, dtype = "f64" })
    local x = moe.randn(4, 3, { dtype = "f64" })
    local density = {}
    for i, row in ipairs(logits_of(x:totable(), m.weight:totable(), "euclidean", 2)) do
      local sum = 0
      density[i] = {}
      for e, v in ipairs(row) do
        density[i][e] = math.exp(v)
        sum = sum + density[i][e]
      end
      for e in ipairs(row) do density[i][e] = density[i][e] / sum end
    end
    assert.close(density, m:route(x).probs, { rtol = 1e-9 })
  end)

  it("has gradients for x, prototypes and temperature", function()
    for _, metric in ipairs { "euclidean", "cosine" } do
      local m = made("prototype", { metric = metric, learned_temperature = true, top_k = 4, dtype = "f64", norm_topk_prob = false })
      local x, w = moe.randn(5, 3, { dtype = "f64" }), moe.randn(20, { dtype = "f64" })
      assert.is_true(moe.gradcheck(function(xs, p, t)
        local keep, temperature = m.weight, m.log_temperature
        rawset(m, "weight", p)
        rawset(m, "log_temperature", t)
        local out = (m:route(xs).weight * w):sum()
        rawset(m, "weight", keep)
        rawset(m, "log_temperature", temperature)
        return out
      end, { x, m.weight, m.log_temperature }))
    end
  end)

  it("names what is wrong", function()
    local function says(message, f) assert.matches(message, helper.error_of(f)) end
    says("router.prototype: option 'temperature' must be above 0, got 0", function() made("prototype", { temperature = 0 }) end)
    says("'noise' must be a standard deviation", function() made("prototype", { noise = "learned" }) end)
    says("must be one of euclidean, cosine", function() made("prototype", { metric = "manhattan" }) end)
    says("top_k is 9, but there are 4 experts", function() made("prototype", { top_k = 9 }) end)
    says("router.kmeans: option 'decay' must be in %[0, 1%], got 2", function() made("kmeans", { decay = 2 }) end)
    says("'init_steps' must not be negative", function() made("kmeans", { init_steps = -1 }) end)
  end)
end)

describe("moe.router.kmeans", function()
  -- four far clusters, 10 points each, in turn
  local function clustered()
    moe.manual_seed(2)
    local centre = moe.tensor { { 9, 0, 0 }, { 0, 9, 0 }, { 0, 0, 9 }, { -9, 0, 0 } }
    local which = moe.arange(0, 39):to "i64":remainder(4) + 1
    return centre:index_select(1, which) + moe.randn(40, 3) * 0.3, which, centre
  end

  it("finds clusters in the first batch, and keeps them", function()
    local m = made("kmeans", { top_k = 1 })
    local x, which = clustered()
    -- the first tokens at even distances are of one cluster: k-means must move the centres
    local y = x:index_select(1, select(2, which:to("f32"):sort(1)))
    local routing = m:route(y)
    assert.same({ 10, 10, 10, 10 }, routing:load():totable())
    for e = 1, 4 do
      local own = y:narrow(1, 10 * (e - 1) + 1, 10)
      assert.equal(1, own:sub(m.weight[routing.index[10 * e]:item()]):norm(2, { -1 }):lt(3):to("f32"):mean():item())
    end
    assert.equal(0, m:num_parameters())
    assert.equal(1, m.placed:item())
  end)

  it("follows the means of its tokens, one forward late, once", function()
    local m = made("kmeans", { decay = 0.9, from_data = false, dtype = "f64" })
    local x = moe.randn(12, 3, { dtype = "f64" })
    local before = m.weight:totable()
    local routing = m:route(x, { mask = moe.arange(1, 12):le(11) })
    assert.same(before, m.weight:totable()) -- a recomputed forward decides likewise
    local logits, sum, count = logits_of(x:totable(), before, "euclidean", 1), {}, {}
    assert.close(logits, routing.logits, { rtol = 1e-9, atol = 1e-9 })
    for e = 1, 4 do sum[e], count[e] = { 0, 0, 0 }, 0 end
    for t, row in ipairs(x:totable()) do
      local near = 1
      for e = 2, 4 do near = logits[t][e] > logits[t][near] and e or near end
      for d = 1, t < 12 and 3 or 0 do sum[near][d] = sum[near][d] + row[d] end
      if t < 12 then count[near] = count[near] + 1 end
    end
    for e = 1, 4 do
      for d = 1, count[e] > 0 and 3 or 0 do before[e][d] = 0.9 * before[e][d] + 0.1 * sum[e][d] / count[e] end
    end
    m:eval()
    m:route(x)
    assert.not_close(before, m.weight, { rtol = 1e-6 })
    m:train()
    m:route(x)
    assert.close(before, m.weight, { rtol = 1e-9 })
  end)

  it("has the gradient of x alone, and none of what moves is missed under a checkpoint", function()
    local m = made("kmeans", { from_data = false, metric = "cosine" })
    local x = moe.randn(8, 3, { requires_grad = true })
    local plain = made("prototype", { metric = "cosine" })
    plain:load_state_dict({ weight = m.weight }, { strict = false });
    plain:route(x).weight:narrow(1, 1, 5):sum():backward()
    local wanted = x.grad
    x.grad = nil
    moe.checkpoint(function(v) return m:route(v).weight:narrow(1, 1, 5):sum() end, x):backward()
    assert.close(wanted, x.grad, { rtol = 1e-5, atol = 1e-7 })
    assert.equal(8, m.seen_count:sum():item()) -- once
    -- twice forward before backward: the centres that moved in between are not what the first one used
    local a, b = m:route(x), m:route(x)
    x.grad = nil;
    (a.weight:narrow(1, 1, 5):sum() + b.weight:sum()):backward()
    assert.is_true(x.grad:isfinite():all():item())
  end)

  it("takes empty and wholly masked batches", function()
    local m = made("kmeans", {})
    assert.equal(0, m:route(moe.zeros(0, 3)).num_assignments)
    assert.equal(0, m:route(moe.randn(3, 3), { mask = moe.zeros(3):gt(0) }).num_assignments)
    assert.equal(0, m.placed:item())
    m:route(moe.randn(2, 3)) -- fewer tokens than centres
    assert.is_true(m.weight:isfinite():all():item())
  end)
end)
