--- Pushing Mixture of Experts to the Limit: Extremely Parameter Efficient MoE for Instruction Tuning. Zadouri, Üstün, Ahmadian,
-- Ermiş, Locatelli, Hooker 2023 (arXiv 2309.05444).
--
-- A frozen model, tuned by experts that are vectors (MoV) or low-rank pairs (MoLORA), mixed by a dense router s = softmax(W_g x):
--   MoV      a(x) becomes (sum_i s_i l_i) * a(x),   a: the keys, the values, and the hidden activations of the FFN
--   MoLORA   W x becomes W x + sum_i s_i B_i A_i x,  W: the linear layers of the FFN (the paper tunes those of the attention too)
-- One expert is IA3, or LoRA. It differs from the default layer in that every expert works on every token, costs next to nothing,
-- and all that is trained are experts and routers.

local moe = require "moe"
local nn = moe.nn
local domains = require "moe.recipe.domains"

local M = {
  title = "MoV and MoLORA: vectors or low-rank pairs as experts of a frozen model", paper = "arXiv 2309.05444", number = 105,
  claim = "on a mix of four tasks, four vectors and a router reach a lower loss than one vector, the base being left as it is",
  outcome = "reproduced (three seeds, 200 steps): 1.84 nats with four vectors against 2.24 with one (IA3), 1.24 against 1.56 for " ..
    "low-rank pairs; 5 and 16 % of this small model's parameters are trained, mostly routers",
}

-- Scales activations a [.., width] by vectors that a router mixes by x [.., d_model].
local Scaled = nn.module "mov_scale"

function Scaled:init(d_model, width, E)
  if E > 1 then self.router = moe.router.topk { d_model = d_model, num_experts = E, top_k = E, norm_topk_prob = false } end
  self.experts = moe.experts.ia3 { d_model = width, num_experts = E }
end

function Scaled:forward(x, a)
  if not self.router then return self.experts(a) end
  local routing = self.router:route(x:reshape { -1, x:size(-1) })
  return self.experts(a:reshape { -1, a:size(-1) }, routing):reshape(a.shape), routing
end

-- A frozen feed-forward network with its hidden activations scaled.
local Ffn = nn.module "mov_ffn"

function Ffn:init(base, d_model, E)
  self.base, self.scale = base, Scaled(d_model, base.down_proj.weight:size(2), E)
end

function Ffn:forward(x)
  local base = self.base
  local h, routing = self.scale(x, x:linear(base.up_proj.weight):gelu())
  return h:linear(base.down_proj.weight), routing
end

-- Frozen attention with keys and values scaled; whole sequences, rotated positions.
local Attention = nn.module "mov_attention"

function Attention:init(base, d, E)
  self.base, self.key, self.value = base, Scaled(d, d, E), Scaled(d, d, E)
end

function Attention:forward(x)
  local base, B, T, d = self.base, table.unpack(x.shape)
  local q, k, v = x:linear(base.qkv_proj.weight):chunk(3, -1)
  local function heads(t) return t:reshape { B, T, base.num_heads, d // base.num_heads }:transpose(2, 3) end
  k, v = heads((self.key(x, k))), heads((self.value(x, v)))
  local y = moe.attention(heads(q):rope(), k:rope(), v, { causal = true })
  return y:transpose(2, 3):reshape { B, T, d }:linear(base.o_proj.weight)
end

--- Puts experts into a frozen model of moe.recipe.domains, in place. Options: kind ("mov" or "molora"), num_experts, rank.
function M.adapt(model, o)
  local E, d = o.num_experts, model.d_model
  for _, block in ipairs(model.layers) do
    if o.kind == "molora" then
      local router = E > 1 and moe.router.topk { top_k = E, norm_topk_prob = false } or nil
      block.ffn = moe.experts.lora_ffn { base = block.ffn, num_experts = E, rank = o.rank or 2, router = router }
    else
      block.mixer, block.ffn = Attention(block.mixer, d, E), Ffn(block.ffn, d, E)
    end
  end
  return model
end

--- Trains a base on prose, then tunes it on a mix of four kinds of text. Options: seeds, steps, lr, base, kinds (a list of { kind,
-- num_experts }). Gives rows as of domains.compare, named "mov-4".
function M.run(o)
  local cases = {}
  for i, kind in ipairs(o.kinds) do
    cases[i] = { ("%s-%d"):format(kind[1], kind[2]), function(model) M.adapt(model, { kind = kind[1], num_experts = kind[2] }) end }
  end
  return domains.compare(cases, {
    base = o.base or domains.base(), text = domains.text "prose tales ledger code", seeds = o.seeds, steps = o.steps,
    lr = o.lr or 0.02, weight_decay = 0,
  })
end

--- IA3 and MoV, LoRA and MoLORA, on the mix of four tasks: rows { name, loss }.
function M.demo(report)
  local kinds, rows = { { "mov", 1 }, { "mov", 4 }, { "molora", 1 }, { "molora", 4 } }, {}
  for i, row in ipairs(M.run { kinds = kinds, seeds = { 1, 2, 3 }, steps = 200 }) do
    rows[i] = { row.name, row.val_loss }
    if report then report(row.name, row.val_loss) end
  end
  return rows
end

return M
