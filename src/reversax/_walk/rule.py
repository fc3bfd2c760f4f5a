"""One custom derivative rule around a whole solve.

Forward it runs Diffrax's loop, `forward.py`, and keeps the final state and the times of
the steps. Backward it walks the steps in reverse, `backward.py`, and checks that it
arrives where the solve began, `certificate.py`.
"""

import functools as ft
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._numbers.schedule import Count, Index
from .._schemes.fields import Lanes
from .._schemes.moves import Codes, Cotangents, add_trees
from .._schemes.scheme import Lost, Values, plain
from .._schemes.undoing import Undoing, undo_and_pull_first
from .._schemes.watch import Scale
from .._xla.batching import Axes, batch_aware, if_mapped
from .._xla.guard import forward_only
from .backward import Carry, Parameters, Walk, walk_back, wide
from .beginning import Beginning
from .certificate import Failed, certificate, checked_tangents, round_trip
from .clock import Clock
from .cotangents import Outputs, outputs_of
from .faults import Messages, fault_of, messages_of
from .forward import Forward, run, run_for_derivative
from .lane import Lane, make_lane, sum_over_lanes
from .setup import CALL, Parts, Setup
from .tape import Record


class _Residuals(eqx.Module):
    """What the backward pass needs of the forward pass."""

    codes: Codes
    record: Record
    num_steps: Index
    num_shed: Count
    """Like `num_steps` without an axis of lanes, if they all take the same steps."""
    num_ts: list[Index]
    t_final: Array
    last_end: Array | None
    """Where the last step that was made ended, if there is an event."""
    fault: Array | None
    outputs: Outputs
    """The shapes of all but the parts of the state."""


def _materialise(like: PyTree, ct: PyTree) -> PyTree[Array]:
    """Zeros for symbolic zeros; `None` for what has no cotangent."""

    def leaf(x, ct):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return None
        return jnp.zeros(x.shape, x.dtype) if ct is None else ct

    return jtu.tree_map(leaf, like, ct)


class _Ran(NamedTuple):
    forward: Forward
    fault: Array | None
    """Why the solve failed, if its derivative is to raise."""


class _Counts(NamedTuple):
    num_steps: Index
    """That were accepted."""
    num_shed: Count
    """Bits that were lost."""


def _run(
    parts: Parts, setup: Setup, perturbed: PyTree[bool], axes: Axes | None
) -> tuple[_Ran, _Counts]:
    """The forward pass, or that of each lane; and numbers of which there is one if they
    do not depend on the lane."""
    solve = run if perturbed is None else run_for_derivative

    def ran(forward, setup):
        final_state = forward.final_state
        raises = setup.throw and perturbed is not None
        fault = fault_of(final_state, setup) if raises else None
        num_steps = jnp.asarray(final_state.num_accepted_steps)
        return _Ran(forward, fault), _Counts(num_steps, forward.num_shed)

    if axes is None:
        return ran(solve(parts, setup, perturbed=perturbed), setup)
    axes_fields = None
    if perturbed is not None:
        axes_fields = eqx.partition(axes.in_axes[0].increment, perturbed.increment)

    def in_lane(parts, setup, lane):
        lanes = Lanes(axes_fields, axes.name, lane)
        return ran(solve(parts, setup, perturbed=perturbed, lanes=lanes), setup)

    vmapped = eqx.filter_vmap(
        in_lane,
        in_axes=(*axes.in_axes, 0),
        out_axes=(eqx.if_array(0), if_mapped),
        axis_name=axes.name,
    )
    return vmapped(parts, setup, jnp.arange(axes.size))


@eqx.filter_custom_vjp
def _solve(parts, *, setup: Setup, axes: Axes | None):
    (forward, _), _ = _run(parts, setup, None, axes)
    return forward.final_state, forward.aux_stats


@_solve.def_fwd
def _solve_fwd(perturbed, parts, *, setup: Setup, axes: Axes | None):
    (forward, fault), counts = _run(parts, setup, perturbed, axes)
    final_state = forward.final_state
    save_states = setup.save_states(final_state)
    describe = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    residuals = _Residuals(
        codes=forward.codes,
        record=forward.record,
        num_steps=counts.num_steps,
        num_shed=counts.num_shed,
        num_ts=[jnp.asarray(s.saveat_ts_index) for s in save_states],
        t_final=final_state.tprev,
        last_end=final_state.event_tnext,
        fault=fault,
        outputs=jtu.tree_map(describe, outputs_of(final_state, None)),
    )
    return (final_state, forward.aux_stats), residuals


@_solve.def_bwd
def _solve_bwd(residuals, ct_out, perturbed, parts, *, setup: Setup, axes: Axes | None):
    return _walk_back_and_check(
        residuals, ct_out, perturbed, parts, setup=setup, axes=axes
    )


