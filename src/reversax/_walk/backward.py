r"""The walk back over the accepted steps: reconstruction and pull-back in one.

With cotangents `ct_y, ct_z` of the pair at the end of a step, each increment is
evaluated once, by `jax.vjp`, and serves twice:

    (B2)   z  = z1 + Psi_b,    Psi_b, pull_b = vjp(Psi_{-h}(t1, .), y1)
    (B1)   y  = y1 - Psi_f,    Psi_f, pull_f = vjp(Psi_{h}(t0, .), z)
    (BC)   (y0, z0) = unmix(y, z)

    (T2)   ct_y += pull_b(-ct_z)            transposes (F2)
    (T1)   ct_z += pull_f(ct_y)             transposes (F1)
    (TC)   (ct_y, ct_z) = mix^T(ct_y, ct_z)  transposes (C)

Both halves are one piece of code, `twins.py`, in a loop of two trips, in which each is
evaluated and pulled back at once. Only if something was saved *inside* a step are both
evaluated first: the interpolant needs their values, and its cotangents must be there
before (T2).

Cotangents of outputs join where their outputs were read off: those of the readouts at
the two ends of a step before (T2) and after (TC), those of the interpolant also with
the increment's in (T1).
"""

import functools as ft
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, cast

import diffrax as dfx
import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from .._numbers.arithmetic import State
from .._numbers.schedule import Count, Index
from .._schemes.control import Half, Time, halves_of, of_step
from .._schemes.coupling import Pair
from .._schemes.fields import Psi
from .._schemes.twins import half_of, through_halves, undo_step
from .._schemes.watch import Scale
from .._xla.isolation import Evaluation, run_time_true
from .._xla.one_kernel import in_one_kernel
from .clock import Clock
from .lane import Halved, Lane, only_where, sum_over_lanes
from .observe import add_trees, zeros_like_inexact


def wide(x: Array) -> Array:
    """`x` in a dtype fit for summing over many steps: half precision becomes single."""
    narrow = jnp.finfo(x.dtype).bits < 32
    return x.astype(jnp.float32) if narrow else x


class Carry(eqx.Module):
    """What the walk carries from the end of a step to its start."""

    num_steps: Index
    """How many steps are still to be undone."""
    num_shed: Count
    """How many halvings they made."""
    pair: Pair
    ct_pair: Pair
    ct_parameters: PyTree[Array]
    ct_clock: Clock | None
    """Of its differentiated part, less what `ct_ts` has; `None` if there is none."""
    ct_ts: list[Array | None]
    num_ts: list[Index]
    """For each observation, how many of its `ts` are still to be pulled back."""
    scale: Scale
    """The largest size of the state met so far, per leaf; of its two ends alone, where
    no error is allowed, and a size wanted only to say how large one was."""
    round_trips: list[Float[Array, ""]]
    """The largest error of a round trip met so far, per leaf; none before the end if
    no pairs are kept."""


