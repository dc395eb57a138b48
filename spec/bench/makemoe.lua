-- makeMoE's setting (github.com/AviSoori1x/makeMoE, makeMoE.py): 8 layers, 8 heads, d 128, block 32, batch 16, 8 experts,
-- noisy top-2 (learned softplus noise, also in evaluation), softmax over the chosen two, ReLU experts 4 d wide with bias,
-- dropout 0.1, no balance loss; AdamW lr 1e-3, weight decay 0.01; 5000 steps; published held-out loss 1.7508.
--   lua5.4 makemoe.lua [text] [steps]
local moe = require "moe"
local serve = require "spec.bench.serve"

local D <const>, BLOCK <const>, BATCH <const> = 128, 32, 16
local STEPS <const> = math.tointeger(tonumber(arg[2])) or 5000

moe.threads(math.tointeger(tonumber(os.getenv "MOE_THREADS")) or 2)
moe.manual_seed(1337)
local text = assert(moe.data.text(arg[1] or serve.shakespeare(), { level = "chars", split = { 0.9, 0.1 } }))

local model = moe.model.lm {
  vocab_size = text.vocab_size, d_model = D, num_layers = 8, num_heads = 8, max_seq_len = BLOCK, positional = "learned",
  norm = "layernorm", norm_bias = true, bias = true, qkv_bias = false, head_bias = true, tie_embeddings = false, dropout = 0.1,
  init = "kaiming_normal", embedding_init = "normal(1)", bias_init = "default", residual_scale = false,
  ffn = "moe", moe = {
    num_experts = 8, experts = moe.experts.mlp { intermediate_size = 4 * D, act = "relu", bias = true },
    router = moe.router.topk { top_k = 2, score_after = true, noise = "learned", noise_in_eval = true, bias = true },
  },
}
local train = text.train:batches { batch_size = BATCH, seq_len = BLOCK, random = true, seed = 1337 }
local val = text.val:batches { batch_size = BATCH, seq_len = BLOCK, random = true, seed = 1338 }
local optimizer = moe.optim.adamw(model, { lr = 1e-3, betas = { 0.9, 0.999 }, weight_decay = 0.01, no_decay = "none" })

local function loss_of(batch)
  return moe.cross_entropy(model(batch.x):reshape { BATCH * BLOCK, text.vocab_size }, batch.y:reshape { BATCH * BLOCK })
end

local function estimate(batches)
  model:eval()
  local sum = 0
  moe.no_grad(function()
    for _ = 1, batches do sum = sum + loss_of(val()):item() end
  end)
  model:train()
  return sum / batches
end

print(("  %d parameters (published: 8,996,545)"):format(model:num_parameters()))
local began, busy = moe.clock(), 0
for step = 0, STEPS do
  if step == 0 or step % 1000 == 0 or step == STEPS or step == 500 then
    busy = busy + (moe.clock() - began)
    print(("  step %d  held-out loss %.4f  (%.1f ms a step)"):format(step, estimate(400), busy / math.max(1, step) * 1e3))
    began = moe.clock()
  end
  if step < STEPS then
    local loss = loss_of(train())
    optimizer:zero_grad()
    loss:backward()
    optimizer:step()
  end
end
