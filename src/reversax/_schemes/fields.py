"""The increment as the two passes evaluate it: alike.

In exact arithmetic an increment must have the same bits in both passes, so there its
core, and the control that drives it, are isolated, `isolation.py`, and differentiated
with respect to the same parameters in both. Where a batch of solves shares parameters,
whose cotangents the backward pass sums over all lanes at once (`batching.py`),
increments are evaluated for all lanes at once in both.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.custom_batching
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Int, PyTree

from .._numbers.arithmetic import State
from .._xla.isolation import (
    Evaluation,
    Function,
    evaluate,
    evaluate_isolated,
    evaluate_with_residuals,
    pull_back_again,
)
from .._xla.programs import bytes_of
from .._xla.run_time import run_time_zero
from .control import Control, Leg, Time
from .increment import AbstractIncrement, Advance, Core

Axes = PyTree[int | None]

_FEW_BYTES = 2**10
"""Of parameters, of each of which two increments have cotangents of their own."""

_MAPPED: Any = eqx.if_array(0)
_NOT_MAPPED: Any = None
_LEG_MAPPED: Any = Leg(_MAPPED, _MAPPED, None, _MAPPED, _NOT_MAPPED)


class Lanes(NamedTuple):
    """The lanes of a batch that is evaluated together, as one of them sees them."""

    axes: tuple[Axes, Axes] | None = None
    """As those of [`Fields`][]; `None` without lanes."""
    axis_name: Hashable = None
    lane: Int[Array, ""] | None = None
    """Which one this is: what depends on it is surely batched."""


NO_LANES = Lanes()


class Fields(eqx.Module):
    """`Psi_{t1 - t0}(t0, .)`, its parameters in two pieces, to be joined by
    `equinox.combine`: what is differentiated, and the rest."""

    diff: AbstractIncrement
    nondiff: AbstractIncrement
    axes: tuple[Axes, Axes] | None
    """Which leaves of `diff` and `nondiff` have an axis of lanes, where a batch is
    evaluated together; else `None`."""
    axis_name: Hashable = eqx.field(static=True)
    isolated: bool = eqx.field(static=True)
    error: bool = eqx.field(static=True)
    """Whether the forward pass needs error estimates."""
    dense: bool = eqx.field(static=True)
    """Whether both passes need dense output."""
    times: bool = eqx.field(static=True)
    """Whether the times of the steps are differentiated too."""
    lane: Int[Array, ""] | None = None
    """In the forward pass of one lane of a batch, which."""

    @property
    def is_short(self) -> bool:
        """Whether two increments are rather written out than put into a loop."""
        once = eqx.combine(self.diff, self.nondiff).evaluates_once
        return self.isolated and once and bytes_of(self.diff) <= _FEW_BYTES

    # The forward pass of one lane.

    def contr(self, t0: Time, t1: Time) -> Control:
        """The control of a step."""
        if not self.isolated:
            return eqx.combine(self.diff, self.nondiff).contr(t0, t1)
        evaluation = _of_lane(self, "evaluate_control", t0, t1)
        return eqx.combine(evaluation.value, evaluation.other)

    def core(self, leg: Leg, y: State, *, extends: bool) -> Core:
        """The core of an increment."""
        increment = eqx.combine(self.diff, self.nondiff)
        if not self.isolated:
            return increment.core(leg, y, extends=extends)
        if increment.is_certain(leg.which):
            return _rounded(increment.core(leg, y, extends=extends), leg)
        evaluation = _of_lane(self, "evaluate", leg, y)
        (increment, inexact), (other, result) = evaluation.value, evaluation.other
        return Core(increment, eqx.combine(inexact, other), result)

    def extend(self, *args, **kwargs) -> Advance:
        """As that of the increment."""
        return eqx.combine(self.diff, self.nondiff).extend(*args, **kwargs)

    # Both passes. With lanes, of all of them: all but `self` has a leading axis.

    @property
    def pulls_control(self) -> bool:
        """Whether anything that controls depend on is differentiated."""
        return self.times or bool(jtu.tree_leaves(self.diff.contr))

    def evaluate_control(self, t0: Time, t1: Time) -> Evaluation:
        """The control of a step and its pull-back to `(diff.contr, times)`; what of it
        is not differentiable is beside the value.

        `times` is the pair `(t0, t1)`, or nothing if they are not differentiated.
        """

        def fn(x, rest):
            (diff, times), (nondiff, fixed_times) = x, rest
            contr = eqx.combine(diff, nondiff)
            control = contr(*(fixed_times if times is None else times))
            return eqx.partition(control, eqx.is_inexact_array)

        times = jnp.asarray(t0), jnp.asarray(t1)
        varied, fixed = (times, None) if self.times else (None, times)
        x, rest = (self.diff.contr, varied), (self.nondiff.contr, fixed)
        axes = _MAPPED, _MAPPED
        if self.axes is not None:
            of_diff, of_nondiff = self.axes
            axes = (of_diff.contr, _MAPPED), (of_nondiff.contr, _MAPPED)
        run_time = times[1] if self.isolated else None
        return self._call(fn, x, rest, axes).evaluate(run_time)

    def evaluate(self, leg: Leg, y: State, *, keeps: bool = False) -> Evaluation:
        """The core of an increment and its pull-back to `(diff, leg, y)`; `leg` has
        cotangents of its times and of its control, if these are differentiated.

        The value is the pair of the increment and what dense output depends on. Where
        an evaluation `keeps` its residuals, [`pull_back_again`][] has its pull-back
        again.
        """
        isolated = self.isolated and not self.nondiff.is_certain(leg.which)
        run_time = jnp.asarray(leg.end) if isolated else None
        return self._core_call(leg, y).evaluate(run_time, keeps=keeps)

    def pull_back_again(self, leg: Leg, y: State, residuals: list[Array]) -> Evaluation:
        """What `evaluate(leg, y, keeps=True)` returned, but for the value."""
        return pull_back_again(*self._core_call(leg, y), residuals, leg.end)

    def _core_call(self, leg: Leg, y: State) -> "_Call":
        extends, lanes = self.error or self.dense, self._number_of_lanes(leg)
        certain = self.isolated and self.nondiff.is_certain(leg.which)

        def fn(x, rest):
            (diff, varied, y), (nondiff, fixed) = x, rest
            increment, leg = eqx.combine(diff, nondiff), eqx.combine(varied, fixed)
            core = increment.core(leg, y, extends=extends, lanes=lanes)
            if certain:
                core = _rounded(core, leg)
            inexact, other = eqx.partition(core.rest, eqx.is_inexact_array)
            if not self.dense:
                inexact, other = None, core.rest
            return (core.increment, inexact), (other, core.result)

        varied, fixed = self.varied(leg)
        x, rest = (self.diff, varied, y), (self.nondiff, fixed)
        axes = self._axes((_LEG_MAPPED, _MAPPED), (_LEG_MAPPED,))
        return self._call(fn, x, rest, axes)

    def dense_info(self, leg: Leg, y: State, core: Evaluation) -> Evaluation:
        """The base's `dense_info`, and its pull-back to `(diff, leg, y)` and the value
        of the core."""

        def fn(x, rest):
            (diff, varied, y, value), (nondiff, fixed, other) = x, rest
            core = Core(value[0], eqx.combine(value[1], other[0]), other[1])
            increment, leg = eqx.combine(diff, nondiff), eqx.combine(varied, fixed)
            advance = increment.extend(leg, y, core, error=False, dense=True)
            return eqx.partition(advance.dense_info, eqx.is_inexact_array)

        varied, fixed = self.varied(leg)
        x, rest = (self.diff, varied, y, core.value), (self.nondiff, fixed, core.other)
        of_x, of_rest = (_LEG_MAPPED, _MAPPED, _MAPPED), (_LEG_MAPPED, _MAPPED)
        return self._call(fn, x, rest, self._axes(of_x, of_rest)).evaluate(None)

    def _number_of_lanes(self, leg: Leg) -> int:
        return 1 if self.axes is None else jnp.shape(leg.start)[0]

    def varied(self, leg: Leg) -> tuple[Leg, Leg]:
        """A leg as differentiated, and as not."""
        varies = lambda x: self.pulls_control and eqx.is_inexact_array(x)
        of_control = jtu.tree_map(varies, leg.control)
        return eqx.partition(leg, Leg(self.times, self.times, False, of_control, False))

    def _axes(self, of_x: tuple, of_rest: tuple) -> tuple:
        """The axes of `(diff, *x)` and `(nondiff, *rest)`."""
        diff, nondiff = self.axes or (None, None)
        return (diff, *of_x), (nondiff, *of_rest)

    def _call(self, fn: Function, x: tuple, rest: tuple, axes: tuple) -> "_Call":
        if self.axes is not None:
            fn = eqx.filter_vmap(fn, in_axes=axes, axis_name=self.axis_name)
        return _Call(fn, x, rest)


class _Call(NamedTuple):
    """A function, of all lanes if there are any, and what it is to be called with."""

    fn: Function
    x: tuple
    rest: tuple

    def evaluate(self, run_time: Array | None, *, keeps: bool = False) -> Evaluation:
        """`fn(x, rest)` and its pull-back; isolated, if something is given that is not
        known before run time."""
        if run_time is None:
            return (evaluate_with_residuals if keeps else evaluate)(*self)
        evaluation = evaluate_isolated(*self, run_time)
        return evaluation if keeps else evaluation._replace(residuals=None)


def _rounded(core: Core, leg: Leg) -> Core:
    """Its increment rounded by itself, whatever is done with it."""
    zero = run_time_zero(jnp.asarray(leg.end))
    rounded = lambda x: x + zero.astype(x.dtype)
    return core._replace(increment=jtu.tree_map(rounded, core.increment))


def _of_lane(fields: Fields, method: str, *args) -> Evaluation:
    """`method(*args)` of one lane, without its pull-back. It becomes that of
    all lanes as soon as `vmap` is applied: just as the backward pass evaluates it,
    not what `vmap` would make of the evaluation in one lane."""
    if fields.axes is None:
        return getattr(fields, method)(*args)
    is_none = lambda x: x is None
    everything = (fields.diff, fields.nondiff, list(args))
    arrays, static = eqx.partition(everything, eqx.is_array)
    axes = (*fields.axes, [_axes_of(x) for x in arrays[2]])
    # Axes are looked up by position: trees of `None`s and arrays match no others.
    flat_axes = [
        axis
        for axis, x in zip(
            jtu.tree_leaves(axes, is_leaf=is_none),
            jtu.tree_leaves(arrays, is_leaf=is_none),
            strict=True,
        )
        if x is not None
    ]
    flat, treedef = jtu.tree_flatten(arrays)
    noted: list = []

    def run(axes, flat):
        diff, nondiff, args = eqx.combine(treedef.unflatten(flat), static)
        options = (fields.isolated, fields.error, fields.dense, fields.times)
        same = Fields(diff, nondiff, axes, fields.axis_name, *options)
        evaluation = getattr(same, method)(*args)._replace(pull=None)
        arrays, others = eqx.partition(evaluation, eqx.is_array)
        noted.append(others)
        return arrays

    of_lane = jax.custom_batching.custom_vmap(lambda _, *flat: run(None, flat))

    # With the lane among its arguments, so that lanes that share all the others (a
    # control, at times of all) are not left for the next axis to be taken for them.
    @of_lane.def_vmap
    def of_all_lanes(size, batched, _, *flat):
        leaves = zip(flat, flat_axes, batched[1:], strict=True)
        arrays = run(fields.axes, [_in_each(size, *x) for x in leaves])
        return arrays, jtu.tree_map(lambda _: True, arrays)

    return eqx.combine(of_lane(fields.lane, *flat), noted[-1])


def _axes_of(x: PyTree[Array]) -> Axes:
    axes = jtu.tree_map(lambda _: 0, x)
    return axes._replace(factor=None) if isinstance(x, Leg) else axes


def _in_each(size: int, x: Array, axis: int | None, batched: bool) -> Array:
    """`x`, given an axis of lanes if it should have one."""
    if axis is None or batched:
        return x
    return jnp.broadcast_to(x, (size, *x.shape))
