--- moe: tensors with automatic differentiation, sparse expert layers, routers, state-space blocks and trainers.
-- The operations come from the core's table (csrc/op/ops.def); what is said better in Lua lies in the submodules,
-- which are loaded when they are first named.

local core = require "moe.core"

-- For the library's own files and its specs; reached through moe.core.
local internal <const> = { ops = true, modules = true, record = true, fail_after = true, scope = true, autocast = true }

local M = { _VERSION = "moe 0.1.0" }
for name, value in pairs(core) do
  if not internal[name] and name:sub(1, 1) ~= "_" then M[name] = value end
end
M.core = core

--- Stands for a new dimension of size 1 inside of an index: `x[{ {}, moe.newaxis }]`.
M.newaxis = "newaxis"

--- Submodules, loaded on first use.
local submodules <const> = {
  nn = "moe.nn", model = "moe.model", optim = "moe.optim", schedule = "moe.schedule", trainer = "moe.trainer",
  data = "moe.data", io = "moe.io", loss = "moe.loss", router = "moe.router", experts = "moe.experts",
  routing = "moe.routing", layer = "moe.layer", gradcheck = "moe.gradcheck", help = "moe.help", repl = "moe.repl",
  progress = "moe.progress", mixer = "moe.mixer", stick_breaking = "moe.sparse.stick_breaking:attention", recipe = "moe.recipe",
  inspect = "moe.inspect", plot = "moe.plot", multi_gate = "moe.multi_gate",
}

--- Runs `f(...)` and gives back what it returns; every other tensor that it made is released at once.
-- Needs no collector: useful in a loop of one's own that makes large temporaries.
function M.scope(f, ...)
  return core.scope(f, ...)
end

--- Runs `f(...)` with matrix products in another float type: `moe.autocast("bf16", f, ...)`.
-- Weights stay as they are and receive gradients of their own type; sums inside of a product are made in f32.
function M.autocast(dtype, f, ...)
  return core.autocast(dtype, f, ...)
end

--- A differentiable function made of Lua closures.
-- `forward(ctx, ...)` computes with recording off and may keep what it likes in `ctx`;
-- `backward(ctx, g1, ...)` gets one gradient an output (nil where there is none) and returns one an argument
-- that is a tensor, in order (nil where there is none). The result is called like any function.
function M.fn(def)
  if type(def) ~= "table" then error("fn: argument 1 must be a table with functions 'forward' and 'backward'", 2) end
  for key in pairs(def) do
    if key ~= "forward" and key ~= "backward" and key ~= "name" and key ~= "force" then
      error(("fn: unknown option '%s' (known: forward, backward, force)"):format(tostring(key)), 2)
    end
  end
  local forward, backward = def.forward, def.backward
  if type(forward) ~= "function" or type(backward) ~= "function" then
    error("fn: wants a table with functions 'forward' and 'backward'", 2)
  end
  return function(...)
    local ctx = {}
    local outs = table.pack(core.no_grad(forward, ctx, ...))
    local inputs, given = {}, {}
    for i = 1, select("#", ...) do
      local x = select(i, ...)
      if core.is_tensor(x) then inputs[#inputs + 1], given[x] = x, true end
    end
    local results = {}
    for i = 1, outs.n do
      if core.is_tensor(outs[i]) then
        -- a tensor of its own, also where the forward hands out one of its arguments
        if outs[i].requires_grad or given[outs[i]] then outs[i] = outs[i]:detach() end
        results[#results + 1] = outs[i]
      end
    end
    if #results == 0 then error("fn: 'forward' must return at least one tensor", 2) end
    core.record(def.name == "checkpoint" and "checkpoint" or "fn", function(...)
      return backward(ctx, ...)
    end, def.force, inputs, results)
    return table.unpack(outs, 1, outs.n)
  end
end

local running_again = 0 -- checkpoints whose backward runs their function again

--- Whether a checkpoint runs its function a second time: counters and statistics should not move then.
function M.recomputing() return running_again > 0 end

local again_mt = {
  __close = function(was) -- also after an error
    running_again = running_again - 1
    core.set_rng_state(was.seed, was.offset)
  end,
}

--- Runs `f(...)` keeping nothing for its gradient but the arguments; the backward runs it again.
-- Random numbers are replayed, so that masks agree.
function M.checkpoint(f, ...)
  if type(f) ~= "function" and not (getmetatable(f) or {}).__call then
    error("checkpoint: argument 1 must be a function, got " .. type(f), 2)
  end
  if not core.is_grad_enabled() then return f(...) end
  return M.fn {
    name = "checkpoint", force = true,
    forward = function(ctx, ...)
      ctx.args = table.pack(...)
      ctx.seed, ctx.offset = core.rng_state()
      return f(...)
    end,
    backward = function(ctx, ...)
      local args, again = ctx.args, {}
      local leaves = {}
      for i = 1, args.n do
        local x = args[i]
        if core.is_tensor(x) then
          again[i] = x:detach()
          again[i].requires_grad = x.requires_grad
          leaves[#leaves + 1] = again[i]
        else
          again[i] = x
        end
      end
      local seed, offset = core.rng_state()
      core.set_rng_state(ctx.seed, ctx.offset)
      local outs
      do
        running_again = running_again + 1
        local _ <close> = setmetatable({ seed = seed, offset = offset }, again_mt)
        outs = table.pack(core.enable_grad(f, table.unpack(again, 1, args.n)))
      end
      local roots, grads = {}, {}
      local given = table.pack(...)
      local k = 0
      for i = 1, outs.n do
        if core.is_tensor(outs[i]) then
          k = k + 1
          if given[k] and outs[i].requires_grad then
            roots[#roots + 1], grads[#grads + 1] = outs[i], given[k]
          end
        end
      end
      if #roots > 0 then core.enable_grad(core.backward, roots, grads) end
      local result = {}
      for i, leaf in ipairs(leaves) do result[i] = leaf.grad end
      return table.unpack(result, 1, #leaves)
    end,
  }(...)
end

return require "moe.lazy"(M, submodules)
