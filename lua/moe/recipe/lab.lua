-- The ground that recipes are tried on: one text, one small language model, one way to train and to compare.

local moe = require "moe"
local options = require "moe.nn.options"

local M = {}

-- Sizes of the model and of the training, small enough for seconds on a laptop.
local ROWS <const> = {
  vocab_size = { "integer" }, d_model = { "integer", 64 }, num_layers = { "integer", 2 }, num_heads = { "integer", 4 },
  max_seq_len = { "integer" }, num_experts = { "integer", 8 }, top_k = { "integer", 2 },
  intermediate_size = { "integer", 64 },      -- of one expert
  text = { "any" },                           -- of moe.data.text with train and val; default: moe.recipe.text()
  seq_len = { "integer", 64 }, batch_size = { "integer", 16 }, steps = { "integer", 200 }, eval_steps = { "integer", 20 },
  lr = { "number", 3e-3 }, warmup = { "integer", 10 }, weight_decay = { "number", 0.1 }, clip = { "number", 1 },
  seed = { "integer", 1 }, log = { "function" },     -- log(step, metrics), after each step
}

local function read(name, o) return options.read(name, o, ROWS, 3) end

-- --- text ---

-- Sentences of a small grammar: the text where no corpus lies at hand. Subjects fix the ending of verbs, so that there
-- is something to learn beyond frequencies.
local function generated(length, seed)
  local state = seed * 6364136223846793005 + 1442695040888963407
  local function pick(list)
    state = state * 6364136223846793005 + 1442695040888963407
    return list[(state >> 33) % #list + 1]
  end
  local nouns = { "cat", "sailor", "mountain", "poet", "engine", "child", "river", "lantern", "merchant", "wolf" }
  local verbs = { "watch", "follow", "find", "remember", "carry", "paint", "forget", "call" }
  local places = { "under the old bridge", "in the morning", "near the harbour", "without a word", "after the rain", "by night" }
  local out, n = {}, 0
  while n < length do
    local many = pick { true, false }
    local s = ("%s %s%s %s%s the %s %s%s"):format(pick { "The", "A quiet", "Every", "The other" }, pick(nouns), many and "s" or "",
      pick(verbs), many and "" or "s", pick(nouns), pick(places), pick { ".\n", ", and then\n", "; ", ".\n\n" })
    out[#out + 1] = s
    n = n + #s
  end
  return table.concat(out):sub(1, length)
end

local texts = {} -- by kind and length

--- The text of the recipes as characters, split into train (90 %) and val: options size (characters, default all, or
-- 200,000 generated ones) and kind: "real" (tinyshakespeare.txt in the folder $MOE_DATA or ../shared/data), "generated", or absent: the
-- real one where it is there. Two values: the text and its kind.
function M.text(given)
  local o = options.read("recipe.text", given, { size = { "integer" }, kind = { { "real", "generated" } }, seed = { "integer", 1 } })
  local key = table.concat({ tostring(o.size), tostring(o.kind), o.seed }, " ")
  if not texts[key] then
    local raw, kind = nil, "real"
    if o.kind ~= "generated" then
      local file = io.open((os.getenv "MOE_DATA" or "../shared/data") .. "/tinyshakespeare.txt")
      if file then
        raw = file:read "a"
        file:close()
      elseif o.kind == "real" then
        error("recipe.text: no tinyshakespeare.txt in $MOE_DATA or ../shared/data", 2)
      end
    end
    if not raw then raw, kind = generated(o.size or 200000, o.seed), "generated" end
    texts[key] = { assert(moe.data.text({ text = o.size and raw:sub(1, o.size) or raw }, { split = { 0.9, 0.1 } })), kind }
  end
  return table.unpack(texts[key])
end

-- --- models ---

-- What recipes are held against: a dense network as wide as the experts of one token together, and plain token choice.
local BASE <const> = {
  dense = {
    title = "Dense feed-forward network of the same active width",
    layer = function(o)
      return moe.nn.ffn { d_model = o.d_model, intermediate_size = o.intermediate_size * o.top_k, activation = "gelu" }
    end,
  },
  topk = {
    title = "Token choice: softmax, top-k, Switch balance",
    layer = function(o)
      return moe.layer {
        d_model = o.d_model, num_experts = o.num_experts, router = moe.router.topk { top_k = o.top_k },
        experts = moe.experts.mlp { intermediate_size = o.intermediate_size }, balance = { moe.loss.switch(0.01) },
      }
    end,
  },
}

--- A recipe by its name, a base line ("dense", "topk"), or a table of the same form as it is.
function M.find(recipe)
  if type(recipe) == "table" and (recipe.layer or recipe.model or recipe.demo) then return recipe end
  if type(recipe) ~= "string" then error("recipe: wanted a recipe or the name of one, got a " .. type(recipe), 2) end
  if BASE[recipe] then return BASE[recipe] end
  for _, name in ipairs(require("moe.recipe").names()) do
    if name == recipe then return require("moe.recipe")[recipe] end
  end
  error(("recipe: there is no recipe '%s'"):format(recipe), 2)
end

--- The language model of a recipe: options vocab_size (default: the text's), d_model, num_layers, num_heads, max_seq_len,
-- num_experts, top_k, intermediate_size (of one expert); attention with learned positions, a recipe's layer as every ffn.
function M.build(recipe, given)
  local o = read("recipe.build", given)
  recipe = M.find(recipe)
  if not (recipe.layer or recipe.model) then
    error(("recipe.build: %s is no language model; see its demo"):format(recipe.title or "this recipe"), 2)
  end
  o.vocab_size = o.vocab_size or (o.text or M.text()).vocab_size
  o.max_seq_len = o.max_seq_len or o.seq_len
  if recipe.model then return recipe.model(o) end
  return moe.model.lm {
    vocab_size = o.vocab_size, d_model = o.d_model, num_layers = o.num_layers, num_heads = o.num_heads,
    max_seq_len = o.max_seq_len,
    ffn = function(i) return recipe.layer(setmetatable({ layer = i }, { __index = o })) end,
  }
end

local function default_loss(model, batch, ctx)
  local ce = moe.loss.cross_entropy(model(batch.x, ctx), batch.y)
  return ctx.training and model.aux and ce + model:aux() or ce
end

-- Parameters of a bank that belong to single experts: those with a row an expert, or those of modules in its list.
local function of_experts(bank, num_experts)
  local count = 0
  for name, p in bank:named_parameters() do
    if name:match "^experts%.%d" or p.shape[1] == num_experts and not name:match "^base%." then count = count + p:numel() end
  end
  return count
end

--- Parameters that work for a token: those of single experts times the share of them that a token has had so far; what a bank
-- shares counts whole.
function M.active_parameters(model)
  if not moe.nn.is_module(model) then error("recipe.active_parameters: argument 1 must be a model, got a " .. type(model), 2) end
  local total = model:num_parameters()
  for _, m in model:named_modules() do
    if type(m.stats) == "function" and m.experts and m.num_experts and type(m.experts) == "table" and m.experts.num_parameters then
      local s = m:stats()
      local share = s.tokens > 0 and math.min(1, s.assignments / math.max(1, s.tokens - s.masked) / m.num_experts) or 1
      total = total - of_experts(m.experts, m.num_experts) * (1 - share)
    end
  end
  return math.floor(total + 0.5)
end

--- Trains a recipe's model on a text by the trainer: AdamW, warm-up and half a cosine. Options: those of build, and text, seq_len,
-- batch_size, steps, eval_steps, lr, warmup, weight_decay, clip, seed, log; or a `model` made before as third argument. Gives
-- { model, val_loss, train_loss (mean of the last tenth), losses, parameters, active_parameters, seconds, tokens_per_second }.
function M.train(recipe, given, model)
  local o = read("recipe.train", given)
  recipe = M.find(recipe)
  local text = o.text or M.text()
  moe.manual_seed(o.seed)
  if not model then
    local sizes = {}
    for k, v in pairs(given or {}) do sizes[k] = v end
    sizes.vocab_size = o.vocab_size or text.vocab_size
    model = M.build(recipe, sizes)
  end
  local loss = recipe.loss or default_loss
  local trainer = moe.trainer {
    model = model, optimizer = moe.optim.adamw { lr = o.lr, betas = { 0.9, 0.99 }, weight_decay = o.weight_decay },
    schedule = moe.schedule.cosine { warmup = o.warmup, steps = math.max(o.steps, o.warmup), min = 0.1 }, clip = o.clip,
    quiet = true,
    loss = function(m, batch, ctx)
      if recipe.step and ctx.training then recipe.step(m, ctx.step, o.steps) end
      return (loss(m, batch, ctx))
    end,
  }
  local train = text.train:batches { batch_size = o.batch_size, seq_len = o.seq_len, random = true, seed = o.seed }
  local losses, started = {}, moe.clock()
  for step, m in trainer:steps(train, o.steps) do
    losses[step] = m.loss
    if o.log then o.log(step, m, model) end
  end
  local seconds = moe.clock() - started
  local tail, n = 0.0, math.max(1, o.steps // 10)
  for i = #losses - n + 1, #losses do tail = tail + losses[i] / n end
  local val = trainer:evaluate(text.val:batches { batch_size = o.batch_size, seq_len = o.seq_len }, { steps = o.eval_steps })
  return {
    model = model, val_loss = val.loss, train_loss = tail, losses = losses, parameters = model:num_parameters(),
    active_parameters = M.active_parameters(model), seconds = seconds,
    tokens_per_second = o.steps * o.batch_size * o.seq_len / seconds,
  }
end

--- Mean and sample standard deviation of a list of numbers.
function M.mean(list)
  local sum, square = 0.0, 0.0
  for _, v in ipairs(list) do sum = sum + v end
  local mean = sum / #list
  for _, v in ipairs(list) do square = square + (v - mean) ^ 2 end
  return mean, #list > 1 and math.sqrt(square / (#list - 1)) or 0.0
end

--- Trains several recipes (names or tables) on one text with the same steps and seeds: `seeds` (default { 1, 2, 3 }), further
-- options as in train, `report(name, seed, run)` after each run. A list of { name, val_loss, spread, parameters,
-- active_parameters, tokens_per_second, runs }, in the order given; a recipe without a language model is an error.
function M.compare(recipes, given)
  if type(recipes) ~= "table" then error("recipe.compare: argument 1 must be a list of recipes, got a " .. type(recipes), 2) end
  if given ~= nil and type(given) ~= "table" then error("recipe.compare: takes a table of options, got a " .. type(given), 2) end
  local o = {}
  for k, v in pairs(given or {}) do o[k] = v end
  local seeds, report = o.seeds or { 1, 2, 3 }, o.report
  o.seeds, o.report = nil, nil
  local rows = {}
  for i, recipe in ipairs(recipes) do
    local name = type(recipe) == "string" and recipe or M.find(recipe).title or "own"
    local runs, values = {}, {}
    for j, seed in ipairs(seeds) do
      o.seed = seed
      runs[j] = M.train(recipe, o)
      values[j] = runs[j].val_loss
      if report then report(name, seed, runs[j]) end
    end
    local last = runs[#runs]
    local mean, spread = M.mean(values)
    rows[i] = {
      name = name, val_loss = mean, spread = spread, parameters = last.parameters, active_parameters = last.active_parameters,
      tokens_per_second = last.tokens_per_second, runs = runs,
    }
  end
  return rows
end

return M
