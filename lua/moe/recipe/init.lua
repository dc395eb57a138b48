--- moe.recipe: published systems, one short file each, composed of parts of this library. A recipe is a table:
--
-- title, paper, number (in the catalogue), claim (what makes it work), outcome (what was measured here); layer(o) makes the
-- feed-forward part of a language model, or model(o) a whole one (o as in moe.recipe.build); where the recipe has
-- them, loss(model, batch, ctx) and step(model, step, steps), which is called before every training step. Systems that are no
-- language model have demo(report), which trains on a task of their own and returns rows { name, value }.
--
--   local model = moe.recipe.build("remoe", { vocab_size = 65, num_experts = 8 })
--   local run = moe.recipe.train("remoe", { steps = 200 })        -- on a text; run.val_loss, run.model
--   local rows = moe.recipe.compare({ "topk", "remoe" }, { seeds = { 1, 2, 3 } })

local lab = require "moe.recipe.lab"

local M = {
  build = lab.build, train = lab.train, compare = lab.compare, text = lab.text, active_parameters = lab.active_parameters,
}

-- In the order of the catalogue's sections: routing, structure of experts, balance, memory.
local NAMES <const> = {
  "thor", "similarity_moe", "top_p", "moduleformer", "evomoe", "remoe", "soft_moe", "mixture_of_tokens", "symbolic_moe",
  "dynamoe", "union_of_experts", "bigmac", "mola", "moae", "mohd", "mixda", "polycom", "goat", "mov", "mofme", "home",
  "deepseek_moe", "sigma_moe", "engram", "ultramem",
}

local paths = {}
for _, name in ipairs(NAMES) do paths[name] = "moe.recipe." .. name end

--- The names of all recipes, a list.
function M.names() return table.move(NAMES, 1, #NAMES, 1, {}) end

--- A recipe by its name, a base line ("dense", "topk"), or a table of the same form as it is.
M.find = lab.find

return require "moe.lazy"(M, paths)
