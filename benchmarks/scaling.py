"""What a step costs: in ever longer solves, and on a Brownian path.

- `length`: the time and the temporary bytes of a gradient, per step, of a small system
  from a thousand to a million steps. Both should hardly grow: what does, a bit of each
  element of the state at every fourth step, is what the default scheme keeps.
- `path`: how much of a stochastic solve goes into evaluating its Brownian tree: the
  same solve is timed on a path that costs next to nothing. Reversible solvers evaluate
  the tree once a step in each pass, for both halves of the step.

    python benchmarks/scaling.py           # both, some minutes
    python benchmarks/scaling.py length    # one of them
    python benchmarks/scaling.py --quick   # to see that it runs

Ratios are of runs in turn on one machine, from medians. The packages it needs come with
the extra `examples`.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
from gradient import circumstances
from jax.stages import Compiled
from rich.console import Console
from schemes import print_table

import reversax

REVERSED = reversax.ReversibleAdjoint()
CHECKPOINTED = diffrax.RecursiveCheckpointAdjoint()


def median_times(programs: Mapping[Any, Compiled], repeats: int, *inputs) -> dict:
    """The median seconds of each program; the repeats are interleaved."""
    for program in programs.values():
        jax.block_until_ready(program(*inputs))
    times = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*inputs))
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def compiled_gradient(loss: Callable, *inputs) -> Compiled:
    return jax.jit(jax.value_and_grad(loss)).lower(*inputs).compile()


def temporary_bytes(program: Compiled) -> int | None:
    memory = program.memory_analysis()
    return None if memory is None else memory.temp_size_in_bytes


def long_loss(solver, adjoint, steps: int) -> Callable:
    """A pendulum, for a time of ten whatever the number of steps."""

    def loss(y0):
        field = lambda t, y, args: jnp.stack([y[1], -jnp.sin(y[0])])
        dt0 = 10 / steps
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            solver,
            *(0.0, 10.0, dt0, y0),
            adjoint=adjoint,
            max_steps=steps + 1,
        )
        assert solution.ys is not None
        return jnp.sum(solution.ys**2)

    return loss


LONG = {
    "reversible Euler, reversed": (reversax.Reversible(diffrax.Euler()), REVERSED),
    "Heun, checkpointed": (diffrax.Heun(), CHECKPOINTED),
}


def length(options: argparse.Namespace, console: Console) -> list[dict]:
    lengths = (100, 1_000) if options.quick else (1_000, 10_000, 100_000, 1_000_000)
    y0 = jnp.array([1.0, 0.0])
    programs = {
        (name, steps): compiled_gradient(long_loss(solver, adjoint, steps), y0)
        for steps in lengths
        for name, (solver, adjoint) in LONG.items()
    }
    times = median_times(programs, options.repeats, y0)
    rows = [
        {
            "gradient": name,
            "steps": steps,
            "microseconds a step": seconds / steps * 1e6,
            "bytes": temporary_bytes(programs[name, steps]),
        }
        for (name, steps), seconds in times.items()
    ]
    caption = f"Medians of {options.repeats} runs in turn, single precision."
    print_table(console, "Ever longer solves", rows, caption)
    return rows


class Wave(diffrax.AbstractPath):
    """A path that costs next to nothing to evaluate, of the size of a Brownian one."""

    t0 = 0.0
    t1 = 1.0
    frequencies: jax.Array

    def evaluate(self, t0, t1=None, left=True):
        at = lambda t: jnp.sin(self.frequencies * t)
        return at(t0) if t1 is None else at(t1) - at(t0)


def path_loss(solver, adjoint, path, steps: int) -> Callable:
    """A network of width 64 drives 64 dimensions with diagonal noise."""

    def loss(weights, y0):
        first, second = weights
        drift = lambda t, y, args: jnp.tanh(y @ first) @ second
        noise = lambda t, y, args: jnp.diag(0.1 * jnp.cos(y))
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(drift), diffrax.ControlTerm(noise, path)
        )
        solution = diffrax.diffeqsolve(
            terms, solver, 0.0, 1.0, 1 / steps, y0, adjoint=adjoint, max_steps=steps + 1
        )
        assert solution.ys is not None
        return jnp.sum(solution.ys**2)

    return loss


STOCHASTIC = {
    "reversible Euler, reversed": (reversax.Reversible(diffrax.Euler()), REVERSED),
    "Heun, checkpointed": (diffrax.Heun(), CHECKPOINTED),
}


def path(options: argparse.Namespace, console: Console) -> list[dict]:
    steps, width = (20 if options.quick else options.steps), 64
    keys = jax.random.split(jax.random.key(options.seed), 4)
    weights = [jax.random.normal(key, (width, width)) / 8 for key in keys[:2]]
    y0 = jax.random.normal(keys[2], (width,))
    tree = diffrax.VirtualBrownianTree(0.0, 1.0, 0.5 / steps, (width,), keys[3])
    paths = {"tree": tree, "wave": Wave(jnp.linspace(1.0, 9.0, width))}
    programs: dict[Any, Compiled] = {}
    for name, (solver, adjoint) in STOCHASTIC.items():
        for kind, driver in paths.items():
            loss = path_loss(solver, adjoint, driver, steps)
            programs[name, kind, "forward"] = jax.jit(loss).lower(weights, y0).compile()
            programs[name, kind, "gradient"] = compiled_gradient(loss, weights, y0)
    times = median_times(programs, options.repeats, weights, y0)
    rows = []
    for name in STOCHASTIC:
        for what in ("forward", "gradient"):
            tree_s, wave_s = (times[name, kind, what] / steps for kind in paths)
            row = {"solver": name, "of": what, "microseconds a step": tree_s * 1e6}
            rows.append(row | {"share of the tree": 1 - wave_s / tree_s})
    caption = f"{steps} steps, medians of {options.repeats} runs in turn."
    print_table(console, "The share of the Brownian tree", rows, caption)
    return rows


PARTS = (length, path)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("part", nargs="?", choices=[f.__name__ for f in PARTS], help="by default all")
    add("--steps", type=int, default=1000, help="of the path part")
    add("--repeats", type=int, default=5, help="timed runs of each")
    add("--seed", type=int, default=0)
    add("--quick", action="store_true", help="a smoke test, short solves")
    add("--json", type=Path, metavar="PATH", help="where to write the results")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    # Rich takes a file or a pipe to be 80 columns wide, less than the tables need.
    console = Console(width=None if sys.stdout.isatty() else 128)
    about = circumstances(options)
    console.print(about)
    results = {
        measure.__name__: measure(options, console)
        for measure in PARTS
        if options.part in (None, measure.__name__)
    }
    if options.json is not None:
        text = json.dumps(about | results, indent=1, default=str)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
