--- Polynomial Composition Activations: Unleashing the Dynamics of Large Language Models.
-- Zhijian Zhuo, Ya Wang, Yutao Zeng, Xiaoqing Li, Xun Zhou, Jinwen Ma, 2024 (arXiv 2411.03884).
--
--   PolyReLU(h) = sum_{i=0..3} a_i relu(h)^i        PolyNorm(h) = a_0 + sum_{i=1..3} a_i h^i / rms(h^i)
--
-- in the place of the activation: y = down PolyNorm(up x). The coefficients a, at the start (0, 1/3, 1/3, 1/3), are learned; here every
-- expert has its own. Differs from the default layer in the activation alone (moe.poly_norm, moe.poly_relu, fused); the paper's
-- mixture of experts puts PolyNorm where SwiGLU's product was, with the widths that keep the number of parameters.

local moe = require "moe"
local lab = require "moe.recipe.lab"

local M = {
  title = "PolyCom: polynomial activations with learned coefficients",
  paper = "arXiv 2411.03884",
  number = 78,
  claim = "fits smooth functions with fewer units than ReLU; a lower loss than GELU and SwiGLU at equal parameters",
  outcome = "reproduced in direction (three seeds): smooth functions with half of ReLU's units and 2 to 13 times less error; on " ..
    "text 2.461 nats against 2.478 (GELU), 2.471 (SwiGLU) and 2.477 (ReLU), lower with each seed, by less than 1 %",
}

--- A recipe's layer with another activation at the same number of parameters: a name of moe.experts.mlp, or "swiglu".
function M.with(act)
  return function(o)
    local width, kind = o.intermediate_size, "mlp"
    if act == "swiglu" then
      kind, width, act = "glu", math.floor(width * 2 / 3 + 0.5), "silu"
    end
    return moe.layer {
      d_model = o.d_model, num_experts = o.num_experts, router = moe.router.topk { top_k = o.top_k },
      experts = moe.experts[kind] { intermediate_size = width, act = act }, balance = { moe.loss.switch(0.01) },
    }
  end
end

M.layer = M.with "poly_norm"

--- Trains a language model with an activation on a text; lab.train's result. A model that learns fast enough for activations to
-- differ: rotated positions, no tied embeddings. Options: act, seed, steps, lr, text.
function M.train(o)
  moe.manual_seed(o.seed)
  local text = o.text or lab.text { size = 200000 }
  local layer = M.with(o.act)
  local model = moe.model.lm {
    vocab_size = text.vocab_size, d_model = 48, num_layers = 2, num_heads = 4, max_seq_len = 48, norm = "rmsnorm", positional = "rope",
    tie_embeddings = false, init = "normal(0.1)", embedding_init = "normal(0.5)",
    ffn = function() return layer { d_model = 48, num_experts = 4, top_k = 2, intermediate_size = 48 } end,
  }
  return lab.train({ layer = layer },
    { text = text, seq_len = 48, batch_size = 8, steps = o.steps or 150, lr = o.lr or 3e-3, seed = o.seed }, model)
end

--- Fits a network d -> units -> 1 with an activation (a name of moe.experts.mlp) to f(x [n, d]) -> [n, 1] on random points of [-1, 1]^d;
-- the mean squared error on others. Options: d, units, act, f, steps, seed.
function M.fit(o)
  moe.manual_seed(o.seed or 1)
  local net = moe.experts.mlp { d_model = o.d, d_out = 1, intermediate_size = o.units, act = o.act, bias = true }
  local function points(n) return moe.rand(n, o.d) * 2 - 1 end
  local optimizer = moe.optim.adamw(net, { lr = 0.02, weight_decay = 0 })
  local schedule = moe.schedule.cosine { steps = o.steps, min = 0.01 }
  for step = 1, o.steps do
    optimizer:zero_grad()
    optimizer.lr = 0.02 * schedule(step)
    local x = points(128)
    moe.loss.mse(net(x), o.f(x)):backward()
    optimizer:step { clip = 1 }
  end
  return moe.no_grad(function()
    local x = points(2000)
    return moe.loss.mse(net(x), o.f(x)):item()
  end)
end

return M
