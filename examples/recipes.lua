-- The gallery of published systems:
--
--   lua5.4 examples/recipes.lua                                  lists them
--   lua5.4 examples/recipes.lua show remoe                       what it is, what was measured, how long its file is
--   lua5.4 examples/recipes.lua run remoe --steps 200            trains it on a text, shows its losses and what its router did
--   lua5.4 examples/recipes.lua compare topk remoe soft_moe      the same text, steps and seeds: a table, mean and spread
--   lua5.4 examples/recipes.lua markdown                         the table of the README
--
-- Options of run and compare: --steps 200 --seeds 1,2,3 --d_model 64 --num_layers 2 --num_experts 8 --top_k 2
-- --intermediate_size 64 --seq_len 64 --batch_size 16 --lr 0.003, and --plot file.svg: a picture (gnuplot) besides the text.
-- "dense" and "topk" are base lines. The text is $MOE_DATA/tinyshakespeare.txt where it is there, else a generated one.
package.path = "./lua/?.lua;./lua/?/init.lua;" .. package.path
package.cpath = "./build/?.so;" .. package.cpath
local moe = require "moe"
local recipe = moe.recipe

local function fail(text, ...)
  io.stderr:write("recipes: ", text:format(...), "\n")
  os.exit(1)
end

local NUMBERS <const> = {
  steps = 1, d_model = 1, num_layers = 1, num_heads = 1, num_experts = 1, top_k = 1, intermediate_size = 1, seq_len = 1, batch_size = 1,
  lr = 1, seed = 1,
}

-- Words and options of the command line.
local function parse(args)
  local words, options, extra, i = {}, {}, {}, 1
  while args[i] do
    local name = args[i]:match "^%-%-(.+)$"
    local value = args[i + 1]
    if not name then
      words[#words + 1] = args[i]
      i = i - 1
    elseif name == "plot" then
      extra.plot = value or fail "--plot wants a file"
    elseif name == "seeds" then
      extra.seeds = {}
      for n in (value or ""):gmatch "%-?%d+" do table.insert(extra.seeds, math.tointeger(tonumber(n))) end
      if #extra.seeds == 0 then fail "--seeds wants numbers: --seeds 1,2,3" end
    elseif NUMBERS[name] then
      options[name] = tonumber(value) or fail("--%s wants a number", name)
      options[name] = name ~= "lr" and math.tointeger(options[name]) or options[name]
    else
      fail("unknown option --%s", name)
    end
    i = i + 2
  end
  return words, options, extra
end

local function find(name)
  local ok, found = pcall(recipe.find, name)
  if not ok then fail("there is no recipe '%s'; without arguments this program lists them", name) end
  return found
end

local function list()
  for _, name in ipairs(recipe.names()) do
    local r = find(name)
    print(("%-20s %-16s %s"):format(name, r.paper or "", r.title))
  end
  print "\nshow NAME, run NAME, compare NAME NAME ...: see the head of examples/recipes.lua"
end

local function wrap(text, width)
  local out, line = {}, ""
  for word in text:gmatch "%S+" do
    if #line + #word >= width then
      out[#out + 1] = line
      line = ""
    end
    line = line == "" and word or line .. " " .. word
  end
  out[#out + 1] = line
  return table.concat(out, "\n")
end

local function show(name)
  local r = find(name)
  print(("%s (%s)"):format(r.title, r.paper or "base line"))
  local path = package.searchpath("moe.recipe." .. name, package.path)
  if path then
    local lines, comment = 0, {}
    for line in io.lines(path) do
      lines = lines + 1
      if lines == #comment + 1 and line:match "^%-%-" then comment[lines] = line:gsub("^%-+ ?", "") end
    end
    print("\n" .. table.concat(comment, "\n"))
    print(("\n%s, %d lines"):format(path, lines))
  end
  if r.claim then print("\nClaim: " .. wrap(r.claim, 100)) end
  if r.outcome then print("Outcome: " .. wrap(r.outcome, 100)) end
end

local function run(name, options, extra)
  local r = find(name)
  if not (r.layer or r.model) then
    for _, row in ipairs(r.demo(print) or {}) do print(("%-40s %s"):format(row[1] or row.name, tostring(row[2] or row.value))) end
    return
  end
  local loads, every = {}, math.max(1, (options.steps or 200) // 64)
  local _, kind = recipe.text()
  print(("%s on %s text"):format(r.title, kind == "real" and "Shakespeare's" or "generated"))
  options.log = function(step, m, model)
    if step == 1 or step % 25 == 0 then print(("step %5d  loss %.4f"):format(step, m.loss)) end
    local first = step % every == 0 and model.routings and model.routings[1]
    if first and first.load then loads[#loads + 1] = first end
  end
  local result = recipe.train(name, options)
  print(("\nheld-out loss %.4f, %d parameters, %d of them active for a token, %.0f tokens/s"):format(result.val_loss, result.parameters,
    result.active_parameters, result.tokens_per_second))
  local routings = moe.inspect.routings(result.model, (recipe.text()).val:ids(1, options.seq_len or 64):reshape { 1, -1 })
  for i, routing in ipairs(routings) do print(("layer %d: %s"):format(i, tostring(routing))) end
  if #loads > 1 then
    print("\n" .. moe.plot.load_over_time(loads, { title = "first sparse layer, share of the load over the training" }))
    if extra.plot then assert(moe.plot.load_over_time(loads, { file = extra.plot })) end
  end
end

local function compare(names, options, extra)
  if #names < 2 then fail "compare wants two names or more" end
  for _, name in ipairs(names) do
    local r = find(name)
    if not (r.layer or r.model) then fail("%s is no language model: run it by itself", name) end
  end
  options.seeds = extra.seeds or { 1, 2, 3 }
  options.report = function(name, seed, result)
    print(("%-20s seed %d: held-out loss %.4f, %.0f s"):format(name, seed, result.val_loss, result.seconds))
  end
  local rows = recipe.compare(names, options)
  print(("\n%-20s %18s %12s %12s %10s"):format("", "held-out loss", "parameters", "active", "tokens/s"))
  local values, spread = {}, {}
  for i, row in ipairs(rows) do
    print(("%-20s %9.4f +- %.4f %12d %12d %10.0f"):format(row.name, row.val_loss, row.spread, row.parameters, row.active_parameters,
      row.tokens_per_second))
    values[i], spread[i] = row.val_loss, row.spread
  end
  local low = math.huge
  for _, v in ipairs(values) do low = math.min(low, v) end
  local look = { title = "held-out loss", min = math.floor(low * 10 - 1) / 10 }
  print("\n" .. moe.plot.bars(names, values, spread, look))
  look.file = extra.plot
  if extra.plot then assert(moe.plot.bars(names, values, spread, look)) end
end

-- The rows of the README's gallery.
local function markdown()
  print "| recipe | system | paper | outcome |\n|---|---|---|---|"
  for _, name in ipairs(recipe.names()) do
    local r = find(name)
    print(("| [`%s`](lua/moe/recipe/%s.lua) | %s | %s | %s |"):format(name, name, r.title, r.paper, (r.outcome or ""):gsub("|", "/")))
  end
end

local words, options, extra = parse(arg)
local what = table.remove(words, 1) or "list"
local commands = {
  list = list, markdown = markdown,
  show = function() show(words[1] or fail "show wants a name") end,
  run = function() run(words[1] or fail "run wants a name", options, extra) end,
  compare = function() compare(words, options, extra) end,
}
if not commands[what] then fail("unknown command '%s' (list, show, run, compare, markdown)", what) end
commands[what]()
