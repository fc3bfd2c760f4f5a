"""How coarse the steps of a candidate may be.

The errors of many settings come from one program, which is told the setting when it
runs, and allows more steps than most settings make. The result does not depend on how
many it allows, only the memory that is allocated for them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .._numbers.schedule import BITS, MOST
from ._candidates import Candidate
from ._gradient import (
    Gradient,
    Method,
    Reference,
    gradient_error,
    gradient_of,
    message_of,
    parts_of,
    split,
)
from ._problem import Problem
from ._scan import RematerialisedScan, make_plan
from ._search import AN_OCTAVE, coarsest, step_counts, tolerances

Report = Callable[[str], None]
"""Called with what is done next."""

_MORE_STEPS = 8  # In the next program, where those of one were too few.
_FINER = 2  # Settings to fall back on.
_TIGHTEST = 10.0  # Of tolerances, relative to round-off.
# The relative error of a gradient that is not worth a row: why others failed is.
_NOTHING_RIGHT = 1.0
_DRIVEN_APART = "drove the twins apart"
NOT_FINITE = "The value or the gradient is not finite."


class Setting(NamedTuple):
    """Neither: as the problem has it."""

    num_steps: int | None = None
    """Constant ones."""
    tolerance: float | None = None
    """The larger one of an adaptive controller's two."""


class Found(NamedTuple):
    settings: list[Setting]
    """The coarsest that is accurate enough, and finer ones in case it turns out that it
    is not. If none is accurate enough, that of the least error."""
    failure: str | None
    """Why no setting has a gradient."""
    driven_apart: bool
    """Whether damping drove the twins apart for want of halvings."""


def _is_pid(x: Any) -> bool:
    return isinstance(x, dfx.PIDController)


def _pids(controller: dfx.AbstractStepSizeController) -> list[dfx.PIDController]:
    leaves = jtu.tree_leaves(controller, is_leaf=_is_pid)
    return [x for x in leaves if _is_pid(x)]


def tolerances_of(
    controller: dfx.AbstractStepSizeController,
) -> tuple[float, float] | None:
    """`rtol` and `atol`, the largest if there are several."""
    pids = _pids(controller)
    if not pids:
        return None
    return float(np.max(pids[0].rtol)), float(np.max(pids[0].atol))


def _with_tolerance(
    controller: dfx.AbstractStepSizeController, tolerance: Any
) -> dfx.AbstractStepSizeController:
    """Of which the larger one is `tolerance`, in the same ratio."""
    own = tolerances_of(controller)
    assert own is not None
    both = lambda c: [x for pid in _pids(c) for x in (pid.rtol, pid.atol)]
    scaled = [x * (tolerance / max(own)) for x in both(controller)]
    return eqx.tree_at(both, controller, scaled)


def settings_of(problem: Problem, candidate: Candidate) -> list[Setting]:
    """From the coarsest on."""
    if problem.has_constant_steps(candidate):
        most = problem.most_steps_for(candidate)
        return [Setting(num_steps=n) for n in step_counts(most)]
    own = tolerances_of(problem.controller_for(candidate))
    if own is None or not max(own) > 0:
        return [Setting()]
    eps = max(jnp.finfo(x.dtype).eps for x in jtu.tree_leaves(problem.y0))
    every = tolerances(_TIGHTEST * float(eps))
    return [Setting(tolerance=x) for x in every]


def _method(problem: Problem, candidate: Candidate, size: Any, most: int) -> Method:
    """With steps of that length, or that tolerance, if any is given."""
    dt0, controller = problem.dt0_for(candidate), problem.controller_for(candidate)
    if problem.has_constant_steps(candidate):
        dt0 = size
    elif size is not None:
        controller = _with_tolerance(controller, size)
    return Method(candidate.solver, candidate.adjoint, dt0, controller, most)


def method_of(problem: Problem, candidate: Candidate, setting: Setting) -> Method:
    """What a user would write."""
    n = setting.num_steps
    if n is None:
        most = problem.most_steps_for(candidate)
        return _method(problem, candidate, setting.tolerance, most)
    # One for a last step that round-off may leave over.
    method = _method(problem, candidate, problem.duration / n, n + 1)
    if not candidate.is_control:
        return method
    plan = make_plan(problem.saveat, problem.t0, problem.t1, n)
    return method._replace(adjoint=RematerialisedScan(plan), max_steps=n)


