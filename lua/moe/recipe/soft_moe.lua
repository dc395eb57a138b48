--- From Sparse to Soft Mixtures of Experts (Puigcerver, Riquelme, Mustafa, Houlsby 2023, arXiv 2308.00951).
--
--   L = norm(X) (scale norm(Phi)),    Y = softmax_slots(L) experts(softmax_tokens(L)^T X)
--
-- Every expert works on a few averages of all tokens, every token gets an average of all results: nothing is chosen, so there is
-- nothing to drop, to balance, or to jump. The cost follows the slots, not the experts. Not causal: the demo is an encoder of
-- pictures cut into patches, on a made task, beside token choice and expert choice with as many expert rows a picture.

local moe = require "moe"

local M = {
  title = "Soft MoE", paper = "arXiv 2308.00951", number = 96,
  claim = "classifies patches as well as token choice and expert choice or better at equal expert work; experts are free at fixed slots",
  outcome = "reproduced: 79 % of the pictures right against 52 % (token choice) and 50 % (expert choice), three seeds; 62, 82 and 85 % "
    .. "with 4, 8 and 16 experts on the same 16 slots. With the paper's starting scale of 1 this short training gives 48 %",
}

--- The layer: o.num_experts experts that share o.slots slots (a multiple of them; default: one slot an expert). The paper's scale
-- starts at 1 and has a long training to grow; o.scale starts at 5 here.
function M.soft(o)
  return moe.layer {
    d_model = o.d_model, num_experts = o.num_experts, dtype = o.dtype,
    router = moe.router.soft { slots = math.max(1, (o.slots or o.num_experts) // o.num_experts), scale = o.scale or 5 },
    experts = moe.experts.mlp { intermediate_size = o.intermediate_size },
  }
end

--- What it is held against: one expert a token, by the token's choice or by the experts'.
M.rivals = {
  topk = function(o)
    return moe.layer {
      d_model = o.d_model, num_experts = o.num_experts, router = moe.router.topk { top_k = 1 },
      experts = moe.experts.mlp { intermediate_size = o.intermediate_size }, balance = { moe.loss.switch(0.01) },
    }
  end,
  expert_choice = function(o)
    return moe.layer {
      d_model = o.d_model, num_experts = o.num_experts, router = moe.router.expert_choice { top_k = 1, within = "sequence" },
      experts = moe.experts.mlp { intermediate_size = o.intermediate_size },
    }
  end,
}

-- Every glyph at every place of a picture of 12 x 12 points, as patches: [classes x 64, 16, 9].
local function glyphs(o)
  local picture = moe.zeros(o.classes, 64, 12, 12)
  for c = 1, o.classes do
    local glyph = moe.rand(5, 5):gt(0.5):to "f32"
    for place = 0, 63 do picture[c][place + 1]:narrow(1, place // 8 + 1, 5):narrow(2, place % 8 + 1, 5):copy_(glyph) end
  end
  return picture:reshape { o.classes * 64, 4, 3, 4, 3 }:transpose(3, 4):reshape { o.classes * 64, 16, 9 }
end

--- n pictures of 16 patches of 9 points [n, 16, 9], each with one of the glyphs (random 5 x 5 points) somewhere, under noise, and
-- their classes, the glyphs' numbers.
function M.pictures(o, n)
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

M.Classifier = Classifier

--- Trains one classifier: make_ffn(o) makes its sparse layers. Gives the share of held-out pictures that it gets right, and it.
function M.train(make_ffn, given)
  local o = { d_model = 32, num_layers = 1, num_experts = 8, slots = 16, intermediate_size = 64, classes = 10, noise = 0.3,
    steps = 500, batch = 64, lr = 1e-2, seed = 1 }
  for k, v in pairs(given or {}) do o[k] = v end
  moe.manual_seed(77) -- one task for all seeds
  o.glyphs = glyphs(o)
  local test, answers = M.pictures(o, 1000)
  moe.manual_seed(o.seed)
  local model = Classifier(o, make_ffn)
  local opt = moe.optim.adamw(model, { lr = o.lr })
  local rate = moe.schedule.cosine { warmup = 10, steps = o.steps, min = 0.1 }
  for step = 1, o.steps do
    moe.scope(function()
      local x, y = M.pictures(o, o.batch)
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

--- Soft MoE, token choice and expert choice: rows { name, accuracy }, means over three seeds.
function M.demo(report)
  local rows = {}
  for _, case in ipairs { { "soft", M.soft }, { "topk", M.rivals.topk }, { "expert_choice", M.rivals.expert_choice } } do
    local sum = 0.0
    for seed = 1, 3 do
      local right = M.train(case[2], { seed = seed })
      if report then report(case[1], seed, right) end
      sum = sum + right / 3
    end
    rows[#rows + 1] = { case[1], sum }
  end
  return rows
end

return M