class Walk(eqx.Module):
    """The walk back over the steps of one solve, or of all lanes of a batch at once.

    With lanes every array but the cotangents of shared parameters has a leading axis.
    Increments are pulled back for all lanes together, which sums over them. A lane that
    has undone all its steps keeps what it has.
    """

    lane: Lane
    axes: Lane | None
    """Which leaves of `lane` have an axis of lanes; `None` without lanes."""
    axis_name: Hashable = eqx.field(static=True)

    def each(self, fn: Callable, *args) -> Any:
        """`fn(lane, *args)`, lane by lane."""
        if self.axes is None:
            return fn(self.lane, *args)
        in_axes = (self.axes, *[eqx.if_array(0)] * len(args))
        vmapped = eqx.filter_vmap(fn, in_axes=in_axes, axis_name=self.axis_name)
        return vmapped(self.lane, *args)

    def _keep_if_done(self, num_steps: Index, new: PyTree, old: PyTree) -> PyTree:
        if self.axes is None:
            return new
        some_left = jnp.asarray(num_steps) > 0
        in_lanes = lambda x: some_left.reshape(-1, *[1] * (x.ndim - 1))
        choose = lambda x, y: jnp.where(in_lanes(x), x, y)
        return jtu.tree_map(choose, new, old)

    @property
    def psi(self) -> Psi:
        """The increment, of all lanes."""
        lane, axes = self.lane, self.axes
        return Psi(
            lane.diff[0],
            lane.nondiff[0],
            None if axes is None else (axes.diff[0], axes.nondiff[0]),
            self.axis_name,
            lane.scheme.arithmetic.exact,
            lane.error,
            lane.dense,
            lane.times,
        )

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

    def _undo_and_pull(self, step: "_Undoing") -> "_Undone":
        """Undoes both halves, pulling each back as soon as it is evaluated."""

        def undo_half(half: Half, a: State, ct):
            (ct_b, ct_a), ct_p = ct
            evaluation = self.psi.evaluate(half, a)
            ct_half = _pull_half(half, evaluation, ct_b, None)
            ct, ct_half = _change_places(ct_b, ct_a, ct_p, ct_half)
            return evaluation.value[0], ct, ct_half

        control = self.psi.evaluate_control(step.t0, step.t1)
        mixed, ((ct_z, ct_y), ct_p), ct_halves = undo_step(
            self.lane.scheme,
            *(step.pair1, _halves(step.t0, step.t1, control)),
            core=undo_half,
            extra=((step.ct.z, step.ct.y), step.ct_parameters[0]),
            unroll=False,
        )  # (B2, T2, B1, T1)
        ct_mixed = Pair(ct_y, ct_z)
        pair0, ct = self.each(Lane.unmix_and_pull, mixed, ct_mixed, step.halved)
        ct_p, interval = self._pull_control(control, ct_halves, ct_p)
        ct_parameters = ct_p, step.ct_parameters[1]
        return _Undone(pair0, step.num_ts, ct, ct_parameters, interval, step.ct_ts)

    def _undo_observe_pull(self, step: "_Undoing") -> "_Undone":
        """Undoes both halves and then, with the step's dense output, pulls back what
        was saved inside it and both increments."""

        def undo_half(half: Half, a: State, _):
            evaluation = self.psi.evaluate(half, a)
            return evaluation.value[0], None, evaluation

        scheme, (t0, t1) = self.lane.scheme, (step.t0, step.t1)
        control = self.psi.evaluate_control(t0, t1)
        halves = _halves(t0, t1, control)
        mixed, _, evaluations = undo_step(
            scheme, step.pair1, halves, core=undo_half, extra=None, unroll=True
        )  # (B2, B1)
        pair0 = self.each(Lane.unmix, mixed, step.halved)  # (BC)
        forward, z = half_of(evaluations, 0), scheme.decode(mixed).z
        info = self.psi.dense_info(half_of(halves, 0), z, forward)
        values = z, forward.value[0], eqx.combine(info.value, info.other)
        ends = self.each(Lane.ends, pair0, step.pair1, *values)
        inside = self.each(
            Lane.pull_inside_step, step.num_ts, step.ct_ts, step.index, t0, t1, ends
        )
        ct_outputs = inside.ct_fns, inside.ct_ends, inside.ct_interval
        nothing = zeros_like_inexact(ct_outputs)
        ct_fns, ct_ends, interval = step.if_active(ct_outputs, nothing)
        ct_p_dense, ct_first, ct_z_dense, ct_value = info.pull(ct_ends.base_dense_info)[
            0
        ]
        ct_increment, ct_rest = ct_value
        ct_value = add_trees(ct_increment, ct_ends.increment), ct_rest

        ct1 = self.each(Lane.pull_readout, ct_ends.readout1, step.pair1)
        ct_p, ct_fns_total = step.ct_parameters
        carry = add_trees(step.ct, ct1), add_trees(ct_p, ct_p_dense)
        (ct_z, ct_y), ct_p, ct_halves = _pull_halves(
            carry, halves, evaluations, ct_value
        )  # (T2, T1)
        ct_z = add_trees(ct_z, add_trees(ct_z_dense, ct_ends.z))
        ct = self.each(Lane.pull_mix, Pair(ct_y, ct_z), pair0, step.halved)  # (TC)
        ct = add_trees(ct, self.each(Lane.pull_readout, ct_ends.readout0, pair0))
        ct_halves = jtu.tree_map(lambda x, y: x.at[0].add(y), ct_halves, ct_first)
        ct_p, of_halves = self._pull_control(control, ct_halves, ct_p)
        interval = add_trees(interval, of_halves or nothing[2])
        ct_parameters = ct_p, self.add_fns(ct_fns_total, ct_fns)
        return _Undone(pair0, inside.num_ts, ct, ct_parameters, interval, inside.ct_ts)

    def _pull_control(
        self, control: Evaluation, ct_halves: Half, ct_p: PyTree[Array]
    ) -> tuple[PyTree[Array], tuple[Array, Array] | None]:
        """Pulls back the control of a step: to the parameters and to its interval."""
        if not self.psi.pulls_control:
            return ct_p, None
        ct_t0, ct_t1, ct_control = of_step(ct_halves)
        ct_contr, ct_times = control.pull(ct_control)[0]
        if jtu.tree_leaves(ct_contr):
            ct_contr = add_trees(ct_p.contr, ct_contr)
            ct_p = eqx.tree_at(lambda p: p.contr, ct_p, ct_contr)
        if ct_times is None:
            return ct_p, None
        return ct_p, add_trees((ct_t0, ct_t1), ct_times)

    def __call__(self, carry: Carry) -> Carry:
        if_active = ft.partial(self._keep_if_done, carry.num_steps)
        (index, t0, t1), at_end = self.each(
            Lane.pull_last_end, carry.num_steps, carry.pair, carry.num_ts
        )
        ct_fns, ct_t1, ct = if_active(at_end, zeros_like_inexact(at_end))
        ct = if_active(add_trees(carry.ct_pair, ct), zeros_like_inexact(ct))
        ct_increment, ct_fns_total = carry.ct_parameters
        ct_parameters = ct_increment, self.add_fns(ct_fns_total, ct_fns)
        halved = self.each(Lane.halved, index, carry.num_shed)
        undo = self._undo_observe_pull if self.lane.dense else self._undo_and_pull
        undone = undo(
            _Undoing(
                *(carry.pair, carry.num_ts, carry.ct_ts, index, halved, t0, t1, ct),
                *(ct_parameters, if_active),
            )
        )
        ct_clock, pair0 = carry.ct_clock, undone.pair0
        if self.lane.times:
            ct_t0, ct_later = cast(tuple, undone.ct_interval)
            add = self.each(Lane.pull_interval, index, ct_t0, ct_t1 + ct_later)
            ct_clock = add_trees(ct_clock, if_active(add, zeros_like_inexact(add)))
        scale = carry.scale
        if not self.lane.allows_no_error:
            scale = jtu.tree_map(jnp.maximum, scale, self.each(Lane.size, pair0))
        pair0, errors = self.each(Lane.restart, pair0, index, halved, scale)
        errors = jtu.tree_map(jnp.maximum, carry.round_trips, errors)
        new = Carry(
            num_steps=jnp.maximum(carry.num_steps - 1, 0),
            num_shed=halved.before,
            pair=pair0,
            ct_pair=undone.ct,
            ct_parameters=None,
            ct_clock=None,
            ct_ts=undone.ct_ts,
            num_ts=undone.num_ts,
            scale=scale,
            round_trips=errors,
        )
        # (The others have only what is active added.)
        places = lambda c: (c.ct_parameters, c.ct_clock)
        is_none = lambda x: x is None
        old = eqx.tree_at(places, carry, (None, None), is_leaf=is_none)
        summed = undone.ct_parameters, ct_clock
        return eqx.tree_at(places, if_active(new, old), summed, is_leaf=is_none)


