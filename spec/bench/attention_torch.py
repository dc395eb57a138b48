"""The work of attention.lua by PyTorch's scaled_dot_product_attention. Answers as attention.lua does."""
import os
import sys
import time

import torch
import torch.nn.functional as F

import serve

B, T, W, H = (int(v) for v in sys.argv[1:5])
torch.set_num_threads(int(os.environ.get("MOE_THREADS", 2)))
torch.manual_seed(1)
x = torch.randn(B, T, 3, H, W // H)
qkv = [x[:, :, i].transpose(1, 2).requires_grad_() for i in range(3)]
g = torch.randn(B, T, H, W // H).transpose(1, 2)
a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
best = {name: [1e30, 1e30] for name in ("both", "forward", "product")}


def least(key, f):
    t, cpu = time.perf_counter(), time.process_time()
    f()
    best[key][0] = min(best[key][0], time.perf_counter() - t)
    best[key][1] = min(best[key][1], time.process_time() - cpu)


def attention():
    return F.scaled_dot_product_attention(*qkv, is_causal=True)


def forward():
    with torch.no_grad():
        attention()


def step():
    least("product", lambda: a @ b)
    for _ in range(4):
        least("forward", forward)
        least("both", lambda: torch.autograd.grad(attention(), qkv, g))


def answer():
    both, fwd = best["both"], best["forward"]
    rate = 2 * 1024**3 / best["product"][0] / 1e9
    return f"{both[0] * 1e3:.4f} {fwd[0] * 1e3:.4f} {both[1] * 1e3:.4f} {fwd[1] * 1e3:.4f} {rate:.2f}"


serve.blocks(step, answer)
