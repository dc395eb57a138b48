# The selective scan in PyTorch, step by step as the reference implementations of the field do it: least times of a few runs.
import os, sys, time
import torch

torch.set_num_threads(int(os.environ.get("MOE_THREADS", "2")))
batch, length, channels, states = 4, 512, 512, 16


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


u, delta, z = leaf(batch, length, channels), leaf(batch, length, channels), leaf(batch, length, channels)
A = (-torch.arange(1.0, states + 1).repeat(channels, 1)).requires_grad_()
B, C, D, bias = leaf(batch, length, states), leaf(batch, length, states), leaf(channels), leaf(channels)


def scan():
    dt = torch.nn.functional.softplus(delta + bias)
    decay = torch.exp(torch.einsum("bld,dn->bldn", dt, A))
    fed = torch.einsum("bld,bln,bld->bldn", dt, B, u)
    h, out = u.new_zeros(batch, channels, states), []
    # unbind: the gradient of an index would fill a whole tensor at every step
    for a, b, c in zip(decay.unbind(1), fed.unbind(1), C.unbind(1)):
        h = a * h + b
        out.append(torch.einsum("bdn,bn->bd", h, c))
    return (torch.stack(out, 1) + u * D) * torch.nn.functional.silu(z)


def least(f, runs):
    best = 1e9
    for _ in range(runs):
        start = time.perf_counter()
        f()
        best = min(best, time.perf_counter() - start)
    return best * 1e3


def forward():
    with torch.no_grad():
        scan()


g = torch.randn(batch, length, channels)
runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
print(f"PyTorch {torch.__version__}, step by step: forward {least(forward, runs):.1f} ms, "
      f"forward + backward {least(lambda: scan().backward(g), runs):.1f} ms")