class _Undoing(NamedTuple):
    """A step about to be undone, and the cotangents at its end."""

    pair1: Pair
    num_ts: list[Index]
    ct_ts: list[Array | None]
    index: Index
    halved: Halved
    t0: Time
    t1: Time
    ct: Pair
    ct_parameters: PyTree[Array]
    if_active: Callable


class _Undone(NamedTuple):
    """The same at its start, and the cotangent of its interval."""

    pair0: Pair
    num_ts: list[Index]
    ct: Pair
    ct_parameters: PyTree[Array]
    ct_interval: tuple[Array, Array] | None
    ct_ts: list[Array | None]


def _pull_half(half: Half, evaluation: Evaluation, ct_b: State, ct_value: Any) -> tuple:
    """The cotangents of parameters, half and argument from that of `b` after a half,
    and of the evaluation's value, if it was used otherwise too."""
    ct_increment = half.signed(ct_b)
    ct_rest = zeros_like_inexact(evaluation.value[1])
    if ct_value is not None:
        ct_increment, ct_rest = add_trees(ct_increment, ct_value[0]), ct_value[1]
    return evaluation.pull((ct_increment, ct_rest))[0]


def _change_places(ct_b: State, ct_a: State, ct_p: PyTree, ct_half: tuple) -> tuple:
    """The cotangents before a half, in the places that the twins have in the other; and
    those of what it was given."""
    ct_p_half, ct_given, ct_a_half = ct_half
    ct = (add_trees(ct_a, ct_a_half), ct_b), add_trees(ct_p, ct_p_half)
    return ct, ct_given