class _Trial:
    """Tries settings of one candidate."""

    def __init__(self, problem: Problem, candidate: Candidate, reference: Reference):
        self.problem, self.candidate, self.reference = problem, candidate, reference
        self.failure: str | None = None
        self.driven_apart = False
        self._constant = problem.has_constant_steps(candidate)
        self._most_steps = problem.most_steps_for(candidate)
        self._allows = 0
        self._run: Callable[[float], Gradient] | None = None

    def error_of(self, setting: Setting, report: Report) -> float:
        """Infinite if there is no gradient."""
        if self._run is None or (setting.num_steps or 0) > self._allows:
            self._run = self._compile(setting, report)
        n, tolerance = setting
        size = tolerance if n is None else self.problem.duration / n
        assert size is not None
        try:
            gradient = jax.block_until_ready(self._run(size))
        except jax.errors.JaxRuntimeError as error:
            if "EquinoxRuntimeError" not in str(error):
                raise  # Not what the solve says of itself, but no memory, or the like.
            self.failure = message_of(error)
            # In fewer steps there are as many halvings as are of use.
            many = n is None or n > BITS // MOST
            self.driven_apart |= many and _DRIVEN_APART in self.failure
            return math.inf
        error = gradient_error(parts_of(gradient.parts), self.reference.parts)
        if not math.isfinite(error) or not math.isfinite(gradient.value):
            self.failure = NOT_FINITE
            return math.inf
        return error

    def _compile(self, setting: Setting, report: Report) -> Callable[[float], Gradient]:
        most = self._most_steps
        if self._constant:
            assert setting.num_steps is not None
            first = self.problem.first_bound_for(self.candidate)
            most = min(max(first, _MORE_STEPS * self._allows), most)
        self._allows = most
        allowed = most + 1 if self._constant else most  # As in `method_of`.
        report(f"compiles a program of up to {most:,} steps, to try them")
        arrays, static = eqx.partition(split(self.problem), eqx.is_array)

        def program(arrays, size):
            differentiated, rest = eqx.combine(arrays, static)
            method = _method(self.problem, self.candidate, size, allowed)
            return gradient_of(differentiated, rest, method)

        # As a Python number, whose precision gives way to that of the arrays.
        compiled = jax.jit(program).lower(arrays, 1.0).compile()
        return lambda size: compiled(arrays, size)


def find(
    problem: Problem,
    candidate: Candidate,
    reference: Reference,
    wanted: float,
    report: Report,
) -> Found:
    """The fewest steps, or the loosest tolerance, whose gradient is within `wanted` of
    the reference, by settings a fixed factor apart."""
    settings = settings_of(problem, candidate)
    if settings == [Setting()]:
        return Found(settings, None, False)
    trial, errors = _Trial(problem, candidate, reference), []

    def error_of(index: int) -> float:
        error = trial.error_of(settings[index], report)
        errors.append(error)
        if index % AN_OCTAVE == 0:
            found = f"has an error of {error:.1e}" if error < math.inf else "fails"
            report(f"with {describe(settings[index])} {found}")
        return error

    index = coarsest(
        error_of, wanted, _sizes(settings), _order_of(problem, candidate, settings)
    )
    if trial.failure is not None and errors[index] >= _NOTHING_RIGHT:
        return Found([], trial.failure, trial.driven_apart)
    finer = _FINER if errors[index] <= wanted else 0
    return Found(settings[index : index + finer + 1], None, trial.driven_apart)


def describe(setting: Setting) -> str:
    n, tolerance = setting
    if n is not None:
        return f"{n:,} step{'s' * (n > 1)}"
    return "its own steps" if tolerance is None else f"a tolerance of {tolerance:.1e}"


def _sizes(settings: Sequence[Setting]) -> list[float]:
    return [1 / n if n is not None else tolerance for n, tolerance in settings]  # pyright: ignore


def _order_of(problem: Problem, candidate: Candidate, settings: Sequence) -> Any:
    if settings[0].num_steps is None:
        return None
    return candidate.solver.order(problem.terms) or 1
