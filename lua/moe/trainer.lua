--- The trainer: moe.trainer{ model =, optimizer =, loss =, ... }. The loop is C (csrc/train/trainer.c); here is what it calls.
--
--   local trainer = moe.trainer{
--     model = model, optimizer = moe.optim.adamw{ lr = 1e-3 },
--     loss = function(model, batch, ctx) return moe.loss.cross_entropy(model(batch.x, ctx), batch.y) end,
--     schedule = moe.schedule.cosine{ warmup = 100, steps = 2000, min = 0.1 },
--     clip = 1.0, checkpoint = { dir = "run", every = 500, keep = 3 },
--   }
--   trainer:resume()                                   -- goes on where checkpoints in "run" ended, if there are any
--   trainer:fit(train, { steps = 2000, eval = { every = 250, with = val, steps = 50 } })
--   for step, m in trainer:steps(train, 2000) do print(step, m.loss) end     -- the loop body is yours
--
-- A batch is anything that the loss understands. `train` is a loader of moe.data, a list of batches, or a function that
-- returns the next batch. Loaders and lists begin anew at their end; a function that returns nil ends the training.
-- Steps count from 1 over the whole training, resumed parts included: { steps = 2000 } ends at step 2000.
--
-- ctx has step, training and the values of `schedules` by name. A loss may return a second value, a table of numbers, which
-- joins the metrics. After each step, modules with a method after_step(self, ctx) have it called.

local core = require "moe.core"
local optim = require "moe.optim"
local hint = require("moe.options").hint
local progress = require "moe.progress"
local checkpoint = require "moe.checkpoint"

local low = core._training
local methods = low.methods
local is_tensor = core.is_tensor

local function raise(message, ...) error(("trainer: " .. message):format(...), 0) end

local function describe(v)
  if v == nil then return "nil" end
  if type(v) == "number" or type(v) == "boolean" then return tostring(v) end
  if type(v) == "string" then return ("the string %q"):format(v) end
  return "a " .. type(v)
end

local function is_callable(f)
  if type(f) == "function" then return true end
  local mt = type(f) == "table" and getmetatable(f) or type(f) == "userdata" and getmetatable(f)
  return type(mt) == "table" and mt.__call ~= nil
end

local function has_method(v, name)
  if (type(v) ~= "table" and type(v) ~= "userdata") or is_tensor(v) then return false end
  local ok, f = pcall(function() return v[name] end)
  return ok and is_callable(f)
end

-- Raises for keys that are not known, naming the nearest one.
local function check_names(what, t, known)
  for k in pairs(t) do
    if known[k] == nil then raise("unknown %s '%s'%s", what, tostring(k), hint(k, known)) end
  end
end

local function check_count(name, v, least)
  if math.type(v) ~= "integer" or v < least then
    raise("%s must be a whole number of at least %d, got %s", name, least, describe(v))
  end
  return v
end

-- --- batches ---

