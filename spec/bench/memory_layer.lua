-- A step of a product-key memory (forward, backward, AdamW on its touched rows) with 1,048,576 entries and with 65,536, in one
-- process, by turns: `lua5.4 spec/bench/memory_layer.lua [tokens d_model heads top_k rounds]`. Prints the least times in ms of
-- the parts and of the whole, their ratio, and the bytes that the whole must move at least, over the bandwidth that a copy
-- reaches in the same run. With MOE_THREADS=1 times are processor times, which other work on the machine disturbs less.
local moe = require "moe"

local T, D, HEADS, K, ROUNDS = 256, 256, 4, 16, 40
for i, v in ipairs(arg) do
  v = math.tointeger(tonumber(v))
  if i == 1 then T = v elseif i == 2 then D = v elseif i == 3 then HEADS = v elseif i == 4 then K = v else ROUNDS = v end
end

local threads = tonumber(os.getenv "MOE_THREADS") or 2
moe.threads(threads)
moe.manual_seed(1)
local parts = { "choice", "forward", "backward", "step", "whole" }

local function memory(n)
  local m = moe.nn.product_key_memory { d_model = D, num_keys = n, heads = HEADS, top_k = K }
  local self = { n = n, m = m, opt = moe.optim.adamw(m, { lr = 1e-3 }), least = {} }
  for _, name in ipairs(parts) do self.least[name] = math.huge end
  return self
end

local clock = threads == 1 and os.clock or moe.clock
local function keep(self, name, seconds) self.least[name] = math.min(self.least[name], seconds) end

local function step(self)
  local x, g = moe.randn(T, D, { requires_grad = true }), moe.randn(T, D)
  moe.no_grad(function()
    local t = clock()
    self.m:choice(x)
    keep(self, "choice", clock() - t)
  end)
  local start = clock()
  self.opt:zero_grad()
  local y = self.m(x)
  local forward = clock()
  y:backward(g)
  local backward = clock()
  self.opt:step { clip = 1 }
  local done = clock()
  keep(self, "forward", forward - start)
  keep(self, "backward", backward - forward)
  keep(self, "step", done - backward)
  keep(self, "whole", done - start)
  self.rows = self.m.values.grad_rows:numel()
end

local small, large = memory(256), memory(1024)
local a, b = moe.randn(1 << 24), moe.zeros(1 << 24)
local copy = math.huge
for _ = 1, ROUNDS do
  for _, self in ipairs { small, large } do moe.scope(step, self) end
  local t = clock()
  b:copy_(a)
  copy = math.min(copy, clock() - t)
end
local bandwidth = 2 * 4 * (1 << 24) / copy

print(("%d tokens, d_model %d, %d heads, top_k %d, %d threads; a copy moves %.1f GB/s"):format(T, D, HEADS, K, moe.threads(),
  bandwidth / 1e9))
print(("%-10s %12s %12s %8s"):format("ms", "65,536", "1,048,576", "ratio"))
for _, name in ipairs(parts) do
  local s, l = small.least[name], large.least[name]
  print(("%-10s %12.2f %12.2f %8.2f"):format(name, s * 1e3, l * 1e3, l / s))
end
for _, self in ipairs { small, large } do
  local reads, row, keys = T * HEADS * K, 4 * D, 4 * HEADS * self.n * (D // 4 * 2)
  -- lookup and its gradient read rows; a touched row: its gradient is written, read for the norm and the update, which
  -- reads and writes the row and two states; the keys likewise; scores are written and read twice
  local bytes = 2 * reads * row + self.rows * row * 9 + keys * 10 + 3 * 4 * 2 * HEADS * T * self.n
  print(("%d entries: %d reads of %d rows, %.0f MB at least: %.2f ms at the copy's rate, %.0f %% of the step"):format(
    self.n ^ 2 // 1 | 0, reads, self.rows, bytes / 1e6, bytes / bandwidth * 1e3, 100 * bytes / bandwidth / self.least.whole))
end
