--- Mixture-of-Domain-Adapters: Decoupling and Injecting Domain Knowledge to Pre-trained Language Models' Memories. Diao, Xu, Xu,
-- Wang, Zhang 2023, arXiv 2306.05406.
--
-- Each FFN of a frozen model gets bottleneck adapters beside it, in two stages:
--   1. one adapter a domain, by itself: FFN'(x) = FFN(x) + up act(down x), trained on the domain's text for
--        L = cross-entropy(domain) + lambda * mean |FFN'(x) - FFN(x)|^2 over general text,    the retain loss
--   2. those are frozen: y = FFN(x) + sum over d of g_d adapter_d(x) + task(x), g = softmax(G x); the gate G and a task adapter learn
-- One adapter of zeros stands for "none". It differs from the default layer in that the experts are additions to a frozen network,
-- trained one by one on data of known domains before there is a gate. The gate here sees a token's x alone; adapters sit in every
-- layer.

local moe = require "moe"
local domains = require "moe.recipe.domains"

local M = {
  title = "Mixture of domain adapters", paper = "arXiv 2306.05406", number = 68,
  claim = "adapters learn a domain and leave general text as it was; the gate then picks the right adapter",
  outcome = "reproduced: general text stays within 0.3 % (0.273 nats; without the retain loss 3.5 and 4.7) while the domains fall " ..
    "from 9.4 and 7.4 to 3.2 and 3.1; of three adapters the gate gives the right one 0.67 and 0.65",
}

-- FFN'(x) = FFN(x) + adapter(x); leaves what was added in ctx.added, where the caller has put a list.
local Tuned = moe.nn.module "mixda.ffn"

function Tuned:init(ffn, d_model, width)
  self.ffn, self.adapter = ffn, moe.experts.adapter { d_model = d_model, intermediate_size = width }
end

function Tuned:forward(x, ctx)
  local added = self.adapter(x)
  if ctx and ctx.added then table.insert(ctx.added, added) end
  return self.ffn(x) + added
end

--- Stage 1: an adapter beside every FFN of a frozen model, in place. Options: intermediate_size (16).
function M.add_adapters(model, o)
  for _, block in ipairs(model.layers) do block.ffn = Tuned(block.ffn, model.d_model, o and o.intermediate_size or 16) end
  return model
end

--- The retain loss: the mean over layers and tokens of |FFN'(x) - FFN(x)|^2 on general text ids [batch, time].
function M.retain(model, ids)
  local ctx, sum = { added = {} }, 0
  model:hidden(ids, ctx)
  for _, added in ipairs(ctx.added) do sum = sum + added:square():sum(-1):mean() end
  return sum / #ctx.added
end

--- Trains one adapter a domain. Options: base, text (of the domain), lambda (5; 0: without the retain loss), steps, seed, lr.
function M.learn(o)
  moe.manual_seed(o.seed or 1)
  local model, lambda = M.add_adapters(o.base.fresh()), o.lambda or 5
  local general = o.base.text.train:batches { batch_size = 8, seq_len = model.max_seq_len, random = true, seed = 7 }
  local function loss(m, batch, ctx)
    local ce = moe.loss.cross_entropy(m(batch.x), batch.y)
    return lambda > 0 and ctx.training and ce + M.retain(m, general().x) * lambda or ce
  end
  domains.tune(model, o.text, { steps = o.steps or 150, seed = o.seed, lr = o.lr or 0.02, loss = loss })
  return model
end

--- Stage 2: the adapters of several models of stage 1 side by side, frozen, under a softmax gate, with an adapter of zeros
-- ("none") as the last and a fresh task adapter beside them. Options: base, models.
function M.mix(o)
  local model, E = o.base.fresh(), #o.models + 1
  for i, block in ipairs(model.layers) do
    local width = o.models[1].layers[i].ffn.adapter.intermediate_size
    local layer = moe.layer {
      d_model = model.d_model, num_experts = E, router = moe.router.topk { top_k = E, norm_topk_prob = false },
      experts = moe.experts.adapter { intermediate_size = width, base = block.ffn },
      shared = moe.experts.adapter { intermediate_size = width },
    }
    moe.no_grad(function()
      for e, from in ipairs(o.models) do
        for name, p in from.layers[i].ffn.adapter:named_parameters() do layer.experts[name][e]:copy_(p[1]) end
      end
    end)
    layer.experts:freeze()
    block.ffn = layer
  end
  return model
end

--- Both stages on two domains, "ledger" and "code", over a base of "prose". Rows { what, number }; report(what, number) as they
-- come.
function M.demo(report)
  local rows, models, texts, base = {}, {}, {}, domains.base { num_layers = 2, steps = 250 }
  local function row(what, value)
    rows[#rows + 1] = { what, value }
    if report then report(what, value) end
  end
  row("prose, base", domains.loss(base.model, base.text))
  for d, name in ipairs { "ledger", "code" } do
    texts[d] = domains.text(name)
    row(name .. ", base", domains.loss(base.model, texts[d]))
    models[d] = M.learn { base = base, text = texts[d] }
    row(name .. ", adapter", domains.loss(models[d], texts[d]))
    row("prose, adapter of " .. name, domains.loss(models[d], base.text))
    row("prose, without the retain loss", domains.loss(M.learn { base = base, text = texts[d], lambda = 0 }, base.text))
  end
  local model = M.mix { base = base, models = models }
  domains.tune(model, domains.text "prose ledger code", { steps = 100 })
  for d, name in ipairs { "ledger", "code" } do
    row(name .. ", mixture", domains.loss(model, texts[d]))
    row(name .. ", gate of its adapter", domains.gates(model, texts[d])[d])
  end
  row("prose, mixture", domains.loss(model, base.text))
  row("prose, gate of none", domains.gates(model, base.text)[3])
  return rows
end

return M
