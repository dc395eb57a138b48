-- moe.nn.init: fill a tensor in place by a named distribution and return it. The table is csrc/nn/init.c; the same
-- names, `init = "normal(0.02)"`, are options of layers.

local core = require "moe.core"
local low = core._module

local M = {}

for _, row in ipairs(low.initialisers) do
  local name, names, defaults = row.name, {}, {}
  for option, value in row.args:gmatch "(%w+)=([%d%.%-]+)" do
    names[#names + 1] = option
    defaults[option] = tonumber(value)
  end
  local text = name .. "_"
  M[text] = function(t, ...)
    if not low.is_tensor(t) then error(("init.%s: argument 1 must be a tensor, got a %s"):format(text, type(t)), 2) end
    local options, n = ..., select("#", ...)
    if type(options) ~= "table" then
      if n > #names then
        error(("init.%s: takes at most %d numbers (%s), got %d"):format(text, #names, row.args, n), 2)
      end
      return low.initialise(t, name, ...)
    end
    local values = {}
    for i, option in ipairs(names) do values[i] = options[option] or defaults[option] end
    for k in pairs(options) do
      if defaults[k] == nil then
        error(("init.%s: unknown option '%s' (options: %s)"):format(text, tostring(k), row.args), 2)
      end
    end
    return low.initialise(t, name, table.unpack(values))
  end
end

--- Fills t by a description: "normal(0.02)", "xavier_uniform", a number, or a function(t).
function M.apply(t, what)
  if type(what) == "function" then
    what(t)
  elseif type(what) == "number" then
    low.initialise(t, "constant", what)
  else
    low.initialise(t, what)
  end
  return t
end

--- What there is: a list of { name, args, doc }.
function M.list() return low.initialisers end

return M
