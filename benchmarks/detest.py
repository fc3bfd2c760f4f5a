"""Adaptive steps: how many, and how accurate, on the 25 problems of DETEST.

For each problem of detest_problems.py this solves by plain Tsit5, by the default
`Reversible(Tsit5())` and by the published scheme, with the same controller, and counts
the accepted and rejected steps. Errors are the largest of any element, of the state at
the end and at the ends of all steps, against SciPy's DOP853 at a tolerance of 1e-13.
All in double precision, forwards only, as `ReversibleAdjoint` solves.

    python benchmarks/detest.py           # all, some minutes
    python benchmarks/detest.py --quick   # to see that it runs

It needs the extra `examples`.
"""

import argparse
import functools as ft
import statistics
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import scipy.integrate
from detest_problems import PROBLEMS, T1
from measuring import begin, parser_of, print_table, write_json
from rich.progress import track

import reversax

SOLVERS: dict[str, Any] = {
    "plain": diffrax.Tsit5(),
    "reversible": reversax.Reversible(diffrax.Tsit5()),
    "published": reversax.Reversible(diffrax.Tsit5(), reversax.McCallumFoster()),
}
MAX_STEPS = 4096
QUICK = ("A4", "B2", "E5")


class Solved(NamedTuple):
    steps: int
    """Accepted and rejected."""
    successful: bool
    error: float
    """At the end."""
    largest_error: float
    """At the end of any step."""


@ft.cache
def reference(name: str) -> Any:
    """The solution, as a function of time: by another library."""
    problem = PROBLEMS[name]
    field = jax.jit(lambda t, y: problem.field(t, y.reshape(problem.y0.shape)).ravel())
    kwargs: Any = dict(method="DOP853", rtol=1e-13, atol=1e-15, dense_output=True)
    solution = scipy.integrate.solve_ivp(
        lambda t, y: np.asarray(field(t, y)), (0.0, T1), problem.y0.ravel(), **kwargs
    )
    return solution.sol


def solve(name: str, solver: Any, rtol: float, atol: float) -> Solved:
    problem = PROBLEMS[name]
    adjoint: Any = diffrax.RecursiveCheckpointAdjoint()
    if isinstance(solver, reversax.Reversible):
        adjoint = reversax.ReversibleAdjoint()
    run = ft.partial(
        diffrax.diffeqsolve,
        diffrax.ODETerm(lambda t, y, args: problem.field(t, y)),
        *(solver, 0.0, T1, None),
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
        saveat=diffrax.SaveAt(steps=True, t1=True),
        adjoint=adjoint,
        max_steps=MAX_STEPS,
        throw=False,
    )
    solution = jax.jit(run)(jnp.asarray(problem.y0))
    stats, taken = solution.stats, jnp.isfinite(solution.ts)
    ts, ys = np.asarray(solution.ts[taken]), np.asarray(solution.ys)[np.asarray(taken)]
    successful = bool(solution.result == diffrax.RESULTS.successful)
    off = np.array([np.inf])
    if successful:
        ys = ys.reshape(len(ts), -1)
        off = np.abs(ys - reference(name)(ts).T).max(axis=1)
    steps = int(stats["num_accepted_steps"] + stats["num_rejected_steps"])
    return Solved(steps, successful, float(off[-1]), float(off.max()))


def compare(name: str, rtol: float, atol: float) -> dict:
    solved = {
        label: solve(name, solver, rtol, atol) for label, solver in SOLVERS.items()
    }
    plain, ours, published = solved.values()
    return {
        "problem": name,
        "plain: steps": plain.steps,
        "error": plain.largest_error,
        "at the end": plain.error,
        "reversible: steps": ours.steps,
        "of plain's": ours.steps / plain.steps,
        "error of plain's": ours.largest_error / plain.largest_error,
        "at the end, of plain's": ours.error / plain.error,
        "published: steps": published.steps if published.successful else None,
        "published: error": published.largest_error if published.successful else None,
    }


def main(options: argparse.Namespace) -> None:
    console, about = begin(options)
    names = QUICK if options.quick else PROBLEMS
    with jax.enable_x64(True):
        rows = [
            compare(name, options.rtol, options.atol)
            for name in track(names, "solving", console=console, transient=True)
        ]
    ratios = [row["at the end, of plain's"] for row in rows]
    caption = (
        f"rtol {options.rtol:g}, atol {options.atol:g}. The median error at the end is "
        f"{statistics.median(ratios):.2f} of plain's. '-': the solve did not succeed, "
        "since the twins were driven apart."
    )
    print_table(console, "DETEST", rows, caption)
    write_json(options.json, about, rows)


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--rtol", type=float, default=1e-6)
    parser.add_argument("--atol", type=float, default=1e-9)
    main(parser.parse_args())
