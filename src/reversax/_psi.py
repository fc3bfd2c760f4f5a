"""The increment as the two passes evaluate it: alike.

In exact arithmetic an increment must have the same bits in both passes, so there its
core is isolated, `_isolation.py`, and differentiated with respect to the same
parameters in both. Where a batch of solves shares parameters, whose cotangents the
backward pass sums over all lanes at once (`_lanes.py`), increments are evaluated for
all lanes at once in both.
"""

from collections.abc import Hashable

import equinox as eqx
import jax
import jax.custom_batching
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._arithmetic import State
from ._increment import AbstractIncrement, Advance, Core, Time
from ._isolation import Evaluation, evaluate, evaluate_isolated

Axes = PyTree[int | None]


class Psi(eqx.Module):
    """`Psi_{t1 - t0}(t0, .)`, its parameters in two pieces: what is differentiated and
    the rest, to be joined by `equinox.combine`."""

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

    def core(self, t0: Time, t1: Time, y: State, *, extends: bool) -> Core:
        """The core of an increment, in the forward pass of one lane."""
        if not self.isolated:
            increment = eqx.combine(self.diff, self.nondiff)
            return increment.core(t0, t1, y, extends=extends)
        if self.axes is None:
            return as_core(self.evaluate(t0, t1, y))
        return self._core_of_lane(t0, t1, y)

    def extend(self, *args, error: bool, dense: bool) -> Advance:
        """As that of the increment, in the forward pass of one lane."""
        increment = eqx.combine(self.diff, self.nondiff)
        return increment.extend(*args, error=error, dense=dense)

    def evaluate(self, t0: Time, t1: Time, y: State) -> Evaluation:
        """The core of an increment and its pull-back to `(diff, times, y)`, with
        `times` the pair `(t0, t1)`, or nothing if they are not differentiated.

        With lanes, of all of them: `t0`, `t1` and `y` have a leading axis. The value is
        the pair of the increment and what dense output depends on.
        """

        def fn(x, rest):
            (diff, times, y), (nondiff, fixed_times) = x, rest
            t0, t1 = fixed_times if times is None else times
            increment = eqx.combine(diff, nondiff)
            core = increment.core(t0, t1, y, extends=self.error or self.dense)
            inexact, other = eqx.partition(core.rest, eqx.is_inexact_array)
            if not self.dense:
                inexact, other = None, core.rest
            return (core.increment, inexact), (other, core.result)

        times, fixed_times = self._times(t0, t1)
        x, rest = (self.diff, times, y), (self.nondiff, fixed_times)
        if self.axes is not None:
            mapped = eqx.if_array(0)
            in_axes = (self.axes[0], mapped, mapped), (self.axes[1], mapped)
            fn = eqx.filter_vmap(fn, in_axes=in_axes, axis_name=self.axis_name)
        if self.isolated:
            return evaluate_isolated(fn, x, rest, jnp.asarray(t1))
        return evaluate(fn, x, rest)

    def dense_info(self, t0: Time, t1: Time, y: State, core: Evaluation) -> Evaluation:
        """The base's `dense_info`, and its pull-back to `(diff, times, y)` and the
        value of the core; with lanes as there."""

        def fn(x, rest):
            (diff, times, y, value), (nondiff, fixed_times, other) = x, rest
            t0, t1 = fixed_times if times is None else times
            core = Core(value[0], eqx.combine(value[1], other[0]), other[1])
            increment = eqx.combine(diff, nondiff)
            advance = increment.extend(t0, t1, y, core, error=False, dense=True)
            return eqx.partition(advance.dense_info, eqx.is_inexact_array)

        times, fixed_times = self._times(t0, t1)
        x = (self.diff, times, y, core.value)
        rest = (self.nondiff, fixed_times, core.other)
        if self.axes is not None:
            mapped = eqx.if_array(0)
            in_axes = (self.axes[0], mapped, mapped, mapped)
            in_axes = in_axes, (self.axes[1], mapped, mapped)
            fn = eqx.filter_vmap(fn, in_axes=in_axes, axis_name=self.axis_name)
        return evaluate(fn, x, rest)

    def _times(self, t0: Time, t1: Time) -> tuple:
        """The times as differentiated, and as not: one of them nothing."""
        times = jnp.asarray(t0), jnp.asarray(t1)
        return (times, None) if self.times else (None, times)

    def _core_of_lane(self, t0: Time, t1: Time, y: State) -> Core:
        """The core of one lane, which becomes that of all lanes as soon as `vmap` is
        applied: just as the backward pass evaluates it, not what `vmap` would make of
        the evaluation in one lane."""
        assert self.axes is not None
        is_none = lambda x: x is None
        args = (self.diff, self.nondiff, jnp.asarray(t0), jnp.asarray(t1), y)
        all_mapped = lambda tree: jtu.tree_map(lambda _: 0, tree)
        axes = (*self.axes, 0, 0, all_mapped(y))
        arrays, static = eqx.partition(args, eqx.is_array)
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

        def core(psi_axes, flat):
            diff, nondiff, *rest = eqx.combine(treedef.unflatten(flat), static)
            options = (self.isolated, self.error, self.dense, self.times)
            psi = Psi(diff, nondiff, psi_axes, self.axis_name, *options)
            arrays, others = eqx.partition(as_core(psi.evaluate(*rest)), eqx.is_array)
            noted.append(others)
            return arrays

        of_lane = jax.custom_batching.custom_vmap(lambda *flat: core(None, flat))

        @of_lane.def_vmap
        def of_all_lanes(size, batched, *flat):
            leaves = zip(flat, flat_axes, batched, strict=True)
            arrays = core(self.axes, [_in_each(size, *x) for x in leaves])
            return arrays, jtu.tree_map(lambda _: True, arrays)

        return eqx.combine(of_lane(*flat), noted[-1])


def as_core(evaluation: Evaluation) -> Core:
    (increment, inexact), (other, result) = evaluation.value, evaluation.other
    return Core(increment, eqx.combine(inexact, other), result)


def _in_each(size: int, x: Array, axis: int | None, batched: bool) -> Array:
    """`x`, given an axis of lanes if it should have one."""
    if axis is None or batched:
        return x
    return jnp.broadcast_to(x, (size, *x.shape))
