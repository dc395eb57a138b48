local moe = require "moe"
local helper = require "spec.helper"

-- y = w x + b fitted by gradient descent: small, with a model, data in order and a random part where wanted.
local function make(options, width)
  moe.manual_seed(1)
  width = width or 4
  local model = moe.nn.linear(width, 3)
  moe.manual_seed(2)
  options = options or {}
  options.model = model
  options.quiet = true
  options.optimizer = options.optimizer or moe.optim.adamw { lr = 0.01 }
  options.loss = options.loss or function(m, batch) return (m(batch.x) - batch.y):square():mean() end
  return moe.trainer(options), model
end

local function data(n, options)
  moe.manual_seed(7)
  return moe.data.batches(moe.randn(n, 4), moe.randn(n, 3), options or { batch_size = 8, shuffle = true, seed = 3 })
end

local function weights(model)
  local out = {}
  for name, t in pairs(model:state_dict()) do out[name] = t:totable() end
  return out
end

describe("the trainer", function()
  local dir
  before_each(function() dir = helper.temporary ".run" end)
  after_each(function() os.execute("rm -rf '" .. dir .. "'") end)

  it("does what a loop of one's own does, to the bit", function()
    local trainer, model = make { clip = 0.5, schedule = function(step) return 1 / step end }
    local seen = {}
    trainer.on_step = function(m) seen[#seen + 1] = m end
    local last = trainer:fit(data(20), { steps = 9 })

    local _, own = make()
    local opt = moe.optim.adamw(own, { lr = 0.01 })
    local loader = data(20)
    for step = 1, 9 do
      local batch = loader() or loader()
      opt:zero_grad()
      local loss = (own(batch.x) - batch.y):square():mean()
      loss:backward()
      opt.lr = 0.01 / step
      local norm = opt:step { clip = 0.5 }
      assert.equal(step, seen[step].step)
      assert.equal(loss:item(), seen[step].loss)
      assert.equal(norm, seen[step].grad_norm)
      assert.close(0.01 / step, seen[step].lr, { rtol = 1e-12 })
      assert.equal(batch.x.shape[1], seen[step].tokens)
      assert.is_true(seen[step].tokens_per_second > 0)
    end
    assert.same(weights(own), weights(model))
    assert.equal(9, trainer.step)
    assert.equal(9, last.step)
    assert.equal(0.01, trainer.optimizer.lr) -- the schedule leaves no trace
    assert.equal(1, trainer.optimizer.lr_scale)
  end)

  it("is a loop whose body is yours", function()
    local a, ma = make()
    local b, mb = make()
    a:fit(data(20), { steps = 5 })
    local n = 0
    for step, m in b:steps(data(20), 5) do
      n = n + 1
      assert.equal(n, step)
      assert.equal(step, m.step)
      assert.is_number(m.loss)
    end
    assert.equal(5, n)
    assert.same(weights(ma), weights(mb))
    for _ in b:steps(data(20), 5) do error "it is there already" end
    for step in b:steps(data(20), { more = 3 }) do
      if step == 6 then break end -- and can go on afterwards
    end
    b:fit(data(20), { steps = 7 })
    assert.equal(7, b.step)
  end)

  it("gives ctx the step, the mode and the schedules' values, and takes metrics from the loss", function()
    local seen = {}
    local trainer = make {
      schedules = { temperature = function(step) return 10 * step end },
      loss = function(m, batch, ctx)
        seen[#seen + 1] = { ctx.step, ctx.training, ctx.temperature }
        return (m(batch.x) - batch.y):square():mean(), { extra = ctx.step * 2 }
      end,
    }
    trainer.on_step = function(m) assert.equal(m.step * 2, m.extra) end
    trainer:fit(data(20), { steps = 2, eval = { with = data(8), every = 2 } })
    assert.same({ { 1, true, 10 }, { 2, true, 20 }, { 2, false, 20 } }, seen)
  end)

  it("calls after_step of modules once a step", function()
    local Block = moe.nn.module "Block"
    function Block:init()
      self.inner = moe.nn.linear(4, 3)
      self.count = 0
    end
    function Block:forward(x) return self.inner(x) end
    function Block:after_step(ctx)
      self.count = self.count + 1
      assert.equal(self.count, ctx.step)
    end
    local model = Block()
    local trainer = moe.trainer { model = model, quiet = true, accumulate = 2, optimizer = moe.optim.sgd { lr = 0.1 },
      loss = function(m, batch) return (m(batch.x) - batch.y):square():mean() end }
    trainer:fit(data(20), { steps = 3 })
    assert.equal(3, model.count)
  end)

  it("accumulates: 4 micro-batches of 2 are one batch of 8", function()
    local a, ma = make { optimizer = moe.optim.sgd { lr = 0.1, momentum = 0.9 } }
    local b, mb = make { optimizer = moe.optim.sgd { lr = 0.1, momentum = 0.9 }, accumulate = 4 }
    local la = a:fit(data(16, { batch_size = 8 }), { steps = 6 })
    local lb = b:fit(data(16, { batch_size = 2 }), { steps = 6 })
    assert.close(la.loss, lb.loss, { rtol = 1e-5 })
    assert.equal(la.tokens, lb.tokens)
    assert.close(la.grad_norm, lb.grad_norm, { rtol = 1e-4 })
    for name, t in pairs(weights(ma)) do assert.close(t, weights(mb)[name], { rtol = 1e-4, atol = 1e-6 }) end
  end)

  it("evaluates in its own mode, without touching the training", function()
    local modes, grads = {}, {}
    local function loss(m, batch, ctx)
      modes[#modes + 1] = m.training == ctx.training
      local out = m(batch.x)
      grads[#grads + 1] = out.requires_grad == ctx.training
      moe.rand(3) -- draws
      return (out - batch.y):square():mean()
    end
    local a, ma = make { loss = loss }
    local b, mb = make { loss = loss }
    a:fit(data(20), { steps = 6 })
    local results = {}
    b.on_eval = function(r) results[#results + 1] = r end
    b:fit(data(20), { steps = 6, eval = { every = 2, with = data(10, { batch_size = 4 }) } })
    assert.same(weights(ma), weights(mb))
    assert.equal(3, #results)
    assert.same({ 2, 4, 6 }, { results[1].step, results[2].step, results[3].step })
    assert.equal(3, results[1].batches)
    for _, list in ipairs { modes, grads } do
      for _, ok in ipairs(list) do assert.is_true(ok) end
    end
    assert.is_true(mb.training)
    -- the mean is weighted: batches of 4, 4 and 2 rows
    local sum = 0
    moe.no_grad(function()
      for batch in data(10, { batch_size = 4 }) do
        sum = sum + loss(mb, batch, { training = true }):item() * batch.x.shape[1]
      end
    end)
    assert.close(sum / 10, results[3].loss, { rtol = 1e-6 })
    -- the same batches each time, also when cut short
    local val = data(10, { batch_size = 4, shuffle = true, seed = 1 })
    local one = b:evaluate(val, { steps = 2 })
    assert.equal(2, one.batches)
    assert.equal(one.loss, b:evaluate(val, { steps = 2 }).loss)
  end)

  it("takes lists and functions as batches; a function ends the training", function()
    local list = {}
    for batch in data(24) do list[#list + 1] = batch end
    local a, ma = make()
    a:fit(list, { steps = 7 }) -- goes round
    assert.equal(7, a.step)
    local b, mb = make()
    local i = 0
    b:fit(function()
      i = i + 1
      return i <= 7 and list[(i - 1) % 3 + 1] or nil
    end, { steps = 100 })
    assert.equal(7, b.step)
    assert.same(weights(ma), weights(mb))
  end)

  it("takes a plain list of tensors as its model", function()
    local w = moe.tensor({ 1, 2 }, { requires_grad = true })
    local trainer = moe.trainer { model = { w }, optimizer = moe.optim.sgd { lr = 0.5 }, quiet = true,
      checkpoint = { dir = dir }, loss = function(m, batch) return ((m[1] - batch):square() * 0.5):sum() end }
    trainer:fit({ moe.tensor { 3, 4 } }, { steps = 2 })
    assert.close({ 2.5, 3.5 }, w, { rtol = 1e-6 })
    moe.no_grad(function() w:fill_(0) end)
    assert.equal(2, trainer:resume())
    assert.close({ 2.5, 3.5 }, w, { rtol = 1e-6 })
    trainer:fit({ moe.tensor { 3, 4 } }, { steps = 2 }) -- nothing left to do
    assert.equal(2, trainer.step)
  end)

  it("resumes to the bit", function()
    for _, kind in ipairs { "adamw", "sgd" } do
      local function build(every)
        local opt = kind == "sgd" and moe.optim.sgd { lr = 0.05, momentum = 0.9 } or moe.optim.adamw { lr = 0.01 }
        local losses = {}
        local trainer, model = make {
          optimizer = opt, clip = 1, accumulate = 2, schedule = moe.schedule.cosine { warmup = 3, steps = 20 },
          checkpoint = { dir = dir, every = every, keep = 2 },
          loss = function(m, batch) -- the noise draws from the generator
            return (m(batch.x + moe.randn(batch.x.shape[1], 4) * 0.1) - batch.y):square():mean()
          end,
          on_step = function(m) losses[m.step] = m.loss end,
        }
        return trainer, model, losses
      end
      local a, ma, la = build(1000)
      a.state.note = { 1, "x" }
      a:fit(data(20), { steps = 20 })
      os.execute("rm -rf '" .. dir .. "'")
      local b = build(5)
      b.state.note = { 1, "x" }
      b:fit(data(20), { steps = 10 })
      b:fit(data(20), { steps = 11 }) -- runs on, not saved: 11 is saved at the end, 10 is what we take
      local c, mc, lc = build(1000)
      local loader = data(20)
      moe.manual_seed(99) -- all that must come back
      assert.equal(10, c:resume(nil, { step = 10 }))
      assert.equal(10, c.step)
      assert.same({ 1, "x" }, c.state.note)
      c:fit(loader, { steps = 20 })
      for step = 11, 20 do assert.equal(la[step], lc[step]) end
      assert.same(weights(ma), weights(mc))
      for name, t in pairs(a.optimizer:state_dict()) do
        assert.same(t:totable(), c.optimizer:state_dict()[name]:totable())
      end
      os.execute("rm -rf '" .. dir .. "'")
    end
  end)

  it("resumes bf16 weights with their master copies", function()
    local function build()
      local w = moe.tensor({ 1, 2, 3 }, { dtype = "bf16", requires_grad = true })
      return moe.trainer { model = { w }, optimizer = moe.optim.adamw { lr = 1e-3 }, quiet = true, checkpoint = { dir = dir },
        loss = function(m) return (m[1]:cast "f32"):square():sum() end }, w
    end
    local a, wa = build()
    a:fit({ {} }, { steps = 3 })
    a:fit({ {} }, { steps = 40 })
    local b, wb = build()
    assert.equal(3, b:resume(nil, { step = 3 }))
    b:fit({ {} }, { steps = 40 })
    assert.same(wa:totable(), wb:totable())
    assert.same(a.optimizer:state_dict()["1.master"]:totable(), b.optimizer:state_dict()["1.master"]:totable())
  end)

  it("dies with all that it holds", function()
    local function live()
      collectgarbage()
      collectgarbage()
      return moe.memory().live
    end
    local before = live()
    do
      local trainer = make { checkpoint = { dir = dir } }
      trainer.on_step = function() return trainer end
      trainer:fit(data(20), { steps = 2, eval = { with = data(8) } })
    end
    assert.equal(before, live())
  end)

  it("keeps the newest checkpoints and sweeps up", function()
    local trainer = make { checkpoint = { dir = dir, every = 2, keep = 2 } }
    moe.io.make_dir(dir)
    moe.io.write(dir .. "/step-00000001.safetensors", "left behind")
    moe.io.write(dir .. "/manifest.json.tmp-1-1", "left behind")
    moe.io.write(dir .. "/mine.txt", "not ours")
    local saved = {}
    trainer.on_save = function(path) saved[#saved + 1] = path end
    trainer:fit(data(20), { steps = 7 })
    assert.same({ "manifest.json", "mine.txt", "step-00000006.safetensors", "step-00000007.safetensors" }, moe.io.list(dir))
    assert.equal(4, #saved)
    assert.equal(dir .. "/step-00000007.safetensors", saved[4])
    -- the same step again goes to another file
    trainer:save()
    assert.same({ "manifest.json", "mine.txt", "step-00000007.2.safetensors", "step-00000007.safetensors" }, moe.io.list(dir))
  end)

  it("tells why it cannot resume, and changes nothing", function()
    local trainer, model = make { checkpoint = { dir = dir } }
    local ok, message = trainer:resume()
    assert.is_false(ok)
    assert.matches("no checkpoint there", message)
    trainer:fit(data(20), { steps = 3 })
    ok, message = trainer:resume(nil, { step = 2 })
    assert.is_false(ok)
    assert.matches("no checkpoint of step 2", message)
    local before = weights(model)
    local state = trainer.optimizer:state_dict()
    local function refused(pattern, other)
      local none, why = other:resume(dir)
      assert.is_nil(none)
      assert.matches(pattern, why)
    end
    refused("optimizer is adamw, this one is sgd", (make { optimizer = moe.optim.sgd { lr = 1 } }))
    refused("%[3, 4%]", (make({}, 5)))
    -- damage
    local path = dir .. "/manifest.json"
    local manifest = moe.io.read(path)
    local list = { "", "{", "[]", '{"format": 1}', '{"format": 2, "checkpoints": []}' }
    for _, change in ipairs { { "step%-00000003", "../step" }, { '"step": 3', '"step": "3"' }, { '"rng": %b[]', '"rng": [1]' },
      { '"lr": 0.01', '"lr": -1' }, { '"lr": 0.01', '"x": 2' }, { '"lr": 0.01', '"lr": [1]' }, { '"kind": "rows"', '"kind": "random"' },
      { '"epoch": %d+', '"epoch": -1' } } do
      local text, n = manifest:gsub(change[1], change[2])
      assert.is_true(n > 0, change[1])
      list[#list + 1] = text
    end
    for _, bad in ipairs(list) do
      moe.io.write(path, bad)
      local none, why = trainer:resume()
      assert.is_nil(none, bad)
      assert.is_string(why)
    end
    moe.io.write(path, manifest)
    local file = dir .. "/step-00000003.safetensors"
    moe.io.write(file, moe.io.read(file):sub(1, -2))
    assert.is_nil((trainer:resume()))
    assert.same(before, weights(model))
    assert.equal(3, trainer.step)
    for name, t in pairs(state) do assert.same(t:totable(), trainer.optimizer:state_dict()[name]:totable()) end
  end)

  it("refuses a loss that is not finite, and names the step and the module", function()
    local Net = moe.nn.module "Net"
    function Net:init()
      self.first = moe.nn.linear(4, 4)
      self.second = moe.nn.linear(4, 3)
      self.bad_at = math.huge
    end
    function Net:forward(x, ctx)
      local h = self.first(x)
      if ctx.step >= self.bad_at then h = h / 0 end
      return self.second(h)
    end
    local function build(loss)
      local model = Net()
      return moe.trainer { model = model, quiet = true, optimizer = moe.optim.sgd { lr = 0.1 }, loss = loss or function(m, batch, ctx)
        return (m(batch.x, ctx) - batch.y):square():mean()
      end }, model
    end
    local trainer, model = build()
    trainer:fit(data(20), { steps = 2 })
    local before = weights(model)
    model.bad_at = 3
    local message = helper.error_of(trainer.fit, trainer, data(20), { steps = 5 })
    assert.matches("the loss is %-?nan at step 3; it first appeared in the output of 'second'", message)
    assert.equal(2, trainer.step)
    assert.same(before, weights(model))
    model.bad_at = math.huge -- and it can go on
    trainer:fit(data(20), { steps = 3 })

    trainer = build(function(m, batch, ctx) return (m(batch.x, ctx) - batch.y):square():mean() * math.huge end)
    assert.matches("the loss is inf at step 1; the model's outputs are finite",
      helper.error_of(trainer.fit, trainer, data(20), { steps = 5 }))

    trainer, model = build()
    moe.no_grad(function() model.first.weight:fill_(0 / 0) end)
    assert.matches("the parameter 'first.weight' is not finite", helper.error_of(trainer.fit, trainer, data(20), { steps = 5 }))

    trainer, model = build(function(m, batch, ctx) -- the loss is 0, its derivative is not
      return (m(batch.x, ctx) * 0):sum():sqrt()
    end)
    before = weights(model)
    assert.matches("gradient's norm is %-?nan at step 1; it first appeared in the gradient of 'first.weight'",
      helper.error_of(trainer.fit, trainer, data(20), { steps = 5 }))
    assert.same(before, weights(model))
  end)

  it("stops at Ctrl-C, saves, and goes on as if nothing had been", function()
    local function interrupt() -- what lua.c does in its signal handler, and in the hook that it sets
      debug.sethook(function()
        debug.sethook()
        error "interrupted!"
      end, "crl", 1)
    end
    local a, ma = make()
    a:fit(data(20), { steps = 8 })
    local b, mb
    local cut = 5
    b, mb = make { checkpoint = { dir = dir }, loss = function(m, batch, ctx)
      local out = m(batch.x)
      if ctx.step == cut then
        cut = 0
        interrupt()
      end
      return (out - batch.y):square():mean()
    end }
    local loader = data(20)
    local ok, message = pcall(b.fit, b, loader, { steps = 8 })
    assert.is_false(ok)
    assert.matches("interrupted!", message)
    assert.equal(4, b.step)
    local c, mc = make { checkpoint = { dir = dir } }
    b:fit(loader, { steps = 8 })
    assert.same(weights(ma), weights(mb))
    os.remove(dir .. "/step-00000008.safetensors")
    assert.equal(4, c:resume(nil, { step = 4 }))
    c:fit(data(20), { steps = 8 })
    assert.same(weights(ma), weights(mc))
  end)

  it("saves when Ctrl-C comes in the body of a loop over its steps", function()
    local trainer = make { checkpoint = { dir = dir } }
    local ok = pcall(function()
      for step in trainer:steps(data(20), 10) do
        if step == 3 then error "interrupted!" end
      end
    end)
    assert.is_false(ok)
    assert.equal(3, trainer:resume())
  end)

  it("is left whole by an error in any callback", function()
    for _, where in ipairs { "loss", "schedule", "temperature", "on_step", "on_eval", "on_save", "data" } do
      local armed = false
      local function trap(name, result)
        return function()
          if armed and name == where then error({ where = name }) end
          return result
        end
      end
      local trainer = make {
        schedule = trap("schedule", 1), schedules = { temperature = trap("temperature", 1) }, checkpoint = { dir = dir, every = 1 },
        on_step = trap "on_step", on_eval = trap "on_eval", on_save = trap "on_save",
        loss = function(m, batch)
          trap "loss"()
          return (m(batch.x) - batch.y):square():mean()
        end,
      }
      local loader = data(20)
      local function batches()
        trap "data"()
        return loader() or loader()
      end
      local options = { steps = 4, eval = { every = 1, with = data(8) } }
      trainer:fit(batches, { steps = 2 })
      armed = true
      local ok, err = pcall(trainer.fit, trainer, batches, options)
      assert.is_false(ok, where)
      assert.same({ where = where }, err) -- the value itself
      armed = false
      trainer:fit(batches, options)
      assert.equal(4, trainer.step)
      os.execute("rm -rf '" .. dir .. "'")
    end
  end)

  it("undoes a step in which memory runs out anywhere", function()
    local a, ma = make()
    a:fit(data(20), { steps = 2 })
    local b, mb = make()
    local loader = data(20)
    b:fit(loader, { steps = 1 })
    local before, failed = weights(mb), 0
    for n = 1, 200 do
      moe.empty_cache()
      moe.core.fail_after(n)
      local ok, message = pcall(b.fit, b, loader, { steps = 2 })
      moe.core.fail_after(0)
      if ok then break end
      failed = n
      assert.matches("memory", tostring(message))
      assert.equal(1, b.step)
      assert.same(before, weights(mb))
    end
    assert.is_true(failed > 5 and failed < 200, failed)
    assert.equal(2, b.step)
    assert.same(weights(ma), weights(mb))
  end)

  it("trains in bf16 products and f32 weights", function()
    local trainer, model = make { precision = "bf16" }
    local first
    trainer.on_step = function(m) first = first or m.loss end
    local m = trainer:fit(data(20), { steps = 100 })
    assert.is_true(m.loss < first)
    assert.equal("f32", model.weight.dtype)
  end)

  it("shows progress: plain lines, a moving line, or nothing", function()
    local function run(options, n)
      local out = {}
      options.write = function(text) out[#out + 1] = text end
      local bar <close> = moe.progress(n, options)
      for i = 1, n do bar(i, { loss = 2.5, tokens_per_second = 12345, note = "x" }) end
      bar:line "done"
      return out
    end
    local plain = run({ terminal = false }, 20)
    assert.equal(12, #plain) -- the first, each tenth, the line
    assert.matches("^1/20  loss 2.5000  note x  12.3k tokens/s  0:00 left\n$", plain[1])
    assert.matches("^20/20 .* 0:00\n$", plain[11])
    assert.equal("done\n", plain[12])
    local moving = run({ terminal = true }, 1000)
    assert.is_true(#moving < 100)
    assert.matches("^\r1/1000", moving[1])
    assert.same({}, run({ quiet = true, terminal = true }, 20))
    assert.matches("unknown option 'quite' %(did you mean 'quiet'", helper.error_of(moe.progress, 3, { quite = true }))
  end)

  it("tells what is wrong", function()
    local function wrong(pattern, f, ...) assert.matches(pattern, helper.error_of(f, ...)) end
    local w = moe.zeros(2, { requires_grad = true })
    local function with(changes)
      local o = { model = { w }, optimizer = moe.optim.sgd {}, loss = function() return w:sum() end, quiet = true }
      for k, v in pairs(changes) do o[k] = v end
      return o
    end
    local none = setmetatable({}, { __index = function() end })
    wrong("a table of options", moe.trainer, 3)
    wrong("unknown option 'optimiser' %(did you mean 'optimizer'", moe.trainer, with { optimiser = 1 })
    wrong("loss must be a function", moe.trainer, with { loss = 3 })
    wrong("optimizer must be one of moe.optim, got the string", moe.trainer, with { optimizer = "adamw" })
    wrong("optimizer must be one of moe.optim", moe.trainer, with { optimizer = w })
    wrong("no model to bind", moe.trainer, { optimizer = moe.optim.sgd {}, loss = print })
    wrong("clip must be a number above 0", moe.trainer, with { clip = 0 })
    wrong("accumulate must be a whole number", moe.trainer, with { accumulate = 0.5 })
    wrong("precision must be", moe.trainer, with { precision = "f8" })
    wrong("schedule must be a function", moe.trainer, with { schedule = 3 })
    wrong("schedules.a must be a function", moe.trainer, with { schedules = { a = 1 } })
    wrong("cannot be the name", moe.trainer, with { schedules = { step = print } })
    wrong("checkpoint must be a table", moe.trainer, with { checkpoint = 3 })
    wrong("unknown option of checkpoint 'evry' %(did you mean 'every'", moe.trainer, with { checkpoint = { dir = "x", evry = 1 } })
    wrong("checkpoint.dir must be", moe.trainer, with { checkpoint = {} })
    wrong("checkpoint.keep must be", moe.trainer, with { checkpoint = { dir = "x", keep = 0 } })
    local t = moe.trainer(with {})
    wrong("one of steps", t.fit, t, { {} }, {})
    wrong("unknown option of fit 'step' %(did you mean 'steps'", t.fit, t, { {} }, { step = 3 })
    wrong("steps must be a whole number", t.fit, t, { {} }, { steps = 1.5 })
    wrong("a table of options was wanted, got nil", t.fit, t, { {} })
    wrong("is an empty list", t.fit, t, {}, { steps = 1 })
    wrong("must be a loader", t.fit, t, 3, { steps = 1 })
    wrong("is a data set", t.fit, t, moe.data.text({ text = "abc" }).train, { steps = 1 })
    wrong("eval.with is missing", t.fit, t, { {} }, { steps = 1, eval = { every = 1 } })
    wrong("no field 'on_stp' to assign %(did you mean 'on_step'", function() t.on_stp = print end)
    wrong("cannot be changed", function() t.model = w end)
    wrong("on_step must be a function", function() t.on_step = 3 end)
    wrong("no checkpoint option", t.save, t)
    wrong("no checkpoint option", t.resume, t)
    wrong("must be a trainer", t._run, none, 1)
    local function loss_is(f, pattern)
      local u = moe.trainer(with { loss = f })
      wrong(pattern, u.fit, u, { {} }, { steps = 1 })
    end
    loss_is(function() end, "must return a tensor, got nil")
    loss_is(function() return 3 end, "must return a tensor, got 3")
    loss_is(function() return w * 2 end, "must be one number, got a tensor %[2%]")
    loss_is(function() return moe.tensor { 1 }:sum() end, "does not depend on any parameter")
    loss_is(function() return w:sum(), 3 end, "second value of the loss function must be a table")
    local u = moe.trainer(with { schedule = function() return "x" end })
    wrong("schedule must return a number, got string at step 1", u.fit, u, { {} }, { steps = 1 })
    u.schedule = function() return -1 end
    wrong("schedule gave %-1 at step 1", u.fit, u, { {} }, { steps = 1 })
    u.schedule = nil
    u.on_step = function() u:fit({ {} }, { steps = 1 }) end
    wrong("running already", u.fit, u, { {} }, { steps = 5 })
    assert.matches("moe.Trainer at step 1\n  moe.optim.sgd: 2 parameters", tostring(u))
  end)
end)
