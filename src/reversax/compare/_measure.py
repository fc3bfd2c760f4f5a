"""Measures the candidates, one after the other, and their times in turn."""

import contextlib
import dataclasses
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from .._round_trip import round_trip_error
from .._schemes.control import is_of_time
from .._solver import Reversible
from ._candidates import Candidate, default_candidates
from ._gradient import (
    Method,
    Reference,
    gradient_error,
    gradient_of,
    message_of,
    parts_of,
    solve_reference,
    split,
    value_error,
)
from ._problem import REFUSALS, Problem, prepared
from ._setting import (
    NOT_FINITE,
    Found,
    Report,
    describe,
    find,
    method_of,
    tolerances_of,
)

# A timed run repeats the gradient until it takes at least so long.
_SECONDS_OF_A_RUN = 0.02
_MOST_LOOPS = 1000


class Options(NamedTuple):
    """How to measure."""

    tolerance: float = 1e-3
    """The relative error of the gradient that is accurate enough."""
    repeats: int = 7
    """How many runs to take the median time of."""
    quick: bool = False
    """Whether to compare fewer candidates, if the problem does not say which."""


@dataclasses.dataclass
class Measurement:
    """What was measured of one candidate; `None` where it failed before."""

    candidate: str
    cautionary: bool
    control: bool
    solver: str
    adjoint: str
    dt0: float | None = None
    rtol: float | None = None
    """Of an adaptive controller."""
    atol: float | None = None
    max_steps: int | None = None
    failure: str | None = None
    """Why there is no gradient, or none to trust."""
    gradient_error: float | None = None
    value_error: float | None = None
    num_steps: float | None = None
    temporary_bytes: int | None = None
    compile_seconds: float | None = None
    """To trace, lower and compile."""
    round_trip: float | None = None
    """The largest error of the reconstructed `y0`, relative to its largest element."""
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def median_seconds(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


class _Run(NamedTuple):
    measurement: Measurement
    once: Callable[[], Any] | None
    """Computes the gradient, if that works."""
    driven_apart: bool
    """Whether it would have taken more halvings to take steps as long as could be."""


class _Task(NamedTuple):
    problem: Problem
    reference: Reference
    options: Options
    found: list[tuple[Candidate, Found]]
    """What was searched for, and found."""


def compare(
    problem: Problem, options: Options, report: Report
) -> tuple[Reference, list[Measurement]]:
    """Measures all the candidates of a problem.

    **Raises:** `Refusal` for a problem that cannot be compared, and whatever the user's
    own functions raise.
    """
    offers_more = problem.candidates is None
    candidates, problem = _candidates(problem, options), prepared(problem)
    report("The reference: Dopri8 in double precision, at tolerances down to 1e-12.")
    reference = solve_reference(problem, options.tolerance)
    report(f"The reference is known to {reference.uncertainty:.0e}.")
    task, runs = _Task(problem, reference, options, []), []
    with _quiet_jax():
        while len(runs) < len(candidates):
            i = len(runs)
            candidate = candidates[i]
            prefix = f"({i + 1} of {len(candidates)}) {candidate.name}"
            said = lambda what, prefix=prefix: report(f"{prefix}: {what}.")
            runs.append(_measure(task, candidate, said))
            more = candidate.with_all_halvings()
            if offers_more and runs[-1].driven_apart and more is not None:
                candidates.insert(i + 1, more)
        _time_in_turn([run for run in runs if run.once is not None], options, report)
    return reference, [run.measurement for run in runs]


def _candidates(problem: Problem, options: Options) -> list[Candidate]:
    if problem.candidates is not None:
        return list(problem.candidates)
    terms = problem.terms
    ordinary = isinstance(terms, dfx.AbstractTerm) and is_of_time(terms)
    return default_candidates(problem.solver, options.quick, ordinary=ordinary)


@contextlib.contextmanager
def _quiet_jax() -> Iterator[None]:
    """JAX logs the traceback of every error that a candidate may well end with."""
    logger = logging.getLogger("jax")
    propagate, handler = logger.propagate, logging.NullHandler()
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def _measure(task: _Task, candidate: Candidate, report: Report) -> _Run:
    """With the coarsest steps that are accurate enough."""
    problem, wanted = task.problem, task.options.tolerance
    measurement = _nothing_of(candidate)
    try:
        found = _find(task, candidate.searched_as, report)
    except REFUSALS as error:  # It has a row of the table that says so.
        measurement.failure = message_of(error)
        return _Run(measurement, None, False)
    measurement.failure, once, method = found.failure, None, None
    for setting in found.settings:
        report(f"compiles it for {describe(setting)}")
        method = method_of(problem, candidate, setting)
        measurement, once = _compile(problem, candidate, method, task.reference)
        error = measurement.gradient_error
        if error is not None and error <= wanted:
            break
    if method is not None and once is not None and _can_be_undone(candidate):
        report("undoes a solve")
        _measure_round_trip(problem, method, measurement)
    return _Run(measurement, once, found.driven_apart)


def _can_be_undone(candidate: Candidate) -> bool:
    return isinstance(candidate.solver, Reversible)


def _find(task: _Task, candidate: Candidate, report: Report) -> Found:
    solve = lambda c: (c.solver, c.adjoint, task.problem.controller_for(c))
    for before, found in task.found:
        if bool(eqx.tree_equal(solve(before), solve(candidate))):
            return found
    wanted = task.options.tolerance
    found = find(task.problem, candidate, task.reference, wanted, report)
    task.found.append((candidate, found))
    return found


def _nothing_of(candidate: Candidate) -> Measurement:
    return Measurement(
        candidate.name,
        candidate.cautionary,
        candidate.is_control,
        repr(candidate.solver),
        repr(candidate.adjoint),
    )


def _compile(
    problem: Problem, candidate: Candidate, method: Method, reference: Reference
) -> tuple[Measurement, Callable[[], Any] | None]:
    """What is measured at once, and what is to be timed."""
    measurement = _nothing_of(candidate)
    measurement.dt0, measurement.max_steps = method.dt0, method.max_steps
    tolerances = tolerances_of(method.stepsize_controller)
    if tolerances is not None:
        measurement.rtol, measurement.atol = tolerances
    arrays, static = eqx.partition(split(problem), eqx.is_array)

    def program(arrays):
        differentiated, rest = eqx.combine(arrays, static)
        return gradient_of(differentiated, rest, method)

    try:
        compiled = _compile_timed(program, arrays, measurement)
        once = lambda: jax.block_until_ready(compiled(arrays))
        gradient = once()
    except REFUSALS as error:  # It has a row of the table that says so.
        measurement.failure = message_of(error)
        return measurement, None
    measurement.num_steps = float(gradient.num_steps)
    error = gradient_error(parts_of(gradient.parts), reference.parts)
    if not math.isfinite(error) or not math.isfinite(gradient.value):
        measurement.failure = NOT_FINITE
        return measurement, None
    measurement.gradient_error = error
    measurement.value_error = value_error(float(gradient.value), reference.value)
    return measurement, once


def _compile_timed(program: Callable, arrays: Any, measurement: Measurement) -> Any:
    jax.clear_caches()  # So that no candidate finds what another one compiled.
    start = time.perf_counter()
    compiled = jax.jit(program).lower(arrays).compile()
    measurement.compile_seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    if memory is None:
        raise RuntimeError("This device does not say how much memory a program takes.")
    measurement.temporary_bytes = memory.temp_size_in_bytes
    return compiled


def _largest(tree: PyTree) -> float:
    """The largest absolute value; NaN if any is."""
    return float(np.max([np.max(np.abs(x), initial=0) for x in jtu.tree_leaves(tree)]))


def _measure_round_trip(
    problem: Problem, method: Method, measurement: Measurement
) -> None:
    @eqx.filter_jit
    def there_and_back(problem):
        solve = lambda y0: round_trip_error(
            problem.terms,
            method.solver,
            problem.t0,
            problem.t1,
            method.dt0,
            y0,
            problem.args,
            stepsize_controller=method.stepsize_controller,
            max_steps=method.max_steps,
        )
        return (jax.vmap(solve) if problem.batched else solve)(problem.y0).error

    try:
        error = _largest(there_and_back(problem))
    except eqx.EquinoxRuntimeError as failure:
        measurement.failure = f"Its round trip: {message_of(failure)}"
        return
    measurement.round_trip = error / (_largest(problem.y0) or 1.0)


def _time_in_turn(runs: list[_Run], options: Options, report: Report) -> None:
    """So that a slow spell of the machine hits them all."""

    def seconds(once: Callable, loops: int) -> float:
        start = time.perf_counter()
        for _ in range(loops):
            once()
        return (time.perf_counter() - start) / loops

    loops = []
    for run in runs:
        assert run.once is not None
        enough = math.ceil(_SECONDS_OF_A_RUN / seconds(run.once, 1))
        loops.append(min(enough, _MOST_LOOPS))
    for i in range(options.repeats):
        report(f"Times all of them, {i + 1} of {options.repeats}.")
        for run, n in zip(runs, loops, strict=True):
            assert run.once is not None
            run.measurement.seconds.append(seconds(run.once, n))
