"""What a gradient through a symplectic solve costs: time a step, and bytes.

- `time`: five bodies for 100,000 steps, in double precision.
- `memory`: the temporary bytes of the same for a thousand steps, and for a million.

    python benchmarks/hamiltonian.py           # both, two minutes
    python benchmarks/hamiltonian.py --quick   # to see that it runs

Compared are solvers that undo themselves, `Reversible(Euler)` for the same equations as
one, and `SemiImplicitEuler` with checkpoints. Times are medians of runs in turn.
"""

import argparse
import functools as ft
from collections.abc import Callable

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

import reversax

STEP = 0.01  # A planet at the distance 1 goes around once in 628 steps.
REVERSED = reversax.ReversibleAdjoint()
DISTANCES = np.array([0.0, 5.2, 9.5, 19.2, 30.1])
MASSES = np.array([1.0, 1e-3, 3e-4, 4e-5, 5e-5])


def force(t, q, masses):
    apart = q[None] - q[:, None]
    squared = jnp.sum(apart**2, -1) + jnp.eye(5)
    weights = jnp.where(jnp.eye(5, dtype=bool), 0, squared**-1.5) * masses[None]
    return jnp.sum(weights[:, :, None] * apart, 1)


def velocity(t, p, masses):
    return p


def together(t, y, masses):
    return force(t, y[1], masses), velocity(t, y[0], masses)


APART = diffrax.ODETerm(force), diffrax.ODETerm(velocity)
WAYS = {
    "Reversible(Verlet)": (APART, reversax.Reversible(reversax.Verlet()), REVERSED),
    "Reversible(SemiImplicitEuler)": (
        *(APART, reversax.Reversible(diffrax.SemiImplicitEuler()), REVERSED),
    ),
    "Reversible(BlanesMoan6)": (
        *(APART, reversax.Reversible(reversax.BlanesMoan6()), REVERSED),
    ),
    "Reversible(Euler)": (
        *(diffrax.ODETerm(together), reversax.Reversible(diffrax.Euler()), REVERSED),
    ),
    "SemiImplicitEuler, checkpoints": (
        *(APART, diffrax.SemiImplicitEuler(), diffrax.RecursiveCheckpointAdjoint()),
    ),
}


def loss_of(way: str, steps: int) -> Callable:
    terms, solver, adjoint = WAYS[way]

    def loss(masses, y0):
        solution = diffrax.diffeqsolve(
            *(terms, solver, 0.0, STEP * steps, STEP, y0, masses),
            adjoint=adjoint,
            max_steps=steps + 1,
        )
        assert solution.ys is not None
        return jnp.sum(jnp.sin(solution.ys[1]))

    return loss


def inputs() -> tuple:
    speeds = np.where(DISTANCES > 0, 1 / np.sqrt(np.maximum(DISTANCES, 1)), 0)
    nothing = np.zeros(5)
    q = np.stack([DISTANCES, nothing, nothing], -1)
    p = np.stack([nothing, speeds, nothing], -1)
    return jnp.asarray(MASSES), (jnp.asarray(p), jnp.asarray(q))


def time(options: argparse.Namespace, console: Console) -> list[dict]:
    steps = 50 if options.quick else 100_000
    rows, runs = [], {}
    for way in WAYS:
        program = compile_program(jax.grad(loss_of(way, steps), (0, 1)), *inputs())
        runs[way] = ft.partial(program.run, *inputs())
        seconds = program.preparation_seconds
        rows.append({"way": way, "steps": steps, "seconds to compile": seconds})
    times = medians(interleaved_times(runs, options.repeats))
    for row in rows:
        row["microseconds a step"] = times[row["way"]] / steps * 1e6
        row["Verlet / this"] = times["Reversible(Verlet)"] / times[row["way"]]
    print_table(console, f"A gradient of five bodies, {steps} steps", rows)
    return rows


def memory(options: argparse.Namespace, console: Console) -> list[dict]:
    few, many = (10, 50) if options.quick else (1_000, 1_000_000)
    rows = []
    for way in WAYS:
        row: dict = {"way": way}
        for steps in (few, many):
            program = compile_program(jax.grad(loss_of(way, steps), (0, 1)), *inputs())
            row[f"bytes, {steps} steps"] = program.temporary_bytes
        rows.append(row)
    print_table(console, "Temporary bytes of a gradient", rows)
    return rows


PARTS = (time, memory)


def main() -> None:
    parser = parser_of(__doc__)
    add_parts(parser, PARTS)
    options = parser.parse_args()
    console, about = begin(options)
    with jax.enable_x64(True):
        results = dict(run_parts(PARTS, options, console))
    write_json(options.json, about, results)


if __name__ == "__main__":
    main()
