-- Trains a language model on text, of any sequence mixers, dense or with mixture-of-experts layers:
--   lua5.4 examples/train_lm.lua --help
--   lua5.4 examples/train_lm.lua --arch mamba,mamba,attention --ffn dense,moe --layers 6
local moe = require "moe"

local OPTIONS <const> = {
  { "data", "", "a file, or a directory of text files; the project's own source text when not given" },
  { "level", "bytes", "bytes or chars" },
  { "arch", "moe", "moe or dense: attention with such an ffn; or mixers of moe.mixer, a pattern over the layers: mamba,attention" },
  { "ffn", "", "dense, moe or none, or a pattern of them; dense when not given" },
  { "layers", 4, "number of layers" },
  { "d_model", 128, "width" },
  { "heads", 4, "heads of attention and of the mixers that have them" },
  { "hidden", 256, "hidden width of the feed-forward networks (of each expert)" },
  { "experts", 8, "number of experts" },
  { "top_k", 2, "experts a token" },
  { "block", 64, "tokens in a window" },
  { "batch", 16, "windows in a step" },
  { "steps", 1000, "training steps" },
  { "seconds", 0, "train for about that long instead of a number of steps" },
  { "lr", 2e-3, "highest learning rate; warm-up over 5% of the steps, then a cosine down to a tenth" },
  { "dropout", 0.0, "share of activations dropped in training" },
  { "eval_every", 250, "steps between evaluations on held-out text" },
  { "save", "", "directory for checkpoints and, at the end, model.safetensors (examples/sample.lua reads it)" },
  { "save_every", 500, "steps between checkpoints" },
  { "resume", false, "go on from the newest checkpoint in --save" },
  { "sample", 300, "characters of text to generate at the end" },
  { "seed", 1, "seed of weights, batches and samples" },
  { "threads", 0, "worker threads; all cores when 0" },
  { "precision", "f32", "f32 or bf16" },
  { "quiet", false, "no progress line" },
}

local function usage()
  print "usage: lua5.4 examples/train_lm.lua [options]"
  for _, row in ipairs(OPTIONS) do
    local default = row[2]
    print(("  --%-12s %s%s"):format(row[1]:gsub("_", "-"), row[3],
      default ~= "" and default ~= false and (" (%s)"):format(default) or ""))
  end
end

local function die(message)
  io.stderr:write("train_lm: ", message, "\n")
  os.exit(1, true)
end

local function read_options(args)
  local o, kinds = {}, {}
  for _, row in ipairs(OPTIONS) do o[row[1]], kinds[row[1]] = row[2], row[2] end
  local i = 1
  while i <= #args do
    local name, value = args[i]:match "^%-%-([%w_-]+)=?(.*)$"
    if name == "help" then
      usage()
      os.exit(0)
    end
    name = name and name:gsub("-", "_")
    local default = name and kinds[name]
    if default == nil then die(("unknown option '%s' (--help lists them)"):format(args[i])) end
    if type(default) == "boolean" then
      o[name] = true
    else
      if not args[i]:find "=" then
        i = i + 1
        value = args[i]
      end
      if value == nil then die(("--%s wants a value"):format(name)) end
      if type(default) == "number" then
        local number = tonumber(value)
        if math.type(default) == "integer" then number = number and math.tointeger(number) end
        if not number then die(("--%s wants a number, got '%s'"):format(name, value)) end
        value = number
      end
      o[name] = value
    end
    i = i + 1
  end
  if o.arch == "dense" or o.arch == "moe" then
    if o.ffn ~= "" then die(("--arch %s names the ffn already: give the mixers, as in --arch attention --ffn %s"):format(o.arch, o.ffn)) end
    o.arch, o.ffn = "attention", o.arch
  end
  if o.resume and o.save == "" then die "--resume needs --save" end
  return o
end

