"""gradsolve's record and replay of Tsit5, which accuracy.py compares.

gradsolve 0.2.1 (arXiv 2609.02876) solves adaptively outside of any program, records
the accepted steps, and differentiates a `jax.lax.scan` that replays them. The two are
timed apart: a row for the gradient of the replay alone, as long as the record serves,
and one for a record and the first gradient by it; recording is Python on the host, with
a program for each evaluation, and is to be repeated whenever the parameters have moved
far. All is in double precision, which importing gradsolve switches on for the whole
process; so this one is of its own.

    python benchmarks/replay.py --problems Lorenz Kepler --json rows.json

It needs the extra `peers`. accuracy.py runs it where it finds gradsolve.
"""

# The extra may be missing, for those who check types too.
# pyright: reportMissingImports=false

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import gradsolve
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from accuracy import (
    LONGEST,
    REPLAYED,
    SECONDS,
    Found,
    resolutions,
    search,
    true_gradient,
)
from measuring import (
    begin,
    compile_program,
    interleaved_times,
    medians,
    parser_of,
    relative_error,
    write_json,
)
from methods import Method, make_field
from pareto import Row
from problems import Problem, all_problems

PACKAGES = ("jax", "gradsolve")
METHOD = Method("gradsolve", "Tsit5", "replayed", adaptive=True)


class Ensemble:
    """A problem as gradsolve takes it: trajectories of flat states and parameters, of
    which here is one."""

    is_stiff = False
    t0 = 0.0

    def __init__(self, problem: Problem):
        flat, self.to_parameters = jax.flatten_util.ravel_pytree(problem.parameters)
        self.params, self.y0 = flat[None], problem.y0.reshape(1, -1)
        self.name, self.dim, self.t1 = problem.name, self.y0.shape[1], problem.t1
        self.field, self.shape = make_field(problem), problem.y0.shape

    def f_jax(self, t, y, p):
        return self.field(t, y.reshape(self.shape), self.to_parameters(p)).ravel()

    def record(self, tolerance: float) -> Callable:
        both = "y0", "params"
        return self._called(gradsolve.grad_closure, tolerance, wrt=both)

    def number_of_steps(self, tolerance: float) -> int:
        solved = self._called(gradsolve.solve, tolerance)
        return int(np.max(solved.accepted_steps))

    def _called(self, fn: Callable, tolerance: float, **known: Any) -> Any:
        known |= dict(rtol=tolerance, atol=tolerance, engine="tsit5_replay")
        return fn(self, self.y0, self.params, **known)

    def gradient_of(self, replay: Callable) -> Callable:
        """Of the parameters and the initial state, as of the other methods."""

        def loss(params, y0):
            return jnp.mean(replay(y0, params) ** 2)

        return jax.value_and_grad(loss, argnums=(0, 1))

    def gradient(self, tolerance: float) -> tuple[Any, int]:
        try:
            replay = self.record(tolerance)
        except RuntimeError as error:
            if "exhausted max_steps" not in str(error):
                raise
            return [np.nan], 0  # Of 50,000 steps, at its loosest tolerance.
        _, ct = self.gradient_of(replay)(self.params, self.y0)
        return ct, 0


def rows_of(problem: Problem, options: argparse.Namespace) -> list[Row]:
    reference, ensemble = true_gradient(problem, options.seed), Ensemble(problem)
    targets = problem.targets[: 1 if options.quick else 2]
    grid = resolutions(problem, METHOD)
    # Each is of another number of steps, and compiled anew.
    found = search(ensemble.gradient, grid, reference, targets, patience=LONGEST)
    rows: list[Row] = []
    for target in targets:
        here = measured(ensemble, reference, found.get(target), options.repeats)
        for name, known in here.items():
            about = problem.name, target, "double", METHOD.library, name, True
            rows.append(Row(*about, **known))
    return rows


def measured(
    ensemble: Ensemble, reference: Any, found: Found | None, repeats: int
) -> dict[str, dict[str, Any]]:
    """What is known of the replay alone, and of both."""
    if found is None:
        failed = dict(failed="not within the steps and the time tried")
        return dict.fromkeys(REPLAYED, failed)
    tolerance, at = found.resolution, (ensemble.params, ensemble.y0)
    program = compile_program(ensemble.gradient_of(ensemble.record(tolerance)), *at)
    _, ct = program.run(*at)

    def recorded_and_replayed():
        ensemble.record(tolerance)
        return program.run(*at)

    both = (lambda: program.run(*at)), recorded_and_replayed
    times = interleaved_times(dict(zip(REPLAYED, both, strict=True)), repeats, SECONDS)
    shared = dict(
        steps=ensemble.number_of_steps(tolerance),
        tolerance=tolerance,
        error=relative_error(ct, reference),
        bytes=program.temporary_bytes,
        trace_seconds=program.trace_seconds,
        compile_seconds=program.compile_seconds,
    )
    return {
        name: shared | dict(seconds=seconds, times=times[name])
        for name, seconds in medians(times).items()
    }


def main() -> None:
    parser = parser_of(__doc__)
    problems = {
        name: problem
        for name, problem in all_problems(0).items()
        if problem.kind == "ODE"
    }
    parser.add_argument("--problems", nargs="+", choices=list(problems), metavar="NAME")
    options = parser.parse_args()
    console, about = begin(options, PACKAGES)
    problems = all_problems(options.seed)
    rows = [
        row
        for name in options.problems or ["Lorenz"]
        for row in rows_of(problems[name], options)
    ]
    console.print([dataclasses.asdict(row) | dict(times=None) for row in rows])
    write_json(options.json, about, map(dataclasses.asdict, rows))


if __name__ == "__main__":
    main()
