"""Fields, and the reversible steps written once more, for autograd to go through."""

import torch
from reversax_torch._steps import BASES
from torch import nn

FIXED = ["euler", "midpoint", "heun2", "heun3", "rk4"]
ADAPTIVE = ["bosh3", "dopri5", "tsit5", "dopri8"]


class Network(nn.Module):
    """Of three numbers, time-dependent; `damping` damps it."""

    def __init__(self, *layers, damping=0.0, width=8, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(3)
        first, last = nn.Linear(3, width), nn.Linear(width, 3)
        self.net = nn.Sequential(first, nn.Tanh(), *layers, last).to(dtype)
        self.damping = damping

    def forward(self, t, y):
        return self.net(y) * torch.cos(t) - self.damping * y


def start(dtype=torch.float64, batch=4):
    torch.manual_seed(5)
    return torch.randn(batch, 3, dtype=dtype)


def gradients(fn, *inputs):
    """Of a sum that weighs all outputs differently, by the inputs that need one."""
    out = fn()
    leaves = out if isinstance(out, tuple) else (out,)
    weights = [
        torch.linspace(-1, 2, x.numel(), dtype=x.dtype).reshape(x.shape) for x in leaves
    ]
    loss = sum((w * x.sin()).sum() for w, x in zip(weights, leaves, strict=True))
    return torch.autograd.grad(loss, inputs)


def relative(found, expected):
    """The largest difference of two lists of tensors, relative to each's size."""
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def stages(base, field, t0, h, y):
    ks = []
    for c, row in zip(base.c, base.a, strict=True):
        yi = y + h * sum((a * k for a, k in zip(row, ks, strict=True)), 0 * y)
        ks.append(field(t0 + c * h, yi))
    return ks


def psi(base, field, t0, h, y):
    ks = stages(base, field, t0, h, y)
    return h * sum(b * k for b, k in zip(base.b, ks, strict=True))


def interpolant(base, field, t0, h, y, theta):
    """`u(theta)`."""
    if not base.dense:
        return y + psi(base, field, t0, theta * h, y)
    ks = stages(base, field, t0, h, y)
    if len(base.dense) > len(ks):
        end = y + h * sum(b * k for b, k in zip(base.b, ks, strict=True))
        ks.append(field(t0 + h, end))
    value = y
    for row, k in zip(base.dense, ks, strict=True):
        value = value + h * k * sum(a * theta ** (i + 1) for i, a in enumerate(row))
    return value


def reversible(method, field, y0, times, halvings, asked=()):
    """The solution at `times`, which are ends of steps, and at those `asked` within."""
    base = BASES[method]
    y = z = y0
    ends, inside = [y0], [None] * len(asked)
    for t0, t1, b in zip(times[:-1], times[1:], halvings, strict=True):
        h, r0 = t1 - t0, (y + z) / 2
        c = (1 - 2.0**-b) * (y - z) / 2
        y, z = y - c, z + c
        start, y = z, y + psi(base, field, t0, h, z)
        z = z - psi(base, field, t1, -h, y)
        r1 = (y + z) / 2
        for i, t in enumerate(asked):
            theta = (t - t0) / h
            if 0 < theta <= 1:
                u = lambda x, at=(t0, h, start): interpolant(base, field, *at, x)
                inside[i] = (
                    u(theta)
                    + (1 - theta) * (r0 - start)
                    + theta * (r1 - start - psi(base, field, t0, h, start))
                )
        ends.append(r1)
    return torch.stack(ends), inside
