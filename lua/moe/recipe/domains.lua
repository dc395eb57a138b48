-- The ground of the recipes that tune a frozen model: texts of several kinds, a small language model trained on one of
-- them, and its tuning on another. For moe.recipe's own use.

local moe = require "moe"
local lab = require "moe.recipe.lab"
local options = require "moe.nn.options"

local M = {}

-- Grammars: { symbol = alternatives }; <symbol> within an alternative is expanded, `text` is where a line begins.
local GRAMMARS <const> = {
  prose = {
    text = { "<who> <does> <what> <where>.\n", "<who> <does> <what>, and <who> <does> <what>.\n" },
    who = { "the cat", "a sailor", "the poet", "an old wolf", "the child", "a merchant" },
    does = { "follows", "remembers", "paints", "carries", "forgets" },
    what = { "the lantern", "a river", "the mountain", "an engine", "the harbour" },
    where = { "under the bridge", "in the morning", "after the rain", "by night", "without a word" },
  },
  -- the words of prose under other rules: who does what to whom, and the order
  tales = {
    text = { "<where> <scene>.\n", "<scene>, and <scene>.\n" },
    scene = {
      "the cat paints a sailor", "the cat forgets the poet", "a sailor carries the harbour", "a sailor follows the cat",
      "the poet remembers an engine", "the poet paints an old wolf", "an old wolf follows a merchant", "an old wolf carries the child",
      "the child forgets the lantern", "the child remembers a river", "a merchant paints the mountain",
      "a merchant forgets an old wolf",
    },
    where = { "by night", "under the bridge", "after the rain", "in the morning", "without a word" },
  },
  ledger = {
    text = { "<day> <n><n>: <count> at <n>.<n><n> paid <how>\n", "<day> <n><n>: sum <n><n><n>.<n><n>\n" },
    day = { "MON", "TUE", "WED", "THU", "FRI" },
    count = { "<n> SACKS", "<n><n> BALES", "<n> CASKS" },
    how = { "CASH", "NOTE", "GOLD" },
    n = { "0", "1", "2", "3", "4", "5", "6", "7", "8", "9" },
  },
  code = {
    text = { "if <v> <op> <v> then <v> = <e> end\n", "for <v> = <v>, <v> do <f>(<e>) end\n", "local <v> = <f>(<e>)\n" },
    v = { "i", "j", "x", "y", "key" },
    op = { "==", "~=", "<", ">=" },
    e = { "<v> + <v>", "<v> * <v>", "<f>(<v>)", "#<v>", "{ <v>, <v> }" },
    f = { "next", "sort", "print", "pairs" },
  },
}