def _pull_halves(
    ct: tuple[Pair, PyTree], halves: Half, evaluations: Evaluation, ct_value: PyTree
) -> tuple:
    """Pulls back the increments of both halves, when they have been evaluated.

    `ct_value` is the cotangent of the value of the first, apart from that by the step.
    """

    def pull_half(carry, half_evaluation_ct_value):
        (ct_b, ct_a), ct_p = carry
        half, evaluation, ct_value = half_evaluation_ct_value
        ct_half = _pull_half(half, evaluation, ct_b, ct_value)
        return _change_places(ct_b, ct_a, ct_p, ct_half)

    ct1, ct_p = ct
    ct_values = jtu.tree_map(lambda x: jnp.stack([x, jnp.zeros_like(x)]), ct_value)
    (ct_twins, ct_p), ct_halves = through_halves(
        pull_half,
        ((ct1.z, ct1.y), ct_p),
        (halves, evaluations, ct_values),
        reverse=True,
        unroll=True,
    )
    return ct_twins, ct_p, ct_halves


def _halves(t0: Time, t1: Time, control: Evaluation) -> Half:
    return halves_of(t0, t1, eqx.combine(control.value, control.other))


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
    lane: Lane, psi: Psi, pair1: Pair, num_steps: Index, num_shed: Count
) -> Pair:
    """Undoes all the steps: the reconstructed initial pair."""

    def undo_half(half: Half, a: State, _):
        return psi.evaluate(half, a).value[0], None, None

    def undo(carry):
        num_steps, num_shed, pair = carry
        index, t0, t1 = lane.last_of(num_steps)
        control = psi.evaluate_control(t0, t1)
        halves = _halves(t0, t1, control)
        mixed, *_ = undo_step(
            lane.scheme, pair, halves, core=undo_half, extra=None, unroll=False
        )
        halved = lane.halved(index, num_shed)
        return num_steps - 1, halved.before, lane.unmix(mixed, halved)

    *_, pair0 = lax.while_loop(lambda c: c[0] > 0, undo, (num_steps, num_shed, pair1))
    return pair0
