"""Settles for a device whether both passes have the same bits, and what that costs.

python benchmarks/torch_device.py            # two minutes on a GPU
python benchmarks/torch_device.py --quick    # a small part, on CPU too

Each field is solved and differentiated with and without deterministic algorithms. Where
the way back misses the initial state by a bit, the certificate raises, which the table
says. With `--compile` fields are compiled too, which takes Triton or a C++ compiler.
"""

import argparse
import os
import statistics
import time

import reversax_torch
import torch
import torchdiffeq
from torch import nn


class Autonomous(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, t, y):
        return self.net(y).tanh() - 0.5 * y


class Scattered(nn.Module):
    """Sums in an order that a GPU does not fix."""

    def __init__(self, size):
        super().__init__()
        self.register_buffer("index", torch.arange(size) % 7)

    def forward(self, t, y):
        sums = torch.zeros(7, len(y), device=y.device, dtype=y.dtype)
        sums = sums.index_add(0, self.index, y.tanh().T.contiguous())
        return sums[self.index].T.sin() - y


def fields(width):
    linear = [nn.Linear(8, width), nn.GELU(), nn.Linear(width, 8)]
    layer = nn.TransformerEncoderLayer(8, 2, width, dropout=0.0, batch_first=True)
    return {
        "network": Autonomous(nn.Sequential(*linear)),
        "convolution": Autonomous(
            nn.Sequential(
                nn.Unflatten(1, (1, 8)),
                nn.Conv1d(1, width, 3, padding=1),
                nn.Softplus(),
                nn.Conv1d(width, 1, 3, padding=1),
                nn.Flatten(),
            )
        ),
        "attention": Autonomous(
            nn.Sequential(nn.Unflatten(1, (1, 8)), layer, nn.Flatten(), nn.LayerNorm(8))
        ),
        "scattered sums": Scattered(8),
    }


def solve(field, y0, method, steps, autocast):
    t = torch.linspace(0, 1, 5, device=y0.device)
    with torch.autocast(y0.device.type, dtype=torch.bfloat16, enabled=autocast):
        ys = reversax_torch.odeint(
            field, y0, t, method=method, options={"num_steps": steps}
        )
    ys.float().pow(2).mean().backward()


def outcome(*arguments):
    try:
        solve(*arguments)
    except RuntimeError as error:
        if "did not find" not in str(error):
            return f"{type(error).__name__}: {error}".splitlines()[0][:60]
        return "off by " + str(error).split("off by ")[1].split(" of")[0]
    return "exact"


def bits(device, width, batch, steps, compiles):
    """A row for each field, dtype and way to call it."""
    print("| field | dtype | mode | as it comes | deterministic |")
    print("| --- | --- | --- | --- | --- |")
    for name, field in fields(width).items():
        modes = ["plain", "autocast", *(["compiled"] if compiles else [])]
        for dtype in (torch.float32, torch.float64):
            for mode in modes:
                if mode == "autocast" and dtype == torch.float64:
                    continue
                own = field.to(device, dtype)
                own = torch.compile(own) if mode == "compiled" else own
                torch.manual_seed(0)
                y0 = torch.randn(batch, 8, device=device, dtype=dtype).requires_grad_()
                row = []
                for deterministic in (False, True):
                    torch.use_deterministic_algorithms(deterministic)
                    tries = {
                        outcome(own, y0, method, steps, mode == "autocast")
                        for method in ("euler", "bosh3", "tsit5")
                    }
                    row.append(", ".join(sorted(tries)))
                torch.use_deterministic_algorithms(False)
                kind = str(dtype).removeprefix("torch.")
                print(f"| {name} | {kind} | {mode} | {row[0]} | {row[1]} |", flush=True)


def times(device, width, batch, rounds):
    """Beside torchdiffeq, 100 steps of a network."""
    field = Autonomous(
        nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 8))
    ).to(device)
    y0, t = torch.randn(batch, 8, device=device), torch.tensor([0.0, 1.0]).to(device)
    runs = {
        "reversax-torch, bosh3": (reversax_torch.odeint, "bosh3", {"num_steps": 100}),
        "odeint, rk4": (torchdiffeq.odeint, "rk4", {"step_size": 0.01}),
        "odeint_adjoint, rk4": (torchdiffeq.odeint_adjoint, "rk4", {"step_size": 0.01}),
    }
    taken = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (odeint, method, options) in runs.items():
            begin = time.perf_counter()
            ys = odeint(field, y0, t, method=method, options=options)
            ys[-1].pow(2).mean().backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken[name].append(1e3 * (time.perf_counter() - begin))
    print(f"\n| 100 steps, width {width}, batch {batch} | ms |\n| --- | --- |")
    for name, found in taken.items():
        print(f"| {name} | {statistics.median(found):.1f} |", flush=True)


def main(arguments=None):
    # What a GPU needs for deterministic products of matrices.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device")
    chosen = parser.parse_args(arguments)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(chosen.device or default)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {name}\n")
    if chosen.quick:
        bits(device, 8, 4, 3, chosen.compile)
        times(device, 8, 4, 1)
    else:
        bits(device, 512, 1024, 64, chosen.compile)
        times(device, 1024, 4096, 7)


if __name__ == "__main__":
    main()