def _walk_back_and_check(
    residuals: _Residuals,
    ct_out: PyTree,
    perturbed: PyTree[bool],
    parts: PyTree,
    *,
    setup: Setup,
    axes: Axes | None,
) -> PyTree:
    """The cotangents of `parts`."""
    ct_final_state, _ = ct_out
    returned = setup.scheme.returned(residuals.codes)
    like = residuals.outputs._replace(codes=returned)
    ct_outputs = outputs_of(ct_final_state, ct_final_state.solver_state.codes)
    ct_outputs = _materialise(like, ct_outputs)
    walk = _walk(residuals, ct_outputs, perturbed, parts, setup, axes)
    residuals = residuals if walk.together else _told_apart(residuals)
    scheme, beginning = setup.scheme, parts.beginning
    if axes is not None:
        beginning = beginning.in_lanes(scheme, plain(residuals.codes))
    kept = scheme.decode(residuals.codes)[len(ct_outputs.codes) :]
    nothing = jtu.tree_map(jnp.zeros_like, kept)
    ct_values = *scheme.decode(ct_outputs.codes), *nothing
    carry = _first_carry(walk, residuals, beginning, ct_values)
    carry = walk_back(walk, carry, setup.backward_meter)

    at_start = walk.each(Lane.pull_at_start, carry.codes, carry.saved)
    ct_values = add_trees(carry.ct_values, at_start.values)
    first = walk.each(lambda lane: lane.timeline.first())
    ct_begun = Cotangents(ct_values, carry.ct_parameters.fields)
    nothing_lost = Lost(0, 0)
    # (Of lanes that were idle for some time they may be those of another state.)
    of_kept = carry.residuals if axes is None else None
    begun = Undoing(first, nothing_lost, carry.codes, ct_begun, of_kept)
    begun = undo_and_pull_first(scheme, walk.context, begun)
    pull_beginning = lambda lane, x, ct: x.cotangent(lane.scheme, ct)
    ct_beginning = walk.each(pull_beginning, beginning, begun.ct.parts)
    ct_clock: Any = walk.lane.timeline.diff
    if walk.lane.times:
        pull_t0 = lambda lane, ct: lane.timeline.pull_t0(ct)
        ct_clock = add_trees(carry.ct_clock, walk.each(pull_t0, at_start.t))
        if begun.ct_span is not None:
            pull_first = lambda lane, ct: lane.timeline.pull(0, ct)
            ct_clock = add_trees(ct_clock, walk.each(pull_first, begun.ct_span))
        ct_clock = _refuse_if_used(ct_final_state.controller_state, ct_clock)
        pairs = zip(ct_clock.ts, carry.saved, strict=True)
        ct_ts = [None if a is None else a + b.ct_ts for a, b in pairs]
        ct_clock = eqx.tree_at(
            lambda c: c.ts, ct_clock, ct_ts, is_leaf=lambda x: x is None
        )
    ct_fns = walk.add_fns(carry.ct_parameters.fns, at_start.fns)
    ct = Parts(ct_beginning, begun.ct.parameters, ct_fns, ct_clock)
    found, final = plain(begun.codes), plain(residuals.codes)
    num_steps = _in_lanes(carry.num_steps, residuals)
    codes0 = _encoded_again(walk, beginning, num_steps)
    arrival = _Arrival(found, codes0, final)
    check = ft.partial(_check, messages_of(setup, scheme.decode(final)))
    zeros = walk.each(check, arrival, carry.scale, carry.round_trips, residuals.fault)
    return jtu.tree_map(forward_only, _finish(ct, zeros, parts, axes))


def _refuse_if_used(ct_controller_state: PyTree, ct_clock: Clock) -> Clock:
    """The states of controllers have no derivatives with respect to times."""
    leaves = jtu.tree_leaves(ct_controller_state)
    used = jnp.stack([jnp.array(False), *(jnp.any(x != 0) for x in leaves)]).any()
    return eqx.error_if(ct_clock, used, _CONTROLLER_STATE_USED)


class _Arrival(NamedTuple):
    """The state that a walk arrived at, the one that it should be, and the one that the
    walk began with."""

    found: Codes
    true: Codes
    final: Codes


def _check(
    of_faults: Messages,
    lane: Lane,
    arrival: _Arrival,
    scale: Scale,
    errors: list[Array],
    fault: Array | None,
) -> Array:
    """The certificate of one lane."""
    found, true, final = arrival
    last = round_trip(lane.scheme, found, true, scale)
    errors = jtu.tree_map(jnp.maximum, errors, last) if errors else last
    tolerance = lane.round_trip_tolerance
    failed = None if fault is None else Failed(fault, of_faults)
    zero = certificate(tolerance, lane.scheme, errors, final, failed)
    return checked_tangents(tolerance, true, found, zero, final)[1]


