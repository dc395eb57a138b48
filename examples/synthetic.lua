-- Trains mixers on a task where they differ, and tests them on new examples, also longer ones:
--   lua5.4 examples/synthetic.lua --task induction_heads --arch mamba --seq-len 64 --test-lengths 64,128,512
--   lua5.4 examples/synthetic.lua --task mqar --arch attention --vocab-size 64 --positional learned
-- Options that are not named below go to the task: --setting NAME, --seq-len N, --vocab-size N, ..
local moe = require "moe"

local OPTIONS <const> = {
  { "task", "mqar", "a task of moe.data.synthetic" },
  { "arch", "mamba", "mixers of moe.mixer, a pattern over the layers: mamba,attention" },
  { "ffn", "dense", "dense or none, or a pattern of them" },
  { "layers", 2, "number of layers" },
  { "d_model", 64, "width" },
  { "heads", 1, "heads of attention and of the mixers that have them" },
  { "positional", "", "learned, rope or none; none where a mixer knows the order by itself, else learned, when not given" },
  { "batch", 64, "examples in a step" },
  { "steps", 400, "training steps" },
  { "lr", 2e-3, "highest learning rate; warm-up over 5% of the steps, then a cosine down to a tenth" },
  { "test_lengths", "", "lengths to test at, as 64,128; that of the training when not given" },
  { "seed", 1, "seed of weights and examples; tests take the next one" },
}

local function die(message)
  io.stderr:write("synthetic: ", message, "\n")
  os.exit(1, true)
end

-- Options of this program, and those of the task.
local function read_options(args)
  local o, task, kinds = {}, {}, {}
  for _, row in ipairs(OPTIONS) do o[row[1]], kinds[row[1]] = row[2], type(row[2]) end
  local i = 1
  while i <= #args do
    local name = (args[i]:match "^%-%-([%w_-]+)$" or die(("'%s' is no option"):format(args[i]))):gsub("-", "_")
    if name == "help" then
      print "usage: lua5.4 examples/synthetic.lua [options] [options of the task]"
      for _, row in ipairs(OPTIONS) do print(("  --%-13s %s%s"):format(row[1]:gsub("_", "-"), row[3],
        row[2] ~= "" and (" (%s)"):format(row[2]) or "")) end
      local names = {}
      for task_name in pairs(moe.data.synthetic.settings) do names[#names + 1] = task_name end
      table.sort(names)
      print("tasks: " .. table.concat(names, ", "))
      os.exit(0)
    end
    local value = args[i + 1] or die(("--%s wants a value"):format(name))
    local number = tonumber(value)
    if kinds[name] == "number" then
      o[name] = number or die(("--%s wants a number, got '%s'"):format(name, value))
    elseif kinds[name] then
      o[name] = value
    elseif value == "true" or value == "false" then
      task[name] = value == "true"
    else
      task[name] = number and (math.tointeger(number) or number) or value
    end
    i = i + 2
  end
  return o, task
end

local function list(text)
  local out = {}
  for part in text:gmatch "[^,%s]+" do out[#out + 1] = part end
  return out
end

local o, given = read_options(arg)
local make = moe.data.synthetic.settings[o.task] and moe.data.synthetic[o.task] or die(("there is no task '%s' (--help)"):format(o.task))
if o.task == "compression" then die "compression is read from the last state alone, which this program does not do" end

local function loader(more)
  local settings = { batch_size = o.batch }
  for k, v in pairs(given) do settings[k] = v end
  for k, v in pairs(more) do settings[k] = v end
  local ok, made = pcall(make, settings)
  return ok and made or die(made)
end

local train = loader { seed = o.seed }
local tests, longest = {}, train.seq_len
for _, text in ipairs(list(o.test_lengths)) do
  local length = math.tointeger(tonumber(text)) or die("--test-lengths wants lengths, got " .. text)
  tests[#tests + 1] = length
  longest = math.max(longest, length)
end
if #tests == 0 then tests[1] = train.seq_len end

moe.manual_seed(o.seed)
local ok, model = pcall(moe.model.lm, {
  vocab_size = train.vocab_size, d_model = o.d_model, num_layers = o.layers, num_heads = o.heads, max_seq_len = longest, norm = "rmsnorm",
  layer_types = table.move(list(o.arch), 1, o.layers, 1, {}), ffn = table.move(list(o.ffn), 1, o.layers, 1, {}), activation = "swiglu",
  positional = o.positional ~= "" and o.positional or nil,
})
if not ok then die(model) end
print(train)
print(("%s: %d parameters"):format(o.arch, model:num_parameters()))

local warmup = math.max(1, o.steps // 20)
local trainer = moe.trainer {
  model = model, optimizer = moe.optim.adamw { lr = o.lr, betas = { 0.9, 0.98 }, weight_decay = 0.1 }, clip = 1.0, quiet = true,
  loss = function(m, batch) return moe.loss.cross_entropy(m(batch.x), batch.y) end,
  schedule = moe.schedule.cosine { warmup = warmup, steps = math.max(o.steps, warmup + 1), min = 0.1 },
}
-- The share of right answers over some batches that training does not see.
local function accuracy(length, batches)
  local source, sum = loader { seed = o.seed + 1, seq_len = length }, 0
  model:eval()
  moe.no_grad(function()
    for _ = 1, batches do
      local batch = source()
      sum = sum + moe.data.synthetic.accuracy(model(batch.x), batch)
    end
  end)
  model:train()
  return sum / batches
end

local began, every = moe.clock(), math.max(1, o.steps // 10)
for step, result in trainer:steps(train, o.steps) do
  if step % every == 0 then
    print(("step %5d   loss %.4f   right %5.1f%%   %.0f s"):format(step, result.loss, 100 * accuracy(train.seq_len, 2),
      moe.clock() - began))
  end
end
for _, length in ipairs(tests) do print(("length %6d   right %5.1f%%"):format(length, 100 * accuracy(length, 8))) end
