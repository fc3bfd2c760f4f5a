r"""The walk back over the accepted steps: reconstruction and pull-back in one.

A step is undone and pulled back by its scheme, `scheme.py`. The walk finds its times
and what it lost, joins the cotangents of outputs where these were read off, restarts
from states that were kept, and sums up what is shared by all steps:

- what was saved at the end of a step is pulled back before it is undone;
- what was saved inside it when it has been undone, and before it is pulled back: the
  dense output needs the values of its increments, and its cotangents join theirs;
- what was saved at the very start is left to the caller.
"""

import functools as ft
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from .._numbers.schedule import Count, Index
from .._schemes.fields import Fields
from .._schemes.moves import Codes, Context, Cotangents, add_trees, chosen
from .._schemes.scheme import Lost, Span, Values
from .._schemes.undoing import (
    Undoing,
    Undone,
    undo_and_pull_step,
    undo_first,
    undo_step,
)
from .._schemes.watch import Scale
from .._xla.batching import if_mapped
from .._xla.one_kernel import in_one_kernel
from .._xla.run_time import run_time_true
from .clock import Clock
from .lane import Lane, only_where, sum_over_lanes
from .observe import Saved, zeros_like_inexact

_MAPPED: Any = eqx.if_array(0)


def wide(x: Array) -> Array:
    """`x` in a dtype fit for summing over many steps: half precision becomes single."""
    narrow = jnp.finfo(x.dtype).bits < 32
    return x.astype(jnp.float32) if narrow else x


class Parameters(NamedTuple):
    """The cotangents of what all steps share, of one kind of a leaf each."""

    fields: PyTree[Array]
    fns: list[PyTree]


class Carry(eqx.Module):
    """What the walk carries from the end of a step to its start."""

    num_steps: Index
    """How many steps are still to be undone."""
    num_shed: Count
    """How many bits of each number they lost."""
    codes: Codes
    residuals: list | None
    """Of what the scheme keeps, as [`residuals_of`][] has them; `None` if each is
    evaluated again to be pulled back."""
    ct_values: Values
    ct_parameters: Parameters
    ct_clock: Clock | None
    """Of its differentiated part, less what `saved` has; `None` if there is none."""
    saved: list[Saved]
    """For each observation."""
    scale: Scale
    """The largest size of the state met so far, per leaf; of its two ends alone, where
    no error is allowed, and a size wanted only to say how large one was."""
    round_trips: list[Float[Array, ""]]
    """The largest error of a round trip met so far, per leaf; none before the end if
    no states are kept."""


