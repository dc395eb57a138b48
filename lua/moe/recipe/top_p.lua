--- Harder Tasks Need More Experts: Dynamic Routing in MoE Models. Huang, An, Zhuang, Tao, Zhang, Jin, Xu, Chen, Huang, Feng 2024,
-- arXiv 2403.07652.
--
--   P = softmax(W x);   S = the fewest experts, best first, with sum of P >= p;   y = sum over S of P_e FFN_e(x)
--   loss + 1e-2 switch + b mean over tokens of H(P)
--
-- The default layer takes k experts for every token. Here a token that the router is sure of takes one, an undecided one several, so
-- that work goes where it is hard; without the entropy loss the router would spread P out and take them all. Published: p = 0.4 and
-- b = 1e-4 for 16 experts and long training; here p = 0.6 and b = 5e-3.

local moe = require "moe"

local M = {
  title = "Top-p dynamic routing", paper = "arXiv 2403.07652", number = 21,
  claim = "fewer than 2 experts a token on average at a loss no higher than top-2; hard tokens get more experts than easy ones",
  outcome = "reproduced: 1.982 +- 0.013 with 1.4 experts a token against 2.007 +- 0.010 with 2 (three seeds, 1000 steps); 2.323 +- " ..
    "0.014 against 2.383 +- 0.057 after 400; 1.5 experts for hard tokens, 1.0 for easy ones; with the published p and b 2.081",
}

function M.layer(o)
  return moe.layer {
    d_model = o.d_model, num_experts = o.num_experts, dtype = o.dtype, router = moe.router.top_p { p = o.p or 0.6 },
    experts = moe.experts.mlp { intermediate_size = o.intermediate_size },
    balance = { moe.loss.switch(o.balance or 0.01), moe.loss.entropy(o.entropy or 5e-3) },
  }
end

--- How many experts each token has, [T] of i64.
function M.experts_of(routing) return routing.gate:ne(0):to("i64"):sum(-1) end

return M
