--- From Sparse to Soft Mixtures of Experts (Puigcerver, Riquelme, Mustafa, Houlsby 2023, arXiv 2308.00951).
--
--   L = norm(X) (scale norm(Phi)),    Y = softmax_slots(L) experts(softmax_tokens(L)^T X)
--
-- Every expert works on a few averages of all tokens, every token gets an average of all results: nothing is chosen, so there is
-- nothing to drop, to balance, or to jump. The cost follows the slots, not the experts. Not causal: the demo is an encoder of
-- pictures cut into patches, on a made task, beside token choice and expert choice with as many expert rows a picture.

local moe = require "moe"
local lab = require "moe.recipe.lab"
local glyphs = require "moe.recipe.glyphs"

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
  topk = function(o) return lab.find("topk").layer(setmetatable({ top_k = 1 }, { __index = o })) end,
  expert_choice = function(o)
    return moe.layer {
      d_model = o.d_model, num_experts = o.num_experts, router = moe.router.expert_choice { top_k = 1, within = "sequence" },
      experts = moe.experts.mlp { intermediate_size = o.intermediate_size },
    }
  end,
}

--- Trains a classifier of pictures with the layers that make_ffn(o) makes: the share of held-out pictures that it gets right, and it.
function M.train(make_ffn, given)
  local o = { num_experts = 8, slots = 16, intermediate_size = 64 }
  for k, v in pairs(given or {}) do o[k] = v end
  return glyphs.train(make_ffn, o)
end

--- Soft MoE, token choice and expert choice: rows { name, accuracy }, means over three seeds.
function M.demo(report)
  local rows = {}
  for _, case in ipairs { { "soft", M.soft }, { "topk", M.rivals.topk }, { "expert_choice", M.rivals.expert_choice } } do
    local right = {}
    for seed = 1, 3 do
      right[seed] = M.train(case[2], { seed = seed })
      if report then report(case[1], seed, right[seed]) end
    end
    rows[#rows + 1] = { case[1], (lab.mean(right)) }
  end
  return rows
end

return M
