-- The pictures of the README: lua5.4 examples/pictures.lua [folder]          (default examples/pictures; needs gnuplot)
--
-- Trains a small language model with top-2 routing for a minute and draws what its router did: the share of each expert over the
-- training, and which expert takes which kind of character.
package.path = "./lua/?.lua;./lua/?/init.lua;" .. package.path
package.cpath = "./build/?.so;" .. package.cpath
local moe = require "moe"

local folder = arg[1] or "examples/pictures"
local steps = math.tointeger(tonumber(os.getenv "MOE_STEPS")) or 400
local text = moe.recipe.text()
local loads, every = {}, math.max(1, steps // 80)
local run = moe.recipe.train("topk", { steps = steps, text = text, log = function(step, m, model)
  if step % every == 0 then loads[#loads + 1] = model.routings[1] end
  if step % 50 == 0 then print(("step %4d  loss %.4f"):format(step, m.loss)) end
end })
print(("held-out loss %.4f"):format(run.val_loss))

-- Kinds of characters, and what the last layer's experts take of the held-out text.
local kinds = { "vowel", "consonant", "capital", "space", "line end", "punctuation" }
local function kind_of(c)
  if c == "\n" then return 5 elseif c == " " then return 4 elseif c:match "%u" then return 3 end
  return c:match "[aeiou]" and 1 or c:match "%l" and 2 or 6
end
local kind_of_id = {}
for id, c in ipairs(text.vocab) do kind_of_id[id] = kind_of(c) end
kind_of_id = moe.tensor(kind_of_id, { dtype = "i64" })
local counts
for batch in text.val:batches { batch_size = 16, seq_len = 64, drop_last = true } do
  local routings = moe.inspect.routings(run.model, batch.x)
  counts = moe.inspect.specialisation(routings[#routings], kind_of_id:index_select(1, batch.x:reshape { -1 }), #kinds, counts)
end
print(("the kind of a character tells %.0f %% of its entropy about the expert"):format(100 * moe.inspect.information(counts)))

os.execute(("mkdir -p '%s'"):format(folder))
local function both(draw, values, name, o)
  print(draw(values, o))
  o.file, o.width, o.height = ("%s/%s.svg"):format(folder, name), 560, 300
  assert(draw(values, o))
end
both(moe.plot.load_over_time, loads, "load", { title = "Share of the load by expert, over the training", xlabel = "step / " .. every })
both(moe.plot.specialisation, counts, "specialisation",
  { title = "Which expert takes which kind of character", ynames = kinds, ylabel = " " })
