-- Activations with learned coefficients.

local nn = require "moe.nn.module"
local options = require "moe.nn.options"
local coefficients = require "moe.nn.coefficients"

local M = {}

local ROWS <const> = { order = { "integer", 3 }, dtype = { "string" }, device = { "string" } }

-- options of a class, checked
local function read(name, given, rows)
  if math.type(given) == "integer" then given = { order = given } end
  local o = options.read(name, given, rows, 3)
  if o.order < 1 or o.order > 15 then error(("%s: option 'order' must lie in 1..15, got %d"):format(name, o.order), 3) end
  return o
end

--- PolyReLU: y = sum_i a_i max(x, 0)^i, i = 0 .. order, as in moe.poly_relu; parameter `coefficients` [order + 1], at the
-- start 0 and then 1 / order each. Options: order (3), also as the one argument. x [.., n] -> [.., n].
-- Zhuo et al. 2024 (arXiv 2411.03884, eq. 3; cubic, with these first values, in its experiments).
local PolyReLU = nn.module "poly_relu"
M.poly_relu = PolyReLU

function PolyReLU:init(given)
  local o = read("poly_relu", given, ROWS)
  self.order = o.order
  self.coefficients = coefficients(o.order, nil, o)
end

function PolyReLU:forward(x) return x:poly_relu(self.coefficients) end

function PolyReLU:extra() return ("order=%d"):format(self.order) end

--- PolyNorm: y = a_0 + sum_i a_i x^i / rms(x^i), i = 1 .. order, rms over the last dimension, as in moe.poly_norm; parameter
-- `coefficients` [order + 1] as in poly_relu. Options: order (3), eps (1e-6). x [.., n] -> [.., n].
-- Zhuo et al. 2024 (arXiv 2411.03884, eq. 4; the root mean square in place of the norm there, as its authors compute it).
local PolyNorm = nn.module "poly_norm"
M.poly_norm = PolyNorm

local NORM_ROWS <const> = { eps = { "number", 1e-6 } }
for k, v in pairs(ROWS) do NORM_ROWS[k] = v end

function PolyNorm:init(given)
  local o = read("poly_norm", given, NORM_ROWS)
  self.order, self.eps = o.order, o.eps
  self.coefficients = coefficients(o.order, nil, o)
end

function PolyNorm:forward(x) return x:poly_norm(self.coefficients, self.eps) end

function PolyNorm:extra() return ("order=%d"):format(self.order) end

return M
