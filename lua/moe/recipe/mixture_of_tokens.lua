--- Mixture of Tokens: Continuous MoE through Cross-Example Aggregation (Antoniak et al. 2023, arXiv 2310.15961).
--
--   w_ge = softmax over the group of (W_e . x_g) / temperature,    y_g = sum_e w_ge E_e(sum_h w_he x_h)
--
-- A group is the tokens at one position of group_size examples. Nothing is chosen, dropped or balanced, and time never mixes, so
-- the model stays causal; what the default layer does by choosing, this one does by averaging. A token's share of the work is
-- num_experts / group_size experts: group_size = num_experts / top_k costs what top_k experts a token cost.

local moe = require "moe"

local M = {
  title = "Mixture of Tokens", paper = "arXiv 2310.15961", number = 99,
  claim = "trains smoothly without a balance loss, as well as Switch at equal cost; tunes into token choice",
  outcome = "reproduced on real text: 2.492 against 2.562 (Switch without balance, its busiest expert at 3 to 5 times the mean) and 2.575 "
    .. "(with), three seeds, as smooth; an example alone 3.3, after 80 steps as token choice 2.632 against 2.615 mixed. On generated "
    .. "sentences it learns later (1.34 against 0.74)",
}

--- The layer: o.group_size (default num_experts / top_k), o.temperature (a number, or a function of the step; default 0.25, ours to
-- choose: at 1 the averages of a short training stay too even).
function M.layer(o)
  return moe.layer {
    d_model = o.d_model, num_experts = o.num_experts, dtype = o.dtype,
    router = moe.router.mixture_of_tokens {
      group_size = o.group_size or math.max(1, o.num_experts // o.top_k), temperature = o.temperature or 0.25,
    },
    experts = moe.experts.mlp { intermediate_size = o.intermediate_size },
  }
end

--- Transition tuning (section 3.3): the same model with token choice in place of mixing, so that an example no longer needs
-- others; the controllers become the routers' weights, and a short training adapts them. Returns the model.
function M.transition(model, top_k)
  for _, layer in model:named_modules() do
    local controller = type(layer.stats) == "function" and layer.router
    if controller then
      local router = moe.router.topk {
        d_model = layer.d_model, num_experts = layer.num_experts, top_k = top_k, dtype = controller.weight.dtype,
      }
      router.weight = controller.weight
      layer.router = router
    end
  end
  return model
end

return M
