--- Efficient Deweather Mixture-of-Experts with Uncertainty-aware Feature-wise Linear Modulation. Rongyu Zhang, Yulin Luo, Jiaming
-- Liu, Huanrui Yang, Zhen Dong, Denis Gudovskiy, Tomoyuki Okuno, Yohei Nakata, Kurt Keutzer, Yuan Du, Shanghang Zhang 2023
-- (arXiv 2312.16610).
--
--   h = act(up x),  y = sum_i g_i down(gamma_i * h + beta_i),  g: the k best of softmax(l),  l = mean(z) / sqrt(1 + pi/8 var(z))
--
-- One shared network; expert i is a pair of vectors that modulate its hidden activations (moe.experts.film), so that experts
-- cost next to nothing. The router takes its logits from passes z_m with dropout and trusts those that waver less
-- (moe.router.uncertain; the exact form of that normalisation is chosen here). It differs from the default layer in both.
-- The task is restoration: patches under one of three corruptions, as the paper removes rain, haze and snow with one model.

local moe = require "moe"
local nn = moe.nn
local lab = require "moe.recipe.lab"
local pictures = require "moe.recipe.pictures"

local M = {
  title = "MoFME: one network modulated by experts, an uncertainty-aware router", paper = "arXiv 2312.16610", number = 124,
  claim = "restores as well as a dense network or better, near a full mixture of experts, with far fewer parameters",
  outcome = "half reproduced: 18.36 dB against 18.34 (dense) and 18.41 (full mixture, 2.3 times the parameters), six seeds with a " ..
    "spread of 0.15: equal to both within it, better than neither",
}

--- The feed-forward part of a language model: a shared network as wide as a token's experts together.
function M.layer(o)
  return moe.layer {
    d_model = o.d_model, num_experts = o.num_experts, router = moe.router.uncertain { top_k = o.top_k, dropout = o.dropout },
    experts = moe.experts.film { intermediate_size = o.intermediate_size * o.top_k, spread = 0.1 },
    balance = { moe.loss.switch(0.01) },
  }
end

-- What takes the place of a block's network: of the same width each, so that a token costs one network (moe: two).
local KINDS <const> = {
  mofme = M.layer,
  dense = function(o) return nn.ffn { d_model = o.d_model, intermediate_size = o.intermediate_size * o.top_k } end,
  moe = function(o)
    return moe.layer {
      d_model = o.d_model, num_experts = o.num_experts, router = moe.router.topk { top_k = o.top_k },
      experts = moe.experts.mlp { intermediate_size = o.intermediate_size * o.top_k, bias = true },
      balance = { moe.loss.switch(0.01) },
    }
  end,
}

--- A network that restores patches: kind ("mofme", "dense", "moe"), size, d_model, num_layers, num_experts, top_k,
-- intermediate_size.
function M.restorer(o) return pictures.restorer(o, KINDS[o.kind]) end

--- Trains a restorer on fresh patches. Options: kind, seed, steps, lr, and those of restorer. Gives { psnr, model, parameters }.
function M.train(given)
  local o = { size = 8, d_model = 64, num_layers = 2, num_experts = 8, top_k = 2, intermediate_size = 4, steps = 600, seed = 1, lr = 4e-3 }
  for k, v in pairs(given) do o[k] = v end
  moe.manual_seed(o.seed)
  local model = M.restorer(o)
  pictures.fit(model, o.steps, o.lr, function()
    local clean, ctx = pictures.patches(192, o.size), {}
    return moe.loss.mse(model(pictures.corrupt(clean, o.size), ctx), clean) + moe.loss.aux(ctx)
  end, moe.schedule.cosine { warmup = 20, steps = o.steps, min = 0.02 })
  moe.manual_seed(1000) -- the same patches for all
  model:eval()
  local clean = pictures.patches(3000, o.size)
  local restored = moe.no_grad(model, pictures.corrupt(clean, o.size))
  return { psnr = pictures.psnr(restored, clean), model = model, parameters = model:num_parameters() }
end

--- Restoration by the three kinds of blocks: rows { name, mean psnr over seeds, parameters }.
function M.demo(report, given)
  local o, rows = given or {}, {}
  for i, kind in ipairs { "dense", "mofme", "moe" } do
    local values, parameters = {}, nil
    for j, seed in ipairs(o.seeds or { 1, 2, 3 }) do
      local run = M.train { kind = kind, seed = seed, steps = o.steps }
      values[j], parameters = run.psnr, run.parameters
    end
    local mean, spread = lab.mean(values)
    rows[i] = { ("%s, %d parameters, dB"):format(kind, parameters), mean, spread = spread, parameters = parameters }
    if report then report(rows[i][1], mean, spread) end
  end
  return rows
end

return M
