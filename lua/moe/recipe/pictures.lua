-- The ground of the recipes that look at pictures: patches to restore; still and moving patterns to tell apart, and a small
-- transformer over patches that learns by filling in. For moe.recipe's own use.

local moe = require "moe"
local nn = moe.nn

local M = {}

-- --- patches to restore: [n, size^2] ---

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

local Restorer = nn.module "restorer"

--- A network that restores patches: clean = net(x [n, size^2]), x + out(blocks(embed x)). Options: size, d_model, num_layers;
-- make_ffn(o) makes the network of a block.
function Restorer:init(o, make_ffn)
  self.embed, self.out = nn.linear(o.size * o.size, o.d_model), nn.linear(o.d_model, o.size * o.size)
  self.blocks = nn.list()
  for _ = 1, o.num_layers do
    self.blocks:append(moe.model.block { d_model = o.d_model, ffn = make_ffn(o), norm_bias = true })
  end
end

function Restorer:forward(x, ctx)
  local h = self.embed(x)
  for _, block in ipairs(self.blocks) do h = block(h, nil, ctx) end
  return x + self.out(h)
end

M.restorer = Restorer

local D <const>, PLACES <const>, FRAMES <const>, CLASSES <const> = 32, 4, 4, 4

-- --- still and moving pictures [n, frames, 8, 8] and class numbers [n] ---

-- Four patterns, always the same.
local function patterns()
  local at = moe.arange(1, 8):to "f32"
  local x, y, list = at:reshape { 1, 8 }, at:reshape { 8, 1 }, {}
  for p = 1, CLASSES do list[p] = (x * (0.4 * p) + y * (1.9 - 0.5 * p)):sin() * (y * 0.3 * p - x * 0.5):cos() end
  return moe.stack(list, 1)
end

--- n stills of one frame, class = the pattern; and n clips, in which a pattern (class - 1 modulo 4, or the next one but one when it
-- fades instead of growing) changes by time: what tells one class from another in a still does not in a clip.
function M.moving(n, moving)
  local p, noise = moe.randint(1, CLASSES, { n }), 0.7
  local shape = patterns():index_select(1, p):unsqueeze(2)
  if not moving then
    return shape * (moe.rand(n, 1, 1, 1) + 0.3) + moe.randn(n, 1, 8, 8) * noise, p
  end
  local fades = moe.randint(0, 1, { n })
  local time = moe.arange(1, FRAMES):to("f32"):reshape { 1, FRAMES, 1, 1 } / FRAMES
  local f = fades:to("f32"):reshape { n, 1, 1, 1 }
  local gain = time * (1 - f) + (1.25 - time) * f
  return shape * gain * 1.3 + moe.randn(n, FRAMES, 8, 8) * noise, (p + fades * 2):remainder(CLASSES) + 1
end

-- --- the transformer ---

local Vit = nn.module "vit"

local function block()
  return moe.model.block {
    d_model = D, mixer = nn.attention { d_model = D, num_heads = 4, causal = false },
    ffn = nn.ffn { d_model = D, intermediate_size = 2 * D, bias = true },
  }
end

function Vit:init(num_layers)
  self.d_model = D
  self.patch, self.norm = nn.linear(16, D), nn.layernorm(D)
  self.space = nn.parameter(moe.randn(PLACES, D) * 0.2)
  self.time = nn.parameter(moe.randn(FRAMES + 1, D) * 0.2) -- the last one: of a still
  self.blocks = nn.list()
  for _ = 1, num_layers do self.blocks:append(block()) end
  self.hole, self.decoder, self.pixels = nn.parameter(moe.randn(D) * 0.2), block(), nn.linear(D, 16)
  self.heads = nn.list(nn.linear(D, CLASSES), nn.linear(D, CLASSES)) -- of stills, of clips
end

-- [n, F, 8, 8] -> patches [n, F * 4, 16] in the order of frames
local function patches(x)
  local n, F = x:size(1), x:size(2)
  return x:reshape({ n, F, 2, 4, 2, 4 }):permute(1, 2, 3, 5, 4, 6):reshape { n, F * PLACES, 16 }
end

function Vit:positions(F)
  local time = F == 1 and self.time:narrow(1, FRAMES + 1, 1) or self.time:narrow(1, 1, F)
  return (self.space:unsqueeze(1) + time:unsqueeze(2)):reshape { F * PLACES, D }
end

--- Patches and the numbers of those that are seen (nil: all) -> features of these.
function Vit:encode(p, seen, ctx)
  local h = self.patch(p) + self:positions(p:size(2) // PLACES)
  if seen then h = h:index_select(2, seen) end
  for _, b in ipairs(self.blocks) do
    h = ctx and (b(h, nil, ctx)) or (b(h))
  end
  return self.norm(h)
end

--- The error of filling in half of the places, hidden in all frames alike.
function Vit:fill_in(x)
  local p = patches(x)
  local n, F, order = p:size(1), p:size(2) // PLACES, moe.randperm(PLACES)
  local frames = moe.arange(0, F - 1):to("i64"):unsqueeze(2) * PLACES
  local seen = (frames + order:narrow(1, 1, 2)):reshape { -1 }
  local hidden = (frames + order:narrow(1, 3, 2)):reshape { -1 }
  local all = self.hole:expand({ n, F * PLACES, D }):index_copy(2, seen, self:encode(p, seen))
  local y = self.pixels((self.decoder(all + self:positions(F))))
  return moe.loss.mse(y:index_select(2, hidden), p:index_select(2, hidden))
end

--- Class scores of stills (task 1) or clips (task 2).
function Vit:forward(x, task, ctx)
  ctx = ctx or {}
  ctx.task = task
  return self.heads[task](self:encode(patches(x), nil, ctx):mean(2))
end

M.vit = Vit

--- Trains by AdamW for some steps: loss() is the loss of a fresh batch. The schedule may be another one than a warm-up of 10 steps
-- and a cosine to 0.05.
function M.fit(model, steps, lr, loss, schedule)
  local optimizer = moe.optim.adamw(model, { lr = lr, weight_decay = 0.01 })
  schedule = schedule or moe.schedule.cosine { warmup = 10, steps = steps, min = 0.05 }
  for step = 1, steps do
    optimizer.lr = lr * schedule(step)
    optimizer:zero_grad()
    loss():backward()
    optimizer:step { clip = 1 }
  end
end

--- A base, trained to fill in stills and clips.
function M.pretrain(o)
  moe.manual_seed(o.seed or 1)
  local model = Vit(o.num_layers or 2)
  M.fit(model, o.steps, 4e-3, function()
    return model:fill_in((M.moving(32, false))) + model:fill_in((M.moving(32, true)))
  end)
  return model
end

return M
