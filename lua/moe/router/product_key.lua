-- Slots of a product-key memory as experts.

local core = require "moe.core"
local nn = require "moe.nn"
local base = require "moe.router.base"
local sparse = core._sparse

--- The choice of a product-key memory as a routing: of num_experts = n^2 experts, top_k for each of `heads` queries of a token, weighted
-- by the softmax of a head's chosen scores; an expert that two heads chose has the token twice. No array [T, n^2] is made,
-- and the routing has neither logits nor probs. Options: top_k (8), heads (1), key_dim, query_norm ("batch"), rank, as in
-- moe.nn.product_keys, whose parameters lie under `keys`. Lample et al. 2019 (arXiv 1907.05242).
local ProductKey = nn.module("product_key", base.Router)

local ROWS <const> = base.rows {
  top_k = { "integer", 8 }, heads = { "integer", 1 }, key_dim = { "integer" },
  query_norm = { { "batch", "layer", "none" }, "batch" }, rank = { "integer", 1 },
}

function ProductKey:init(given)
  local o = self:setup(given, ROWS)
  if not o then return end
  local n = math.floor(math.sqrt(o.num_experts) + 0.5)
  if n * n ~= o.num_experts then self:fail("num_experts is %d, wanted a square", o.num_experts) end
  self.keys = nn.product_keys {
    d_model = o.d_model, num_keys = n, top_k = o.top_k, heads = o.heads, key_dim = o.key_dim, query_norm = o.query_norm, rank = o.rank,
    dtype = o.dtype, device = o.device,
  }
  self.top_k = o.top_k * o.heads
end

function ProductKey:route(x, ctx)
  self:ready()
  local score, index = self.keys(self:input(x))
  return sparse.topk(index:flatten(2), score:softmax(-1):flatten(2), self.num_experts, ctx and ctx.mask)
end

ProductKey.forward = ProductKey.route

function ProductKey.traits(_, o) return { ("top_k=%d, heads=%d"):format(o.top_k, o.heads) } end

return ProductKey
