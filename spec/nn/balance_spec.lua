local moe = require "moe"
local helper = require "spec.helper"
local loss = moe.loss

local F64 <const> = { dtype = "f64" }
local function f64(t) return moe.tensor(t, F64) end
local function i64(t) return moe.tensor(t, { dtype = "i64" }) end

-- A routing of tokens by their experts, with probabilities; weights of 1 unless given.
local function routed(index, probs, o)
  o = o or {}
  local E = o.num_experts or 4
  local mask = o.mask and moe.tensor(o.mask)
  local r = moe.routing.topk(i64(index), o.weight or moe.ones(#index, #index[1], F64), E, { mask = mask })
  r.probs, r.logits, r.top_k = probs, o.logits, #index[1]
  return r
end

local EVEN <const> = { { 1, 2 }, { 3, 4 }, { 2, 3 }, { 4, 1 } }
local COLLAPSED <const> = { { 1, 2 }, { 2, 1 }, { 1, 2 }, { 2, 1 } }
local uniform = moe.full({ 4, 4 }, 0.25, F64)
local half = f64 { { .5, .5, 0, 0 } }:expand { 4, 4 }:contiguous()
local CERTAIN <const> = f64 { { 1, 0, 0, 0 }, { 0, 1, 0, 0 }, { 0, 0, 1, 0 }, { 0, 0, 0, 1 } }

-- EVEN and COLLAPSED with two masked tokens between, whose numbers are absurd.
local function with_padding(index, probs)
  local rows, values, mask = {}, {}, {}
  local absurd = moe.full({ 1, 4 }, 1e3, F64)
  for t, row in ipairs(index) do
    rows[#rows + 1], mask[#mask + 1], values[#values + 1] = row, true, probs:narrow(1, t, 1)
    if t % 2 == 0 then rows[#rows + 1], mask[#mask + 1], values[#values + 1] = { 4, 4 }, false, absurd end
  end
  return rows, moe.cat(values, 1), mask
end

-- name, the loss, its values for { even and uniform, collapsed on two and half each, one expert a token with certainty }
local CLOSED <const> = {
  { "switch", loss.switch(1), { 1, 2, 1 } },
  { "switch of two groups", loss.switch(1, { groups = 2 }), { 1, 2, 1 } },
  { "switch of unequal groups", loss.switch(1, { groups = { 1, 2, 2, 2 } }), { 1, 4 / 4 + 4 / 3 / 4, 1 } },
  { "switch, norm k", loss.switch(1, { norm = "k" }), { 2, 4, 1 } },
  { "importance", loss.importance(1), { 0, 1, 0 } },
  { "load", loss.load(1), { 0, 1, 0 } },
  { "entropy", loss.entropy(1), { math.log(4), math.log(2), 0 } },
  { "mutual information", loss.mutual_information(1), { 0, 0, -math.log(4) } },
  { "load concentration", loss.load_concentration(1), { math.log(4), math.log(2), math.log(4) } },
  { "gate L1", loss.gate_l1(1), { 2, 2, 1 } },
  { "latency of equal costs", loss.latency(1, { cost = { 3, 3, 3, 3 } }), { 0, 2, 0 } },
  { "latency of importance alone", loss.latency(1, { cost = { 3, 3, 3, 3 }, on = "importance" }), { 0, 1, 0 } },
}
local CASES <const> = { { EVEN, uniform }, { COLLAPSED, half }, { { { 1 }, { 2 }, { 3 }, { 4 } }, CERTAIN } }

describe("balance losses", function()
  for _, row in ipairs(CLOSED) do
    it("closed form of " .. row[1], function()
      for i, case in ipairs(CASES) do
        assert.close(row[3][i], row[2](routed(case[1], case[2])), { rtol = 1e-6, atol = 1e-6 })
      end
    end)
    it("padding does not count in " .. row[1], function()
      for i = 1, 2 do
        local rows, probs, mask = with_padding(CASES[i][1], CASES[i][2])
        assert.close(row[3][i], row[2](routed(rows, probs, { mask = mask })), { rtol = 1e-6, atol = 1e-6 })
      end
    end)
    it("no token at all is no failure of " .. row[1], function()
      local rows, probs = { { 1, 2 }, { 3, 4 } }, moe.full({ 2, 4 }, 0.25, F64)
      local value = row[2](routed(rows, probs, { mask = { false, false } }))
      assert.equal(0, value:item() * 0) -- finite
    end)
  end

  it("multiply by their coefficient, a number or a function of step and layer", function()
    local r = routed(COLLAPSED, half)
    assert.close(0.02, loss.switch(0.01)(r))
    assert.close(-math.log(2), loss.entropy(-1)(r))
    local f = loss.switch(function(step, layer) return step * 0.1 + (layer or 0) end)
    assert.close(0.6, f(r, { step = 3 }))
    assert.close(2.6, f(r, { step = 3, layer_number = 1 }))
    assert.matches("loss.switch: the coefficient is a function of the step, but ctx has no step",
      helper.error_of(function() f(r) end))
    assert.matches("must return a number, got a nil", helper.error_of(function()
      loss.z(function() end)(routed(EVEN, nil, { logits = uniform }), { step = 1 })
    end))
    assert.equal("moe.loss.switch(function)", tostring(f))
  end)

  it("of a single token, and by the coefficients that they have when none is given", function()
    local p = f64 { { .7, .1, .1, .1 } }
    local r = routed({ { 1 } }, p, { logits = p * 2, weight = f64 { { .7 } } })
    local h = -(.7 * math.log(.7) + .3 * math.log(.1))
    local z = math.log(math.exp(1.4) + 3 * math.exp(.2)) ^ 2
    for _, row in ipairs {
      { loss.switch(), 0.01 * 2.8 }, { loss.switch(1, { by = "sequence" }), 2.8 }, { loss.entropy(), 1e-4 * h },
      { loss.load_concentration(), 0.01 * h }, { loss.mutual_information(), 0 }, { loss.z(), 1e-3 * z },
      { loss.gate_l1(), 0.01 * 0.7 }, { loss.importance(), 0.01 * 3 }, { loss.load(), 0.01 * 3 },
      { loss.mutual_information(1, { by = "task" }), 0 }, { loss.latency(nil, { cost = { 1, 1, 1, 1 } }), 0.06 },
    } do
      assert.close(row[2], row[1](r, { shape = { 1, 1 }, task_ids = 1 }), { rtol = 1e-6, atol = 1e-12 })
    end
    local eye = f64 { { 1, 0 }, { 0, 1 }, { 0, 0 }, { 0, 0 } }
    local two = routed({ { 1 }, { 2 } }, nil)
    assert.close(0.1 * (math.log(math.exp(10) + 1) - 10), loss.contrastive()(two, { x = eye:narrow(1, 1, 2),
      layer = { router = { weight = eye } } }), { rtol = 1e-6 })
    assert.close(0.01, loss.diversity(nil, { of = "weights" })(r, { layer = { experts = { down_proj = moe.ones(2, 3, F64) } } }))
    -- two sequences of one token, each collapsed in itself
    assert.close(4, loss.switch(1, { by = "sequence" })(routed({ { 1 }, { 2 } }, CERTAIN:narrow(1, 1, 2)), { shape = { 2, 1 } }))
    -- tokens whose probabilities are nil count in the mean
    assert.close(1, loss.switch(1)(routed({ { 1 }, { 2 } }, f64 { { 1, 0, 0, 0 }, { 0, 0, 0, 0 } })))
    -- one loss for routings of several sizes and types
    local one = loss.switch(1, { groups = 1 })
    assert.close(1, moe.scope(function() return one(routed(EVEN, uniform)):item() end))
    assert.close(1, one(routed(EVEN, uniform)))
    assert.close(1, one(routed(EVEN, uniform:to "f32")))
    assert.close(1, one(routed({ { 8 } }, moe.full({ 1, 8 }, 1 / 8), { num_experts = 8 })))
  end)

  it("z is the squared logarithm of E at zero logits, padding apart", function()
    local rows, probs, mask = with_padding(EVEN, moe.zeros(4, 4, F64))
    assert.close(math.log(4) ^ 2, loss.z(1)(routed(rows, nil, { logits = probs, mask = mask })), { rtol = 1e-9 })
  end)

  it("have no sequences or groups of their own in switch: a plain loop says the same", function()
    moe.manual_seed(3)
    local B, T, E, k = 3, 5, 6, 2
    local probs = moe.randn(B * T, E, F64):softmax(-1)
    local _, index = probs:topk(k)
    local mask = {}
    for t = 1, B * T do mask[t] = t ~= 4 and (t <= 5 or t > 10) end -- the second sequence is padding alone
    local r = moe.routing.topk(index, nil, E, { mask = moe.tensor(mask), probs = probs })
    local of = { 1, 2, 2, 3, 3, 3 }
    local p, choice = probs:totable(), index:totable()
    local function reference(first, last)
      local f, P, n, size = {}, {}, 0, { 1, 2, 3 }
      for g = 1, 3 do f[g], P[g] = 0, 0 end
      for t = first, last do
        if mask[t] then
          n = n + 1
          for e = 1, E do P[of[e]] = P[of[e]] + p[t][e] end
          for j = 1, k do f[of[choice[t][j]]] = f[of[choice[t][j]]] + 1 end
        end
      end
      local sum = 0
      for g = 1, 3 do sum = sum + E / size[g] * (f[g] / (n * k)) * (P[g] / n) end
      return sum
    end
    assert.close(reference(1, B * T), loss.switch(1, { groups = of })(r), { rtol = 1e-9 })
    assert.close((reference(1, 5) + reference(11, 15)) / 2,
      loss.switch(1, { groups = of, by = "sequence" })(r, { shape = { B, T } }), { rtol = 1e-9 })
  end)

  it("switch by sequence counts what a capacity dropped", function()
    local index = { { 1 }, { 1 }, { 1 }, { 2 } }
    local full = routed(index, half)
    local cut = full:limit(1, "position")
    assert.equal(2, cut.dropped)
    local by = loss.switch(1, { by = "sequence" })
    assert.close(by(full, { shape = { 2, 2 } }), by(cut, { shape = { 2, 2 } }))
    assert.close(loss.load(1)(full), loss.load(1)(cut))
  end)

  describe("switch over the global batch", function()
    -- two micro-batches, each collapsed on two experts of its own
    local micro = { routed(COLLAPSED, half), routed({ { 3, 4 }, { 4, 3 }, { 3, 4 }, { 4, 3 } },
      f64 { { 0, 0, .5, .5 } }:expand { 4, 4 }:contiguous()) }
    local function layer_with(balance)
      local at = 0
      return moe.layer {
        d_model = 3, num_experts = 4, experts = moe.experts.mlp { intermediate_size = 2 }, balance = balance,
        router = function()
          at = at % 2 + 1
          local r = routed(at == 1 and COLLAPSED or { { 3, 4 }, { 4, 3 }, { 3, 4 }, { 4, 3 } }, micro[at].probs:to "f32",
            { weight = moe.ones(4, 2) })
          return r
        end,
      }
    end

    it("adds the counts of the micro-batches of a step, and begins anew after it", function()
      local layer = layer_with { loss.switch(1, { by = "global" }) }
      local x = moe.zeros(4, 3)
      for _ = 1, 2 do
        assert.close(2, select(2, layer(x)):aux()) -- nothing before: as within the batch
        assert.close(1, select(2, layer(x)):aux()) -- even over both
        layer:after_step()
      end
      layer:eval()
      layer(x) -- what is evaluated does not count
      layer:train()
      layer(x)
      layer:after_step()
      assert.close(2, select(2, layer(x)):aux())
    end)

    it("is the same when a checkpoint runs it again", function()
      local values = {}
      local function probe(r, ctx, state)
        local v = loss.switch(1, { by = "global" })(r, ctx, state)
        values[#values + 1] = v:item()
        return v
      end
      local global = loss.switch(1, { by = "global" })
      local balance = setmetatable({ name = "probe", start = global.start, observe = global.observe },
        { __call = function(_, ...) return probe(...) end })
      local probs = f64 { { .4, .3, .2, .1 }, { .1, .1, .2, .6 } }
      local layer = moe.layer {
        d_model = 3, num_experts = 4, dtype = "f64", experts = moe.experts.mlp { intermediate_size = 2 }, balance = { balance },
        router = function() return routed({ { 1, 2 }, { 4, 1 } }, probs) end,
      }
      layer(moe.randn(2, 3, F64))
      local x = moe.randn(2, 3, { dtype = "f64", requires_grad = true })
      local y = moe.checkpoint(function(a) return (layer(a)) end, x)
      y:sum():backward()
      assert.equal(3, #values)
      assert.equal(values[2], values[3])
    end)
  end)

  it("load with noise is the chance to be chosen if the noise were drawn again", function()
    local function phi(v) return moe.tensor(v / math.sqrt(2), F64):erf():item() / 2 + 0.5 end
    for _, k in ipairs { 1, 2, 3 } do
      for _, noise in ipairs { "learned", 0.7 } do
        moe.manual_seed(k)
        local router = moe.router.topk { d_model = 5, num_experts = 4, top_k = k, noise = noise, dtype = "f64" }
        local x = moe.randn(6, 5, F64)
        local r = router:route(x, { mask = moe.tensor { true, true, false, true, true, true } })
        local noisy, clean = r.logits:totable(), x:linear(router.weight):totable()
        assert.close(clean, r.clean_logits, { rtol = 1e-12 })
        local std = noise == 0.7 and moe.full({ 6, 4 }, 0.7, F64) or x:linear(router.noise_weight):softplus()
        std = std:totable()
        local load, mean, var = { 0, 0, 0, 0 }, 0, 0
        for _, t in ipairs { 1, 2, 4, 5, 6 } do
          for e = 1, 4 do
            local others = {}
            for j = 1, 4 do if j ~= e then others[#others + 1] = noisy[t][j] end end
            table.sort(others, function(a, b) return a > b end)
            load[e] = load[e] + phi((clean[t][e] - others[k]) / std[t][e])
          end
        end
        for e = 1, 4 do mean = mean + load[e] / 4 end
        for e = 1, 4 do var = var + (load[e] - mean) ^ 2 / 4 end
        assert.close(var / mean ^ 2, loss.load(1)(r), { rtol = 1e-8 })
      end
    end
    local all = moe.router.topk { d_model = 5, num_experts = 2, top_k = 2, noise = 1, dtype = "f64" }
    assert.close(0, loss.load(1)(all:route(moe.randn(6, 5, F64))))
    assert.is_nil(all:eval():route(moe.randn(6, 5, F64)).noise_std)
  end)

  it("latency is least where the load is inverse to the cost", function()
    local rows = { { 1 }, { 1 }, { 1 }, { 2 } } -- the second expert costs three times as much
    local probs = f64 { { 1, 0 }, { 1, 0 }, { 1, 0 }, { 0, 1 } }
    local r = routed(rows, probs, { num_experts = 2 })
    assert.close(0, loss.latency(1, { cost = { 1, 3 } })(r), { atol = 1e-9 })
    assert.close(0.5, loss.latency(1, { cost = { 1, 1 } })(r), { rtol = 1e-6 }) -- twice (0.5 / 1)^2 / 1 of { 3, 1 }
    assert.is_true(loss.latency(1, { cost = { 3, 1 } })(r):item() > 0.5)
    local some, chosen = f64 { { .7, .1, .1, .1 }, { .1, .1, .4, .4 } }, f64 { { .7, .1 }, { .4, .4 } }
    local sparse = routed({ { 1, 2 }, { 3, 4 } }, some, { weight = chosen })
    assert.close(loss.latency(1, { cost = { 1, 2, 1, 2 }, on = "load" })(sparse),
      loss.latency(1, { cost = { 10, 20, 10, 20 }, on = "importance" })(sparse), { rtol = 1e-9 })
  end)

  it("mutual information of experts and tasks", function()
    local mi = loss.mutual_information(1, { by = "task" })
    local two = f64 { { 1, 0 }, { 0, 1 }, { 1, 0 }, { 0, 1 } }
    local r = routed({ { 1 }, { 2 }, { 1 }, { 2 } }, two, { num_experts = 2 })
    assert.close(-math.log(2), mi(r, { task_ids = i64 { 1, 2, 1, 2 } }), { atol = 1e-9 }) -- an expert a task
    assert.close(0, mi(r, { task_ids = i64 { 1, 1, 2, 2 } }), { atol = 1e-9 }) -- each task uses both alike
    assert.close(0, mi(r, { task_ids = 2 }), { atol = 1e-9 })
    local apart = f64 { { 1, 0 }, { 1, 0 }, { 0, 1 }, { 0, 1 } }
    local by_sequence = routed({ { 1 }, { 1 }, { 2 }, { 2 } }, apart, { num_experts = 2 })
    assert.close(-math.log(2), mi(by_sequence, { task_ids = i64 { 1, 2 } }), { atol = 1e-9 })
    assert.matches("needs ctx.task_ids", helper.error_of(function() mi(r, {}) end))
    assert.matches("3 elements, wanted 4 tokens", helper.error_of(function() mi(r, { task_ids = i64 { 1, 2, 3 } }) end))
  end)

  describe("contrastive", function()
    local function context(x, prototypes) return { x = x, layer = { router = { weight = prototypes } } } end
    local index = { { 1 }, { 2 }, { 3 }, { 1 } }

    it("in closed form", function()
      local x = f64 { { 2, 0, 0 }, { 0, 1, 0 }, { 0, 0, 3 }, { 1, 0, 0 } }
      local r = routed(index, nil, { num_experts = 4 })
      local eye = f64 { { 1, 0, 0 }, { 0, 2, 0 }, { 0, 0, 1 }, { 1, 1, 1 } } -- the fourth has no token
      -- apart: log(e^(1/t) + 2) - 1/t; prototypes alike: log 3
      assert.close(math.log(math.exp(2) + 2) - 2, loss.contrastive(1, { temperature = 0.5 })(r, context(x, eye)), { rtol = 1e-9 })
      assert.close(math.log(3), loss.contrastive(1)(r, context(x, moe.ones(4, 3, F64))), { rtol = 1e-9 })
      assert.close(math.log(3), loss.contrastive(1)(r, context(moe.ones(4, 3, F64), eye)), { rtol = 1e-9 })
      -- a prototype is held against all means, not a mean against all prototypes
      local lone = f64 { { 1, 0, 0 }, { 1, 0, 0 }, { 0, 0, 1 }, { 1, 1, 1 } }
      local e = math.exp(2)
      assert.close((math.log(e + 2) - 2 + math.log(e + 2) + math.log(e + 2) - 2) / 3,
        loss.contrastive(1, { temperature = 0.5 })(r, context(x, lone)), { rtol = 1e-9 })
      -- one expert alone has nothing to be told from
      assert.close(0, loss.contrastive(1)(routed({ { 2 }, { 2 }, { 2 }, { 2 } }, nil), context(x, eye)), { atol = 1e-9 })
      assert.is_nil(loss.contrastive(1)(routed({ { 0 }, { 0 } }, nil), context(x:narrow(1, 1, 2), eye)))
    end)

    it("leaves padding out, takes prototypes of one's own, and checks them", function()
      local x = f64 { { 2, 0, 0 }, { 9, 9, 9 }, { 0, 1, 0 } }
      local eye = f64 { { 1, 0, 0 }, { 0, 2, 0 }, { 0, 0, 1 }, { 1, 1, 1 } }
      local r = routed({ { 1 }, { 2 }, { 2 } }, nil, { mask = { true, false, true } })
      local other = routed({ { 1 }, { 2 } }, nil)
      local kept = context(f64 { { 2, 0, 0 }, { 0, 1, 0 } }, eye)
      assert.close(loss.contrastive(1)(other, kept), loss.contrastive(1)(r, context(x, eye)))
      local mine = loss.contrastive(1, { prototypes = function(layer) return layer.mine end })
      assert.close(loss.contrastive(1)(r, context(x, eye)), mine(r, { x = x, layer = { router = {}, mine = eye } }))
      assert.matches("prototypes must be a tensor %[4, 3%], got %[3, 4%]", helper.error_of(function()
        mine(r, { x = x, layer = { mine = eye:t() } })
      end))
      assert.matches("ctx has no layer", helper.error_of(function() mine(r, {}) end))
      assert.matches("ctx has no x", helper.error_of(function() mine(r, { layer = {} }) end))
      assert.matches("temperature must be above 0", helper.error_of(loss.contrastive, 1, { temperature = 0 }))
    end)
  end)

  describe("diversity", function()
    local function layer_of(balance, o)
      moe.manual_seed(5)
      return moe.layer {
        d_model = 6, num_experts = 4, dtype = "f64", router = moe.router.topk { top_k = o and o.top_k or 2 }, balance = balance,
        experts = moe.experts.swiglu { intermediate_size = 5 },
      }
    end

    it("of outputs: 1 for experts alike, 0 for orthogonal ones, a plain loop between", function()
      local layer = layer_of { loss.diversity(1) }
      local x = moe.randn(7, 6, F64)
      local _, r = layer(x)
      local index, sum = r.index:totable(), 0
      for t = 1, 7 do
        local y = {}
        for j, e in ipairs(index[t]) do
          local gate, up = x[t]:matmul(layer.experts.gate_up_proj[e]:t()):chunk(2)
          y[j] = (gate:silu() * up):matmul(layer.experts.down_proj[e]:t())
        end
        sum = sum + ((y[1] * y[2]):sum() / y[1]:norm() / y[2]:norm()):item() ^ 2 / 7
      end
      assert.close(sum, r:aux(), { rtol = 1e-9 })
      moe.no_grad(function()
        for e = 2, 4 do
          layer.experts.gate_up_proj[e]:copy_(layer.experts.gate_up_proj[1])
          layer.experts.down_proj[e]:copy_(layer.experts.down_proj[1])
        end
      end)
      assert.close(1, select(2, layer(x)):aux(), { rtol = 1e-9 })
      moe.no_grad(function() -- each expert writes an output of its own
        layer.experts.down_proj:mul_(0)
        for e = 1, 4 do layer.experts.down_proj[e][e]:fill_(1) end
      end)
      assert.close(0, select(2, layer(x)):aux(), { atol = 1e-12 })
    end)

    it("of outputs over some tokens, evenly spread, padding apart", function()
      local layer = layer_of {}
      local x = moe.randn(6, 6, F64)
      local _, few = layer(x)
      local whole, some = loss.diversity(1), loss.diversity(1, { tokens = 3 })
      local at = x:index_select(1, i64 { 1, 3, 5 })
      local _, picked = layer(at)
      assert.close(whole(picked, { layer = layer, x = at }), some(few, { layer = layer, x = x }), { rtol = 1e-9 })
      local ctx = { mask = moe.tensor { true, false, true, false, true, false } }
      local _, masked = layer(x, ctx)
      assert.close(whole(picked, { layer = layer, x = at }), whole(masked, { layer = layer, x = x }), { rtol = 1e-9 })
      local many = layer_of({}, { top_k = 3 })
      moe.no_grad(function() many.experts.gate_up_proj:copy_(many.experts.gate_up_proj[1]:expand { 4, 10, 6 }) end)
      moe.no_grad(function() many.experts.down_proj:copy_(many.experts.down_proj[1]:expand { 4, 6, 5 }) end)
      assert.close(1, whole(select(2, many(x)), { layer = many, x = x }), { rtol = 1e-9 })
      local single = layer_of({}, { top_k = 1 })
      assert.close(0, whole(select(2, single(x)), { layer = single, x = x }))
    end)

    it("of weights", function()
      local value = loss.diversity(1, { of = "weights", parameter = "w" })
      local function of(w) return value(routed(EVEN, nil), { layer = { experts = { w = w } } }) end
      assert.close(1, of(moe.ones(4, 2, 3, F64)))
      assert.close(0, of(f64 { { 1, 0 }, { 0, 5 } }))
      assert.close(0.5, of(f64 { { 1, 0 }, { 2, 2 } }), { rtol = 1e-9 })
      assert.close(2 / 6, of(f64 { { 1, 0 }, { -3, 0 }, { 0, 2 } }), { rtol = 1e-9 })
      assert.matches("the experts have no parameter 'w'", helper.error_of(of, nil))
    end)
  end)

  describe("have gradients that agree with differences:", function()
    local index = { { 1, 2 }, { 3, 1 }, { 2, 3 }, { 1, 4 }, { 4, 1 } }
    local mask = { true, true, false, true, true }
    local list = {
      { "switch", loss.switch(0.5) }, { "switch k", loss.switch(0.5, { norm = "k" }) },
      { "switch by sequence", loss.switch(0.5, { by = "sequence" }), { shape = { 5, 1 } } },
      { "switch of groups", loss.switch(0.5, { groups = { 1, 2, 2, 1 } }) },
      { "load", loss.load(0.5) }, { "entropy", loss.entropy(0.5) }, { "mutual information", loss.mutual_information(0.5) },
      { "mutual information of tasks", loss.mutual_information(0.5, { by = "task" }), { task_ids = i64 { 1, 2, 2, 1, 2 } } },
      { "load concentration", loss.load_concentration(0.5) }, { "z", loss.z(0.5) },
    }
    for _, row in ipairs(list) do
      it(row[1], function()
        moe.manual_seed(2)
        local logits = moe.randn(5, 4, { dtype = "f64", requires_grad = true })
        assert.is_true(moe.gradcheck(function(v)
          return row[2](routed(index, v:softmax(-1), { mask = mask, logits = v }), row[3] or {})
        end, { logits }))
      end)
    end
    it("importance, gate L1 and latency", function()
      moe.manual_seed(2)
      local weight = (moe.rand(5, 2, F64) + 0.1):detach()
      weight.requires_grad = true
      local latency = loss.latency(0.5, { cost = { 1, 2, 3, 4 }, on = "importance" })
      for _, value in ipairs { loss.importance(0.5), loss.gate_l1(0.5), latency } do
        assert.is_true(moe.gradcheck(function(w)
          return value(routed(index, nil, { weight = w, mask = mask }))
        end, { weight }))
      end
    end)
    it("load with noise, through all weights", function()
      moe.manual_seed(4)
      local router = moe.router.topk { d_model = 3, num_experts = 4, top_k = 2, noise = "learned", dtype = "f64" }
      local x = moe.randn(4, 3, { dtype = "f64", requires_grad = true })
      local params = { x, router.weight, router.noise_weight }
      assert.is_true(moe.gradcheck(function(a, weight, noise_weight)
        router.weight, router.noise_weight = weight, noise_weight
        return loss.load(0.5)(router:route(a))
      end, params, { seed = 7 }))
      router.weight, router.noise_weight = params[2], params[3]
      loss.load(1)(router:route(x)):backward()
      assert.is_true(router.noise_weight.grad:abs():sum():item() > 0)
    end)
    it("contrastive and diversity", function()
      moe.manual_seed(6)
      local settings = { dtype = "f64", requires_grad = true }
      local x, p = moe.randn(5, 3, settings), moe.randn(4, 3, settings)
      assert.is_true(moe.gradcheck(function(a, b)
        local ctx = { x = a, layer = { router = { weight = b } } }
        return loss.contrastive(0.5, { temperature = 0.7 })(routed(index, nil, { mask = mask }), ctx)
      end, { x, p }))
      local bank = moe.experts.mlp { d_model = 3, num_experts = 4, intermediate_size = 4, act = "tanh", dtype = "f64" }
      local r = routed(index, nil, { mask = mask })
      assert.is_true(moe.gradcheck(function(a, up, down)
        bank.up_proj, bank.down_proj = up, down
        return loss.diversity(0.5)(r, { x = a, layer = { experts = bank } })
      end, { x, bank.up_proj, bank.down_proj }))
      assert.is_true(moe.gradcheck(function(down)
        return loss.diversity(0.5, { of = "weights" })(r, { layer = { experts = { down_proj = down } } })
      end, { bank.down_proj }))
    end)
  end)

  describe("fall when a router follows them:", function()
    for name, value in pairs {
      switch = loss.switch(1), importance = loss.importance(1), load = loss.load(1), z = loss.z(1), entropy = loss.entropy(1),
      undecided = loss.entropy(-1), mutual_information = loss.mutual_information(1), concentration = loss.load_concentration(1),
      latency = loss.latency(1, { cost = { 1, 2, 3, 4 } }), contrastive = loss.contrastive(1),
      devices = loss.switch(1, { groups = { 1, 2, 2, 2 } }),
    } do
      it(name, function()
        moe.manual_seed(8)
        local x = moe.randn(64, 8) + 1 -- a mean of its own: the load is skewed
        local router = moe.router.topk { d_model = 8, num_experts = 4, top_k = 2, norm_topk_prob = false, init = "normal(1)" }
        local optimizer, first, last = moe.optim.adamw(router, { lr = 0.05, weight_decay = 0 }), nil, nil
        for _ = 1, 30 do
          local v = value(router:route(x), { x = x, layer = { router = router } })
          optimizer:zero_grad()
          v:backward()
          optimizer:step()
          first, last = first or v:item(), v:item()
        end
        assert.is_true(last < first - 0.03 * math.abs(first), ("%g, then %g"):format(first, last))
      end)
    end
  end)

  it("over the global batch of a trainer that accumulates: the last micro-batch sees all", function()
    local seen = {}
    local global = loss.switch(1, { by = "global" })
    local model = moe.layer {
      d_model = 3, num_experts = 4, experts = moe.experts.mlp { intermediate_size = 2 }, balance = { global },
      router = function(x)
        local e = x:narrow(2, 1, 1):to "i64" -- the expert that the data says, with certainty
        local probs = x:narrow(2, 1, 1):eq(moe.arange(1, 4):reshape { 1, 4 }):to "f32"
        return moe.routing.topk(e, nil, 4, { probs = probs + 0 * x:sum() })
      end,
    }
    local trainer = moe.trainer {
      model = model, optimizer = moe.optim.sgd { lr = 0.1 }, accumulate = 4, quiet = true,
      loss = function(m, batch, ctx)
        local y, r = m(batch, ctx)
        seen[#seen + 1] = r:aux():item()
        return y:sum() * 0 + r:aux()
      end,
    }
    local batches = {}
    for e = 1, 4 do batches[e] = moe.full({ 2, 3 }, e) end
    trainer:fit(batches, { steps = 2 })
    assert.close({ 4, 2, 4 / 3, 1, 4, 2, 4 / 3, 1 }, seen)
  end)

  it("name themselves and what is missing", function()
    local bare = moe.routing.topk(i64 { { 1 }, { 2 } }, nil, 4)
    for name, value in pairs {
      switch = loss.switch(1), load = loss.load(1), entropy = loss.entropy(1), load_concentration = loss.load_concentration(1),
      mutual_information = loss.mutual_information(1), latency = loss.latency(1, { cost = { 1, 1, 1, 1 } }),
    } do
      assert.matches("loss." .. name .. ": the routing has no probs", helper.error_of(value, bare, {}))
    end
    assert.matches("loss.z: the routing has no logits", helper.error_of(loss.z(1), bare))
    assert.matches("loss.diversity: the routing has no index", helper.error_of(loss.diversity(1),
      moe.routing.dense(moe.ones(2, 4)), { layer = { experts = {} }, x = moe.ones(2, 3) }))
    local function groups(g) loss.switch(1, { groups = g })(routed(EVEN, uniform)) end
    for pattern, f in pairs {
      ["coef%) must be a number or a function of the step, got a string"] = function() loss.load "x" end,
      ["did you mean 'groups'"] = function() loss.switch(1, { group = 2 }) end,
      ["groups is 3, wanted a divisor of the 4 experts"] = function() groups(3) end,
      ["groups lists 2 experts, the routing has 4"] = function() groups({ 1, 2 }) end,
      ["groups%[2%] must be a number of a group from 1, got 0"] = function() groups({ 1, 0, 1, 1 }) end,
      ["no expert is in group 2 of 3"] = function() groups({ 1, 3, 1, 1 }) end,
      ["loss.latency: the option 'cost' is missing"] = function() loss.latency(1) end,
      ["cost%[2%] must be a positive number, got 0"] = function() loss.latency(1, { cost = { 1, 0 } }) end,
      ["cost lists 2 experts, the routing has 4"] = function() loss.latency(1, { cost = { 1, 1 } })(routed(EVEN, uniform)) end,
      ["option 'by' must be one of"] = function() loss.mutual_information(1, { by = "day" }) end,
      ["tokens must be at least 1"] = function() loss.diversity(1, { tokens = 0 }) end,
      ["a soft routing has no choices"] = function()
        local r = moe.routing.soft(moe.ones(2, 4, 1), moe.ones(2, 4, 1))
        r.probs = moe.ones(2, 4)
        loss.load(1)(r)
      end,
    } do
      assert.matches(pattern, helper.error_of(f))
    end
  end)
end)
