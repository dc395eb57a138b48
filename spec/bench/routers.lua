-- What routing costs, and how fast the layers of each router are. `lua5.4 routers.lua [ROUNDS]`, through `run.sh routers`.
--
-- 1. The time of every router for 8192 tokens, d 512, 64 experts and 8 a token (forward, recorded, as in training), as a
--    share of what the experts take for these assignments (SwiGLU, hidden 512, forward).
-- 2. Layers of routers at (2048, 512, 512, 64, about 8 a token), forward + backward: their operations over their time, as a
--    share of the rate of the BLAS on a product of 1024 x 1024 matrices.
-- All take turns, round by round; the least time of each counts.
local moe = require "moe"

local ROUNDS <const> = tonumber(arg[1]) or 12
local D <const>, H <const>, E <const>, K <const> = 512, 512, 64, 8

moe.threads(tonumber(os.getenv "MOE_THREADS") or 2)
moe.manual_seed(1)

local function timed(f)
  local t = moe.clock()
  f()
  return moe.clock() - t
end

-- Sets router by `set(value)`, value in [lo, hi], so that x has about K experts a token; more of it: more experts.
local function tune(router, x, set, lo, hi)
  for _ = 1, 24 do
    local mid = (lo + hi) / 2
    set(mid)
    local n = moe.no_grad(function() return router:route(x, { step = 1 }).num_assignments end) / x:size(1)
    if n > K then hi = mid else lo = mid end
  end
end

local function set_bias(router) return function(v) router.bias:detach():fill_(v) end end
local function set_p(router) return function(v) router.p = v end end
local function set_threshold(router) return function(v) router.threshold = -v end end

-- name in moe.router, options, how to come to K experts a token, lowest and highest value
local ROUTERS <const> = {
  { "topk", { top_k = K } },
  { "topk", { top_k = K, score = "sigmoid", n_group = 8, topk_group = 4, noise = "learned" }, label = "topk: sigmoid, groups, noise" },
  { "cosine", { top_k = K } },
  { "expert_choice", { top_k = K } },
  { "expert_choice", { top_k = K, within = "position" }, label = "expert_choice: by position" },
  { "relu", {}, set_bias, -20, 20 },
  { "top_p", {}, set_p, 0, 1 },
  { "threshold", {}, set_threshold, -1, 0 },
  { "threshold", { quantile = (E - K - 0.5) / (E - 1) }, label = "threshold: the token's quantile" },
  { "threshold", { quantile = 1 - K / E, over = "batch" }, label = "threshold: the batch's quantile" },
  { "dense_to_sparse", {}, set_threshold, -1, 0 },
  { "two_stage", { top_k = K - 2, num_shared = 2 } },
  { "mlp", { top_k = K } },
  { "soft", { slots = K } },
  { "mixture_of_tokens", {} },
  { "random", { top_k = K } },
  { "neighbour", { top_k = K, rank = 128 } },
  { "sequence", { top_k = K } },
  { "hash", { top_k = K, vocab_size = 1000 } },
  { "balanced", { top_k = K } },
  { "prototype", { top_k = K } },
  { "kmeans", { top_k = K } },
  { "by_id", { top_k = K, num_ids = 1000, key = "token_ids" } },
  { "lookahead", { top_k = K } },
}

-- The routers, made and tuned; those that this version of the library lacks are left out.
local function make(x, wanted)
  local list = {}
  for _, row in ipairs(ROUTERS) do
    local name, options = row[1], { d_model = D, num_experts = E }
    for k, v in pairs(row[2]) do options[k] = v end
    if moe.router[name] and (not wanted or wanted[row.label or name]) then
      local router = moe.router[name](options)
      if row[3] then tune(router, x, row[3](router), row[4], row[5]) end
      list[#list + 1] = { label = row.label or name, router = router, least = math.huge }
    end
  end
  return list
end

local function context(batch, time)
  return { step = 1, shape = { batch, time }, token_ids = moe.arange(0, batch * time - 1):to "i64":remainder(1000) + 1 }
end

local function routing_times()
  local B, time = 128, 64
  local T = B * time
  local x = moe.randn(T, D)
  local list = make(x)
  local experts = moe.experts.swiglu { d_model = D, num_experts = E, intermediate_size = H }
  local routing = moe.router.topk({ d_model = D, num_experts = E, top_k = K }):route(x)
  local work = math.huge
  for round = 1, ROUNDS do
    if round % 3 == 1 then
      work = math.min(work, timed(function() moe.no_grad(function() moe.scope(function() experts(x, routing) end) end) end))
    end
    for _, row in ipairs(list) do
      moe.scope(function()
        local made
        row.least = math.min(row.least, timed(function() made = row.router:route(x, context(B, time)) end))
        row.count = made.num_assignments / T
      end)
    end
  end
  print(("routing %d tokens, d %d, %d experts; the experts take %.1f ms for %d a token"):format(T, D, E, work * 1e3, K))
  for _, row in ipairs(list) do
    print(("  %-32s %6.2f ms  %5.2f %% of the experts  (%.2f a token)"):format(row.label, row.least * 1e3,
      100 * row.least / work, row.count))
  end
end

local function layer_rates()
  local B, time = 32, 64
  local T = B * time
  local x, g = moe.randn(B, time, D, { requires_grad = true }), moe.randn(B, time, D)
  local a, b = moe.randn(1024, 1024), moe.randn(1024, 1024)
  local list = make(x:detach():reshape { T, D }, { topk = true, expert_choice = true, relu = true, top_p = true, soft = true })
  local product = math.huge
  for _, row in ipairs(list) do
    row.layer = moe.layer { d_model = D, num_experts = E, router = row.router, experts = moe.experts.swiglu { intermediate_size = H } }
  end
  for _ = 1, ROUNDS do
    for _, row in ipairs(list) do
      for _ = 1, 3 do product = math.min(product, timed(function() local _ <close> = a:matmul(b) end)) end
      row.layer:zero_grad()
      x.grad = nil
      moe.scope(function()
        local y, routing
        row.least = math.min(row.least, timed(function()
          y, routing = row.layer(x)
          y:backward(g)
        end))
        row.count = routing.num_assignments / T
        local soft = routing.dispatch
        -- the mixing of tokens into slots and back is work of a soft layer
        row.work = 18 * routing.num_assignments * D * H + (soft and 12 * routing.num_assignments * time * D or 0)
      end)
    end
  end
  local rate = 2 * 1024 ^ 3 / product
  print(("layers, %d tokens, d %d, hidden %d, %d experts, forward + backward; sgemm at 1024: %.0f GFLOP/s"):format(T, D, H, E,
    rate / 1e9))
  for _, row in ipairs(list) do
    print(("  %-32s %6.1f ms  %5.1f %% of sgemm  (%.2f a token)"):format(row.label, row.least * 1e3,
      100 * row.work / row.least / rate, row.count))
  end
end

routing_times()
layer_rates()