class Walk(eqx.Module):
    """The walk back over the steps of one solve, or of all lanes of a batch at once.

    With lanes every array but the cotangents of shared parameters has a leading axis.
    Increments are pulled back for all lanes together, which sums over them. A lane that
    has undone all its steps keeps what it has; unless all take the same steps, which
    are counted for all of them at once.
    """

    lane: Lane
    axes: Lane | None = None
    """Which leaves of `lane` have an axis of lanes; `None` without lanes."""
    axis_name: Hashable = eqx.field(static=True, default=None)
    together: bool = eqx.field(static=True, default=True)
    """Whether there are no lanes, or all take the same steps: then how many there are,
    and what of bits they [`Lost`][], has no axis of lanes."""

    def each(self, fn: Callable, *args) -> Any:
        """`fn(lane, *args)`, lane by lane."""
        if self.axes is None:
            return fn(self.lane, *args)
        is_lost = lambda x: isinstance(x, Lost) and self.together
        in_axes = [None if is_lost(x) else eqx.if_array(0) for x in args]
        return self._vmapped(fn, in_axes)(self.lane, *args)

    def _vmapped(self, fn: Callable, in_axes: list, out_axes: Any = _MAPPED):
        return eqx.filter_vmap(
            fn,
            in_axes=(self.axes, *in_axes),
            out_axes=out_axes,
            axis_name=self.axis_name,
        )

    def loses_alike(self, num_steps: Index, num_shed: Count) -> bool:
        """Whether all lanes lose the same in the last of so many steps."""
        last_of = self._vmapped(Lane.last_of, [None] * 2, (_MAPPED, if_mapped))
        _, lost = eqx.filter_eval_shape(last_of, self.lane, num_steps, num_shed)
        return all(jnp.ndim(x) == 0 for x in jtu.tree_leaves(lost))

    def last_of(self, num_steps: Index, num_shed: Count) -> tuple[Span, Lost]:
        """As of a lane."""
        if self.axes is None:
            return self.lane.last_of(num_steps, num_shed)
        of_steps = None if self.together else _MAPPED
        vmapped = self._vmapped(Lane.last_of, [of_steps] * 2, (_MAPPED, of_steps))
        return vmapped(self.lane, num_steps, num_shed)

    def _keep_if_done(self, num_steps: Index, new: PyTree, old: PyTree) -> PyTree:
        if self.together:
            return new
        return chosen(jnp.asarray(num_steps) > 0, new, old)

    @property
    def context(self) -> Context:
        """What schemes undo steps in, of all lanes."""
        lane, axes = self.lane, self.axes
        fields = Fields(
            diff=lane.diff[0],
            nondiff=lane.nondiff[0],
            axes=None if axes is None else (axes.diff[0], axes.nondiff[0]),
            axis_name=self.axis_name,
            isolated=lane.scheme.arithmetic.exact,
            error=lane.error,
            dense=lane.dense,
            times=lane.times,
        )
        extends = lane.error or lane.dense
        return Context(lane.scheme.arithmetic, fields, extends, self.each)

    def add_fns(self, ct_fns: list[PyTree], new: list[PyTree]) -> list[PyTree]:
        """Adds cotangents of the saved functions, of those leaves that have any."""
        _, diff_fns = self.lane.diff
        new = [
            eqx.filter(ct, only_where(diff))
            for ct, diff in zip(new, diff_fns, strict=True)
        ]
        if self.axes is not None:
            new = sum_over_lanes(new, self.axes.diff[1])
        return add_trees(ct_fns, new)

    def __call__(self, carry: Carry) -> Carry:
        if_active = ft.partial(self._keep_if_done, carry.num_steps)
        mask = lambda ct: if_active(ct, zeros_like_inexact(ct))
        span, lost = self.last_of(carry.num_steps, carry.num_shed)
        at_end = self.each(Lane.pull_last_end, span, lost, carry.codes, carry.saved)
        at_end = mask(at_end)
        ct_values = mask(add_trees(carry.ct_values, at_end.values))
        ct_fields, ct_fns = carry.ct_parameters
        ct_fns = self.add_fns(ct_fns, at_end.fns)
        ct = Cotangents(ct_values, ct_fields)
        observe = None
        if self.lane.dense:
            pull = lambda _, info: self._pull_inside(span, lost, info, carry, mask)
            observe = pull
        undoing = Undoing(span, lost, carry.codes, ct, carry.residuals)
        undone = undo_and_pull_step(self.lane.scheme, self.context, undoing, observe)
        saved, interval = carry.saved, None
        if undone.observed is not None:
            saved, ct_fns_inside, interval = undone.observed
            ct_fns = self.add_fns(ct_fns, ct_fns_inside)
        ct_clock = carry.ct_clock
        if self.lane.times:
            ct_span = _joined(undone, at_end.t, interval)
            pull = lambda lane, lost, ct: lane.timeline.pull(lost.index, ct)
            add = mask(self.each(pull, lost, ct_span))
            ct_clock = add_trees(ct_clock, add)
        codes0, scale, errors = self._checked(carry, undone.codes, lost)
        nothing: Any = None
        new = Carry(
            num_steps=jnp.maximum(carry.num_steps - 1, 0),
            num_shed=lost.before,
            codes=codes0,
            residuals=None,
            ct_values=undone.ct.parts,
            ct_parameters=nothing,
            ct_clock=None,
            saved=saved,
            scale=scale,
            round_trips=errors,
        )
        # (The others have only what is active added; and residuals are used in lanes
        # that are active alone.)
        places = lambda c: (c.ct_parameters, c.ct_clock, c.residuals)
        is_none = lambda x: x is None
        old = eqx.tree_at(places, carry, (None, None, None), is_leaf=is_none)
        summed = Parameters(undone.ct.parameters, ct_fns), ct_clock, undone.residuals
        return eqx.tree_at(places, if_active(new, old), summed, is_leaf=is_none)

    def _pull_inside(
        self, span: Span, lost: Lost, info: dict, carry: Carry, mask: Callable
    ) -> tuple[PyTree, tuple[list[Saved], list[PyTree], tuple[Array, Array]]]:
        """What `observe` of a scheme is to return."""
        pulled = self.each(Lane.pull_inside_step, span, lost, info, carry.saved)
        fns, (interval, ct_info) = mask((pulled.fns, pulled.interior))
        return ct_info, (pulled.saved, fns, interval)

    def _checked(
        self, carry: Carry, codes0: Codes, lost: Lost
    ) -> tuple[Codes, Scale, list[Float[Array, ""]]]:
        """The state that a step began with, restarted if it was kept; and the carry's
        scale and errors with it."""
        scale = carry.scale
        if not self.lane.allows_no_error:
            scale = jtu.tree_map(jnp.maximum, scale, self.each(Lane.size, codes0))
        codes0, errors = self.each(Lane.restart, codes0, lost, scale)
        return codes0, scale, jtu.tree_map(jnp.maximum, carry.round_trips, errors)


