-- Generates text with a model that train_lm.lua saved, each token written as it comes:
--   lua5.4 examples/sample.lua --load run --prompt "local function" --tokens 400 --temperature 0.8 --top-k 40 --seed 1
-- --top-k 0, --top-p 1, --min-p 0 and --repetition-penalty 1 leave the draw as it is; --stop TEXT ends it before that text's last token.
local moe = require "moe"

local folder = arg[0]:match "^(.*)/[^/]*$" or "."
package.path = folder .. "/?.lua;" .. package.path
local make_model = require "train_lm".make_model

local o = {
  load = "run", prompt = "\n", tokens = 300, temperature = 0.8, top_k = 40, top_p = 1, min_p = 0, repetition_penalty = 1, stop = "",
  seed = 1,
}
local i = 1
while i <= #arg do
  local name = (arg[i]:match "^%-%-([%w-]+)$" or ""):gsub("-", "_")
  if o[name] == nil or arg[i + 1] == nil then
    io.stderr:write("usage: lua5.4 examples/sample.lua --load DIR [--prompt TEXT] [--tokens N] [--temperature T] [--top-k K] [--top-p P]\n",
      "  [--min-p P] [--repetition-penalty C] [--stop TEXT] [--seed N]\n")
    os.exit(name == "help" and 0 or 1)
  end
  o[name] = arg[i + 1]
  i = i + 2
end

local function fail(message)
  io.stderr:write("sample: ", message, "\n")
  os.exit(1, true)
end
local function number(name)
  local v = tonumber(o[name]) or fail(("--%s wants a number, got '%s'"):format(name, o[name]))
  return math.tointeger(v) or v
end

local path = o.load .. "/model.safetensors"
local tensors, about = moe.io.load(path)
if not tensors then fail(about) end
if not (about and about.options) then fail(path .. " was not saved by train_lm.lua") end
local model = make_model(moe.io.json_decode(about.options))
model:load_state_dict(tensors)

-- The vocabulary: bytes, or the characters of the training text.
local vocab, place = {}, {}
if about.level == "chars" then
  vocab = moe.io.json_decode(about.vocab)
else
  for b = 0, 255 do vocab[b + 1] = string.char(b) end
end
for id, token in ipairs(vocab) do place[token] = id end

local ids = {}
for piece in o.prompt:gmatch(about.level == "chars" and utf8.charpattern or ".") do
  ids[#ids + 1] = place[piece] or fail(("the model has not seen the character '%s'"):format(piece))
end

local settings = { max_new_tokens = number "tokens", seed = number "seed" }
for _, name in ipairs { "temperature", "top_k", "top_p", "min_p", "repetition_penalty" } do settings[name] = number(name) end
if settings.top_k == 0 then settings.top_k = nil end
if o.stop ~= "" then
  local last = "" -- as much of what came as the text to stop at is long
  settings.stop = function(id)
    last = (last .. vocab[id]):sub(-#o.stop)
    return last == o.stop
  end
end

io.write(o.prompt)
for id in model:generate(ids, settings) do
  io.write(vocab[id])
  io.flush()
end
print()
