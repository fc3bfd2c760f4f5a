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

    def __call__(
        self, t0: Time, t1: Time, y: State, *, error: bool, dense: bool
    ) -> Advance:
        """An increment, in the forward pass of one lane."""
        increment = eqx.combine(self.diff, self.nondiff)
        if not self.isolated:
            core = increment.core(t0, t1, y, extends=self.error or self.dense)
        elif self.axes is None:
            core = as_core(self.core(t0, t1, y))
        else:
            core = self._core_of_lane(t0, t1, y)
        return increment.extend(t0, t1, y, core, error=error, dense=dense)

    def core(self, t0: Time, t1: Time, y: State) -> Evaluation:
        """The core of an increment and its pull-back to `(diff, y)`.

        With lanes, of all of them: `t0`, `t1` and `y` have a leading axis. The value is
        the pair of the increment and what dense output depends on.
        """

        def fn(x, rest):
            (diff, y), (nondiff, t0, t1) = x, rest
            increment = eqx.combine(diff, nondiff)
            core = increment.core(t0, t1, y, extends=self.error or self.dense)
            inexact, other = eqx.partition(core.rest, eqx.is_inexact_array)
            if not self.dense:
                inexact, other = None, core.rest
            return (core.increment, inexact), other

        x, rest = (self.diff, y), (self.nondiff, t0, t1)
        if self.axes is not None:
            in_axes = (self.axes[0], eqx.if_array(0)), (self.axes[1], 0, 0)
            fn = eqx.filter_vmap(fn, in_axes=in_axes, axis_name=self.axis_name)
        if self.isolated:
            return evaluate_isolated(fn, x, rest, jnp.asarray(t1))
        return evaluate(fn, x, rest)

    def dense_info(self, t0: Time, t1: Time, y: State, core: Evaluation) -> Evaluation:
        """The base's `dense_info`, and its pull-back to `(diff, y)` and the value of
        the core; with lanes as there."""

        def fn(x, rest):
            (diff, y, value), (nondiff, t0, t1, other) = x, rest
            core = Core(value[0], eqx.combine(value[1], other))
            increment = eqx.combine(diff, nondiff)
            advance = increment.extend(t0, t1, y, core, error=False, dense=True)
            return eqx.partition(advance.dense_info, eqx.is_inexact_array)

        x = (self.diff, y, core.value)
        rest = (self.nondiff, t0, t1, core.other)
        if self.axes is not None:
            mapped = eqx.if_array(0)
            in_axes = (self.axes[0], mapped, mapped), (self.axes[1], 0, 0, mapped)
            fn = eqx.filter_vmap(fn, in_axes=in_axes, axis_name=self.axis_name)
        return evaluate(fn, x, rest)

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
            options = (self.axis_name, self.isolated, self.error, self.dense)
            psi = Psi(diff, nondiff, psi_axes, *options)
            arrays, others = eqx.partition(as_core(psi.core(*rest)), eqx.is_array)
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
    (increment, inexact), other = evaluation.value, evaluation.other
    return Core(increment, eqx.combine(inexact, other))


def _in_each(size: int, x: Array, axis: int | None, batched: bool) -> Array:
    """`x`, given an axis of lanes if it should have one."""
    if axis is None or batched:
        return x
    return jnp.broadcast_to(x, (size, *x.shape))
