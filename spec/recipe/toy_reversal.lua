-- A made translation: a string of letters, a mark, the letters in other letters and from the end. Batches for a language model whose
-- loss counts the translation alone.
local moe = require "moe"

local M = { vocab_size = 13 } -- letters 1 to 12, mark 13

-- n strings of `length` letters: { x [n, 2 length], y, mask }, y the next tokens, mask true where they are the translation.
function M.batch(n, length)
  local letters = moe.randint(1, 12, { n, length })
  local translated = (letters * 5):remainder(12):flip(2) + 1 -- 5 has no divisor in common with 12: one letter, one other
  local all = moe.cat({ letters, moe.full({ n, 1 }, 13, { dtype = "i64" }), translated }, 2)
  local mask = moe.arange(1, 2 * length):gt(length):reshape { 1, 2 * length }:expand { n, 2 * length }:contiguous()
  return { x = all:narrow(2, 1, 2 * length):contiguous(), y = all:narrow(2, 2, 2 * length):contiguous(), mask = mask }
end

-- n rows of a batch, drawn anew.
local function some(data, n)
  local rows = moe.randint(1, data.x:size(1), { n })
  return { x = data.x:index_select(1, rows), y = data.y:index_select(1, rows), mask = data.mask:index_select(1, rows) }
end

-- Trains a language model whose ffn is layer(o): loss(model, batch, ctx) as a recipe has it; on fresh strings, or on `examples` of
-- them over and over. log(step, parts) gets what the loss returns behind its value. Gives the model.
function M.train(layer, loss, given)
  local o = { d_model = 32, num_layers = 2, num_heads = 2, num_experts = 4, top_k = 1, intermediate_size = 64, length = 6, steps = 300,
    batch = 32, lr = 3e-3, seed = 1 }
  for k, v in pairs(given or {}) do o[k] = v end
  moe.manual_seed(o.seed)
  local model = moe.model.lm {
    vocab_size = M.vocab_size, d_model = o.d_model, num_layers = o.num_layers, num_heads = o.num_heads, max_seq_len = 2 * o.length,
    ffn = function() return layer(o) end,
  }
  local opt = moe.optim.adamw(model, { lr = o.lr })
  local rate = moe.schedule.cosine { warmup = 10, steps = o.steps, min = 0.1 }
  local data = o.examples and M.batch(o.examples, o.length)
  for step = 1, o.steps do
    moe.scope(function()
      local batch = data and some(data, o.batch) or M.batch(o.batch, o.length)
      local value, parts = loss(model, batch, { training = true, step = step })
      opt:zero_grad()
      value:backward()
      opt.lr = o.lr * rate(step)
      opt:step()
      if o.log then o.log(step, parts) end
    end)
  end
  model:eval()
  return model
end

return M
