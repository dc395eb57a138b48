"""nanoGPT's CPU setting (github.com/karpathy/nanoGPT: model.py, train.py, config/train_shakespeare_char.py): 4 layers,
4 heads, d 128, block 64, batch 12, 2000 steps of AdamW, characters of tiny Shakespeare, split 90/10, f32, eager."""
import math
import os
import sys

import torch
import torch.nn as nn
from torch.nn import functional as F

import serve

torch.set_num_threads(int(os.environ.get("MOE_THREADS", "2")))
torch.manual_seed(1337)
LAYERS, HEADS, D, BLOCK, BATCH, STEPS = 4, 4, 128, 64, 12, 2000

text = open(sys.argv[1]).read()
chars = sorted(set(text))
index = {c: i for i, c in enumerate(chars)}
data = torch.tensor([index[c] for c in text])
cut = int(0.9 * len(data))
train, val = data[:cut], data[cut:]


class LayerNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, None, 1e-5)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_attn = nn.Linear(D, 3 * D, bias=False)
        self.c_proj = nn.Linear(D, D, bias=False)

    def forward(self, x):
        b, t, _ = x.size()
        q, k, v = (z.view(b, t, HEADS, D // HEADS).transpose(1, 2) for z in self.c_attn(x).split(D, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, D))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_fc = nn.Linear(D, 4 * D, bias=False)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * D, D, bias=False)

    def forward(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = LayerNorm(), Attention(), LayerNorm(), MLP()

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(len(chars), D), nn.Embedding(BLOCK, D)
        self.h, self.ln_f = nn.ModuleList(Block() for _ in range(LAYERS)), LayerNorm()
        self.lm_head = nn.Linear(D, len(chars), bias=False)
        self.wte.weight = self.lm_head.weight
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                scaled = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * LAYERS) if scaled else 0.02)

    def forward(self, x, y):
        h = self.wte(x) + self.wpe(torch.arange(x.size(1)))
        for block in self.h:
            h = block(h)
        logits = self.lm_head(self.ln_f(h))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1))


model = GPT()
params = list(model.parameters())
optimizer = torch.optim.AdamW(
    [{"params": [p for p in params if p.dim() >= 2], "weight_decay": 0.1},
     {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}], lr=1e-3, betas=(0.9, 0.99))


def batch(source):
    at = torch.randint(len(source) - BLOCK, (BATCH,))
    return (torch.stack([source[i:i + BLOCK] for i in at]), torch.stack([source[i + 1:i + 1 + BLOCK] for i in at]))


def rate(it):
    if it < 100:
        return 1e-3 * (it + 1) / 101
    return 1e-4 + 0.5 * (1 + math.cos(math.pi * min(1, (it - 100) / (STEPS - 100)))) * 9e-4


done = 0


def step():
    global done
    for group in optimizer.param_groups:
        group["lr"] = rate(done)
    x, y = batch(train)
    loss = model(x, y)
    loss.backward()
    nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    done += 1
    return loss


@torch.no_grad()
def finish():
    estimate = sum(model(*batch(val)).item() for _ in range(200)) / 200
    return f"{estimate:.4f}"


serve.blocks(step, finish)
