"""What a step costs where the state is small, or many lanes of small states.

There the arithmetic of a step is next to nothing, and the time is what the loop costs.

- `pendulum`: two numbers, 10,000 steps, single precision
- `lanes`: 256 Lorenz systems of three numbers, 512 steps, by `vmap` of the solve or as
  one state, in both precisions
- `sizes`: states of 2 to 10,000 numbers, 200 steps: a polynomial of each number, a
  stencil, waves (`sin`), and one small network
- `threshold`: waves and the network of `sizes`, with XLA's threshold for loops as it is
  and raised by `XLA_FLAGS`, in a process each; with the seconds to compile

    python benchmarks/small.py              # all, some ten minutes
    python benchmarks/small.py pendulum     # one of them
    python benchmarks/small.py --quick      # to see that it runs

All methods of a part run in turn in one process, but those of `threshold`. To compare
two versions of reversax, run `sizes` with `PYTHONPATH` set to the source of either. The
packages it needs come with the extra `examples`.
"""

import argparse
import functools as ft
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from measuring import (
    add_parts,
    begin,
    compile_program,
    interleaved_times,
    medians,
    parser_of,
    print_table,
    run_parts,
    write_json,
)
from rich.console import Console
from rich.progress import track

import reversax

EULER, TSIT5 = diffrax.Euler(), diffrax.Tsit5()
REVERSED, CHECKPOINTED = (
    reversax.ReversibleAdjoint(),
    diffrax.RecursiveCheckpointAdjoint(),
)
SECONDS = 2.0  # Of repeats of one program.
FLAG = "--xla_backend_extra_options=xla_cpu_small_while_loop_byte_threshold="


def floating(base: diffrax.AbstractSolver) -> reversax.Reversible:
    return reversax.Reversible(base, arithmetic=reversax.FloatingPoint())


METHODS = {
    "Reversible(Euler)": (reversax.Reversible(EULER), REVERSED),
    "Reversible(Euler), floating point": (floating(EULER), REVERSED),
    "Reversible(Tsit5)": (reversax.Reversible(TSIT5), REVERSED),
    "Heun, checkpoints": (diffrax.Heun(), CHECKPOINTED),
    "Tsit5, checkpoints": (TSIT5, CHECKPOINTED),
}


def make_loss(field: Callable, method: str, t1: float, steps: int, vmap: bool):
    solver, adjoint = METHODS[method]

    def solve(args, y0):
        solution = diffrax.diffeqsolve(
            *(diffrax.ODETerm(field), solver, 0.0, t1, t1 / steps, y0, args),
            adjoint=adjoint,
            max_steps=steps + 1,
        )
        assert solution.ys is not None
        return solution.ys

    solve = jax.vmap(solve, (None, 0)) if vmap else solve
    return lambda args, y0: jnp.mean(solve(args, y0) ** 2)


def measure(cases: list[tuple[dict, Callable, tuple, int]], options, console):
    """A row for each case: what is to be said of it, a loss, its inputs and steps."""
    rows, runs = [], {}
    for case in track(cases, "compiling", console=console, transient=True):
        about, loss, inputs, steps = case
        program = compile_program(jax.grad(loss, (0, 1)), *inputs)
        runs[len(rows)] = ft.partial(program.run, *inputs)
        row = about | {"seconds to compile": program.preparation_seconds}
        rows.append(row | {"bytes": program.temporary_bytes, "steps": steps})
    times = medians(interleaved_times(runs, options.repeats, SECONDS))
    for i, row in enumerate(rows):
        row["microseconds a step"] = times[i] / row["steps"] * 1e6
    return rows


def swinging(t, y, args):
    return jnp.stack([y[1], -args * jnp.sin(y[0])])


def pendulum(options: argparse.Namespace, console: Console) -> list[dict]:
    steps = 100 if options.quick else 10_000
    inputs = jnp.float32(1.3), jnp.array([1.0, 0.2], jnp.float32)
    cases = [
        ({"method": m}, make_loss(swinging, m, 10.0, steps, False), inputs, steps)
        for m in METHODS
    ]
    rows = measure(cases, options, console)
    print_table(console, f"A pendulum, {steps} steps", rows)
    return rows


