-- What can be seen of routers: co-activation, specialisation, change, local consistency, traces and replay.
local helper = require "spec.helper"
local moe = require "moe"

local function topk(rows, E, weight) return moe.routing.topk(moe.tensor(rows, { dtype = "i64" }), weight, E) end

describe("routing:coactivation", function()
  it("counts pairs of experts at the same token", function()
    local r = topk({ { 1, 2 }, { 1, 3 }, { 2, 1 }, { 3, 0 }, { 0, 0 } }, 4)
    assert.same({ { 3, 2, 1, 0 }, { 2, 2, 0, 0 }, { 1, 0, 2, 0 }, { 0, 0, 0, 0 } }, r:coactivation():totable())
    assert.same({ { 0, 0 }, { 0, 0 } }, moe.routing.dense(moe.zeros(0, 2)):coactivation():totable())
  end)
end)

describe("moe.inspect", function()
  local inspect = moe.inspect

  it("counts which group goes to which expert, and goes on counting", function()
    local r = topk({ { 1, 2 }, { 1, 3 }, { 2, 0 }, { 3, 2 } }, 3)
    local group = moe.tensor({ 1, 2, 2, 0 }, { dtype = "i64" })
    local counts = inspect.specialisation(r, group, 2)
    assert.same({ { 1, 1, 0 }, { 1, 1, 1 } }, counts:totable())
    assert.same({ { 2, 2, 0 }, { 2, 2, 2 } }, inspect.specialisation(r, group, 2, counts):totable())
    assert.matches("index tensor of 4 tokens, got %[3%]", helper.error_of(function() inspect.specialisation(r, moe.zeros(3), 2) end))
    assert.matches("values outside of 0 to 1", helper.error_of(function() inspect.specialisation(r, group, 1) end))
  end)

  it("measures how much the group tells of the expert", function()
    assert.close(1, inspect.information(moe.tensor { { 5, 0, 0 }, { 0, 3, 2 } }), { atol = 1e-12 })
    assert.close(0, inspect.information(moe.tensor { { 2, 4 }, { 1, 2 } }), { atol = 1e-12 })
    assert.equal(0, inspect.information(moe.zeros(2, 2)))
    -- by hand: joint 3/8 1/8 1/8 3/8, both margins even
    local h = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert.close(1 - h / math.log(2), inspect.information(moe.tensor { { 3, 1 }, { 1, 3 } }), { atol = 1e-12 })
  end)

  it("measures change as the share of lost assignments and of changed tokens", function()
    local a, b = topk({ { 1, 2 }, { 3, 4 }, { 1, 4 } }, 4), topk({ { 2, 1 }, { 3, 1 }, { 2, 3 } }, 4)
    local moved, tokens = inspect.change(a, b)
    assert.close(3 / 6, moved)
    assert.close(2 / 3, tokens)
    assert.same({ 0, 0 }, { inspect.change(a, a) })
    assert.matches("2 tokens, 4 experts and of 3", helper.error_of(function() inspect.change(topk({ { 1 }, { 2 } }, 4), a) end))
  end)

  -- Every group of experts, tried.
  local function best_of_all(rows, E, length, size)
    local srp, hits, total, segments = 0, 0, 0, 0
    for s = 1, #rows, length do
      local best, most, n, assigned = 0, 0, 0, 0
      for t = s, math.min(s + length - 1, #rows) do
        n = n + 1
        assigned = assigned + #rows[t]
      end
      for set = 1, (1 << E) - 1 do
        local members, covered = 0, 0
        for e = 1, E do members = members + (set >> (e - 1) & 1) end
        for t = s, s + n - 1 do
          for _, e in ipairs(rows[t]) do covered = covered + (set >> (e - 1) & 1) end
        end
        best = math.max(best, 2 * covered / (n * members + assigned))
        if members == size then most = math.max(most, covered) end
      end
      srp, hits, total, segments = srp + best, hits + most, total + assigned, segments + 1
    end
    return srp / segments, hits / total
  end

  it("finds the best fixed group and cache of each segment, as trying all does", function()
    local random = helper.random(3)
    for _ = 1, 10 do
      local rows = {}
      for t = 1, 23 do
        local e = random(6)
        rows[t] = { e, e % 6 + 1 }
        if random() < 0.5 then rows[t][2] = (e + 2) % 6 + 1 end
      end
      local got = inspect.segments(topk(rows, 6), { length = 5, cache = 1.5 })
      local srp, sch = best_of_all(rows, 6, 5, 3)
      assert.close(srp, got.srp, { rtol = 1e-12 })
      assert.close(sch, got.sch, { rtol = 1e-12 })
      assert.equal(5, got.segments)
    end
    -- all tokens alike: perfect; time cuts segments
    local same = topk({ { 1 }, { 1 }, { 2 }, { 2 } }, 4)
    local two = inspect.segments(same, { length = 16, cache = 1, time = 2 })
    assert.same({ srp = 1, sch = 1, segments = 2 }, two)
    assert.close(0.5, inspect.segments(same, { length = 16, cache = 1 }).sch)
  end)

  local function tiny()
    moe.manual_seed(1)
    return moe.model.lm { vocab_size = 11, d_model = 16, num_layers = 2, num_heads = 2, max_seq_len = 8, ffn = "moe",
      moe = { num_experts = 4, top_k = 2, intermediate_size = 8 } }
  end

  it("looks at a model without moving it", function()
    local model, ids = tiny(), moe.randint(1, 11, { 2, 8 })
    local layer = model.layers[1].ffn
    local routings = inspect.routings(model, ids)
    assert.equal(2, #routings)
    assert.equal(16, routings[1].num_tokens)
    assert.is_true(model.training and layer.training)
    assert.error(function() inspect.routings(model, moe.full({ 1, 3 }, 99, { dtype = "i64" })) end) -- the model's own message
    assert.is_true(model.training)
    assert.matches("argument 1 must be a model, got a table", helper.error_of(function() inspect.routings({}, ids) end))
  end)

  it("traces a training to a file, and replays the choices to the bit", function()
    local path = os.tmpname()
    local ids = moe.randint(1, 11, { 2, 8 })
    local function run(prepare, trace)
      local model = tiny()
      prepare(model)
      local losses = {}
      for step = 1, 3 do
        local ctx = { step = step }
        local loss = model(ids, ctx):square():mean()
        for i, r in ipairs(ctx.routings) do
          if trace then trace:record(r, step, i) end
        end
        loss:backward()
        losses[step] = loss:item()
        moe.no_grad(function()
          for _, p in model:named_parameters() do
            if p.grad then p:add_(p.grad * -0.5) end
            p.grad = nil
          end
        end)
      end
      return losses
    end
    local trace = assert(inspect.trace(path))
    local losses = run(function() end, trace)
    trace:close()
    local records = assert(inspect.read_trace(path))
    assert.equal(6, #records)
    assert.same({ 3, 2 }, { records[6].step, records[6].layer })
    assert.same({ 16, 4 }, { records[6].tokens, records[6].experts })
    assert.same(losses, run(function(model) assert.equal(2, inspect.force(model, inspect.replay(records))) end))
    local other = run(function(model) inspect.force(model, "uniform") end)
    assert.is_true(other[3] ~= losses[3])
    local again = inspect.recorded(records[1])
    assert.equal(32, again.num_assignments)
    assert.matches("no record of step 9, layer 1", helper.error_of(function()
      local model = tiny()
      inspect.force(model, inspect.replay(records))
      model(ids, { step = 9 })
    end))
    os.remove(path)
  end)

  it("records routings of any form, as entry of a layer's balance", function()
    local path = os.tmpname()
    local trace = assert(inspect.trace(path))
    local layer = moe.layer { d_model = 4, num_experts = 3, experts = moe.experts.mlp { intermediate_size = 4 }, balance = { trace },
      router = function() return moe.routing.dense(moe.tensor { { 0.5, 0, 0.5 }, { 0, 0, 0 }, { 0, 1, 0 } }) end }
    layer(moe.randn(3, 4), { step = 7, layer_number = 2 })
    layer:eval()
    layer(moe.randn(3, 4), { step = 8 })
    trace:close()
    local records = assert(inspect.read_trace(path))
    assert.equal(1, #records)
    assert.same({ { 1, 3 }, { 0, 0 }, { 2, 0 } }, records[1].index)
    assert.same({ { 0.5, 0.5 }, { 0, 0 }, { 1, 0 } }, records[1].weight)
    local file = assert(io.open(path, "w"))
    file:write('{"tokens":2,"experts":3,"index":[[1],[4]]}\n')
    file:close()
    local none, message = inspect.read_trace(path)
    assert.is_nil(none)
    assert.matches("line 1: not a routing", message)
    os.remove(path)
    assert.is_nil((inspect.read_trace(path)))
    assert.is_nil((inspect.trace "/nowhere/at/all"))
  end)
end)
