--- GOAT: Make LoRA Great Again: Boosting LoRA with Adaptive Singular Values and Mixture-of-Experts Optimization Alignment. Fan,
-- Lu, Liu, Gu, Qu, Wei, Cheng 2025, arXiv 2502.16894.
--
-- Low-rank experts that start from the frozen weight itself. W0 [m, n] = U S V^T is cut into E segments of min(m, n) / E singular
-- triples; expert e takes the first r triples (U_e, S_e, V_e) of segment e:
--   B_e = U_e (S_e / (s rho))^(1/2),    A_e = (S_e / (s rho))^(1/2) V_e^T,    s = sqrt(3 eta n / r)
--   y = W_res x + s sum over the k best e of g_e B_e A_e x,    W_res = W0 - s / E sum over all e of B_e A_e
-- with g the normalised softmax weights and a Switch balance loss. W_res makes the expectation under an even gate W0 x; the
-- scale s makes a step of the low-rank experts about as large as one of experts of full rank (theorem 3.5; eta: the ratio of the
-- learning rates). It differs from MoLA's layer in the start and in the scale alone. rho = 10, eta = 1 chosen here.

local moe = require "moe"
local domains = require "moe.recipe.domains"

local M = {
  title = "GOAT: LoRA experts from segments of the singular values", paper = "arXiv 2502.16894", number = 101,
  claim = "in equal steps better than low-rank experts that start at zero, and near full fine-tuning",
  outcome = "reproduced at an equal learning rate (three seeds, 80 steps at 0.003: 0.345 nats against 0.381 from zero, full tuning " ..
    "0.317), by the scale: a start at zero with that scale has 0.329; not where each has its best rate (0.288 against 0.281)",
}

--- The scale sqrt(3 eta n / r) for inputs of n and rank r.
function M.scale(n, rank, eta) return math.sqrt(3 * (eta or 1) * n / rank) end

--- Makes a moe.experts.lora_linear start as above, in place: a base given as a weight is replaced, a layer is written. Options:
-- rho (10), eta (1).
function M.start(linear, o)
  o = o or {}
  local bank = linear.experts
  local plain = moe.core.is_tensor(bank.base)
  local E, r, W = bank.num_experts, bank.rank, plain and bank.base or bank.base.weight:detach()
  local s, segment = M.scale(bank.d_model, r, o.eta), math.min(table.unpack(W.shape)) // E
  if r > segment then error(("goat: rank %d, but a segment has %d singular values"):format(r, segment), 2) end
  local U, S, V = moe.svd(W)
  local root, rest = (S / (s * (o.rho or 10))):sqrt(), W
  moe.no_grad(function()
    for e = 1, E do
      local first = (e - 1) * segment + 1
      local B = bank.lora_B[e]:copy_(U:narrow(2, first, r) * root:narrow(1, first, r))
      local A = bank.lora_A[e]:copy_((V:narrow(2, first, r) * root:narrow(1, first, r)):t())
      rest = rest - B:matmul(A) * (s / E)
    end
    if plain then bank:buffer("base", rest) else bank.base.weight:copy_(rest) end
  end)
  bank.scale = s
  return linear
end

--- Puts low-rank experts beside the FFNs of a frozen model, in place. Options: num_experts (4), rank (4), top_k (2), alpha (2
-- rank: of the start at zero), start: "goat" (default), "zero", or "scaled" (at zero, with GOAT's scale); rho, eta.
function M.add_experts(model, o)
  local rank = o.rank or 4
  for _, block in ipairs(model.layers) do
    block.ffn = moe.experts.lora_ffn {
      base = block.ffn, num_experts = o.num_experts or 4, top_k = o.top_k or 2, rank = rank, alpha = o.alpha or 2 * rank,
      balance = { moe.loss.switch(0.01) },
    }
    for _, part in ipairs { block.ffn.up, block.ffn.down } do
      if o.start == "scaled" then part.experts.scale = M.scale(part.d_model, rank, o.eta) end
      if (o.start or "goat") == "goat" then M.start(part, o) end
    end
  end
  return model
end

--- Trains a base on one kind of text, then tunes it on another by each of `starts` ("goat", "zero", "scaled", "full": the FFNs
-- themselves): rows as of domains.compare. Options: starts, seeds, steps, lr, text, base.
function M.run(o)
  local cases = {}
  for i, start in ipairs(o.starts) do
    cases[i] = { start, function(model)
      if start ~= "full" then return M.add_experts(model, { start = start }) end
      for _, block in ipairs(model.layers) do block.ffn:unfreeze() end
    end }
  end
  return domains.compare(cases, {
    base = o.base or domains.base(), text = domains.text(o.text or "tales"), seeds = o.seeds, steps = o.steps, lr = o.lr,
  })
end

--- The four starts at three learning rates, 80 steps: rows { "start at lr", loss after tuning }.
function M.demo(report)
  local base, rows, starts = domains.base(), {}, { "zero", "scaled", "goat", "full" }
  for _, lr in ipairs { 0.003, 0.01, 0.02 } do
    for _, row in ipairs(M.run { base = base, starts = starts, seeds = { 1, 2, 3 }, steps = 80, lr = lr }) do
      rows[#rows + 1] = { ("%s at %g"):format(row.name, lr), row.val_loss }
      if report then report(table.unpack(rows[#rows])) end
    end
  end
  return rows
end

return M