def _joined(
    undone: Undone, ct_end: Array, interval: tuple[Array, Array] | None
) -> Span:
    """The cotangents of a step's times, by all ways."""
    ct = undone.ct_span
    assert ct is not None
    start, end = ct.start, ct.end + ct_end
    if interval is not None:
        start, end = start + interval[0], end + interval[1]
    return ct._replace(start=start, end=end)


def walk_back(
    walk: Walk, carry: Carry, progress_meter: dfx.AbstractProgressMeter
) -> Carry:
    """Undoes all the steps, accumulating cotangents."""
    total = jnp.maximum(jnp.max(carry.num_steps), 1)

    def undo(carry_and_state):
        carry, state = carry_and_state
        carry = walk(carry)
        left = jnp.max(carry.num_steps) / total
        return carry, progress_meter.step(state, lax.stop_gradient(1 - left))

    some_left = lambda c: jnp.any(c[0].num_steps > 0)
    # Not before the way forward is over, which a meter's own start does not depend on.
    init = lambda: progress_meter.init()
    state = lax.cond(run_time_true(jnp.asarray(carry.num_steps)), init, init)
    loop = lambda carry: lax.while_loop(some_left, undo, carry)
    carry, state = in_one_kernel(loop, (carry, state))
    progress_meter.close(state)
    return carry


def walk_back_without_cotangents(
    walk: Walk, codes1: Codes, num_steps: Index, num_shed: Count
) -> Codes:
    """Undoes all the steps: the reconstructed initial state."""
    lane = walk.lane

    def undo(carry):
        num_steps, num_shed, codes = carry
        span, lost = lane.last_of(num_steps, num_shed)
        nothing: Any = None
        undoing = Undoing(span, lost, codes, nothing)
        codes = undo_step(lane.scheme, walk.context, undoing)
        return num_steps - 1, lost.before, codes

    carry = num_steps, num_shed, codes1
    *_, codes0 = lax.while_loop(lambda c: c[0] > 0, undo, carry)
    return undo_first(lane.scheme, walk.context, lane.timeline.first(), codes0)
