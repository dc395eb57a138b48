local moe = require "moe"
local helper = require "spec.helper"

local function f64(t) return moe.tensor(t, { dtype = "f64" }) end

local function layer_of(o)
  o.d_model, o.num_experts = o.d_model or 6, o.num_experts or 4
  o.experts = o.experts or moe.experts.swiglu { intermediate_size = 5 }
  moe.manual_seed(o.seed or 1)
  o.seed = nil
  return moe.layer(o)
end

-- A router that gives token t the experts and weights of row t.
local function fixed(index, weight, extras)
  return function(x)
    local routing = moe.routing.topk(moe.tensor(index, { dtype = "i64" }), weight, extras and extras.num_experts or 4)
    for k, v in pairs(extras or {}) do
      if k ~= "num_experts" then routing[k] = v end
    end
    assert(x)
    return routing
  end
end

describe("moe.layer against PyTorch", function()
  for name, case in pairs(helper.fixture "moe_layer") do
    it("agrees forward and backward: " .. name, function()
      local c, p = case.options, case.parameters
      local make = c.gated and moe.experts.swiglu or moe.experts.mlp
      local layer = moe.layer {
        d_model = 4, num_experts = c.num_experts, dtype = "f64",
        router = moe.router.topk { top_k = c.top_k, score = c.score, score_after = c.score_after, norm_topk_prob = c.norm_topk_prob,
          n_group = c.n_group, topk_group = c.topk_group, routed_scaling_factor = c.routed_scaling_factor, selection_bias = true },
        experts = make { intermediate_size = 3, bias = not c.gated, act = not c.gated and "relu" or nil },
        balance = { moe.loss.switch(0.3), moe.loss.z(0.2) },
      }
      local names = c.gated and { w_in = "gate_up_proj", w_out = "down_proj" }
        or { w_in = "up_proj", w_out = "down_proj", b_in = "up_bias", b_out = "down_bias" }
      moe.no_grad(function()
        layer.router.weight:copy_(f64(p.router_weight))
        layer.router.expert_bias:copy_(f64(p.expert_bias))
        for from, to in pairs(names) do layer.experts[to]:copy_(f64(p[from])) end
      end)
      local x = moe.tensor(case.x, { dtype = "f64", requires_grad = true })
      local y, routing = layer(x)
      assert.same(case.index, routing.index:totable())
      local close = { rtol = 1e-8, atol = 1e-9 }
      assert.close(case.y, y, close)
      assert.close(0.3 * case.switch, routing:aux("switch"), close)
      assert.close(0.2 * case.z, routing:aux("z"), close)
      ;((y * f64(case.g)):sum() + routing:aux()):backward()
      assert.close(case.grad.x, x.grad, close)
      assert.close(case.grad.router_weight, layer.router.weight.grad, close)
      for from, to in pairs(names) do assert.close(case.grad[from], layer.experts[to].grad, close) end
    end)
  end
end)

