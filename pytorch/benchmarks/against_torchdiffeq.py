"""Time and memory of gradients beside torchdiffeq's, as tables in Markdown.

python benchmarks/against_torchdiffeq.py time       # at equal accuracy
python benchmarks/against_torchdiffeq.py memory     # over the number of steps
"""

import argparse
import functools
import resource
import statistics
import subprocess
import sys
import time

import reversax_torch
import torch
import torchdiffeq
from torch import nn

WIDTH, BATCH, SIZE, END = 256, 64, 8, 4.0
THREADS = 1  # Two would wait for each other where the machine has other work.


class Field(nn.Module):
    """A network, damped or not."""

    def __init__(self, damping, dtype, width=WIDTH):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            *(nn.Linear(SIZE, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()),
            nn.Linear(width, SIZE),
        ).to(dtype)
        self.damping = damping

    def forward(self, t, y):
        return self.net(y) - self.damping * y


def problem(damping, dtype, batch=BATCH):
    field = Field(damping, dtype)
    torch.manual_seed(1)
    y0 = torch.randn(batch, SIZE, dtype=torch.float64).to(dtype).requires_grad_()
    return field, y0


def gradient(solve, field, y0, **keywords):
    """One vector: of the initial state, scaled to the size of the rest, and of the
    parameters."""
    t = torch.tensor([0.0, END], dtype=y0.dtype)
    ys = solve(field, y0, t, **keywords)
    wanted = [y0, *field.parameters()]
    return torch.autograd.grad(ys[-1].pow(2).sum(dim=1).mean(), wanted)


def errors(found, truth):
    """The largest relative error of the gradient of a tensor, and of a parameter."""
    each = [
        float((a.double() - b).norm() / b.norm())
        for a, b in zip(found, truth, strict=True)
    ]
    return max(each), max(each[1:])


def reversible(method, **more):
    def keywords(n):
        return dict(method=method, options={"num_steps": n, **more})

    counts = [
        *range(1, 9),
        *range(10, 17, 2),
        *range(20, 33, 4),
        40,
        48,
        56,
        64,
        96,
        128,
    ]
    return reversax_torch.odeint, keywords, counts


def adaptive(solve, method):
    tolerances = [10 ** (-k / 3) for k in range(5, 28)]
    return solve, lambda tol: dict(method=method, rtol=tol, atol=tol), tolerances


CONTENDERS = {
    "torchdiffeq odeint, dopri5": adaptive(torchdiffeq.odeint, "dopri5"),
    "torchdiffeq odeint_adjoint, dopri5": adaptive(
        torchdiffeq.odeint_adjoint, "dopri5"
    ),
    "reversax-torch, euler": reversible("euler"),
    "reversax-torch, bosh3": reversible("bosh3"),
    "reversax-torch, tsit5": reversible("tsit5"),
    "reversax-torch, dopri8": reversible("dopri8"),
    "reversax-torch, dopri5, adaptive": adaptive(reversax_torch.odeint, "dopri5"),
}


def cheapest(contender, truth, case, target, what):
    """The first setting that meets the target, and so does the next."""
    solve, keywords, settings = contender
    field, y0 = case
    met = None
    for setting in settings:
        try:
            found = gradient(solve, field, y0, **keywords(setting))
            error = errors(found, truth)[what]
        except (RuntimeError, FloatingPointError, AssertionError):
            error = float("inf")
        if error <= target and met is not None:
            return met
        met = (setting, error) if error <= target else None
    return met


def times(runs, rounds):
    """Medians of processor time in milliseconds, each round one after the other."""
    taken = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            begin = time.process_time()
            run()
            taken[name].append(1e3 * (time.process_time() - begin))
    return {name: statistics.median(x) for name, x in taken.items()}


def table_of_times(damping, target, what, rounds, dtype=torch.float32, batch=BATCH):
    truth_case = problem(damping, torch.float64, batch)
    truth = gradient(
        torchdiffeq.odeint, *truth_case, method="dopri5", rtol=1e-10, atol=1e-11
    )
    case, runs, chosen = problem(damping, dtype, batch), {}, {}
    for name, contender in CONTENDERS.items():
        found = cheapest(contender, truth, case, target, what)
        if found is None:
            continue
        chosen[name], (solve, keywords, _) = found, contender
        runs[name] = functools.partial(gradient, solve, *case, **keywords(found[0]))
    medians = times(runs, rounds)
    kind = "damped" if damping else "not damped"
    of = ("all gradients", "parameters")[what]
    print(f"\n{kind}, {of} within {target:g}, batch {batch}, {dtype}\n")
    print("| | setting | error | ms | of odeint | of odeint_adjoint |")
    print("| --- | --- | --- | --- | --- | --- |")
    ratio = lambda name, base: (
        f"{medians[name] / medians[base]:.2f}" if base in medians else "-"
    )
    odeint, adjoint = list(CONTENDERS)[:2]
    for name in CONTENDERS:
        if name not in chosen:
            print(f"| {name} | not met | | | | |")
            continue
        setting, error = chosen[name]
        print(
            f"| {name} | {setting:.2g} | {error:.1e} | {medians[name]:.0f} | "
            f"{ratio(name, odeint)} | {ratio(name, adjoint)} |",
            flush=True,
        )


SOLVERS = {
    "odeint": (torchdiffeq.odeint, "step_size"),
    "odeint_adjoint": (torchdiffeq.odeint_adjoint, "step_size"),
    "reversax-torch": (reversax_torch.odeint, "num_steps"),
}


def one_memory(name, steps, method):
    """MB by which a process grows, of a gradient after one of a single step."""
    torch.set_num_threads(THREADS)
    solve, option = SOLVERS[name]
    field, y0 = problem(0.0, torch.float32, 256)
    for n in (1, steps):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        options = {option: n if option == "num_steps" else END / n}
        gradient(solve, field, y0, method=method, options=options)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print((after - before) / 1024)


def table_of_memory(counts):
    # Two evaluations a step, of order 2.
    methods = {"odeint": "midpoint", "odeint_adjoint": "midpoint"}
    methods["reversax-torch"] = "euler"
    print("\n| MB more than for one step | " + " | ".join(map(str, counts)) + " |")
    print("| --- " * (len(counts) + 1) + "|")
    for name, method in methods.items():
        found = []
        for steps in counts:
            if name == "odeint" and steps > 1000:
                found.append("")
                continue
            command = [sys.executable, __file__, "one-memory", "--name", name]
            command += ["--steps", str(steps), "--method", method]
            output = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(f"{float(output.stdout):.1f}")
        print(f"| {name}, {method} | " + " | ".join(found) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["time", "memory", "one-memory"])
    parser.add_argument("--name")
    parser.add_argument("--method")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--quick", action="store_true", help="small, to test this")
    chosen = parser.parse_args()
    torch.set_num_threads(THREADS)
    if chosen.what == "one-memory":
        one_memory(chosen.name, chosen.steps, chosen.method)
    elif chosen.what == "memory":
        table_of_memory([32] if chosen.quick else [32, 256, 1000, 4096])
    elif chosen.quick:
        table_of_times(5.0, 0.1, 0, 1, torch.float64, batch=2)
    else:
        for damping in (0.0, 5.0):
            for target in (1e-3, 1e-6):
                dtype = torch.float32 if target > 1e-5 else torch.float64
                # The flow forgets the damped initial state, exp(-20) of which is left.
                table_of_times(damping, target, int(damping > 0), 5, dtype)


if __name__ == "__main__":
    main()
