"""A neural controlled equation of torchcde on an irregular series, solved by both.

python examples/controlled.py

`torchcde.cdeint` builds a field from a path and a network and hands it to torchdiffeq.
The same field, which is a module, goes to `reversax_torch.odeint`.
"""

import reversax_torch
import torch
import torchcde
from torch import nn


class Network(nn.Module):
    def __init__(self, channels, hidden, width=32):
        super().__init__()
        self.shape = (hidden, channels)
        self.net = nn.Sequential(
            nn.Linear(hidden, width), nn.Tanh(), nn.Linear(width, hidden * channels)
        )

    def forward(self, t, z):
        return self.net(z).tanh().reshape(*z.shape[:-1], *self.shape)


class Field(nn.Module):
    """That of `torchcde.cdeint`, of a tensor."""

    def __init__(self, path, network):
        super().__init__()
        self.path, self.network = path, network

    def forward(self, t, z):
        slope = self.path.derivative(t)
        return (self.network(t, z) @ slope.unsqueeze(-1)).squeeze(-1)


def series(batch=16, length=20, seed=0):
    """Sines of random speeds, each seen at random times, some values missing."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.rand(length, generator=generator, dtype=torch.float64).sort().values
    t[0], t[-1] = 0.0, 1.0
    speed = 3 + 5 * torch.rand(batch, 1, generator=generator, dtype=torch.float64)
    x = torch.stack([(speed * t).sin(), (speed * t).cos()], dim=-1)
    missing = torch.rand(x.shape, generator=generator) < 0.2
    missing[:, 0] = False
    x = x.masked_fill(missing, float("nan"))
    x = torch.cat([t.expand(batch, length)[..., None], x], dim=-1)
    return t, x, speed


def gradients(z, wanted):
    return torch.autograd.grad(z[:, -1].pow(2).sum(dim=-1).mean(), wanted)


def main():
    """The largest relative difference of gradients: of ours from backpropagation
    through torchdiffeq's tight solve, and of `cdeint`'s adjoint from it."""
    torch.manual_seed(0)
    t, x, _ = series()
    coefficients = torchcde.hermite_cubic_coefficients_with_backward_differences(x, t)
    path = torchcde.CubicSpline(coefficients, t)
    network, start = Network(3, 8).double(), nn.Linear(3, 8).double()
    z0, ends = start(path.evaluate(t[0])), path.interval
    wanted = list(network.parameters())
    # Steps end where pieces of the path do.
    steps = lambda parts: {"grid_constructor": lambda f, y, ends: between(t, parts)}
    ours = reversax_torch.odeint(
        Field(path, network), z0, ends, method="rk4", options=steps(2)
    ).movedim(0, 1)
    solve = lambda options, adjoint: torchcde.cdeint(
        path, network, z0, ends, method="rk4", options=options, adjoint=adjoint
    )
    adjoint = solve({"step_size": 1 / 64}, True)
    tight = solve(steps(16), False)
    truth = gradients(tight, wanted)
    apart = lambda found: max(
        float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)
    )
    result = {
        "reversax_torch.odeint": apart(gradients(ours, wanted)),
        "torchcde.cdeint, adjoint": apart(gradients(adjoint, wanted)),
    }
    for name, difference in result.items():
        print(f"{name}: gradient within {difference:.1e} of that with finer steps")
    return result


def between(t, parts):
    """`t` and times between."""
    share = torch.arange(parts, dtype=t.dtype) / parts
    inner = t[:-1, None] + share * t.diff()[:, None]
    return torch.cat([inner.reshape(-1), t[-1:]])


if __name__ == "__main__":
    main()
