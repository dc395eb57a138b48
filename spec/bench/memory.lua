-- Two figures. `lua5.4 memory.lua steps N`: the resident size over N training steps of a small sparse language model
-- with no call of collectgarbage: mean of the second tenth and of the last, MB, and their ratio.
-- `lua5.4 memory.lua layer T D H E K`: peak of one MoE layer's forward and backward, MB above weights and input, the
-- way memory_torch.py measures it, and by the allocator's own count.
local moe = require "moe"
local serve = require "spec.bench.serve"

local function steps(n)
  local MB <const> = 1 << 20
  moe.manual_seed(1)
  local d, vocab, batch, block = 64, 65, 8, 32
  local embed = moe.nn.embedding(vocab, d)
  local layer = moe.layer {
    d_model = d, num_experts = 8, router = moe.router.topk { top_k = 2, norm_topk_prob = true },
    experts = moe.experts.swiglu { intermediate_size = 64 }, balance = { moe.loss.switch(0.01) },
  }
  local head = moe.nn.linear(d, vocab)
  local model = moe.nn.list { embed, layer, head }
  local optimizer = moe.optim.adamw(model, { lr = 1e-3 })
  local second, last, tenth = 0, 0, n // 10
  for step = 1, n do
    local x = moe.randint(1, vocab, { batch, block })
    local y = moe.randint(1, vocab, { batch, block })
    local h, routing = layer(embed(x))
    local loss = moe.cross_entropy(head(h):reshape { batch * block, vocab }, y:reshape { batch * block }) + routing:aux()
    optimizer:zero_grad()
    loss:backward()
    optimizer:step()
    if step > tenth and step <= 2 * tenth then second = second + serve.rss() / tenth end
    if step > n - tenth then last = last + serve.rss() / tenth end
  end
  print(("%.2f %.2f %.4f"):format(second / MB, last / MB, last / second))
end

local function status(key)
  for line in io.lines "/proc/self/status" do
    local value = line:match("^" .. key .. ":%s+(%d+)")
    if value then return tonumber(value) / 1024 end
  end
end

local function reset_peak()
  local file = io.open("/proc/self/clear_refs", "w")
  if file then
    file:write "5"
    file:close()
  end
end

local function layer_peak(t, d, h, e, k)
  moe.threads(2)
  moe.manual_seed(1)
  local layer = moe.layer {
    d_model = d, num_experts = e, router = moe.router.topk { top_k = k, norm_topk_prob = true },
    experts = moe.experts.swiglu { intermediate_size = h },
  }
  local x = moe.randn(t, d, { requires_grad = true })
  moe.zeros(64, d):matmul(moe.zeros(d, d)) -- the BLAS's own buffers
  for _, p in ipairs(layer:parameters()) do p.grad = p:detach():zeros_like() end
  x.grad = x:detach():zeros_like()
  local before, live = status "VmRSS", moe.memory().live
  local least, counted = math.huge, math.huge
  for _ = 1, 3 do
    reset_peak()
    moe.reset_peak_memory()
    moe.scope(function()
      local y = layer(x)
      local loss = (y * y):mean()
      loss:backward()
    end)
    least = math.min(least, status "VmHWM" - before)
    counted = math.min(counted, (moe.memory().peak - live) / (1 << 20))
  end
  print(("%.1f %.1f"):format(least, counted))
end

if arg[1] == "steps" then
  steps(tonumber(arg[2]) or 3000)
elseif arg[1] == "layer" then
  local sizes = {}
  for i = 1, 5 do sizes[i] = math.tointeger(tonumber(arg[i + 1])) end
  layer_peak(table.unpack(sizes))
else
  error "memory.lua steps N | layer T D H E K"
end
