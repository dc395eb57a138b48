-- nanoGPT's CPU setting (github.com/karpathy/nanoGPT, config/train_shakespeare_char.py with the README's CPU options), our
-- side of nanogpt_torch.py: the same model, batches drawn alike, the same schedule.
local moe = require "moe"
local serve = require "spec.bench.serve"

local LAYERS <const>, HEADS <const>, D <const>, BLOCK <const>, BATCH <const>, STEPS <const> = 4, 4, 128, 64, 12, 2000

moe.threads(math.tointeger(tonumber(os.getenv "MOE_THREADS")) or 2)
moe.manual_seed(1337)
local text = assert(moe.data.text(arg[1] or serve.shakespeare(), { level = "chars", split = { 0.9, 0.1 } }))
local model = moe.model.lm {
  vocab_size = text.vocab_size, d_model = D, num_layers = LAYERS, num_heads = HEADS, max_seq_len = BLOCK,
  positional = "learned", norm = "layernorm", bias = false, activation = "gelu", tie_embeddings = true,
}
local train = text.train:batches { batch_size = BATCH, seq_len = BLOCK, random = true, seed = 1337 }
local val = text.val:batches { batch_size = BATCH, seq_len = BLOCK, random = true, seed = 1338 }

-- As nanoGPT: no weight decay for tensors of fewer than two dimensions.
local optimizer = moe.optim.adamw(model, { lr = 1e-3, betas = { 0.9, 0.99 }, weight_decay = 0.1, no_decay = "vectors" })

local function rate(it)
  if it < 100 then return 1e-3 * (it + 1) / 101 end
  return 1e-4 + 0.5 * (1 + math.cos(math.pi * math.min(1, (it - 100) / (STEPS - 100)))) * 9e-4
end

local function loss_of(batch)
  return moe.cross_entropy(model(batch.x):reshape { BATCH * BLOCK, text.vocab_size }, batch.y:reshape { BATCH * BLOCK })
end

local done = 0
local function step()
  optimizer.lr = rate(done)
  local loss = loss_of(train())
  optimizer:zero_grad()
  loss:backward()
  optimizer:step { clip = 1.0 }
  done = done + 1
end

-- The mean over 200 random held-out batches, as nanoGPT's estimate_loss (which takes 20 on a CPU).
serve.blocks(step, function()
  model:eval()
  local sum = 0
  moe.no_grad(function()
    for _ = 1, 200 do sum = sum + loss_of(val()):item() end
  end)
  return ("%.4f"):format(sum / 200)
end)