describe("moe.layer", function()
  it("takes any leading shape and returns its routing", function()
    local layer = layer_of {}
    local x = moe.randn(2, 3, 6)
    local y, routing = layer(x)
    assert.same({ 2, 3, 6 }, y.shape)
    assert.equal(6, routing.num_tokens)
    assert.close(y:reshape { 6, 6 }, layer(x:reshape { 6, 6 }))
    assert.close(y[1][1], layer(x[1][1]), { rtol = 1e-5, atol = 1e-6 })
    assert.same({ 0, 6 }, layer(moe.zeros(0, 6)).shape)
  end)

  it("with one expert and k = 1 is the dense network to the bit", function()
    local layer = layer_of { num_experts = 1, router = moe.router.topk { top_k = 1 } }
    local dense = moe.experts.swiglu { d_model = 6, intermediate_size = 5 }
    dense:load_state_dict(layer.experts:state_dict())
    local x = moe.randn(9, 6)
    assert.same(dense(x):totable(), (layer(x)):totable())
  end)

  it("with all experts chosen is the dense mixture", function()
    local layer = layer_of { dtype = "f64", router = moe.router.topk { top_k = 4, norm_topk_prob = false } }
    local x = moe.randn(7, 6, { dtype = "f64", requires_grad = true })
    local y = layer(x)
    local gate, wanted = x:linear(layer.router.weight):softmax(-1), 0
    for e = 1, 4 do
      local h = x:matmul(layer.experts.gate_up_proj[e]:t())
      local a = h:narrow(2, 1, 5):silu() * h:narrow(2, 6, 5)
      wanted = wanted + a:matmul(layer.experts.down_proj[e]:t()) * gate:narrow(2, e, 1)
    end
    assert.close(wanted, y, { rtol = 1e-10 })
    local inputs = { x, layer.router.weight, layer.experts.gate_up_proj, layer.experts.down_proj }
    local a, b = { moe.grad(y:square():sum(), inputs) }, { moe.grad(wanted:square():sum(), inputs) }
    for i = 1, 4 do assert.close(b[i], a[i], { rtol = 1e-9, atol = 1e-10 }) end
  end)

  it("leaves padding tokens at zero and out of every statistic", function()
    local layer = layer_of { balance = { moe.loss.switch(1), moe.loss.z(1), moe.loss.switch(1, { by = "sequence" }) } }
    local x = moe.randn(2, 4, 6)
    local mask = moe.tensor { { true, true, true, false }, { true, false, true, true } }
    local y, routing = layer(x, { mask = mask })
    assert.equal(12, routing.num_assignments)
    assert.equal(4, routing.masked)
    assert.equal(0, y[1][4]:abs():sum():item())
    assert.equal(0, y[2][2]:abs():sum():item())
    -- the same tokens without the padding
    local kept = moe.cat({ x[1]:narrow(1, 1, 3), x[2]:narrow(1, 1, 1), x[2]:narrow(1, 3, 2) }, 1)
    local z, other = layer(kept)
    assert.close(z:narrow(1, 1, 3), y[1]:narrow(1, 1, 3), { rtol = 1e-5, atol = 1e-6 })
    assert.close(other:aux "z", routing:aux "z", { rtol = 1e-5 })
    assert.same(other:load():totable(), routing:load():totable())
    local plain = layer_of { balance = moe.loss.switch(1) }
    local _, a = plain(x, { mask = mask })
    local _, b = plain(kept)
    assert.close(b:aux(), a:aux(), { rtol = 1e-5 })
  end)

  describe("balance losses in closed form", function()
    local function aux(loss, index, probs, extras)
      extras = extras or {}
      extras.probs, extras.index, extras.num_experts = probs, moe.tensor(index, { dtype = "i64" }), 4
      local layer = layer_of { router = fixed(index, moe.ones { #index, #index[1] }, extras), balance = loss }
      local _, routing = layer(extras.x or moe.zeros(#index, 6))
      return routing:aux():item()
    end
    local even = { { 1, 2 }, { 3, 4 }, { 2, 3 }, { 4, 1 } }
    local collapsed = { { 1, 2 }, { 2, 1 }, { 1, 2 }, { 2, 1 } }
    local half = moe.tensor { { .5, .5, 0, 0 } }:expand { 4, 4 }

    it("switch: 1 when even, E/k when k experts take all", function()
      assert.close(0.01, aux(moe.loss.switch(0.01), even, moe.full({ 4, 4 }, 0.25)))
      assert.close(2, aux(moe.loss.switch(1), collapsed, half))
      assert.close(2, aux(moe.loss.switch(1, { norm = "k" }), even, moe.full({ 4, 4 }, 0.25)))
      assert.close(4, aux(moe.loss.switch(1, { norm = "k" }), collapsed, half))
    end)

    it("switch by sequence: each sequence counts for itself", function()
      -- two sequences, each collapsed on two experts of its own: even over the batch, E/k within
      local index = { { 1, 2 }, { 2, 1 }, { 3, 4 }, { 4, 3 } }
      local probs = moe.tensor { { .5, .5, 0, 0 }, { .5, .5, 0, 0 }, { 0, 0, .5, .5 }, { 0, 0, .5, .5 } }
      assert.close(1, aux(moe.loss.switch(1), index, probs))
      assert.close(2, aux(moe.loss.switch(1, { by = "sequence" }), index, probs, { x = moe.zeros(2, 2, 6) }))
    end)

    it("z: the squared logarithm of E at zero logits", function()
      assert.close(math.log(4) ^ 2, aux(moe.loss.z(1), even, nil, { logits = moe.zeros(4, 4) }))
      assert.close(math.log(64) ^ 2, 17.296, { rtol = 1e-4 })
    end)

    it("importance: 0 when even, variance over squared mean else", function()
      assert.close(0, aux(moe.loss.importance(1), even), { atol = 1e-6 })
      assert.close(1, aux(moe.loss.importance(1), collapsed), { rtol = 1e-5 })
    end)

    it("ask for what the routing lacks by name", function()
      assert.matches("loss.switch: the routing has no probs", helper.error_of(function() return aux(moe.loss.switch(1), even) end))
      assert.matches("coef", helper.error_of(function() return moe.loss.switch "x" end))
      assert.matches("did you mean 'norm'", helper.error_of(function() return moe.loss.switch(1, { nrm = "k" }) end))
    end)
  end)

  it("drops what is over capacity, in training and in evaluation by factors of their own", function()
    local index = { { 1 }, { 1 }, { 1 }, { 2 } }
    local weight = moe.tensor { { .1 }, { .9 }, { .5 }, { 1 } }
    local layer = layer_of { router = fixed(index, weight), capacity_factor = 1, eval_capacity_factor = 2 }
    local x = moe.randn(4, 6)
    local y, routing = layer(x)
    assert.equal(2, routing.dropped) -- 1 x 4 / 4 = 1 token an expert
    assert.same({ 1, 3 }, routing.dropped_token:totable())
    assert.equal(0, y[1]:abs():sum():item())
    assert.is_true(y[2]:abs():sum():item() > 0)
    assert.equal(2, layer:stats().dropped)
    layer:eval()
    local _, second = layer(x)
    assert.same({ 1 }, second.dropped_token:totable())
    local first = layer_of { router = fixed(index, weight), capacity_factor = 1, drop_policy = "position", min_capacity = 2 }
    local _, third = first(x)
    assert.same({ 3 }, third.dropped_token:totable())
    local last = layer_of { router = fixed(index, weight), capacity_factor = 1, drop_policy = function(r, ctx)
      assert(ctx.layer)
      return r.token:to "f32" -- the last tokens stay
    end }
    assert.same({ 1, 2 }, select(2, last(x)).dropped_token:totable())
    local lost = {}
    local random = layer_of { router = fixed(index, weight), capacity_factor = 1, drop_policy = "random" }
    for _ = 1, 50 do
      for _, t in ipairs(select(2, random(x)).dropped_token:totable()) do lost[t] = true end
    end
    assert.same({ true, true, true }, lost)
  end)

  it("moves the selection bias once a step, towards the mean load", function()
    local layer = layer_of { bias_update_rate = 0.5, router = moe.router.topk { top_k = 1, score = "sigmoid" } }
    local bias = layer.router.expert_bias
    moe.no_grad(function() layer.router.weight:copy_(moe.zeros(4, 6)) end)
    local x = moe.randn(8, 6)
    layer(x) -- ties: all to expert 1
    layer(x)
    assert.same({ 0, 0, 0, 0 }, bias:totable())
    layer:after_step()
    assert.close({ -.5, .5, .5, .5 }, bias)
    layer:after_step() -- nothing seen since
    assert.close({ -.5, .5, .5, .5 }, bias)
    layer:eval()
    layer(x)
    layer:after_step()
    assert.close({ -.5, .5, .5, .5 }, bias)
    layer:train()
    local _, routing = layer(x)
    assert.same({ 0, 8, 0, 0 }, routing:load():totable())
    -- what a checkpoint runs again counts once
    layer:after_step()
    layer:reset_stats()
    local input = moe.randn(8, 6, { requires_grad = true })
    moe.checkpoint(function(v) return (layer(v)) end, input):sum():backward()
    assert.equal(8, layer:stats().tokens)
    assert.equal(1, layer:stats().forwards)
    local names = {}
    for name in pairs(layer:state_dict()) do names[#names + 1] = name end
    table.sort(names)
    assert.same({ "experts.down_proj", "experts.gate_up_proj", "router.expert_bias", "router.weight" }, names)
    assert.is_false(moe.recomputing())
  end)

  it("brings an uneven router to an even load by the bias alone", function()
    local layer = layer_of { bias_update_rate = function(step) return 0.05 / step ^ 0.5 end,
      router = moe.router.topk { top_k = 2, score = "sigmoid" }, num_experts = 8 }
    moe.no_grad(function() layer.router.weight:mul_(4) end)
    local x = moe.randn(512, 6) + 0.7
    local _, before = layer(x)
    for _ = 1, 150 do
      moe.no_grad(function() layer(x) end)
      layer:after_step()
    end
    local _, after = layer(x)
    assert.is_true(before:max_over_mean() > 1.5)
    assert.is_true(after:max_over_mean() < 1.2, tostring(after))
  end)

  it("recomputes the same choice, noise included, and the same gradients", function()
    local layer = layer_of { router = moe.router.topk { top_k = 2, noise = "learned" } }
    local x = moe.randn(10, 6, { requires_grad = true })
    local function run(f)
      moe.manual_seed(5)
      layer:zero_grad()
      x.grad = nil
      f(x):square():sum():backward()
      return { x.grad:totable(), layer.router.weight.grad:totable(), layer.experts.down_proj.grad:totable() }
    end
    local function forward(v) return (layer(v)) end
    assert.same(run(forward), run(function(v) return moe.checkpoint(forward, v) end))
  end)

  it("forces, records and replays choices", function()
    local layer = layer_of { force = "uniform" }
    local x = moe.randn(8, 6)
    local _, routing = layer(x)
    assert.same({ 4, 4, 4, 4 }, routing:load():totable())
    layer.force = nil
    local y, recorded = layer(x)
    moe.no_grad(function() layer.router.expert_bias = nil layer.router.weight:add_(moe.randn(4, 6)) end)
    layer.force = recorded.index
    local _, replayed = layer(x)
    assert.same(recorded.index:totable(), replayed.index:totable())
    assert.is_true((replayed.weight - recorded.weight):abs():max():item() > 1e-4)
    assert.equal(8, y:size(1))
    layer.force = function(v) return moe.ones({ v:size(1), 2 }, { dtype = "i64" }) end
    assert.same({ 16, 0, 0, 0 }, select(2, layer(x)):load():totable())
    layer.force = "sideways"
    assert.matches("unknown force 'sideways'", helper.error_of(function() layer(x) end))
  end)

  it("adds shared experts by every rule", function()
    local x = moe.randn(5, 6)
    for _, rule in ipairs { "add", "gate", "average", "residual" } do
      local layer = layer_of { shared = moe.experts.swiglu { intermediate_size = 3 }, shared_combine = rule }
      local routed = layer.experts(x, (layer.router:route(x)))
      local shared = layer.shared(x)
      local wanted
      if rule == "add" then
        wanted = routed + shared
      elseif rule == "gate" then
        wanted = routed + x:linear(layer.shared_gate):sigmoid() * shared
      elseif rule == "average" then
        wanted = (routed * 2 + shared) / 3
      else
        local c = x:linear(layer.coefficient):softmax(-1)
        wanted = routed * c:narrow(2, 1, 1) + shared * c:narrow(2, 2, 1)
      end
      assert.close(wanted, (layer(x)), { rtol = 1e-5, atol = 1e-6 })
      layer(x):sum():backward()
      for name, p in layer:named_parameters() do assert.is_truthy(p.grad, name) end
    end
  end)

  it("takes a router, a loss and experts written in Lua, and they train", function()
    moe.manual_seed(3)
    local gate = moe.nn.linear(6, 3)
    local experts = { moe.nn.linear(6, 6), moe.nn.linear(6, 6), moe.nn.linear(6, 6) }
    local Router = moe.nn.module "my_router"
    function Router:init() self.gate = gate end
    function Router:route(x, ctx)
      assert(ctx.layer and ctx.shape)
      local probs = self.gate(x):softmax(-1)
      return moe.routing.dense(probs * probs:gt(0.3):to "f32", { probs = probs }) -- any number of experts a token
    end
    local seen
    local layer = moe.layer { d_model = 6, num_experts = 3, router = Router(), experts = moe.experts.map(experts),
      balance = { function(routing, ctx)
        seen = ctx.step
        return (routing.probs:mean(1) * routing.probs:mean(1)):sum() * 0.1
      end } }
    local x, target = moe.randn(64, 6), moe.randn(64, 6)
    local optimizer = moe.optim.adamw(layer, { lr = 0.02 })
    local first, last
    for step = 1, 60 do
      local ctx = { step = step }
      local y, routing = layer(x, ctx)
      local loss = moe.loss.mse(y, target) + moe.loss.aux(ctx)
      assert.equal(routing, ctx.routing)
      optimizer:zero_grad()
      loss:backward()
      optimizer:step()
      first, last = first or loss:item(), loss:item()
    end
    assert.equal(60, seen)
    assert.is_true(last < 0.8 * first, ("loss went from %g to %g"):format(first, last))
  end)

  it("passes the previous routing and whatever the caller adds", function()
    local got
    local function spy(x, ctx)
      got = { ctx.routing, ctx.modality, ctx.shape }
      return moe.routing.topk(moe.ones({ x:size(1), 1 }, { dtype = "i64" }), nil, 4)
    end
    local a, b = layer_of {}, layer_of { router = spy }
    local ctx = { modality = "text" }
    local x, first = a(moe.randn(2, 3, 6), ctx)
    b(x, ctx)
    assert.equal(first, got[1])
    assert.equal("text", got[2])
    assert.same({ 2, 3 }, got[3])
    assert.equal(2, #ctx.routings)
  end)

  it("does not share what is only described", function()
    local router, experts = moe.router.topk { top_k = 1 }, moe.experts.swiglu { intermediate_size = 5 }
    local a = moe.layer { d_model = 6, num_experts = 4, router = router, experts = experts }
    local b = moe.layer { d_model = 6, num_experts = 2, router = router, experts = experts }
    assert.is_false((a.experts.down_proj:sum() - b.experts.down_proj:sum()):item() == 0)
    assert.same({ 2, 6 }, b.router.weight.shape)
    local bank = moe.experts.swiglu { d_model = 6, num_experts = 4, intermediate_size = 5 }
    local c = moe.layer { d_model = 6, num_experts = 4, experts = bank }
    local d = moe.layer { d_model = 6, num_experts = 4, experts = bank }
    assert.equal(c.experts, d.experts)
    assert.matches("num_experts = 4, the layer wants 3", helper.error_of(function()
      return moe.layer { d_model = 6, num_experts = 3, experts = bank }
    end))
  end)

  it("reads well and keeps statistics", function()
    local layer = layer_of { balance = moe.loss.switch(0.01), capacity_factor = 1.5 }
    local text = tostring(layer)
    for _, part in ipairs { "d_model=6, num_experts=4", "switch%(0.01%)", "router: topk%(6 %-> 4, top_k=2", "experts: swiglu" } do
      assert.matches(part, text)
    end
    layer(moe.randn(10, 6))
    layer(moe.randn(10, 6))
    local s = layer:stats { reset = true }
    assert.equal(20, s.tokens)
    assert.equal(2, s.forwards)
    assert.equal(40, s.assignments + s.dropped)
    assert.is_true(s.entropy > 0 and s.entropy <= math.log(4) + 1e-9)
    assert.equal(0, layer:stats().tokens)
  end)

  it("names what is wrong", function()
    local cases = {
      { "unknown option 'num_expert' %(did you mean 'num_experts'", function() return moe.layer { num_expert = 4 } end },
      { "option 'experts' is missing", function() return moe.layer { d_model = 4, num_experts = 2 } end },
      { "'num_experts' must be at least 1", function() return layer_of { num_experts = 0 } end },
      { "'capacity_factor' must be positive", function() return layer_of { capacity_factor = 0 } end },
      { "'drop_policy' must be probs, position", function() return layer_of { drop_policy = "best" } end },
      { "balance%[1%] must be a function", function() return layer_of { balance = { 3 } } end },
      { "x is %[2, 5%], wanted %[%.%., 6%]", function() return layer_of {}(moe.ones(2, 5)) end },
      { "argument 1 %(x%) must be a tensor", function() return layer_of {}(3) end },
      { "argument 2 %(ctx%) must be a table", function() return layer_of {}(moe.ones(2, 6), 3) end },
      { "the router %(a function%) must return a routing",
        function() return layer_of { router = function() return 3 end }(moe.ones(2, 6)) end },
      { "returned 1 tokens and 4 experts, wanted 2 and 4", function() return layer_of { router = fixed({ { 1 } }) }(moe.ones(2, 6)) end },
      { "needs a router with selection_bias", function() return layer_of { router = fixed({ { 1 } }), bias_update_rate = 1 } end },
    }
    for _, case in ipairs(cases) do assert.matches(case[1], helper.error_of(case[2])) end
  end)
end)
