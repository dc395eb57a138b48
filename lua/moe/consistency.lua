-- The loss that makes two predictions for one input agree.

local core = require "moe.core"
local options = require "moe.nn.options"

local M = {}

local ROWS <const> = { reduction = { { "mean", "sum", "none" }, "mean" }, mask = { "userdata" } }

--- How far two predictions of one input lie apart: logits a, b [.., classes] -> the symmetric divergence
-- (KL(p || q) + KL(q || p)) / 2 = sum over classes of (p - q) (log p - log q) / 2, p = softmax(a), q = softmax(b); 0 where they
-- agree. Both get a gradient. Options: reduction "mean" (over the rows), "sum" or "none" ([..]); mask [..]: rows that count.
-- The regulariser CR of THOR: Zuo et al. 2021 (arXiv 2110.04260), eq. 3.
function M.consistency(a, b, given)
  local o = options.read("loss.consistency", given, ROWS)
  for i, t in ipairs { a or false, b or false } do
    if not core.is_tensor(t) then
      error(("loss.consistency: argument %d must be a tensor of logits, got a %s"):format(i, type(t)), 2)
    end
  end
  local sa, sb = table.concat(a.shape, ", "), table.concat(b.shape, ", ")
  if sa ~= sb or #a.shape == 0 then
    error(("loss.consistency: wants two tensors of one shape [.., classes], got [%s] and [%s]"):format(sa, sb), 2)
  end
  local p, q = a:log_softmax(-1), b:log_softmax(-1)
  local rows = ((p:exp() - q:exp()) * (p - q)):sum(-1) * 0.5
  if o.mask then rows = rows * o.mask:reshape(rows.shape):to(rows.dtype) end
  if o.reduction == "none" then return rows end
  local sum = rows:sum()
  if o.reduction == "sum" then return sum end
  local count = o.mask and o.mask:to "i64":sum():item() or rows:numel()
  return sum / math.max(count, 1)
end

return M
