"""The step of a scheme, as Diffrax's loop takes it."""

from collections.abc import Callable
from typing import Any, ClassVar

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp

from .._numbers.arithmetic import State
from .._numbers.schedule import AbstractSchedule, Index
from .._schemes.control import Time
from .._schemes.fields import Fields
from .._schemes.scheme import AbstractScheme, Grid, Lost, Span
from .._schemes.watch import Seen, Watch, look_sometimes


class Interpolated(eqx.Module):
    """A value between the ends of a step, in the place of the parts at an end."""

    y: State


class ClosedInterpolation(dfx.AbstractLocalInterpolation):
    """The interpolation of a scheme, in a loop whose state is of its parts."""

    t0: Time
    t1: Time
    inner: dfx.AbstractLocalInterpolation

    def __init__(self, *, inner_cls: Callable, t0, t1, **dense_info):
        self.t0 = t0
        self.t1 = t1
        self.inner = inner_cls(t0=t0, t1=t1, **dense_info)

    def evaluate(self, t0, t1=None, left: bool = True) -> Any:
        return Interpolated(self.inner.evaluate(t0, t1, left))


class ClosedInterpolationFactory(eqx.Module):
    """A module rather than a `functools.partial`, so that two of them compare equal."""

    cls: Callable[..., dfx.AbstractLocalInterpolation] = eqx.field(static=True)

    def __call__(self, **kwargs) -> ClosedInterpolation:
        return ClosedInterpolation(inner_cls=self.cls, **kwargs)


class Progress(eqx.Module):
    """How far a solve has come, in the adjoint's own loop."""

    num_steps: Index
    """How many steps were accepted, of this solve."""
    watch: Watch
    before: Time | None
    """Where the last step began, for a scheme that looks back."""


class ClosedSolver(dfx.AbstractSolver):
    """A scheme's step for the adjoint's own loop, where terms and arguments are already
    inside the fields and it is known whether error and dense output are wanted.

    The loop's state is of the parts of the scheme, and the solver's a [`Progress`][].
    """

    scheme: AbstractScheme
    fields: Fields
    schedule: AbstractSchedule
    look_every: Any
    """At every how many steps to look: a Python number, or an array."""
    end: Time
    """Of the last step."""
    grid: Grid | None
    """For a scheme that takes equal steps."""
    known_error_order: Any

    term_structure: ClassVar = dfx.AbstractTerm

    @property
    def interpolation_cls(self):
        return ClosedInterpolationFactory(self.scheme.interpolation_cls)

    def error_order(self, terms):
        return self.known_error_order

    def init(self, terms, t0, t1, y0, args):
        raise NotImplementedError  # Done before the loop begins.

    def func(self, terms, t0, y0, args):
        raise NotImplementedError  # Only asked for before the loop begins.

    @eqx.filter_jit  # Traced once for all that Diffrax's loop traces it for.
    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        scheme, index = self.scheme, solver_state.num_steps
        scheme.check_jump(y0, made_jump)
        bits = self.schedule.of_step(index, t0, t1)
        span = Span(t0, t1, solver_state.before, self.grid)
        options = dict(error=self.fields.error, dense=self.fields.dense)
        step = scheme.step(self.fields, span, y0, Lost(bits, 0, index), **options)
        seen = Seen(scheme, y0, step.codes, Lost(bits, 0, index), t1)
        known = index, self.look_every, self.end
        watch = look_sometimes(solver_state.watch, *known, seen)
        before = jnp.asarray(t0) if scheme.looks_back else None
        progress = Progress(index + 1, watch, before)
        return step.codes, step.error, step.dense_info, progress, step.result
