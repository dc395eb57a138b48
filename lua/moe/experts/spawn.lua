-- Experts grown from one.

local core = require "moe.core"
local nn = require "moe.nn"
local options = require "moe.nn.options"

local ROWS <const> = {
  from = { "table" }, expert = { "integer", 1 }, noise = { "number", 0 }, mask = { "number", 0 },
}

local function fail(text, ...) error("experts.spawn: " .. text:format(...), 3) end

--- Makes every expert of a bank a copy of one, in place, so that optimizers stay bound: w_e <- keep_e * (w + noise std(w) n_e),
-- n_e normal, keep_e 1 with probability 1 - mask, else 0, drawn for each element of each expert's matrices; biases are copied as
-- they are. Options: `expert` (1), the number of the one to copy, `from`: the bank that it is in (default: this one; of the same
-- class and sizes, and of any number of experts), noise and mask (0: exact copies). Returns the bank. The spawning of EvoMoE
-- (Nie et al. 2021, arXiv 2112.14397) and, without noise, the copies of sparse upcycling (Komatsuzaki et al. 2022, arXiv
-- 2212.05055).
local function spawn(bank, given)
  if not (nn.is_module(bank) and math.type(bank.num_experts) == "integer") then
    fail("argument 1 must be a bank of experts, got a %s", type(bank))
  end
  local o = options.read("experts.spawn", given, ROWS, 2)
  local from = o.from or bank
  if not (nn.is_module(from) and getmetatable(from) == getmetatable(bank)) then fail "option 'from' must be a bank of the same class" end
  local there = from.num_experts
  if not (there and o.expert >= 1 and o.expert <= there) then fail("there is no expert %d among %s", o.expert, tostring(there)) end
  if o.noise < 0 or o.noise ~= o.noise then fail("option 'noise' must not be negative, got %g", o.noise) end
  if not (o.mask >= 0 and o.mask <= 1) then fail("option 'mask' must be in [0, 1], got %g", o.mask) end
  local source = {}
  for name, p in from:named_parameters() do source[name] = p end
  core.no_grad(function()
    for name, p in bank:named_parameters() do
      local one, w = source[name], p:detach()
      local a, b = one and one.shape or {}, w.shape
      local alike = #a == #b and a[1] == there and b[1] == bank.num_experts
      for i = 2, #a do alike = alike and a[i] == b[i] end
      if not alike then
        fail("parameter %s is [%s], but [%s] in the bank to copy from", name, table.concat(b, ", "), table.concat(a, ", "))
      end
      one = one:detach():narrow(1, o.expert, 1):clone()
      w:copy_(one)
      if #b > 2 and o.noise > 0 then w:add_(core.randn_like(w) * (one:std() * o.noise)) end
      if #b > 2 and o.mask > 0 then w:mul_(core.rand_like(w):ge(o.mask):to(w.dtype)) end
    end
  end)
  return bank
end

return spawn
