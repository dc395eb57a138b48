--- UltraMemV2: Memory Networks Scaling to 120B Parameters with Superior Long-Context Learning (Huang et al. 2025, arXiv 2508.18756),
-- with the retrieval of Ultra-Sparse Memory Network (Huang et al. 2024, arXiv 2411.12364).
--
--   y = FFN(x) + W_out sum_{s in top_k} g_s act(u_s . W_in x) v_s,     score of slot (i, j) = s_i^T C s'_j
--
-- A memory in every block, beside a narrow feed-forward network: each slot is a network of one hidden unit with vectors u_s, v_s of
-- value_dim < d_model, which one projection expands; slots are found by rows and columns of a grid, scored through a small core
-- C (Tucker's decomposition), filtered by its leading singular vectors, and a loss keeps C near rank 1 (moe.nn.peer, rank =
-- 2). The default layer has few wide experts, and its router scores them all.

local moe = require "moe"
local nn = moe.nn

local M = {
  title = "UltraMemV2", paper = "arXiv 2508.18756", number = 133,
  claim = "memorised pairs rise with slots at fixed active compute; one slot is an FFN of width 1; the filter finds the best slots",
  outcome = "reproduced: of 1024 pairs 26 / 49 / 75 / 94 % memorised with 16 / 64 / 256 / 1024 slots (8 at work; top-8 MoE of one-unit "
    .. "experts: 24 / 74 / 100 % with 16 / 64 / 256); the filter finds 96 % of the best slots at the start",
}

local Layer = nn.module "ultramem_layer"

--- The feed-forward part: o as in moe.recipe.build; a memory of about the parameters of o.num_experts experts, of which as many
-- hidden units work for a token as in o.top_k of them, shared between the network and the slots. Options beyond: num_keys,
-- slots (that work: heads x top_k of the memory), heads (2), value_dim (d_model / 2), rank (2), core_coef (0.001), act ("silu").
function Layer:init(o)
  local units = o.top_k * o.intermediate_size
  local heads, width = o.heads or 2, o.value_dim or math.max(1, o.d_model // 2)
  local slots = o.slots or math.min(units // 2, 32)
  local n = o.num_keys or math.floor(math.sqrt(o.num_experts * o.intermediate_size * o.d_model / width))
  self.ffn = nn.ffn { d_model = o.d_model, intermediate_size = math.max(1, units - slots), activation = "silu", bias = false }
  self.memory = nn.peer {
    d_model = o.d_model, num_keys = n, top_k = math.max(1, math.min(n, slots // heads)), heads = heads, rank = o.rank or 2,
    key_dim = o.key_dim, value_dim = width, act = o.act or "silu", query_norm = "layer", score = "sigmoid",
  }
  self._core_coef = o.core_coef or 0.001
end

function Layer:forward(x, ctx) return self.ffn(x) + self.memory(x, ctx) end

--- What keeps the core near rank 1.
function Layer:aux() return self.memory.keys:core_loss(0.1) * self._core_coef end

M.layer = Layer

--- Cross entropy and the cores' losses.
function M.loss(model, batch, ctx)
  local loss = moe.loss.cross_entropy(model(batch.x, ctx), batch.y)
  if not ctx.training then return loss end
  for _, m in model:named_modules() do
    if getmetatable(m) == Layer then loss = loss + m:aux() end
  end
  return loss
end

--- The share of the truly best top_k slots among those that keys chose for x [T, d_model].
function M.recall(keys, x)
  return moe.no_grad(function()
    local all = keys:all_scores(x)
    local _, index = keys(x)
    return all:gather(3, index):ge(all:topk(keys.top_k):amin(3, true)):to("f32"):mean():item()
  end)
end

--- Memorising: `pairs` random keys [d_model], each with one of `classes` random classes, through `layer` (y = layer(x)) and a linear
-- head, in so many steps of all pairs. The share of pairs that come out right.
function M.memorise(layer, given)
  local o = given or {}
  local d, count, classes = o.d_model or 32, o.pairs or 1024, o.classes or 32
  local x, y = moe.randn(count, d), moe.randint(1, classes, count)
  local model = nn.sequential(layer, nn.linear(d, classes))
  local opt = moe.optim.adamw(model, { lr = o.lr or 0.01, weight_decay = 0 })
  for _ = 1, o.steps or 200 do
    opt:zero_grad()
    moe.loss.cross_entropy(model(x), y):backward()
    opt:step { clip = 1 }
  end
  model:eval()
  return moe.no_grad(function() return model(x):argmax(-1):eq(y):to("f32"):mean():item() end)
end

return M
