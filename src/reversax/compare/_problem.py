"""The user's problem, as `reversax compare` takes it."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from .._schemes.control import brownian_paths
from .._solver import Reversible
from ._candidates import Candidate

_CALL = "`reversax.compare.Problem(...)`"
_DEFAULT_MAX_STEPS = 4096
# A search begins with a program that allows at least so many constant steps.
_FEW_STEPS = 64
_ONLY_FINAL = dfx.SaveAt(t1=True)


REFUSALS = (TypeError, ValueError, NotImplementedError, RuntimeError)
"""What Diffrax, Equinox, JAX and reversax raise for what they cannot do. Any other
error is a mistake, in whose code it may be, and is raised."""


class Refusal(Exception):
    """A problem that cannot be compared, or a wrong call; the message is for users."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class Problem(eqx.Module):
    """A differential equation, and a loss to take the gradient of.

    Return one from a function, and call `reversax compare MODULE:FUNCTION`. The
    gradient is with respect to all floating-point arrays in `args` and `y0`, and to
    those of the vector fields in `terms`, such as a network that is one. Constant are
    Python numbers in `args`, the values of a control, and what functions close over: so
    keep what is trained in `args`, as arrays, and let `loss` close over the data.

    The names are those of `diffrax.diffeqsolve`. All arguments are keywords.
    """

    _: dataclasses.KW_ONLY
    terms: PyTree[dfx.AbstractTerm]
    """Of an ordinary or controlled equation; stochastic ones are refused."""
    y0: PyTree[Array]
    t0: Any
    t1: Any
    dt0: Any = None
    """The step of `ConstantStepSize()`, from which the longest that is accurate enough
    is searched for; the first step of an adaptive controller, or `None` to leave that
    to it."""
    loss: Callable[[PyTree, PyTree], Float[Array, ""]]
    """`loss(ys, args)`: a scalar from the saved states, `solution.ys`."""
    args: PyTree = None
    saveat: dfx.SaveAt = _ONLY_FINAL
    """What to save for the loss: by default the final state, with a leading axis of
    length one, as in Diffrax."""
    stepsize_controller: dfx.AbstractStepSizeController = dfx.ConstantStepSize()
    max_steps: int | None = None
    """The most steps that a candidate may take: by default 4096, or as many constant
    steps as `dt0` makes if they are more. It decides how much memory is allocated with
    any other controller, so give a tight bound for these."""
    batched: bool = False
    """Whether to solve for each element of the leading axis of `y0` by itself, under
    `jax.vmap`. (`loss` gets the saved states of all, stacked.)"""
    solver: dfx.AbstractSolver = dfx.Tsit5()
    """The base: the solver that you would take without reversax."""
    candidates: Sequence[Candidate] | None = None
    """What to compare, instead of
    [`reversax.compare.default_candidates`][]`(solver)`."""

    def __check_init__(self):
        if not callable(self.loss):
            raise TypeError(f"{_CALL} needs `loss(ys, args)`, got {self.loss!r}.")
        if isinstance(self.solver, Reversible) or not isinstance(
            self.solver, dfx.AbstractSolver
        ):
            raise TypeError(
                f"{_CALL} got `solver={self.solver!r}`: give the base, such as "
                "`diffrax.Tsit5()`; `Reversible` over it is compared by itself."
            )
        _check_candidates(self.candidates)
        _check_saveat(self.saveat)
        for candidate in self.candidates or [None]:
            if candidate is not None and candidate.is_control:
                continue  # Its steps are searched for without.
            if self.has_constant_steps(candidate) and not self.dt0_for(candidate):
                raise ValueError(f"{_CALL} needs a `dt0` for `ConstantStepSize()`.")

    def controller_for(
        self, candidate: Candidate | None
    ) -> dfx.AbstractStepSizeController:
        own = None if candidate is None else candidate.stepsize_controller
        return self.stepsize_controller if own is None else own

    def dt0_for(self, candidate: Candidate | None) -> float | None:
        own = None if candidate is None else candidate.dt0
        dt0 = self.dt0 if own is None else own
        return None if dt0 is None else float(dt0)

    def has_constant_steps(self, candidate: Candidate | None) -> bool:
        return isinstance(self.controller_for(candidate), dfx.ConstantStepSize)

    def most_steps_for(self, candidate: Candidate) -> int:
        if self.max_steps is not None:
            return self.max_steps
        return max(_DEFAULT_MAX_STEPS, self._steps_of_dt0(candidate))

    def first_bound_for(self, candidate: Candidate) -> int:
        """How many constant steps the first program of a search is to allow."""
        bound = max(_FEW_STEPS, self._steps_of_dt0(candidate))
        return min(bound, self.most_steps_for(candidate), _DEFAULT_MAX_STEPS)

    def _steps_of_dt0(self, candidate: Candidate) -> int:
        dt0 = self.dt0_for(candidate)
        if dt0 is None or not self.has_constant_steps(candidate):
            return 0
        return math.ceil(self.duration / dt0)

    @property
    def duration(self) -> float:
        """Negative backwards in time."""
        return float(self.t1) - float(self.t0)


def _check_candidates(candidates: Sequence[Candidate] | None) -> None:
    if candidates is None:
        return
    if not candidates or not all(isinstance(x, Candidate) for x in candidates):
        raise TypeError(
            f"{_CALL} got `candidates={candidates!r}`: give a sequence of "
            "`reversax.compare.Candidate`, or `None` for the default ones."
        )
    names = [x.name for x in candidates]
    if len(set(names)) < len(names):
        raise ValueError(f"{_CALL} got candidates of the same name: {names}.")


def _check_saveat(saveat: dfx.SaveAt) -> None:
    is_sub = lambda x: isinstance(x, dfx.SubSaveAt)
    subs = [x for x in jtu.tree_leaves(saveat.subs, is_leaf=is_sub) if is_sub(x)]
    if saveat.dense or not subs or any(sub.steps for sub in subs):
        raise ValueError(
            f"{_CALL} got `saveat={saveat!r}`: what is saved must not depend on the "
            "solver's own steps, which differ between candidates. Use "
            "`diffrax.SaveAt(ts=...)`, `SaveAt(t1=True)` or a tree of such `subs`."
        )


def prepared(problem: Problem) -> Problem:
    """With all its numbers in arrays of the precision that JAX is in.

    **Raises:** `Refusal` for what cannot be compared."""
    if brownian_paths(problem.terms):
        raise Refusal(
            "The terms hold a Brownian path: this is a stochastic equation. Only "
            "ordinary and controlled equations are compared: the error of a gradient "
            "is measured against a tight solve, and a stochastic solve converges so "
            "slowly, along one path, that there is none. "
            "`reversax.round_trip_error` and docs/stochastic.md help to choose.",
            exit_code=2,
        )
    for leaf in jtu.tree_leaves(problem.y0):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise Refusal(
                f"`y0` has a leaf of dtype {dtype}; it must consist of real "
                "floating-point arrays.",
                exit_code=2,
            )
    arrays = lambda x: jnp.asarray(x) if hasattr(x, "dtype") else x
    y0 = jtu.tree_map(jnp.asarray, problem.y0)
    both = lambda p: (p.y0, p.candidates)
    none = lambda x: x is None
    problem = eqx.tree_at(both, problem, (y0, None), is_leaf=none)
    return jtu.tree_map(arrays, problem)
