--- MoLA: Higher Layers Need More LoRA Experts. Gao, Chen, Rao, Sun, Liu, Peng, Zhang, Guo, Yang, Subrahmanian 2024,
-- arXiv 2402.08562.
--
-- Every linear layer of a frozen model gets E_j low-rank experts, E_j by its depth j:
--   y = W0 x + sum over the 2 best e of g_e B_e A_e x,    g = the softmax of a router, normalised over the 2 (eq. 3-5)
-- with a Switch balance loss. The number E_j follows a pattern of four values over the quarters of the depth: 2-4-6-8 (more
-- experts in higher layers, "inverted triangle"), 8-6-4-2, 8-2-2-8, 2-8-8-2 or 5-5-5-5, all of the same total. It differs from
-- the default layer in that the experts are additions of low rank to a dense network which is not trained. Here the two linear
-- layers of each FFN are tuned; the paper tunes those of the attention too.

local moe = require "moe"
local domains = require "moe.recipe.domains"

local M = {
  title = "MoLA: more LoRA experts in higher layers", paper = "arXiv 2402.08562", number = 32,
  claim = "as many experts in all do at least as well placed 2-4-6-8 as placed evenly; experts differ more in higher layers",
  outcome = "half reproduced (three seeds, tuning on other rules over the same words): experts of the highest layer lie 1.4 to " ..
    "1.6 times as far apart as those of the lowest; but 2-4-6-8 only equals 5-5-5-5 (0.272 against 0.272 nats; 8-6-4-2: 0.275), " ..
    "and is 2 to 5 % worse where the new text has other letters",
}

--- Numbers of experts over the quarters of the depth; of each pattern the sum is 20.
M.patterns = {
  inverted_triangle = { 2, 4, 6, 8 }, triangle = { 8, 6, 4, 2 }, hourglass = { 8, 2, 2, 8 }, rhombus = { 2, 8, 8, 2 },
  uniform = { 5, 5, 5, 5 },
}

--- The number of experts of each of num_layers layers: a pattern's name, or a list of numbers, spread over the depth.
function M.allocate(pattern, num_layers)
  local list, out = M.patterns[pattern] or pattern, {}
  if type(list) ~= "table" then error("mola: there is no pattern '" .. tostring(pattern) .. "'", 2) end
  for layer = 1, num_layers do out[layer] = list[math.ceil(layer * #list / num_layers)] end
  return out
end

--- Puts low-rank experts beside the FFNs of a frozen model, in place. Options: pattern, rank (2), alpha (2 rank), top_k (2),
-- balance (0.01).
function M.add_experts(model, o)
  local rank = o.rank or 2
  local counts = M.allocate(o.pattern, #model.layers)
  for i, block in ipairs(model.layers) do
    block.ffn = moe.experts.lora_ffn {
      base = block.ffn, num_experts = counts[i], top_k = counts[i] > 1 and math.min(o.top_k or 2, counts[i]) or nil, rank = rank,
      alpha = o.alpha or 2 * rank, balance = { moe.loss.switch(o.balance or 0.01) },
    }
  end
  return model
end

--- How far apart the experts of each layer are: the mean over pairs and over the layer's matrices of |D_a - D_b| (Frobenius),
-- D_e = scale B_e A_e. A list, one number a layer; 0 for one expert.
function M.distances(model)
  local out = {}
  for i, block in ipairs(model.layers) do
    local sum, pairs_seen = 0.0, 0
    for _, part in ipairs { block.ffn.up, block.ffn.down } do
      local delta = {}
      for e = 1, part.num_experts do delta[e] = moe.no_grad(function() return part.experts:delta(e) end) end
      for a = 1, #delta do
        for b = a + 1, #delta do
          sum, pairs_seen = sum + (delta[a] - delta[b]):norm():item(), pairs_seen + 1
        end
      end
    end
    out[i] = pairs_seen > 0 and sum / pairs_seen or 0.0
  end
  return out
end

--- Trains a base on one kind of text, then tunes it on another with each pattern: rows as of domains.compare, by the pattern's
-- name, and the base. Options: patterns (a list of names), seeds, steps, lr, text, base.
function M.run(o)
  local base, cases = o.base or domains.base(), {}
  for i, name in ipairs(o.patterns) do
    cases[i] = { name, function(model) M.add_experts(model, { pattern = name }) end }
  end
  return domains.compare(cases, {
    base = base, text = domains.text(o.text or "tales"), seeds = o.seeds, steps = o.steps, lr = o.lr or 0.01,
  }), base
end

--- The five patterns on one new text: rows { pattern, loss after tuning }.
function M.demo(report)
  local names, rows = { "inverted_triangle", "triangle", "hourglass", "rhombus", "uniform" }, {}
  local result, base = M.run { patterns = names, seeds = { 1, 2, 3 }, steps = 160 }
  rows[1] = { "base, before", domains.loss(base.model, domains.text "tales") }
  for _, name in ipairs(names) do rows[#rows + 1] = { name, result[name].val_loss } end
  for _, row in ipairs(rows) do
    if report then report(row[1], row[2]) end
  end
  return rows
end

return M
