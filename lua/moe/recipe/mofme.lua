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

local Restorer = nn.module "restorer"

--- A network that restores patches: clean = net(x [n, size^2]), x + out(blocks(embed x)). Options: kind ("mofme", "dense", "moe"), size,
-- d_model, num_layers, num_experts, top_k, intermediate_size.
function Restorer:init(o)
  self.embed, self.out = nn.linear(o.size * o.size, o.d_model), nn.linear(o.d_model, o.size * o.size)
  self.norms, self.blocks = nn.list(), nn.list()
  for _ = 1, o.num_layers do
    self.norms:append(nn.layernorm { size = o.d_model })
    self.blocks:append(KINDS[o.kind](o))
  end
end

function Restorer:forward(x, ctx)
  local h = self.embed(x)
  for i, block in ipairs(self.blocks) do
    local z = self.norms[i](h)
    if block.router then h = h + (block(z, ctx)) else h = h + block(z) end
  end
  return x + self.out(h)
end

M.restorer = Restorer

--- n clean patches [n, size^2] of values around 0..1: two soft waves and an edge.
function M.patches(n, size)
  local at = moe.arange(1, size):to "f32" / size
  local gx, gy = at:reshape { 1, 1, size }, at:reshape { 1, size, 1 }
  local function draw(low, high) return moe.rand(n, 1, 1) * (high - low) + low end
  local function wave(low, high)
    return ((gx * draw(low, high) + gy * draw(low, high) + draw(0, 6.3)):sin() * draw(0.05, 0.2))
  end
  local edge = ((gx - 0.5) * draw(-1, 1) + (gy - 0.5) * draw(-1, 1) + draw(-0.2, 0.2)):gt(0):to "f32" * draw(-0.4, 0.4)
  return (wave(-3, 3) + wave(-7, 7) + edge + draw(0.3, 0.7)):reshape { n, size * size }
end

--- The patches with one of three corruptions each: noise, bright vertical streaks, or a haze that fades contrast. The kind of a patch is
-- its number modulo 3.
function M.corrupt(x, size)
  local n = x:size(1)
  local noisy = x + moe.randn_like(x) * 0.15
  local streak = moe.rand(n, 1, size):lt(0.2):to "f32" * 0.6
  local streaked = (x:reshape { n, size, size } + streak):reshape { n, size * size }
  local t = moe.rand(n, 1) * 0.5 + 0.3
  local hazed = x * t + (1 - t)
  local kind = moe.arange(0, n - 1):remainder(3):unsqueeze(2)
  return moe.where(kind:eq(0), noisy, moe.where(kind:eq(1), streaked, hazed))
end

--- Peak signal to noise ratio in dB, the peak being 1.
function M.psnr(restored, clean) return -10 * math.log(moe.loss.mse(restored, clean):item(), 10) end

--- Trains a restorer on fresh patches. Options: kind, seed, steps, and those of Restorer. Gives { psnr, model, parameters }.
function M.train(given)
  local o = { size = 8, d_model = 64, num_layers = 2, num_experts = 8, top_k = 2, intermediate_size = 4, steps = 600, seed = 1, lr = 4e-3 }
  for k, v in pairs(given) do o[k] = v end
  moe.manual_seed(o.seed)
  local model = Restorer(o)
  local optimizer = moe.optim.adamw(model, { lr = o.lr, weight_decay = 0.01 })
  local schedule = moe.schedule.cosine { warmup = 20, steps = o.steps, min = 0.02 }
  for step = 1, o.steps do
    local clean, ctx = M.patches(192, o.size), {}
    optimizer.lr = o.lr * schedule(step)
    optimizer:zero_grad()
    local loss = moe.loss.mse(model(M.corrupt(clean, o.size), ctx), clean) + moe.loss.aux(ctx)
    loss:backward()
    optimizer:step { clip = 1 }
  end
  moe.manual_seed(1000) -- the same patches for all
  model:eval()
  local clean = M.patches(3000, o.size)
  local restored = moe.no_grad(model, M.corrupt(clean, o.size))
  return { psnr = M.psnr(restored, clean), model = model, parameters = model:num_parameters() }
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