-- One form of every source: next() gives a batch, or nil at the end of a pass; state() and restore(s) where it has them.
local function open_source(batches, what)
  if type(batches) == "function" then return { next = batches, once = true } end
  if has_method(batches, "batches") and not is_callable(batches) then
    raise("%s is a data set: give what its method batches{ ... } returns", what)
  end
  if type(batches) == "table" and getmetatable(batches) == nil then
    if #batches == 0 then raise("%s is an empty list", what) end
    local at = 0
    return {
      next = function()
        at = at < #batches and at + 1 or 0
        return batches[at]
      end,
      state = function() return { at = at } end,
      restore = function(s) at = math.min(s.at, #batches) end,
    }
  end
  if not is_callable(batches) then
    raise("%s must be a loader, a list of batches or a function that returns the next one, got %s", what, describe(batches))
  end
  return {
    next = function() return batches() end,
    state = has_method(batches, "state") and function() return batches:state() end or nil,
    restore = has_method(batches, "restore") and function(s) return batches:restore(s) end or nil,
    endless = batches.endless,
  }
end

-- Tokens of a batch: what it says, else the elements of an integer input, else its rows.
local function count_tokens(batch)
  local x = batch
  if type(batch) == "table" then
    if type(batch.tokens) == "number" then return batch.tokens end
    x = batch.x or batch.input or batch[1]
  end
  if not is_tensor(x) then return 1 end
  local shape = x.shape
  local rows, all = shape[1] or 1, 1
  for i = 1, #shape do all = all * shape[i] end
  local kind = x.dtype
  return (kind == "i64" or kind == "i32" or kind == "u8") and all or rows
end

-- --- models ---

-- Names and tensors of a model's state: its state dict, or a list of tensors by number, or what the optimizer updates.
local function model_state(self)
  local model = self.model
  if has_method(model, "state_dict") then return model:state_dict() end
  local out = {}
  for i, t in ipairs(is_tensor(model) and { model } or type(model) == "table" and model or self.optimizer.params) do
    out[tostring(i)] = t
  end
  return out
end

local function load_model_state(self, state)
  if has_method(self.model, "load_state_dict") then
    self.model:load_state_dict(state)
    return
  end
  local own = model_state(self)
  for name, t in pairs(own) do
    local v = state[name]
    if v == nil then error(("tensor %s of the model is missing"):format(name), 0) end
    if table.concat(v.shape, ",") ~= table.concat(t.shape, ",") then
      error(("tensor %s of the model is [%s] here, [%s] there"):format(name, table.concat(t.shape, ", "),
        table.concat(v.shape, ", ")), 0)
    end
  end
  for name in pairs(state) do
    if own[name] == nil then error(("the model has no tensor %s"):format(name), 0) end
  end
  for name, t in pairs(own) do core._module.assign(t, state[name]) end
end

local function set_training(self, on)
  local name = on and "train" or "eval"
  if has_method(self.model, name) then self.model[name](self.model) end
end

-- Modules that want to know of each step.
local function find_listeners(self)
  self.listeners = {}
  if not has_method(self.model, "named_modules") then return end
  for _, m in self.model:named_modules() do
    if has_method(m, "after_step") then table.insert(self.listeners, m) end
  end
end

-- --- what is not finite, and where ---

local function is_finite(t)
  local kind = t.dtype
  if kind ~= "f32" and kind ~= "f64" and kind ~= "bf16" and kind ~= "f16" then return true end
  local sum = core.no_grad(function() return (t:detach():cast "f32" * 0):sum():item() end)
  return sum == 0
end

local function any_not_finite(...)
  for i = 1, select("#", ...) do
    local v = select(i, ...)
    if is_tensor(v) and not is_finite(v) then return true end
  end
  return false
end

-- Runs f with every module of the model watched: returns the name of the first one that gave a value that is not finite.
-- The metatables' __call are exchanged for the time of the call; where the debug library is missing nothing is found.
local function watch_modules(model, f)
  if not has_method(model, "named_modules") or not debug then return nil end
  local names, changed, found = {}, {}, nil
  for name, m in model:named_modules() do
    names[m] = name == "" and "the model itself" or name
    local mt = debug.getmetatable(m)
    local call = mt and mt.__call
    if call and not changed[mt] then
      changed[mt] = call
      mt.__call = function(self, ...)
        local out = table.pack(call(self, ...))
        if not found and names[self] and any_not_finite(table.unpack(out, 1, out.n)) then found = names[self] end
        return table.unpack(out, 1, out.n)
      end
    end
  end
  pcall(f)
  for mt, call in pairs(changed) do mt.__call = call end
  return found
end

local function first_bad_parameter(self, field)
  local list, names = optim.parameters(self.model or self.optimizer.params)
  for i, p in ipairs(list) do
    local t = field and p[field] or not field and p
    if t and not is_finite(t) then return names[i] or tostring(i) end
  end
end

local function explain(self, what)
  local ok, where = pcall(function()
    local bad = first_bad_parameter(self, nil)
    if bad then return ("; the parameter '%s' is not finite"):format(bad) end
    if what ~= "loss" then
      bad = first_bad_parameter(self, "grad")
      return bad and ("; it first appeared in the gradient of '%s'"):format(bad) or ""
    end
    if self.last_batch == nil then return "" end
    local seed, offset = core.rng_state()
    if self.micro_rng then core.set_rng_state(table.unpack(self.micro_rng)) end
    local name = watch_modules(self.model, function()
      self.loss(self.model, self.last_batch, self.last_ctx)
    end)
    core.set_rng_state(seed, offset)
    if name then return ("; it first appeared in the output of '%s'"):format(name) end
    return has_method(self.model, "named_modules") and "; the model's outputs are finite: it appeared in the loss function" or ""
  end)
  return ok and where or ""
end

-- --- the callbacks of the C loop ---

local function make_calls(self, proxy)
  local calls = {}

  function calls.begin()
    self.snapshot = { core.rng_state() }
    self.snapshot.data = self.source.state and self.source.state()
    self.in_step = true
  end

  function calls.rate(step)
    local values = {}
    for name, f in pairs(self.schedules) do values[name] = f(step, proxy) end
    self.values = values
    return self.schedule and self.schedule(step, proxy) or 1
  end

  function calls.loss(step, _, training)
    local source = training and self.source or self.eval_source
    local batch = source.next()
    if batch == nil and training and not source.once then batch = source.next() end -- the next pass
    if batch == nil then return nil end
    local ctx = { step = step, training = training }
    for name, value in pairs(self.values or {}) do ctx[name] = value end
    self.last_batch, self.last_ctx, self.micro_rng = batch, ctx, { core.rng_state() }
    local loss, extra = self.loss(self.model, batch, ctx)
    if not is_tensor(loss) then raise("the loss function must return a tensor, got %s", describe(loss)) end
    if extra ~= nil then
      if type(extra) ~= "table" then raise("the second value of the loss function must be a table, got %s", describe(extra)) end
      self.extra = extra
    end
    return loss, count_tokens(batch)
  end

  function calls.not_finite(step, what, value)
    raise("the %s is %s at step %d%s", what, tostring(value), step, explain(self, what))
  end

  function calls.stepped(step)
    self.in_step = false
    self.last_batch = nil
    if #self.listeners == 0 then return end
    local ctx = { step = step, training = true }
    for name, value in pairs(self.values or {}) do ctx[name] = value end
    for _, m in ipairs(self.listeners) do m:after_step(ctx) end
  end

  function calls.report(m)
    for k, v in pairs(self.extra or {}) do m[k] = v end
    self.extra = nil
    self.metrics = m
    local seen = self.seen
    seen.loss, seen.count, seen.tokens = seen.loss + m.loss, seen.count + 1, seen.tokens + m.tokens
    local bar = self.bar
    if bar and bar:due(m.step) then
      local now = core.clock()
      bar(m.step, { loss = seen.loss / seen.count, lr = m.lr, tokens_per_second = seen.tokens / math.max(1e-9, now - seen.since) })
      self.seen = { loss = 0, count = 0, tokens = 0, since = now }
    end
    if self.on_step then self.on_step(m, proxy) end
  end

  function calls.evaluate(step)
    local e = self.eval
    local result = proxy:evaluate(e.with, { steps = e.steps })
    self.seen.since = self.seen.since + result.seconds -- the rate that is shown is that of training
    result.step = step
    self.evaluated = result
    if self.bar then self.bar:line(("step %d  eval"):format(step), { loss = result.loss, batches = result.batches }) end
    if self.on_eval then self.on_eval(result, proxy) end
  end

  function calls.save() assert(proxy:save()) end

  return calls
end

-- What a failed step took is given back: the random state and the place in the data.
local function roll_back(self)
  if not self.in_step then return end
  self.in_step = false
  core.set_rng_state(self.snapshot[1], self.snapshot[2])
  if self.source.restore and self.snapshot.data then self.source.restore(self.snapshot.data) end
end

-- lua.c's handler of Ctrl-C raises this from a hook; a step that it cuts off never happened.
local function is_interrupt(err) return type(err) == "string" and err:find("interrupted!", 1, true) ~= nil end

local function finish(self, proxy, err)
  roll_back(self)
  self.running = false
  if err and is_interrupt(err) then
    local text = ("interrupted after step %d"):format(proxy.step)
    if self.checkpoint then
      local path, message = proxy:save()
      text = text .. (path and ("; saved " .. path) or ("; could not save: " .. message))
    end
    if self.bar then self.bar:line(text) end
  end
  if self.bar then self.bar:close() end
  self.bar = nil
end

-- --- making ---

local option_names <const> = {
  model = 1, optimizer = 1, loss = 1, schedule = 1, schedules = 1, clip = 1, accumulate = 1, precision = 1, checkpoint = 1,
  quiet = 1, log_every = 1, on_step = 1, on_eval = 1, on_save = 1, state = 1,
}
local assignable <const> = { on_step = 1, on_eval = 1, on_save = 1, quiet = 1, schedule = 1, clip = 1, state = 1, log_every = 1 }
local precisions <const> = { f32 = false, bf16 = "bf16" }

local checks = {}
local function check_callable(name, v)
  if v ~= nil and not is_callable(v) then raise("%s must be a function, got %s", name, describe(v)) end
end
for _, name in ipairs { "on_step", "on_eval", "on_save", "schedule" } do
  checks[name] = function(v) check_callable(name, v) end
end
function checks.clip(v)
  if v ~= nil and not (type(v) == "number" and v > 0 and v < math.huge) then
    raise("clip must be a number above 0, got %s", describe(v))
  end
end
function checks.quiet(v)
  if v ~= nil and type(v) ~= "boolean" then raise("quiet must be true or false, got %s", describe(v)) end
end
function checks.state(v)
  if v ~= nil and type(v) ~= "table" then raise("state must be a table, got %s", describe(v)) end
end
function checks.log_every(v)
  if v ~= nil then check_count("log_every", v, 1) end
end

local function read_checkpoint(c)
  if c == nil then return nil end
  if type(c) == "string" then c = { dir = c } end
  if type(c) ~= "table" then raise("checkpoint must be a table { dir =, every =, keep = }, got %s", describe(c)) end
  check_names("option of checkpoint", c, { dir = 1, every = 1, keep = 1 })
  if type(c.dir) ~= "string" or c.dir == "" then raise("checkpoint.dir must be the name of a directory, got %s", describe(c.dir)) end
  return {
    dir = c.dir,
    every = c.every and check_count("checkpoint.every", c.every, 1) or math.maxinteger, -- else at the end alone
    keep = check_count("checkpoint.keep", c.keep == nil and 3 or c.keep, 1),
  }
end

local function bind_optimizer(o, model)
  if optim.is_unbound(o) then
    if model == nil or type(model) == "function" then raise("the optimizer is not bound, and there is no model to bind it to") end
    return o(model)
  end
  if type(o) == "userdata" and has_method(o, "zero_grad") and has_method(o, "step") then return o end
  raise("optimizer must be one of moe.optim, got %s", describe(o))
end

local function new(options)
  if type(options) ~= "table" then raise("a table of options was wanted, got %s", describe(options)) end
  check_names("option", options, option_names)
  for name, check in pairs(checks) do check(options[name]) end
  if not is_callable(options.loss) then raise("loss must be a function (model, batch, ctx), got %s", describe(options.loss)) end
  if options.precision ~= nil and precisions[options.precision] == nil then
    raise("precision must be \"f32\" or \"bf16\", got %s", describe(options.precision))
  end
  local self = {
    model = options.model, loss = options.loss, schedule = options.schedule, schedules = {}, state = options.state or {},
    quiet = options.quiet, log_every = options.log_every, clip = options.clip,
    on_step = options.on_step, on_eval = options.on_eval, on_save = options.on_save,
    accumulate = check_count("accumulate", options.accumulate == nil and 1 or options.accumulate, 1),
    precision = options.precision or "f32", checkpoint = read_checkpoint(options.checkpoint),
    listeners = {}, seen = {},
  }
  if options.schedules ~= nil then
    if type(options.schedules) ~= "table" then raise("schedules must be a table of functions, got %s", describe(options.schedules)) end
    for name, f in pairs(options.schedules) do
      if type(name) ~= "string" or name == "step" or name == "training" then
        raise("schedules: %s cannot be the name of a schedule", describe(name))
      end
      if not is_callable(f) then raise("schedules.%s must be a function, got %s", name, describe(f)) end
      self.schedules[name] = f
    end
  end
  self.optimizer = bind_optimizer(options.optimizer, options.model)
  local calls = {}
  local proxy = low.new(self, self.optimizer, calls, {
    accumulate = self.accumulate, clip = self.clip or 0, autocast = precisions[self.precision] or nil,
    save_every = self.checkpoint and self.checkpoint.every or 0,
  })
  for name, f in pairs(make_calls(self, proxy)) do calls[name] = f end
  return proxy
end

-- --- methods ---

local fit_names <const> = { steps = 1, eval = 1, more = 1 }

-- Where to stop, the evaluation, and everything that a run needs.
local function start(proxy, batches, options, label)
  local self = proxy:_self()
  if self.running then raise("%s: it is running already", label) end
  if type(options) ~= "table" then raise("%s: a table of options was wanted, got %s", label, describe(options)) end
  check_names("option of " .. label, options, fit_names)
  if (options.steps == nil) == (options.more == nil) then
    raise("%s: one of steps (where the training ends) and more (how many steps from here) is needed", label)
  end
  local stop = options.steps and check_count("steps", options.steps, 0) or proxy.step + check_count("more", options.more, 0)
  local e = options.eval
  if e ~= nil then
    if type(e) ~= "table" then raise("eval must be a table { every =, with =, steps = }, got %s", describe(e)) end
    check_names("option of eval", e, { every = 1, with = 1, steps = 1 })
    if e.every ~= nil then check_count("eval.every", e.every, 1) end
    if e.steps ~= nil then check_count("eval.steps", e.steps, 1) end
    if e.with == nil then raise("eval.with is missing: the batches to evaluate with") end
    open_source(e.with, "eval.with")
  end
  self.eval = e
  proxy:_set("eval_every", e and (e.every or math.maxinteger) or 0)
  if self.checkpoint then
    local ok, message = core._files.make_dir(self.checkpoint.dir)
    if not ok then raise("checkpoint.dir: %s", message) end
  end
  if self.batches ~= batches then -- else it goes on where it was
    self.batches, self.source = batches, open_source(batches, "the first argument of " .. label)
  end
  if self.resumed_data then
    if self.source.restore then self.source.restore(self.resumed_data) end
    self.resumed_data = nil
  end
  set_training(self, true)
  find_listeners(self)
  self.bar = progress(stop, { quiet = self.quiet, start = proxy.step, every = self.log_every })
  self.seen = { loss = 0, count = 0, tokens = 0, since = core.clock() }
  self.running = true
  return self, stop
end

--- Trains on `batches` until step `steps` (or for `more` steps). Options: steps, more, eval = { every, with, steps }.
-- Returns the metrics of the last step.
function methods.fit(proxy, batches, options)
  local self, stop = start(proxy, batches, options, "fit")
  local ok, err = pcall(proxy._run, proxy, stop)
  finish(self, proxy, not ok and err or nil)
  if not ok then error(err, 0) end
  return self.metrics
end

--- for step, m in trainer:steps(batches, 2000) do ... end: the same loop with your code between the steps. m has loss,
-- lr, grad_norm, tokens, seconds, tokens_per_second. The second argument may be the options of fit.
function methods.steps(proxy, batches, options)
  if type(options) == "number" then options = { steps = options } end
  local self, stop = start(proxy, batches, options, "steps")
  local done = false
  local function close(err) -- err: what the loop's body raised
    if done then return end
    done = true
    finish(self, proxy, err)
  end
  local function advance()
    if done or proxy.step >= stop then return close() end
    local ok, m = pcall(proxy._advance, proxy, proxy.step + 1 == stop)
    if not ok then
      done = true
      finish(self, proxy, m)
      error(m, 0)
    end
    if not m then return close() end
    return m.step, self.metrics
  end
  return advance, nil, nil, setmetatable({}, { __close = function(_, err) close(err) end })
end

--- Mean loss over batches (weighted by tokens), without recording and in evaluation mode; what it draws at random does not
-- change the training. Options: steps (at most so many batches; needed for loaders that never end: 50). A loader or a list
-- is read from the same place each time. Returns { loss =, batches =, seconds = }.
function methods.evaluate(proxy, batches, options)
  local self = proxy:_self()
  options = options or {}
  if type(options) ~= "table" then raise("evaluate: a table of options was wanted, got %s", describe(options)) end
  check_names("option of evaluate", options, { steps = 1 })
  if options.steps ~= nil then check_count("steps", options.steps, 1) end
  self.eval_from = self.eval_from or setmetatable({}, { __mode = "k" })
  local source = open_source(batches, "what to evaluate with")
  if source.state and source.restore then
    local from = self.eval_from[batches]
    if from then source.restore(from)
    else self.eval_from[batches] = source.state() end
  end
  local outer, began = self.eval_source, core.clock()
  self.eval_source = source
  set_training(self, false)
  local last_batch, last_ctx, micro_rng, extra = self.last_batch, self.last_ctx, self.micro_rng, self.extra
  local ok, mean, count = pcall(proxy._evaluate, proxy, options.steps or (source.endless and 50 or -1))
  self.last_batch, self.last_ctx, self.micro_rng, self.extra = last_batch, last_ctx, micro_rng, extra
  set_training(self, true)
  self.eval_source = outer
  if not ok then error(mean, 0) end
  if count == 0 then raise("evaluate: there was no batch") end
  return { loss = mean, batches = count, seconds = core.clock() - began }
end

local function group_options(o)
  local out = {}
  for i, g in ipairs(o.groups) do
    out[i] = {}
    for _, row in ipairs(optim.kinds) do
      if row.name == o.kind then
        for name in pairs(row.options) do
          if name ~= "no_decay" then out[i][name] = g[name] end
        end
      end
    end
  end
  return out
end

--- Writes a checkpoint into dir (default: that of the options): weights, optimizer, random state, place in the data, and
-- trainer.state, a table of yours of JSON values. Returns its path, or nil, message.
function methods.save(proxy, dir)
  local self = proxy:_self()
  dir = dir or self.checkpoint and self.checkpoint.dir
  if type(dir) ~= "string" then raise("save: argument 1 (dir) must be a directory: the trainer has no checkpoint option") end
  local tensors = {}
  for name, t in pairs(model_state(self)) do tensors["model." .. name] = t end
  for name, t in pairs(self.optimizer:state_dict()) do tensors["optimizer." .. name] = t end
  local rng, data = { core.rng_state() }, self.resumed_data
  if self.in_step then -- called from within a step that is not finished: the state before it
    rng, data = { self.snapshot[1], self.snapshot[2] }, self.snapshot.data
  elseif self.source then
    data = self.source.state and self.source.state()
  end
  local path, message = checkpoint.save(dir, tensors, {
    step = proxy.step, rng = rng, data = data, state = self.state, moe = require("moe")._VERSION,
    optimizer = { kind = self.optimizer.kind, groups = group_options(self.optimizer), lr_scale = self.optimizer.lr_scale },
  }, self.checkpoint and self.checkpoint.keep or 3)
  if path and self.on_save then self.on_save(path, proxy) end
  return path, message
end

local function split_names(tensors, prefix)
  local out = {}
  for name, t in pairs(tensors) do
    if name:sub(1, #prefix) == prefix then out[name:sub(#prefix + 1)] = t end
  end
  return out
end

local function restore(self, proxy, entry, tensors)
  local o = self.optimizer
  local saved = type(entry.optimizer) == "table" and entry.optimizer or {}
  if saved.kind ~= o.kind then
    error(("the checkpoint's optimizer is %s, this one is %s"):format(tostring(saved.kind), o.kind), 0)
  end
  local rng = entry.rng
  if type(rng) ~= "table" or math.type(rng[1]) ~= "integer" or math.type(rng[2]) ~= "integer" then
    error("its random state is damaged", 0)
  end
  local groups, data = o.groups, type(entry.data) == "table" and entry.data or nil
  local function set_groups(list)
    if type(list) ~= "table" or #list ~= #groups then return end -- other groups: the script's options hold
    for i, g in ipairs(list) do
      for name, value in pairs(g) do groups[i][name] = value end
    end
  end
  local seekable = data and self.source and self.source.restore
  local state_before, groups_before = o:state_dict(), group_options(o) -- loading makes new tensors: these stay as they are
  local data_before = seekable and self.source.state()
  local ok, err = pcall(function()
    o:load_state_dict(split_names(tensors, "optimizer."))
    set_groups(saved.groups)
    if type(saved.lr_scale) == "number" then o.lr_scale = saved.lr_scale end
    if seekable then self.source.restore(data) end
    load_model_state(self, split_names(tensors, "model.")) -- changes nothing unless everything fits
  end)
  if not ok then
    o:load_state_dict(state_before)
    set_groups(groups_before)
    if seekable then self.source.restore(data_before) end
    error(err, 0)
  end
  core.set_rng_state(rng[1], rng[2])
  self.state = type(entry.state) == "table" and entry.state or {}
  self.resumed_data = not seekable and data or nil
  proxy:_set("step", entry.step)
end

--- Goes on from the newest checkpoint of dir (default: that of the options), or from that of { step = n }. Returns the
-- step; false, message when there is no checkpoint; nil, message when it cannot be read or does not fit, and then
-- nothing has changed.
function methods.resume(proxy, dir, options)
  local self = proxy:_self()
  if self.running then raise("resume: it is running") end
  if type(dir) == "table" and options == nil then dir, options = nil, dir end
  options = options or {}
  check_names("option of resume", options, { step = 1 })
  dir = dir or self.checkpoint and self.checkpoint.dir
  if type(dir) ~= "string" then raise("resume: argument 1 (dir) must be a directory: the trainer has no checkpoint option") end
  local entry, tensors = checkpoint.load(dir, options.step)
  if not entry then return entry, tensors end
  local ok, err = pcall(restore, self, proxy, entry, tensors)
  if not ok then
    err = tostring(err):gsub("^[^:]*:%d+: ", "")
    return nil, ("%s: %s"):format(dir, err)
  end
  return entry.step
end

function methods._assign(proxy, name, value)
  if not assignable[name] then
    if option_names[name] then raise("'%s' cannot be changed after the trainer was made", name) end
    raise("there is no field '%s' to assign%s", tostring(name), hint(name, assignable))
  end
  if checks[name] then checks[name](value) end
  if name == "clip" then proxy:_set("clip", value or 0) end
  proxy:_self()[name] = value
end

function methods._text(proxy)
  local self = proxy:_self()
  local parts = { ("moe.Trainer at step %d"):format(proxy.step), "  " .. tostring(self.optimizer):gsub("\n", "\n  ") }
  local settings = { ("accumulate = %d"):format(self.accumulate), ("precision = %s"):format(self.precision) }
  if self.clip then settings[#settings + 1] = ("clip = %g"):format(self.clip) end
  if self.checkpoint then settings[#settings + 1] = ("checkpoints in %s"):format(self.checkpoint.dir) end
  parts[#parts + 1] = "  " .. table.concat(settings, ", ")
  return table.concat(parts, "\n")
end

return setmetatable({}, { __call = function(_, options) return new(options) end })
