"""Peak resident memory of one MoE layer, forward and backward, SwiGLU, in PyTorch eager: experts' rows sorted and
contiguous, one product an expert. Prints MB above what weights and input take, the least of several passes."""
import sys

import torch
import torch.nn.functional as F

T, D, H, E, K = (int(v) for v in sys.argv[1:6])
torch.set_num_threads(2)
torch.manual_seed(1)
wr = torch.randn(E, D).mul_(D ** -0.5).requires_grad_()
gate_up = torch.randn(E, 2 * H, D).mul_(D ** -0.5).requires_grad_()
down = torch.randn(E, D, H).mul_(H ** -0.5).requires_grad_()
x = torch.randn(T, D, requires_grad=True)


def layer():
    probs = F.softmax(x @ wr.t(), -1)
    weight, index = probs.topk(K, -1)
    weight = weight / weight.sum(-1, keepdim=True)
    flat = index.flatten()
    order = flat.argsort(stable=True)
    rows = x[order // K]
    parts = rows.split(torch.bincount(flat, minlength=E).tolist())
    out = []
    for e, part in enumerate(parts):
        g, u = (part @ gate_up[e].t()).chunk(2, -1)
        out.append((F.silu(g) * u) @ down[e].t())
    y = torch.cat(out) * weight.flatten()[order, None]
    return torch.zeros_like(x).index_add(0, order // K, y)


def status(key):
    with open("/proc/self/status") as f:
        for line in f:
            if line.startswith(key):
                return int(line.split()[1]) / 1024
    return float("nan")


def reset_peak():
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")


F.linear(torch.zeros(64, D), torch.zeros(D, D)).sum()  # the BLAS's own buffers
for p in (wr, gate_up, down, x):
    p.grad = torch.zeros_like(p)
before = status("VmRSS")
least = float("inf")
for _ in range(3):
    reset_peak()
    layer().pow(2).mean().backward()
    least = min(least, status("VmHWM") - before)
print(f"{least:.1f}")