--- A text of a kind ("prose", "tales", "ledger", "code") in bytes, so that all kinds share one vocabulary, split into train and
-- val; several kinds, "prose ledger", take turns, a few lines each. Options: size (characters, 40,000), seed.
function M.text(kinds, given)
  local o = options.read("recipe.domains.text", given, { size = { "integer", 40000 }, seed = { "integer", 1 } })
  local state = o.seed * 6364136223846793005 + 1442695040888963407
  local function pick(n)
    state = state * 6364136223846793005 + 1442695040888963407
    return (state >> 33) % n + 1
  end
  local list, out, length = {}, {}, 0
  for kind in kinds:gmatch "%a+" do
    list[#list + 1] = GRAMMARS[kind] or error("recipe.domains: there is no text '" .. kind .. "'", 2)
  end
  local function expand(grammar, symbol)
    local text = grammar[symbol][pick(#grammar[symbol])]
    return (text:gsub("<(%a+)>", function(inner) return expand(grammar, inner) end))
  end
  local turn = 0
  while length < o.size do
    turn = turn % #list + 1
    for _ = 1, 8 do
      out[#out + 1] = expand(list[turn], "text")
      length = length + #out[#out]
    end
  end
  return assert(moe.data.text({ text = table.concat(out) }, { level = "bytes", split = { 0.9, 0.1 } }))
end

local SIZES <const> = {
  d_model = { "integer", 48 }, num_layers = { "integer", 4 }, num_heads = { "integer", 4 }, seq_len = { "integer", 48 },
  batch_size = { "integer", 8 }, steps = { "integer", 150 }, lr = { "number", 6e-3 }, seed = { "integer", 1 },
  weight_decay = { "number", 0.01 }, text = { "any" }, loss = { "function" }, step = { "function" },
}

-- Rotated positions and weights of this size learn the grammars in 150 steps; those of the default take over 600.
local function empty(o)
  return moe.model.lm {
    vocab_size = 256, d_model = o.d_model, num_layers = o.num_layers, num_heads = o.num_heads, max_seq_len = o.seq_len,
    norm = "rmsnorm", ffn_hidden = 2 * o.d_model, positional = "rope", tie_embeddings = false,
    init = "normal(0.1)", embedding_init = "normal(0.5)",
  }
end

local function train(o, model)
  return lab.train({ layer = true, loss = o.loss, step = o.step }, {
    text = o.text, seq_len = o.seq_len, batch_size = o.batch_size, steps = o.steps, lr = o.lr, seed = o.seed, weight_decay = o.weight_decay,
    eval_steps = 8,
  }, model)
end

--- A base: a dense language model trained on `text` (prose). Gives { model, val_loss, text, fresh }; fresh() is a new model of
-- the same weights, frozen. Options: d_model, num_layers, num_heads, seq_len, batch_size, steps, lr, seed.
function M.base(given)
  local o = options.read("recipe.domains.base", given, SIZES)
  o.text = o.text or M.text "prose"
  moe.manual_seed(o.seed)
  local run = train(o, empty(o))
  local state = run.model:state_dict()
  run.text = o.text
  run.fresh = function()
    local model = empty(o)
    model:load_state_dict(state)
    return model:freeze()
  end
  return run
end

--- Trains what is not frozen of a model on a text: lab.train's result. Options as for base, and loss, step (as in a recipe).
function M.tune(model, text, given)
  local o = options.read("recipe.domains.tune", given, SIZES)
  o.text = text
  return train(o, model)
end

--- Tunes a base on a text in several ways: cases, a list of { name, adapt }, where adapt(model) puts into a frozen copy what is to be
-- trained. A list, also by name, of { name, val_loss (mean over the seeds), spread, losses, models (one a seed each), trained
-- (share of the parameters) }. Options: base, text, seeds; the others as for tune.
function M.compare(cases, given)
  local rows, o = {}, {}
  for k, v in pairs(given) do o[k] = v end
  o.base, o.text, o.seeds = nil, nil, nil
  for i, case in ipairs(cases) do
    local row = { name = case[1], losses = {}, models = {} }
    for j, seed in ipairs(given.seeds) do
      moe.manual_seed(seed)
      local model = given.base.fresh()
      case[2](model)
      o.seed = seed
      row.losses[j], row.models[j] = M.tune(model, given.text, o).val_loss, model
      row.trained = model:num_parameters(true) / model:num_parameters()
    end
    row.val_loss, row.spread = lab.mean(row.losses)
    rows[i], rows[row.name] = row, row
  end
  return rows
end

--- The mean cross-entropy of a model on the part of a text kept for validation.
function M.loss(model, text, ctx)
  local training = model.training
  model:eval()
  local sum, n = 0.0, 0
  local window = model.max_seq_len
  for batch in text.val:batches { batch_size = 8, seq_len = window } do
    if n == 8 then break end
    local own = setmetatable({}, { __index = ctx })
    sum, n = sum + moe.no_grad(function() return moe.loss.cross_entropy(model(batch.x, own), batch.y):item() end), n + 1
  end
  model:train(training)
  return sum / n
end

--- What the gates of a model give each expert on a text: the mean over tokens and layers, a list.
function M.gates(model, text)
  local batch = text.val:batches { batch_size = 8, seq_len = model.max_seq_len }()
  local ctx, sum = {}, 0
  moe.no_grad(model.hidden, model, batch.x, ctx)
  for _, routing in ipairs(ctx.routings) do sum = sum + routing.probs:mean(1) / #ctx.routings end
  return sum:totable()
end

return M