def _walk(residuals, ct, perturbed, parts, setup: Setup, axes: Axes | None) -> Walk:
    num_steps = _in_lanes(residuals.num_steps, residuals)
    ends = num_steps, residuals.last_end
    lane = make_lane(parts, setup, residuals.record, ct, ends, perturbed)
    if axes is None:
        return Walk(lane)
    # Made in the same way of the axes of the same things.
    axes_parts, axes_setup = axes.in_axes
    record, ct, ends = jtu.tree_map(lambda _: 0, (residuals.record, ct, ends))
    axes_lane = make_lane(axes_parts, axes_setup, record, ct, ends, perturbed)
    walk = ft.partial(Walk, lane, axes_lane, axes.name)
    counts = residuals.num_steps, residuals.num_shed
    counted_once = all(jnp.ndim(x) == 0 for x in counts)
    return walk(together=counted_once and walk(together=True).loses_alike(*counts))


def _told_apart(residuals: _Residuals) -> _Residuals:
    """With counts of each lane."""
    counts = lambda x: (x.num_steps, x.num_shed)
    of_lanes = [_in_lanes(x, residuals) for x in counts(residuals)]
    return eqx.tree_at(counts, residuals, of_lanes)


def _in_lanes(number: Index, residuals: _Residuals) -> Array:
    """With an axis of lanes, if there are lanes."""
    return jnp.broadcast_to(number, jnp.shape(residuals.t_final))


def _encoded_again(walk: Walk, beginning: Beginning, num_steps: Index) -> Codes:
    """The initial state, once it is known how many steps there are left."""
    encode = lambda lane, *x: x[0].encoded_again(lane.scheme, x[1])
    return walk.each(encode, beginning, num_steps)


def _first_carry(
    walk: Walk, residuals: _Residuals, beginning: Beginning, ct_values: Values
) -> Carry:
    """Where the walk begins: at the end, with what was saved there pulled back."""
    codes1, t_final = residuals.codes, residuals.t_final
    num_steps = _in_lanes(residuals.num_steps, residuals)
    codes0 = _encoded_again(walk, beginning, num_steps)
    sizes = [walk.each(Lane.size, codes) for codes in (codes0, codes1)]
    scale = jtu.tree_map(jnp.maximum, *sizes)
    saved = walk.each(Lane.nothing_saved, residuals.num_ts)
    at_end = walk.each(Lane.pull_at_end, codes1, saved, num_steps, t_final)
    zeros = jtu.tree_map(lambda x: wide(jnp.zeros_like(x)), walk.lane.diff)
    ct_fields, ct_fns = zeros
    ct_clock: Any = None
    if walk.lane.times:
        pull = lambda lane, *x: lane.timeline.pull_time_after(*x)
        ct_clock = walk.each(pull, num_steps, at_end.t)
    return Carry(
        num_steps=residuals.num_steps,
        num_shed=residuals.num_shed,
        codes=codes1,
        residuals=_first_residuals(walk, residuals),
        ct_values=add_trees(ct_values, at_end.values),
        ct_parameters=Parameters(ct_fields, walk.add_fns(ct_fns, at_end.fns)),
        ct_clock=ct_clock,
        saved=saved,
        scale=scale,
        round_trips=walk.each(Lane.no_errors_yet, scale),
    )


def _first_residuals(walk: Walk, residuals: _Residuals) -> list | None:
    """Of what is kept at the end of a solve. A state that is kept to restart from may
    be another than the one that they belong to, by a rounding."""
    if walk.lane.tape.record.codes is not None:
        return None
    span, lost = walk.last_of(residuals.num_steps, residuals.num_shed)
    known = span, lost.index, residuals.codes
    return walk.lane.scheme.residuals(walk.context, *known)


def _finish(ct: Parts, zeros: Array, parts: Parts, axes: Axes | None):
    """The cotangents of `parts`, each hung on the certificate's zero of its lane."""
    axes_parts = jtu.tree_map(lambda _: None, parts)
    if axes is not None:
        # (The others were summed on the way.)
        axes_parts, _ = axes.in_axes
        ct = ct._replace(
            beginning=sum_over_lanes(ct.beginning, axes_parts.beginning),
            clock=sum_over_lanes(ct.clock, axes_parts.clock),
        )

    def leaf(x, axis, ct):
        if ct is None:
            return None
        zero = zeros.sum() if axis is None else zeros.reshape(-1, *[1] * (ct.ndim - 1))
        return ct.astype(x.dtype) + zero.astype(x.dtype)

    return jtu.tree_map(leaf, parts, axes_parts, ct)


_CONTROLLER_STATE_USED = (
    "Resume without the `controller_state` that a solve returned, or with "
    "`jax.lax.stop_gradient` of it: there are no derivatives through it with respect "
    "to times (`t0`, `t1`, `dt0`, or others). `RecursiveCheckpointAdjoint` has them. "
    f"({CALL})"
)


def solve(parts: Parts, setup: Setup) -> tuple[Any, dict]:
    """Diffrax's final state and statistics, which may be differentiated by `parts`."""
    in_lanes = lambda parts, setup, axes: _solve(parts, setup=setup, axes=axes)
    return batch_aware(in_lanes)(parts, setup)
