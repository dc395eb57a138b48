-- The ground of the recipe soft_moe: pictures of glyphs, cut into patches, and a transformer that tells which glyph it is.

local moe = require "moe"

local M = {}

-- Every glyph at every place of a picture of 12 x 12 points, as patches: [classes x 64, 16, 9].
local function glyphs(o)
  local picture = moe.zeros(o.classes, 64, 12, 12)
  for c = 1, o.classes do
    local glyph = moe.rand(5, 5):gt(0.5):to "f32"
    for place = 0, 63 do picture[c][place + 1]:narrow(1, place // 8 + 1, 5):narrow(2, place % 8 + 1, 5):copy_(glyph) end
  end
  return picture:reshape { o.classes * 64, 4, 3, 4, 3 }:transpose(3, 4):reshape { o.classes * 64, 16, 9 }
end

-- n pictures of 16 patches of 9 points [n, 16, 9], each with one of the glyphs (random 5 x 5 points) somewhere, under noise, and
-- their classes, the glyphs' numbers.
local function pictures(o, n)
  local which = moe.randint(1, o.classes * 64, { n })
  local x = o.glyphs:index_select(1, which)
  return x + moe.randn_like(x) * o.noise, (which - 1):floor_divide(64) + 1
end

local Classifier = moe.nn.module "picture_classifier"

function Classifier:init(o, make_ffn)
  self.embed = moe.nn.linear(9, o.d_model)
  self.places = moe.nn.parameter(moe.randn(16, o.d_model) * 0.5)
  self.blocks = moe.nn.list()
  for _ = 1, o.num_layers do
    self.blocks:append(moe.model.block {
      d_model = o.d_model, mixer = moe.nn.attention { d_model = o.d_model, num_heads = 4, causal = false }, ffn = make_ffn(o),
    })
  end
  self.norm = moe.nn.layernorm(o.d_model)
  self.head = moe.nn.linear(o.d_model, o.classes)
end

--- x [n, 16, 9] -> logits [n, classes].
function Classifier:forward(x, ctx)
  local h = self.embed(x) + self.places
  for _, block in ipairs(self.blocks) do h = block(h, nil, ctx) end
  return self.head(self.norm(h):mean(2))
end

--- Trains one classifier: make_ffn(o) makes the networks of its layers. Gives the share of held-out pictures that it gets right,
-- and it. Options: d_model, num_layers, classes, noise, steps, batch, lr, seed, and those that make_ffn has.
function M.train(make_ffn, given)
  local o = { d_model = 32, num_layers = 1, classes = 10, noise = 0.3, steps = 500, batch = 64, lr = 1e-2, seed = 1 }
  for k, v in pairs(given or {}) do o[k] = v end
  moe.manual_seed(77) -- one task for all seeds
  o.glyphs = glyphs(o)
  local test, answers = pictures(o, 1000)
  moe.manual_seed(o.seed)
  local model = Classifier(o, make_ffn)
  local opt = moe.optim.adamw(model, { lr = o.lr })
  local rate = moe.schedule.cosine { warmup = 10, steps = o.steps, min = 0.1 }
  for step = 1, o.steps do
    moe.scope(function()
      local x, y = pictures(o, o.batch)
      local ctx = { step = step, training = true }
      local loss = moe.loss.cross_entropy(model(x, ctx), y) + moe.loss.aux(ctx)
      opt:zero_grad()
      loss:backward()
      opt.lr = o.lr * rate(step)
      opt:step()
    end)
  end
  model:eval()
  local right = moe.no_grad(function() return model(test, {}):argmax(-1):eq(answers):to("f32"):mean():item() end)
  return right, model
end

return M
