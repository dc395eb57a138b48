--- ModuleFormer: Learning Modular Large Language Models From Uncurated Data (Shen, Zhang, Cao, Tan, Chen, Gan 2023,
-- arXiv 2306.04640).
--
--   attention:   y_t = sum_m g_m(x_t) W_o^m sum_j p_tj v_j,   p_tj = b_tj prod_{j < k < t} (1 - b_tk)
--                b_tj = sigmoid(W_q^m x_t . k_j / sqrt(D))
--   router:      g(x) = top-k of softmax(A relu(B x)), for heads and for feed-forward experts alike
--   training:    loss + c (E[H(m given x)] - H(m))    mutual information: all modules used, each token sure of its own
--   finetuning:  loss + c H(m)                        load concentration: what a domain does not need falls idle, is pruned
--
-- Nothing says beforehand what a module is for; domains find theirs, so that modules can be cut away for one domain or added for
-- a new one beside the frozen old. The default layer routes feed-forward experts alone, by a linear map, with Switch's balance;
-- here there are no position codes either: sticks know the order.

local moe = require "moe"

local M = {
  title = "ModuleFormer", paper = "arXiv 2306.04640", number = 65,
  claim = "mutual information: even marginal, sharp conditional; concentration, then pruning, loses little on one domain",
  outcome = "reproduced: I(m; x) 1.35 nats against 0.36 without (log 8 = 2.08); 12 of 32 modules left after concentration at 0.0001 " ..
    "more loss on one domain, 18 left at 0.63 more without it",
}

--- The language model: o.num_experts stick-breaking heads and feed-forward experts in each layer, o.top_k of each for a token;
-- o.coef of the mutual information (default 0.05).
function M.model(o)
  local phase = { loss = moe.loss.mutual_information(o.coef or 0.05) }
  local function balance(routing, ctx, state) return phase.loss(routing, ctx, state) end
  local model = moe.model.lm {
    vocab_size = o.vocab_size, d_model = o.d_model, num_layers = o.num_layers, max_seq_len = o.max_seq_len, positional = "none",
    mixer = function()
      return moe.mixer.mixture_of_attention {
        d_model = o.d_model, num_experts = o.num_experts, head_dim = o.head_dim or o.d_model // o.top_k, attention = "stick_breaking",
        router = moe.router.mlp { top_k = o.top_k }, balance = { balance },
      }
    end,
    ffn = function()
      return moe.layer {
        d_model = o.d_model, num_experts = o.num_experts, router = moe.router.mlp { top_k = o.top_k },
        experts = moe.experts.mlp { intermediate_size = o.intermediate_size }, balance = { balance },
      }
    end,
  }
  model._phase = phase
  return model
end

--- From now on the model is trained to use few modules: the load concentration takes the place of the mutual information.
function M.concentrate(model, coef)
  model._phase.loss = moe.loss.load_concentration(coef)
  return model
end

--- Layers of modules: f(layer, name).
function M.each(model, f)
  for name, part in model:named_modules() do
    if type(part.stats) == "function" and part.router then f(part, name) end
  end
end

--- Cuts off the modules that have less than `share` of a layer's assignments since the last layer:reset_stats(), the busiest
-- top_k excepted; make the optimizer afterwards. Returns how many modules there were and how many are left.
function M.prune(model, share)
  local was, left = 0, 0
  M.each(model, function(layer)
    local load, total, order = layer:stats().load, 0, {}
    for e, n in ipairs(load) do order[e], total = e, total + n end
    table.sort(order, function(a, b) return load[a] > load[b] or load[a] == load[b] and a < b end)
    local keep = {}
    for i, e in ipairs(order) do
      if i <= layer.router.top_k or load[e] >= share * total then keep[#keep + 1] = e end
    end
    table.sort(keep)
    was, left = was + #load, left + #keep
    layer:prune(keep)
  end)
  return was, left
end

--- n further feed-forward experts a layer for a new domain: they and the routers are trained, all that was there is frozen.
function M.extend(model, n)
  model:freeze()
  M.each(model, function(layer)
    if not layer.kv_proj then
      layer:extend(n, { freeze = true })
      layer.router:unfreeze()
    end
  end)
  return model
end

return M
