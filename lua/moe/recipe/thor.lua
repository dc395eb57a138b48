--- THOR: Taming Sparsely Activated Transformer with Stochastic Experts (Zuo et al. 2021, arXiv 2110.04260).
--
--   loss = CE(p1, y) + CE(p2, y) + alpha CR,    CR = (KL(p1 || p2) + KL(p2 || p1)) / 2
--
-- There is no gate: every layer draws a pair of different experts for a batch, p1 is what the model says with the first of each
-- pair, p2 with the second, and both learn to agree. At inference the experts are drawn too, or all of them averaged. The
-- default layer learns whom to ask, and needs a loss to balance it.

local moe = require "moe"

local M = {
  title = "THOR", paper = "arXiv 2110.04260", number = 2, alpha = 1.0,
  claim = "beats or ties Switch of equal size; the consistency loss falls, and draws matter less than without it",
  outcome = "reproduced on few examples: 0.021 against Switch's 0.104 on 96 strings of a made translation, at as many passes (two seeds); "
    .. "CR falls from 0.0065 to 0.0002, the variance over draws to 0.45 of that without it. With fresh strings at every step Switch "
    .. "is ahead (0.0037 against 0.0056)",
}

--- The layer: o.inference = "random" (default) or "all".
function M.layer(o)
  return moe.layer {
    d_model = o.d_model, num_experts = o.num_experts, dtype = o.dtype,
    router = moe.router.random { draw = "batch", inference = o.inference },
    experts = moe.experts.mlp { intermediate_size = o.intermediate_size },
  }
end

--- Both passes at once, as one batch given twice: logits of the first, of the second.
function M.pair(model, ids, ctx)
  local both = { draws = 2 }
  for k, v in pairs(ctx or {}) do both[k] = v end
  local half = ids:size(1)
  local logits = model(moe.cat({ ids, ids }, 1), both)
  return logits:narrow(1, 1, half), logits:narrow(1, half + 1, half)
end

--- The loss of training, and its parts { ce =, cr = }: alpha CR (default M.alpha) and the mean of both cross entropies, half the
-- paper's sum, so that it compares with other models'. In evaluation the cross entropy of one draw. batch.mask [B, T]: tokens that
-- count.
function M.loss(model, batch, ctx, alpha)
  local real = batch.mask and batch.mask:reshape { -1 }
  local function ce(logits)
    local rows = moe.loss.cross_entropy(logits:reshape { -1, logits:size(-1) }, batch.y:reshape { -1 }, { reduction = "none" })
    if real then return (rows * real:to(rows.dtype)):sum() / real:to "i64":sum():item() end
    return rows:mean()
  end
  if not (ctx and ctx.training) then return ce(model(batch.x, ctx)) end
  local p1, p2 = M.pair(model, batch.x, ctx)
  local cr = moe.loss.consistency(p1, p2, { mask = batch.mask })
  local fit = (ce(p1) + ce(p2)) * 0.5
  return fit + cr * (0.5 * (alpha or M.alpha)), { ce = fit, cr = cr }
end

return M
