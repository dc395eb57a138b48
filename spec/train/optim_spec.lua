local moe = require "moe"
local helper = require "spec.helper"

-- the starting values and gradients of spec/fixture/make_adamw.py
local sizes = { 5, 7 }
local function start(which, dtype)
  local t = {}
  for i = 0, sizes[which] - 1 do t[i + 1] = ((i * 37 + (which - 1) * 11) % 19 - 9) / 8 end
  return moe.tensor(t, { dtype = dtype, requires_grad = true })
end
local function set_grad(p, step, which)
  local t, v = {}, p:detach():cast("f64"):totable()
  for i = 1, #v do t[i] = 0.5 * v[i] + math.sin(step * (i + which - 1)) end
  p.grad = moe.tensor(t, { dtype = "f64" }):cast(p.dtype)
end

describe("optimizers against PyTorch", function()
  for _, case in ipairs(helper.fixture "optim") do
    local text = {}
    for k, v in pairs(case.options) do text[#text + 1] = k .. "=" .. (type(v) == "table" and table.concat(v, ",") or tostring(v)) end
    table.sort(text)
    it(case.kind .. " " .. case.dtype .. " " .. table.concat(text, " "), function()
      local params = { start(1, case.dtype), start(2, case.dtype) }
      local opt = moe.optim[case.kind](params, case.options)
      local tolerance = case.dtype == "f64" and { rtol = 1e-12, atol = 1e-13 } or { rtol = 2e-5, atol = 2e-6 }
      for step = 1, 20 do
        for k, p in ipairs(params) do set_grad(p, step, k) end
        opt:step()
        if step == 1 then
          for k, p in ipairs(params) do assert.close(case.first[k], p, tolerance) end
        end
      end
      for k, p in ipairs(params) do assert.close(case.last[k], p, tolerance) end
    end)
  end
end)

describe("optimizers", function()
  local function param(values, opts)
    opts = opts or {}
    opts.requires_grad = true
    return moe.tensor(values, opts)
  end

  it("take a strided parameter and gradient as their dense copies", function()
    local base = moe.arange(1, 12, { dtype = "f32" }):reshape(3, 4)
    local a = base:clone():t():detach()
    local b = base:t():contiguous()
    a.requires_grad, b.requires_grad = true, true
    local g = moe.randn(3, 4)
    for _, kind in ipairs { "adamw", "sgd" } do
      local oa, ob = moe.optim[kind](a, { lr = 0.1 }), moe.optim[kind](b, { lr = 0.1 })
      for _ = 1, 3 do
        a.grad, b.grad = g:t(), g:t():contiguous()
        oa:step()
        ob:step()
      end
      assert.same(b:totable(), a:totable())
    end
    assert.is_false(a:is_contiguous())
  end)

  it("keep an f32 master copy of bf16 parameters", function()
    local p = param({ 1, 2 }, { dtype = "bf16" })
    local opt = moe.optim.sgd(p, { lr = 1 })
    for _ = 1, 16 do -- each step alone would be rounded away
      p.grad = moe.tensor({ 2 ^ -11, 2 ^ -11 }, { dtype = "bf16" })
      opt:step()
    end
    assert.same({ 1 - 2 ^ -7, 2 - 2 ^ -7 }, p:cast("f32"):totable())
    moe.no_grad(function() p:fill_(3) end) -- a write from outside is not lost
    p.grad = moe.tensor({ 0, 0 }, { dtype = "bf16" })
    opt:step()
    assert.same({ 3, 3 }, p:cast("f32"):totable())
  end)

  it("skip parameters without a gradient and count their steps one by one", function()
    local a, b = param { 1 }, param { 1 }
    local opt = moe.optim.adamw({ a, b }, { lr = 0.1, weight_decay = 0 })
    a.grad = moe.tensor { 1 }
    opt:step()
    assert.equal(1, b:item())
    assert.is_nil(opt:state_dict()["2.exp_avg"])
    opt:zero_grad()
    assert.is_nil(a.grad)
    b.grad = moe.tensor { 1 }
    opt:step()
    assert.close(0.9, b:item(), { rtol = 1e-6 }) -- a first step of Adam is lr
  end)

  it("have groups with options of their own", function()
    local a, b, c = param { 1 }, param { 1 }, param { 1 }
    local opt = moe.optim.sgd({ { params = a, lr = 0.5 }, { params = { b, c } } }, { lr = 0.25 })
    for _, p in ipairs { a, b, c } do p.grad = moe.tensor { 1 } end
    opt:step()
    assert.same({ 0.5, 0.75, 0.75 }, { a:item(), b:item(), c:item() })
    assert.equal(0.5, opt.lr)
    assert.equal(0.25, opt.groups[2].lr)
    assert.equal(2, #opt.groups[2].params)
    opt.groups[2].lr = 0
    opt:step()
    assert.same({ 0, 0.75 }, { a:item(), b:item() })
    opt.lr = 1
    assert.same({ 1, 1 }, { opt.groups[1].lr, opt.groups[2].lr })
    assert.equal(3, #opt.params)
  end)

  it("spare tagged parameters, or vectors, or none from decay", function()
    local function decayed(mode)
      local v, m = param { 1, 1 }, param { { 1, 1 } }
      moe.core._module.set_tag(v, 4)
      local opt = moe.optim.adamw({ v, m }, { lr = 0.5, weight_decay = 0.5, no_decay = mode })
      v.grad, m.grad = moe.zeros(2), moe.zeros(1, 2)
      opt:step()
      return { v[1], m[1][1] }
    end
    assert.same({ 1, 0.75 }, decayed(nil))
    assert.same({ 1, 0.75 }, decayed "vectors")
    assert.same({ 0.75, 0.75 }, decayed "none")
  end)

  it("clip by the global norm: fused and by the function alike", function()
    local function grads()
      local a, b = param { 1, 1 }, param { 1 }
      a.grad, b.grad = moe.tensor { 3, 0 }, moe.tensor { 4 }
      return a, b
    end
    local a, b = grads()
    assert.equal(5, moe.optim.clip_grad_norm({ a, b }, 1))
    assert.close({ 0.6, 0 }, a.grad, { rtol = 1e-6 })
    assert.close({ 0.8 }, b.grad, { rtol = 1e-6 })
    assert.close(1, moe.optim.sgd({ a, b }):grad_norm(), { rtol = 1e-6 })
    moe.optim.clip_grad_norm({ a, b }, 100) -- nothing to do
    assert.close({ 0.8 }, b.grad, { rtol = 1e-6 })
    local c, d = grads()
    assert.equal(5, moe.optim.sgd({ c, d }, { lr = 1 }):step { clip = 1 })
    assert.close({ 0.4, 1 }, c, { rtol = 1e-5 })
    assert.close({ 0.2 }, d, { rtol = 1e-5 })
    assert.same({ 3, 0 }, c.grad:totable())
  end)

  it("sum squares in double: large and many", function()
    local p = moe.full({ 50001 }, 1e20, { requires_grad = true })
    p.grad = moe.full({ 50001 }, 1e20)
    assert.close(1e20 * math.sqrt(50001), moe.optim.sgd(p):grad_norm(), { rtol = 1e-6 })
  end)

  it("give the same bits for any number of threads", function()
    local before = moe.threads()
    local function run(n)
      moe.threads(n)
      moe.manual_seed(3)
      local list = {}
      for i = 1, 5 do
        list[i] = moe.randn(i * 7919)
        list[i].requires_grad = true
      end
      list[6] = moe.zeros(0, { requires_grad = true })
      local opt = moe.optim.adamw(list, { lr = 0.01 })
      for _ = 1, 3 do
        for _, p in ipairs(list) do p.grad = moe.randn_like(p:detach()) end
        opt:step { clip = 0.5 }
      end
      local out = {}
      for i, p in ipairs(list) do out[i] = p:totable() end
      return out
    end
    local one, two = run(1), run(2)
    moe.threads(before)
    assert.same(one, two)
  end)

  it("save and load their state", function()
    for _, kind in ipairs { "adamw", "sgd" } do
      local options = kind == "sgd" and { lr = 0.1, momentum = 0.9 } or { lr = 0.1 }
      local function train(p, opt, n)
        for i = 1, n do
          p.grad = p:detach() * (i + opt.lr)
          opt:step()
        end
      end
      local p, q = param { 1, -2, 3 }, param { 1, -2, 3 }
      local o1, o2 = moe.optim[kind](p, options), moe.optim[kind](q, options)
      train(p, o1, 2)
      moe.core._module.assign(q, p)
      o2:load_state_dict(o1:state_dict())
      train(p, o1, 3)
      train(q, o2, 3)
      assert.same(p:totable(), q:totable())
      local r = param { 1, 2 }
      assert.error_matches(function() moe.optim[kind](r, options):load_state_dict(o1:state_dict()) end, "%[3%].*%[2%]")
      local state = o1:state_dict()
      state.extra = moe.zeros(1)
      assert.error_matches(function() o2:load_state_dict(state) end, "1 of %d entries")
    end
  end)

  it("are unbound until they are called with what they update", function()
    local u = moe.optim.adamw { lr = 0.5, weight_decay = 0 }
    assert.is_true(moe.optim.is_unbound(u))
    assert.is_true(moe.optim.is_unbound(moe.optim.sgd()))
    local p = param { 1 }
    local opt = u(p)
    p.grad = moe.tensor { 1 }
    opt:step()
    assert.close(0.5, p:item(), { rtol = 1e-6 })
    assert.equal("adamw", opt.kind)
    assert.matches("adamw: 1 parameters in 1 tensors; lr = 0.5", tostring(opt))
  end)

  it("use the names of a module's parameters", function()
    local model = moe.nn.linear(2, 3)
    local opt = moe.optim.adamw(model, { lr = 0.1 })
    model(moe.randn(4, 2)):sum():backward()
    opt:step()
    assert.is_not_nil(opt:state_dict()["weight.exp_avg"])
  end)

  it("tell what is wrong", function()
    local p = param { 1 }
    local function wrong(pattern, f) assert.error_matches(f, pattern) end
    local adamw, sgd = moe.optim.adamw, moe.optim.sgd
    wrong("unknown option 'lrr' %(did you mean 'lr'%?%)", function() adamw(p, { lrr = 1 }) end)
    wrong("unknown option 'weight_deca' %(did you mean 'weight_decay'", function() adamw { weight_deca = 1 } end)
    wrong("lr must be a number, got the string", function() adamw(p, { lr = "x" }) end)
    wrong("lr must be a finite number of at least 0, got %-1", function() adamw(p, { lr = -1 }) end)
    wrong("betas must be at least 0 and below 1, got 1", function() adamw(p, { betas = { 0.9, 1 } }) end)
    wrong("betas must be a list of 2 numbers", function() adamw(p, { betas = 0.9 }) end)
    wrong("nesterov must be true or false", function() sgd(p, { nesterov = 1 }) end)
    wrong("nesterov needs a momentum", function() sgd(p, { nesterov = true }) end)
    wrong("given twice", function() adamw({ p, p }) end)
    wrong("given twice", function() adamw({ { params = p }, { params = p } }) end)
    wrong("a module, a tensor, a list", function() adamw(3, {}) end)
    wrong("has type i64", function() adamw(moe.arange(1, 3, { dtype = "i64" })) end)
    wrong("only leaves", function() adamw(p * 2) end)
    wrong("no_decay must be", function() adamw(p, { no_decay = "x" }) end)
    wrong("must be a table of options", function() adamw(p, 3) end)
    local opt = adamw(p)
    wrong("lr must be a finite", function() opt.lr = 0 / 0 end)
    wrong("unknown option 'foo'", function() opt.foo = 1 end)
    wrong("clip must be", function() opt:step { clip = 0 } end)
    wrong("must be an optimizer", function() opt.step(p) end)
    wrong("argument 2 %(max%)", function() moe.optim.clip_grad_norm({ p }, -1) end)
    wrong("state must hold tensors", function() opt:load_state_dict { x = 1 } end)
  end)

  it("change nothing when memory runs out", function()
    local p = param { 1, 2 }
    p.grad = moe.tensor { 1, 1 }
    local opt = moe.optim.adamw(p, { lr = 0.1 })
    for n = 1, 2 do
      moe.core.fail_after(n)
      local ok = pcall(opt.step, opt)
      moe.core.fail_after(0)
      assert.is_false(ok)
      assert.same({ 1, 2 }, p:totable())
    end
    opt:step()
    assert.close({ 0.9 - 0.001, 1.9 - 0.002 }, p, { rtol = 1e-6 })
  end)

  it("die with their parameters: no cycle keeps them", function()
    collectgarbage()
    collectgarbage()
    local before = moe.memory().live
    do
      local q = param { 1, 2, 3 }
      local opt = moe.optim.adamw(q)
      q.grad = moe.zeros(3)
      opt:step()
      q:register_hook(function(g) local _ = opt return g end)
    end
    collectgarbage()
    collectgarbage()
    assert.equal(before, moe.memory().live)
  end)
end)
