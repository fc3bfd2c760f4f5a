"""A continuous normalising flow of two moons by FFJORD's recipe, with both packages.

python examples/flow.py                    # prints a table and saves figures/flow.png

The recipe (Grathwohl et al., arXiv 1810.01367): the state is the data and the change of
its log-density, whose trace is estimated by one random probe a solve; dopri5 at 1e-5;
the data is solved back to a normal distribution, whose log-likelihood is maximised.
"""

import argparse
import math
import time
from pathlib import Path

import matplotlib
import reversax_torch
import torch
import torchdiffeq
from torch import nn

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SOLVERS = {
    "torchdiffeq.odeint_adjoint": torchdiffeq.odeint_adjoint,
    "reversax_torch.odeint": reversax_torch.odeint,  # the one import that changes
}


def moons(count, seed):
    """Two half circles with noise."""
    generator = torch.Generator().manual_seed(seed)
    angle = math.pi * torch.rand(count, generator=generator)
    upper = torch.arange(count) % 2 == 0
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    noise = 0.08 * torch.randn(count, 2, generator=generator)
    return (torch.stack([x, y], dim=1) - torch.tensor([0.5, 0.25]) + noise) * 1.5


class Flow(nn.Module):
    """The field of `(x, log-density)`, with a probe that is drawn before each solve."""

    def __init__(self, width):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            *(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()),
            nn.Linear(width, 2),
        )
        self.probe, self.calls = torch.zeros(0, 2), 0

    def forward(self, t, state):
        x, _ = state
        self.calls += 1
        with torch.enable_grad():
            x = x if x.requires_grad else x.requires_grad_()
            slope = self.net(torch.cat([x, t.expand(len(x), 1)], dim=1))
            (pulled,) = torch.autograd.grad(
                slope, x, self.probe, create_graph=torch.is_grad_enabled()
            )
            trace = (pulled * self.probe).sum(dim=1)
        return slope, -trace

    def log_likelihood(self, odeint, x, exact=False):
        """Of each point; `exact` takes both unit vectors for probes."""
        t = torch.tensor([1.0, 0.0])
        tolerance = dict(rtol=1e-5, atol=1e-5, method="dopri5")
        zero = torch.zeros(len(x))
        if not exact:
            # Rademacher's.
            self.probe = torch.randint(0, 2, x.shape) * 2.0 - 1
            z, change = odeint(self, (x, zero), t, **tolerance)
            return self._normal(z[-1]) - change[-1]
        changes = []
        for axis in torch.eye(2):
            self.probe = axis.expand(x.shape)
            z, change = odeint(self, (x, zero), t, **tolerance)
            changes.append(change[-1])
        return self._normal(z[-1]) - sum(changes)

    @staticmethod
    def _normal(z):
        return -0.5 * z.pow(2).sum(dim=1) - math.log(2 * math.pi)


def train(odeint, iterations, batch, width):
    flow = Flow(width)
    optimiser = torch.optim.Adam(flow.parameters(), lr=5e-3)
    begin = time.perf_counter()
    for i in range(iterations):
        optimiser.zero_grad()
        loss = -flow.log_likelihood(odeint, moons(batch, i)).mean()
        loss.backward()
        optimiser.step()
    seconds, calls = time.perf_counter() - begin, flow.calls
    with torch.no_grad():
        held_out = flow.log_likelihood(odeint, moons(2000, 10**6), exact=True).mean()
    return flow, seconds, calls, float(held_out)


def show(flows, path):
    figure, axes = plt.subplots(1, 1 + len(flows), figsize=(4 * (1 + len(flows)), 4))
    data = moons(4000, 7)
    axes[0].hist2d(*data.T.numpy(), bins=80, range=[[-3, 3], [-3, 3]])
    axes[0].set_title("data")
    side = torch.linspace(-3, 3, 80)
    grid = torch.stack(torch.meshgrid(side, side, indexing="xy"), dim=-1).reshape(-1, 2)
    for axis, (name, flow) in zip(axes[1:], flows.items(), strict=True):
        with torch.no_grad():
            density = flow.log_likelihood(SOLVERS[name], grid, exact=True).exp()
        picture = density.reshape(80, 80).numpy()
        axis.imshow(picture, origin="lower", extent=[-3, 3, -3, 3])
        axis.set_title(name)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=80, bbox_inches="tight")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--figure", type=Path, default=Path("figures/flow.png"))
    chosen = parser.parse_args(arguments)
    flows, found = {}, {}
    print("| | held-out log-likelihood | seconds | calls of the field |")
    print("| --- | --- | --- | --- |")
    for name, odeint in SOLVERS.items():
        torch.manual_seed(1)
        flow, seconds, calls, value = train(
            odeint, chosen.iterations, chosen.batch, chosen.width
        )
        flows[name], found[name] = flow, value
        print(f"| {name} | {value:.3f} | {seconds:.0f} | {calls:,} |", flush=True)
    show(flows, chosen.figure)
    return found


if __name__ == "__main__":
    main()
