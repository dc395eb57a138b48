--- moe.router: what decides. A router answers route(x, ctx) for x [T, d_model] with a routing; so does a plain function
-- (x, ctx). One made without d_model is a description: bind{ d_model =, num_experts = } makes the router.

local core = require "moe.core"

local M = {}

--- The choice "token t takes experts t k + 1, t k + 2, ..." modulo num_experts, as [T, k]: an even load, for experiments.
function M.uniform_choice(tokens, top_k, num_experts)
  for i, v in ipairs { tokens or false, top_k or false, num_experts or false } do
    if math.type(v) ~= "integer" or v < (i == 1 and 0 or 1) then
      error(("router.uniform_choice: argument %d must be a count, got %s"):format(i, tostring(v)), 2)
    end
  end
  return core.arange(0, tokens * top_k - 1):to "i64":remainder(num_experts):reshape { tokens, top_k } + 1
end

-- One file a router.
local paths = {}
for _, name in ipairs {
  "topk", "cosine",
  "expert_choice", "relu", "top_p", "threshold", "dense_to_sparse",
  "two_stage", "mlp", "patches", "uncertain",
  "soft", "mixture_of_tokens", "random", "neighbour", "sequence",
  "hash", "balanced", "prototype", "kmeans", "by_id", "lookahead",
  "product_key",
} do
  paths[name] = "moe.router." .. name
end

return require "moe.lazy"(M, paths)