def lorenz(t, y, args):
    x, u, z = y[..., 0], y[..., 1], y[..., 2]
    return jnp.stack(
        [args[0] * (u - x), x * (args[1] - z) - u, x * u - args[2] * z], -1
    )


def lanes(options: argparse.Namespace, console: Console) -> list[dict]:
    steps, number = (16, 4) if options.quick else (512, 256)
    rng, rows = np.random.default_rng(options.seed), []
    values = np.array([10.0, 28.0, 8 / 3]), rng.standard_normal((number, 3))
    for dtype in (np.float32, np.float64):
        with jax.enable_x64(dtype is np.float64):
            inputs = tuple(jnp.asarray(x, dtype) for x in values)
            cases = []
            for vmap in (True, False):
                kind = "vmap" if vmap else "batched"
                for method in METHODS:
                    about = {"dtype": dtype.__name__, "lanes": kind, "method": method}
                    loss = make_loss(lorenz, method, 1.0, steps, vmap)
                    cases.append((about, loss, inputs, steps))
            rows += measure(cases, options, console)
    print_table(console, f"{number} Lorenz systems, {steps} steps", rows)
    return rows


def polynomial(t, y, args):
    return args * y * y * (1 - y) - 0.2 * y


def stencil(t, y, args):
    left, right = jnp.roll(y, 1), jnp.roll(y, -1)
    return args * (left - 2 * y + right) + y * (1 - y * y)


def waves(t, y, args):
    return -args * jnp.sin(y)


def network(t, y, args):
    first, second = args
    return jnp.tanh(jnp.tanh(y @ first) @ second)


def network_weights(size: int, width: int = 32):
    rng = np.random.default_rng(0)
    shapes = (size, width), (width, size)
    return tuple(
        jnp.asarray(rng.standard_normal(s) / s[0] ** 0.5, jnp.float32) for s in shapes
    )


FIELDS = polynomial, stencil, waves, network


def sizes(options: argparse.Namespace, console: Console) -> list[dict]:
    lengths = (2, 16) if options.quick else (2, 16, 64, 256, 1_024, 4_096, 10_000)
    steps, cases = (20 if options.quick else 200), []
    for field in FIELDS:
        if options.fields is not None and field.__name__ not in options.fields:
            continue
        for length in lengths:
            args = network_weights(length) if field is network else jnp.float32(0.3)
            inputs = args, jnp.linspace(0.1, 0.9, length, dtype=jnp.float32)
            for method in METHODS:
                about = {"field": field.__name__, "state": length, "method": method}
                loss = make_loss(field, method, 2.0, steps, False)
                cases.append((about, loss, inputs, steps))
    rows = measure(cases, options, console)
    print_table(console, f"States of one solve, {steps} steps", rows)
    return rows


def threshold(options: argparse.Namespace, console: Console) -> list[dict]:
    rows = []
    for number in (None, 100_000):
        flags = os.environ.get("XLA_FLAGS", "")
        if number is not None:
            flags = f"{flags} {FLAG}{number}"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "sizes.json"
            command = [sys.executable, __file__, "sizes", "--json", str(path)]
            command += ["--fields", *(options.fields or ("waves", "network"))]
            command += ["--repeats", str(options.repeats)]
            command += ["--quick"] if options.quick else []
            environment = os.environ | {"XLA_FLAGS": flags}
            subprocess.run(command, env=environment, check=True, capture_output=True)
            measured = json.loads(path.read_text())["sizes"]
        name = "1,024" if number is None else f"{number:,}"
        rows += [{"threshold": name} | row for row in measured]
    print_table(console, "With XLA's threshold for loops raised", rows)
    return rows


PARTS = (pendulum, lanes, sizes, threshold)


def main() -> None:
    parser = parser_of(__doc__)
    add_parts(parser, PARTS)
    names = [field.__name__ for field in FIELDS]
    parser.add_argument("--fields", nargs="+", choices=names, help="of `sizes`")
    options = parser.parse_args()
    console, about = begin(options)
    write_json(options.json, about, dict(run_parts(PARTS, options, console)))


if __name__ == "__main__":
    main()
