--- Schedules: functions from a step, counted from 1, to a multiplier of the learning rate (or to anything else that follows
-- the steps: `schedules = { temperature = ... }` of a trainer), and functions of the depth (layer, num_layers). Any Lua
-- function is one too, and they compose as functions do.
--
--   schedule = moe.schedule.cosine{ warmup = 100, steps = 2000, min = 0.1 }                    -- of a trainer
--   router = moe.router.topk{ top_k = moe.schedule.sparsify{ from = 4, steps = 900 } }         -- (step, layer)
--   balance = moe.loss.switch(moe.schedule.constant{ warmup = 200, max = 0.01 })               -- a coefficient that warms up
--   local experts = moe.schedule.capacity{ pattern = "descending", mean = 8 }                  -- experts(layer, num_layers)
--
-- Options of the rates: warmup (steps of a linear rise from 0, default 0), steps (where the schedule ends; it stays there
-- afterwards), min (the last value, default 0), max (the highest, default 1).

local M = {}

-- One file a kind.
for _, file in ipairs { "rate", "anneal", "depth" } do
  for name, f in pairs(require("moe.schedule." .. file)) do
    if name:sub(1, 1) ~= "_" then M[name] = f end
  end
end

return M
