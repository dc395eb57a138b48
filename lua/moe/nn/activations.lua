-- Activations as modules. A row: the options with their defaults, and what is computed.

local module = require("moe.nn.module").module

local function plain(name) return function(x) return x[name](x) end end

local ROWS = {
  relu = { {}, plain "relu" },
  silu = { {}, plain "silu" },
  tanh = { {}, plain "tanh" },
  sigmoid = { {}, plain "sigmoid" },
  softplus = { {}, plain "softplus" },
  relu_squared = { {}, plain "relu_squared" },
  gelu = { { approximate = "none" }, function(x, o) -- "none" (erf) or "tanh"
    if o.approximate == "tanh" then return x:gelu("tanh") end
    return x:gelu()
  end },
  leaky_relu = { { slope = 0.01 }, function(x, o) return x:leaky_relu(o.slope) end },
  elu = { { alpha = 1.0 }, function(x, o) return x:elu(o.alpha) end },
  softmax = { { dim = -1 }, function(x, o) return x:softmax(o.dim) end },
  log_softmax = { { dim = -1 }, function(x, o) return x:log_softmax(o.dim) end },
}

local M = {}

local function sorted_keys(t)
  local keys = {}
  for k in pairs(t) do keys[#keys + 1] = k end
  table.sort(keys)
  return keys
end

for name, row in pairs(ROWS) do
  local defaults, compute = row[1], row[2]
  local class = module(name)
  local known = sorted_keys(defaults)

  function class:init(options)
    if #known == 1 and options ~= nil and type(options) ~= "table" then options = { [known[1]] = options } end
    if options ~= nil and type(options) ~= "table" then
      error(("%s: takes no argument but a table of options, got a %s"):format(name, type(options)), 3)
    end
    for k, v in pairs(options or {}) do
      if defaults[k] == nil then
        local list = #known > 0 and "options: " .. table.concat(known, ", ") or "it has none"
        error(("%s: unknown option '%s' (%s)"):format(name, tostring(k), list), 3)
      end
      if type(v) ~= type(defaults[k]) then
        error(("%s: option '%s' must be a %s, got a %s"):format(name, k, type(defaults[k]), type(v)), 3)
      end
      self[k] = v
    end
  end

  for k, v in pairs(defaults) do class[k] = v end
  function class:forward(x) return compute(x, self) end
  function class:extra()
    local out = {}
    for i, k in ipairs(known) do
      if self[k] ~= defaults[k] then out[i] = ("%s=%s"):format(k, tostring(self[k])) end
    end
    return table.concat(out, ", ")
  end
  M[name] = class
end

-- identity()(...) = ...
M.identity = module "identity"
function M.identity.forward(_, ...) return ... end

return M
