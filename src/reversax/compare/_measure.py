"""Measures the candidates, one after the other, and their times in turn."""

import contextlib
import dataclasses
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from .._round_trip import round_trip_error
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
from ._problem import Problem, prepared

# A timed run repeats the gradient until it takes at least so long.
_SECONDS_OF_A_RUN = 0.02
_MOST_LOOPS = 1000


class Options(NamedTuple):
    """How to measure."""

    tolerance: float = 1e-3
    """The relative error of the gradient that is accurate enough."""
    refinements: int = 2
    """How often a candidate of constant steps may halve them to be that accurate."""
    repeats: int = 7
    """How many runs to take the median time of."""
    quick: bool = False
    """Whether to compare fewer candidates, if the problem does not say which."""


@dataclasses.dataclass
class Measurement:
    """What was measured of one candidate; `None` where it failed before."""

    candidate: str
    cautionary: bool
    solver: str
    adjoint: str
    dt0: float | None = None
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
    method: Method
    once: Callable[[], Any] | None
    """Computes the gradient, if that works."""


Report = Callable[[str], None]
"""Called with what is done next."""


def number_of_stages(problem: Problem, options: Options) -> int:
    """How often `compare` reports what it does next, refinements apart."""
    return 1 + len(_candidates(problem, options)) + options.repeats


def compare(
    problem: Problem, options: Options, report: Report
) -> tuple[Reference, list[Measurement]]:
    """Measures all the candidates of a problem.

    **Raises:** `Refusal` for a problem that cannot be compared, and whatever the user's
    own functions raise.
    """
    candidates, problem = _candidates(problem, options), prepared(problem)
    report("reference")
    reference = solve_reference(problem, options.tolerance)
    runs = []
    with _quiet_jax():
        for candidate in candidates:
            report(candidate.name)
            run = _compile_until_accurate(problem, candidate, reference, options)
            runs.append(run)
        _time_in_turn([run for run in runs if run.once is not None], options, report)
    return reference, [run.measurement for run in runs]


def _candidates(problem: Problem, options: Options) -> list[Candidate]:
    if problem.candidates is not None:
        return list(problem.candidates)
    return default_candidates(problem.solver, options.quick)


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


def _compile_until_accurate(
    problem: Problem, candidate: Candidate, reference: Reference, options: Options
) -> _Run:
    """With steps halved until the gradient is accurate enough, or too often."""
    refinements = options.refinements if problem.has_constant_steps(candidate) else 0
    run = _compile(problem, candidate, 0, reference)
    for halved in range(1, refinements + 1):
        error = run.measurement.gradient_error
        if error is not None and error <= options.tolerance:
            break
        if run.measurement.temporary_bytes is None:
            break  # It does not even compile, and will not with other steps.
        run = _compile(problem, candidate, halved, reference)
    if isinstance(run.method.solver, Reversible):
        _measure_round_trip(problem, run)
    return run


def _compile(
    problem: Problem, candidate: Candidate, halved: int, reference: Reference
) -> _Run:
    dt0 = problem.dt0_for(candidate)
    dt0 = None if dt0 is None else dt0 / 2**halved
    method = Method(
        candidate.solver,
        candidate.adjoint,
        dt0,
        problem.controller_for(candidate),
        problem.max_steps_for(candidate, dt0, halved),
    )
    measurement = Measurement(
        candidate.name,
        candidate.cautionary,
        repr(method.solver),
        repr(method.adjoint),
        dt0,
        method.max_steps,
    )
    arrays, static = eqx.partition(split(problem), eqx.is_array)

    def program(arrays):
        differentiated, rest = eqx.combine(arrays, static)
        return gradient_of(differentiated, rest, method)

    try:
        compiled = _compile_timed(program, arrays, measurement)
        once = lambda: jax.block_until_ready(compiled(arrays))
        gradient = once()
    except Exception as error:  # Any: it is reported in the candidate's row.
        measurement.failure = message_of(error)
        return _Run(measurement, method, None)
    measurement.num_steps = float(gradient.num_steps)
    parts = parts_of(gradient.parts)
    finite = all(np.isfinite(x).all() for x in parts.values())
    if not finite or not math.isfinite(gradient.value):
        measurement.failure = "The value or the gradient is not finite."
        return _Run(measurement, method, None)
    measurement.gradient_error = gradient_error(parts, reference.parts)
    measurement.value_error = value_error(float(gradient.value), reference.value)
    return _Run(measurement, method, once)


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


def _measure_round_trip(problem: Problem, run: _Run) -> None:
    method = run.method

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
    except Exception as failure:  # Any: it is reported in the candidate's row.
        if run.measurement.failure is None:
            run.measurement.failure = f"Its round trip: {message_of(failure)}"
        return
    run.measurement.round_trip = error / (_largest(problem.y0) or 1.0)


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
        report(f"times, {i + 1} of {options.repeats}")
        for run, n in zip(runs, loops, strict=True):
            assert run.once is not None
            run.measurement.seconds.append(seconds(run.once, n))
