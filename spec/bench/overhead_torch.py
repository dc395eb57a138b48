"""An addition of two tensors of 8 elements, with and without recording, in PyTorch eager: us a call."""
import os
import time

import torch

import serve

torch.set_num_threads(int(os.environ.get("MOE_THREADS", "2")))
a, b = torch.randn(8), torch.randn(8)
ra = torch.randn(8, requires_grad=True)
CALLS = 20000


def once(x, y):
    t = time.perf_counter()
    for _ in range(CALLS):
        x + y
    return (time.perf_counter() - t) / CALLS * 1e6


least = [float("inf"), float("inf")]


def step():
    least[0] = min(least[0], once(a, b))
    least[1] = min(least[1], once(ra, b))


serve.blocks(step, lambda: f"{least[0]:.4f} {least[1]:.4f}")