-- The project's own text: the sources below the folder that holds examples/.
local function own_text()
  local root = arg[0]:match "^(.*)/examples/[^/]*$" or (arg[0]:match "^examples/" and "." or "..")
  local parts = {}
  local function walk(path, depth)
    local kind = moe.io.kind(path)
    if kind == "directory" and depth < 8 then
      for _, name in ipairs(assert(moe.io.list(path))) do
        if name:sub(1, 1) ~= "." then walk(path .. "/" .. name, depth + 1) end
      end
    elseif kind == "file" and (path:match "%.[ch]$" or path:match "%.lua$") then
      parts[#parts + 1] = assert(moe.io.read(path))
    end
  end
  for _, dir in ipairs { "csrc", "lua", "examples" } do walk(root .. "/" .. dir, 0) end
  return table.concat(parts)
end

local function open_text(o)
  local source = o.data
  if source == "" then
    source = { text = own_text() }
    if #source.text < 10000 then die "the project's own text was not found: give --data" end
  end
  local text, message = moe.data.text(source, { level = o.level, split = { 0.9, 0.1 } })
  if not text then die(message) end
  return text
end

-- "a,b" as a list, no longer than the layers.
local function pattern(text, layers)
  local list = {}
  for name in text:gmatch "[^,%s]+" do
    if #list < layers then list[#list + 1] = name end
  end
  return list
end

-- What a kind of mixer wants beside the width and the heads.
local KINDS_OF_MIXERS <const> = {
  mamba2 = function(o) return { headdim = math.max(1, 2 * o.d_model // o.heads) } end,
  mla = function(o) return { kv_lora_rank = math.max(1, o.d_model // 4) } end,
  mixture_of_attention = function(o) return { num_experts = o.experts, top_k = o.top_k } end,
}

local function model_options(o, vocab_size)
  local options = {
    vocab_size = vocab_size, d_model = o.d_model, num_layers = o.layers, num_heads = o.heads, max_seq_len = o.block,
    layer_types = pattern(o.arch, o.layers), ffn = pattern(o.ffn == "" and "dense" or o.ffn, o.layers),
    positional = "rope", norm = "rmsnorm", activation = "swiglu", intermediate_size = o.hidden, dropout = o.dropout,
  }
  for _, kind in ipairs(options.layer_types) do
    if KINDS_OF_MIXERS[kind] then
      options.mixers = options.mixers or {}
      options.mixers[kind] = KINDS_OF_MIXERS[kind](o)
    end
  end
  for _, kind in ipairs(options.ffn) do
    if kind == "moe" then options.moe = { num_experts = o.experts, top_k = o.top_k } end
  end
  return options
end

-- What sample.lua does with the saved options as well.
local function make_model(options)
  local copy = {}
  for k, v in pairs(options) do copy[k] = v end
  if copy.moe then
    local top_k = copy.moe.top_k
    copy.moe = {
      num_experts = copy.moe.num_experts, router = moe.router.topk { top_k = top_k, norm_topk_prob = top_k > 1 },
      balance = { moe.loss.switch(0.01), moe.loss.z(1e-3) },
    }
  end
  return moe.model.lm(copy)
end

local KINDS <const> = {
  { "lower case", "%l" }, { "upper case", "%u" }, { "digits", "%d" }, { "spaces", "[ \t]" }, { "line ends", "[\r\n]" },
  { "brackets", "[%(%)%[%]{}<>]" }, { "punctuation", "%p" }, { "other", "" },
}

local function kind_of(token)
  for i, kind in ipairs(KINDS) do
    if token:find(kind[2]) then return i end
  end
end

-- How often each expert of each sparse layer worked on each kind of text: [layer][kind][expert].
local function expert_counts(model, batches, text, steps)
  local counts = {}
  model:eval()
  moe.no_grad(function()
    for _ = 1, steps do
      local batch = batches()
      if batch == nil then break end
      local kinds = batch.x:reshape { -1 }:totable()
      for i, id in ipairs(kinds) do kinds[i] = kind_of(text.vocab[id]) end
      model(batch.x)
      for l, routing in ipairs(model.routings) do
        counts[l] = counts[l] or {}
        local token, expert = routing.token:totable(), routing.expert:totable()
        for a = 1, #token do
          local kind = kinds[token[a]]
          local row = counts[l][kind]
          if not row then
            row = { total = 0 }
            counts[l][kind] = row
          end
          row[expert[a]] = (row[expert[a]] or 0) + 1
          row.total = row.total + 1
        end
      end
    end
  end)
  model:train()
  return counts
end

-- Mutual information of kind and expert, in nats: how much a layer's experts divided the kinds among them.
local function information(rows)
  local total, by_expert = 0, {}
  for _, row in pairs(rows) do
    total = total + row.total
    for e, n in pairs(row) do
      if e ~= "total" then by_expert[e] = (by_expert[e] or 0) + n end
    end
  end
  local mi = 0
  for _, row in pairs(rows) do
    for e, n in pairs(row) do
      if e ~= "total" then mi = mi + n / total * math.log(n * total / (row.total * by_expert[e])) end
    end
  end
  return mi
end

local function print_experts(counts, num_experts)
  local best, most = nil, -1
  for l, rows in ipairs(counts) do
    local mi = information(rows)
    if mi > most then best, most = l, mi end
  end
  if not best then return end
  local shown = math.min(num_experts, 16)
  print(("\nWhich experts of layer %d took which kind of text, in percent of its tokens:"):format(best))
  local head = { ("%-12s"):format "" }
  for e = 1, shown do head[#head + 1] = ("%5s"):format("E" .. e) end
  print(table.concat(head))
  for i, kind in ipairs(KINDS) do
    local row = counts[best][i]
    if row then
      local line = { ("%-12s"):format(kind[1]) }
      for e = 1, shown do line[#line + 1] = ("%5.0f"):format(100 * (row[e] or 0) / row.total) end
      print(table.concat(line))
    end
  end
end

local function printable(s) return (s:gsub("[^\t\n\32-\126\128-\255]", "?")) end

local function main(args)
  local o = read_options(args)
  if o.threads > 0 then moe.threads(o.threads) end
  moe.manual_seed(o.seed)
  local text = open_text(o)
  local options = model_options(o, text.vocab_size)
  local made, model = pcall(make_model, options)
  if not made then die(model) end
  print(text)
  print(model)

  local train = text.train:batches { batch_size = o.batch, seq_len = o.block, random = true, seed = o.seed }
  local held_out = text.val:batches { batch_size = o.batch, seq_len = o.block }
  local steps = o.steps
  local function loss_of(m, batch, ctx)
    return moe.loss.cross_entropy(m(batch.x, ctx), batch.y) + (m.training and m:aux() or 0)
  end
  local function make_trainer(silent)
    local warmup = math.max(1, steps // 20)
    return moe.trainer {
      model = model, optimizer = moe.optim.adamw { lr = o.lr, betas = { 0.9, 0.99 }, weight_decay = 0.1 }, loss = loss_of,
      schedule = moe.schedule.cosine { warmup = warmup, steps = math.max(steps, warmup + 1), min = 0.1 }, clip = 1.0,
      precision = o.precision, quiet = silent or o.quiet,
      checkpoint = not silent and o.save ~= "" and { dir = o.save .. "/steps", every = o.save_every } or nil,
    }
  end
  if o.seconds > 0 then -- a few steps tell how many fit
    local trial, weights, began, last = make_trainer(true), {}, nil, nil
    for name, t in pairs(model:state_dict()) do weights[name] = t:clone() end
    for step in trial:steps(train, 15) do
      last = moe.clock()
      if step == 5 then began = last end
    end
    model:load_state_dict(weights)
    steps = math.max(20, math.floor(o.seconds / ((last - began) / 10) * 0.93)) -- evaluation takes the rest
    moe.manual_seed(o.seed)
  end

  local trainer = make_trainer(false)
  if o.resume then
    local step, message = trainer:resume()
    if step == nil then die(message) end
    print(step and ("resumed at step %d"):format(step) or "no checkpoint yet: starting anew")
  end
  local began = moe.clock()
  print(("training for %d steps of %d tokens on %d threads"):format(steps, o.batch * o.block, moe.threads()))
  trainer:fit(train, { steps = steps, eval = { every = o.eval_every, with = held_out, steps = 20 } })
  local loss = trainer:evaluate(held_out, { steps = 100 }).loss
  print(("trained for %.0f s; held-out loss %.4f nats a token (%.3f bits)"):format(moe.clock() - began, loss, loss / math.log(2)))

  if options.moe then print_experts(expert_counts(model, held_out, text, 20), o.experts) end
  if o.save ~= "" then
    local path = o.save .. "/model.safetensors"
    assert(moe.io.make_dir(o.save))
    assert(moe.io.save(path, model:state_dict(), {
      options = moe.io.json_encode(options), level = o.level, vocab = moe.io.json_encode(o.level == "chars" and text.vocab or {}),
    }))
    print("\nsaved " .. path)
  end
  if o.sample > 0 then
    print "\nA sample:"
    local out = {}
    for token in model:generate(text.val:ids(1, math.min(o.block, #text.val)), {
      max_new_tokens = o.sample, temperature = 0.8, top_k = 40, seed = o.seed }) do
      out[#out + 1] = text:decode(token)
    end
    print(printable(table.concat(out)))
  end
end

if arg and arg[0] and arg[0]:match "train_lm%.lua$" then main(arg) end

return { make_model = make_model }
