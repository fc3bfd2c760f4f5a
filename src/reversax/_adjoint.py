"""`ReversibleAdjoint`: one custom derivative rule around the whole solve.

Forward it runs Diffrax's loop, `forward.py`, and keeps the final pair and the times of
the steps. Backward it walks the steps in reverse, `backward.py`, and checks that it
arrives where the solve began, `certificate.py`.
"""

import functools as ft
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._numbers.schedule import Count, Index
from ._schemes.coupling import Pair
from ._schemes.fields import Lanes
from ._walk.backward import Carry, Walk, walk_back, wide
from ._walk.certificate import certificate, checked_tangents, round_trip
from ._walk.clock import Clock
from ._walk.event import locate
from ._walk.faults import raise_if_failed
from ._walk.forward import Forward, run, run_for_derivative
from ._walk.lane import Lane, Outputs, make_lane, outputs_of, sum_over_lanes
from ._walk.observe import add_trees
from ._walk.setup import CALL, Setup, set_up
from ._walk.tape import Record
from ._xla.batching import Axes, batch_aware
from ._xla.guard import detached, forward_only, reverse_only


class _Residuals(eqx.Module):
    """What the backward pass needs of the forward pass."""

    pair: Pair
    record: Record
    num_steps: Index
    num_shed: Count
    num_ts: list[Index]
    t_final: Array
    last_end: Array | None
    """Where the last step that was made ended, if there is an event."""
    outputs: Outputs
    """The shapes of all but the pair."""


def _materialise(like: PyTree, ct: PyTree) -> PyTree[Array]:
    """Zeros for symbolic zeros; `None` for what has no cotangent."""

    def leaf(x, ct):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return None
        return jnp.zeros(x.shape, x.dtype) if ct is None else ct

    return jtu.tree_map(leaf, like, ct)


def _run(parts, setup: Setup, perturbed: PyTree[bool], axes: Axes | None) -> Forward:
    """The forward pass, or that of each lane."""
    solve = run if perturbed is None else run_for_derivative
    if axes is None:
        return solve(parts, setup, perturbed=perturbed)
    axes_increment = None
    if perturbed is not None:
        axes_increment = eqx.partition(axes.in_axes[0][1], perturbed[1])

    def in_lane(parts, setup, lane):
        lanes = Lanes(axes_increment, axes.name, lane)
        return solve(parts, setup, perturbed=perturbed, lanes=lanes)

    in_axes = (*axes.in_axes, 0)
    vmapped = eqx.filter_vmap(in_lane, in_axes=in_axes, axis_name=axes.name)
    return vmapped(parts, setup, jnp.arange(axes.size))


@eqx.filter_custom_vjp
def _solve(parts, *, setup: Setup, axes: Axes | None):
    forward = _run(parts, setup, None, axes)
    return forward.final_state, forward.aux_stats


@_solve.def_fwd
def _solve_fwd(perturbed, parts, *, setup: Setup, axes: Axes | None):
    forward = _run(parts, setup, perturbed, axes)
    final_state = forward.final_state
    save_states = setup.save_states(final_state)
    describe = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    residuals = _Residuals(
        pair=forward.pair,
        record=forward.record,
        num_shed=forward.num_shed,
        num_steps=jnp.asarray(final_state.num_accepted_steps),
        num_ts=[jnp.asarray(s.saveat_ts_index) for s in save_states],
        t_final=final_state.tprev,
        last_end=final_state.event_tnext,
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
    like = residuals.outputs._replace(pair=residuals.pair)
    ct_outputs = outputs_of(ct_final_state, ct_final_state.solver_state.pair)
    ct_outputs = _materialise(like, ct_outputs)
    walk = _walk(residuals, ct_outputs, perturbed, parts, setup, axes)
    pair0 = _in_each_lane(parts[0], residuals, axes)
    ct_pair = setup.scheme.decode(ct_outputs.pair)
    carry = _first_carry(walk, residuals, pair0, ct_pair)
    carry = walk_back(walk, carry, setup.backward_meter)

    ct_fns, ct_t0, ct_pair = walk.each(Lane.pull_at_start, carry.pair, carry.num_ts)
    ct_pair = setup.scheme.cotangent(pair0, add_trees(carry.ct_pair, ct_pair))
    ct_increment, ct_fns_before = carry.ct_parameters
    ct_clock: Any = walk.lane.clock_diff
    if walk.lane.times:
        ct_clock = add_trees(carry.ct_clock, walk.each(Lane.pull_t0, ct_t0))
        ct_clock = _refuse_if_used(ct_final_state.controller_state, ct_clock)
        pairs = zip(ct_clock.ts, carry.ct_ts, strict=True)
        ct_ts = [None if a is None else a + b for a, b in pairs]
        ct_clock = eqx.tree_at(
            lambda c: c.ts, ct_clock, ct_ts, is_leaf=lambda x: x is None
        )
    ct = ct_pair, ct_increment, walk.add_fns(ct_fns_before, ct_fns), ct_clock
    check = ft.partial(_check, setup.throw)
    zeros = walk.each(
        check, carry.pair, pair0, carry.scale, carry.round_trips, residuals.pair
    )
    return jtu.tree_map(forward_only, _finish(ct, zeros, parts, axes))


def _refuse_if_used(ct_controller_state: PyTree, ct_clock: Clock) -> Clock:
    """The states of controllers have no derivatives with respect to times."""
    leaves = jtu.tree_leaves(ct_controller_state)
    used = jnp.stack([jnp.array(False), *(jnp.any(x != 0) for x in leaves)]).any()
    return eqx.error_if(ct_clock, used, _CONTROLLER_STATE_USED)


def _check(throw, lane: Lane, reconstructed, true, scale, errors, final):
    """The certificate of one lane."""
    last = round_trip(lane.scheme, reconstructed, true, scale)
    errors = jtu.tree_map(jnp.maximum, errors, last) if errors else last
    tolerance = lane.round_trip_tolerance
    zero = certificate(tolerance, throw, lane.scheme, errors, final)
    return checked_tangents(tolerance, true, reconstructed, zero, final)[1]


def _walk(residuals, ct, perturbed, parts, setup: Setup, axes: Axes | None) -> Walk:
    ends = residuals.num_steps, residuals.last_end
    lane = make_lane(parts, setup, residuals.record, ct, ends, perturbed)
    if axes is None:
        return Walk(lane, None, None)
    # Made in the same way of the axes of the same things.
    axes_parts, axes_setup = axes.in_axes
    record, ct, ends = jtu.tree_map(lambda _: 0, (residuals.record, ct, ends))
    axes_lane = make_lane(axes_parts, axes_setup, record, ct, ends, perturbed)
    return Walk(lane, axes_lane, axes.name)


def _in_each_lane(pair0: Pair, residuals: _Residuals, axes: Axes | None) -> Pair:
    """The initial pair, copied into each lane if they all share it."""
    if axes is None:
        return pair0
    like = lambda x, shape: jnp.broadcast_to(x, shape)
    shapes = jtu.tree_map(lambda x: x.shape, residuals.pair)
    return jtu.tree_map(like, pair0, shapes)


def _first_carry(
    walk: Walk, residuals: _Residuals, pair0: Pair, ct_pair: Pair
) -> Carry:
    """Where the walk begins: at the end, with what was saved there pulled back."""
    sizes = [walk.each(Lane.size, pair) for pair in (pair0, residuals.pair)]
    scale = jtu.tree_map(jnp.maximum, *sizes)
    ct_fns, ct_t_final, ct_saved = walk.each(
        Lane.pull_at_end,
        residuals.pair,
        residuals.num_ts,
        residuals.num_steps,
        residuals.t_final,
    )
    zeros = jtu.tree_map(lambda x: wide(jnp.zeros_like(x)), walk.lane.diff)
    ct_increment, ct_fns_before = zeros
    ct_clock: Any = None
    ct_ts: Any = [None for _ in walk.lane.observations]
    if walk.lane.times:
        ct_clock = walk.each(Lane.pull_time_after, residuals.num_steps, ct_t_final)
        ct_ts = walk.each(Lane.no_cotangent_of_ts)
    return Carry(
        num_steps=residuals.num_steps,
        num_shed=residuals.num_shed,
        pair=residuals.pair,
        ct_pair=add_trees(ct_pair, ct_saved),
        ct_parameters=(ct_increment, walk.add_fns(ct_fns_before, ct_fns)),
        ct_clock=ct_clock,
        ct_ts=ct_ts,
        num_ts=residuals.num_ts,
        scale=scale,
        round_trips=walk.each(Lane.no_errors_yet, scale),
    )


def _finish(ct, zeros: Array, parts, axes: Axes | None):
    """The cotangents of `parts`, each hung on the certificate's zero of its lane."""
    axes_parts = jtu.tree_map(lambda _: None, parts)
    if axes is not None:
        axes_parts, _ = axes.in_axes
        ct_pair, *ct_parameters, ct_clock = ct
        ct_pair = sum_over_lanes(ct_pair, axes_parts[0])
        ct = ct_pair, *ct_parameters, sum_over_lanes(ct_clock, axes_parts[3])

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


class ReversibleAdjoint(dfx.AbstractAdjoint):
    """Exact gradients of `diffrax.diffeqsolve` in memory independent of the number of
    steps, for a [`reversax.Reversible`][] solver.

    The gradient is that of the discrete solve, as
    [`diffrax.RecursiveCheckpointAdjoint`][] would compute it, for the same solver. It
    is taken with respect to `y0`, `args` and the parameters of the terms and of
    `SaveAt(fn=...)`, including values that their functions close over; and to `t0`,
    `t1`, `dt0`, `SaveAt(ts=...)` and the numbers of the controller. Saved values, dense
    output and the state and time of events may be differentiated, and once more in
    forward mode (`jax.hessian`).

    Use it for solves of many steps, or where memory is short. For a stiff problem,
    for an implicit solver, or for forward-mode differentiation use one of Diffrax's
    adjoints. For a short solve of a small state, checkpointing the plain base
    solver is as good.

    Memory is a few copies of the state and of the parameters; with a controller
    that adapts two numbers per step of `max_steps`; with [`reversax.FixedPoint`][]
    (the default) 256 bits per element of the state, or a quarter of a bit per step of
    `max_steps` if that is more (the sum of 320 and that with a controller that adapts;
    `halvings_per_step` bits per step if that is given to [`reversax.Symmetric`][]);
    and with [`reversax.FloatingPoint`][] a pair of states at every `restart_every`
    steps. An event records the times of constant steps too;
    recorded times that are differentiated, two numbers more a step for each number
    that they are differentiated by. Dense output takes the memory that it takes
    under any adjoint. Backward, each step costs as many vector field evaluations as
    forward, and their pull-backs.

    Every backward pass checks that it arrives at the initial state again: to the bit
    with [`reversax.FixedPoint`][], else to a tolerance. The factors by which a
    controller changes the step count as constants, which is how Diffrax's own are made.
    """

    round_trip_tolerance: float | None = None
    restart_every: int | str | None = "auto"
    progress_meter: dfx.AbstractProgressMeter = dfx.NoProgressMeter()

    def __check_init__(self):
        if not isinstance(self.progress_meter, dfx.AbstractProgressMeter):
            raise TypeError(
                "Pass a progress meter of Diffrax, such as "
                "`diffrax.TqdmProgressMeter()`, as `reversax.ReversibleAdjoint("
                f"progress_meter=...)`, not {self.progress_meter!r}."
            )
        tolerance = self.round_trip_tolerance
        if tolerance is None:
            return
        is_number = isinstance(tolerance, int | float) and type(tolerance) is not bool
        if not (is_number and tolerance >= 0):
            raise ValueError(
                "Pass a Python number of at least 0, `math.inf`, or `None` as "
                "`reversax.ReversibleAdjoint(round_trip_tolerance=...)`, not "
                f"{tolerance!r}."
            )

    def loop(
        self: Any = None,
        *,
        throw,
        passed_solver_state,
        passed_controller_state,
        **problem,
    ):
        del passed_controller_state
        if self is None:  # Diffrax calls whatever it is given.
            raise TypeError(
                "Pass `adjoint=reversax.ReversibleAdjoint()` with the brackets, not "
                "the class."
            )
        parts, setup = set_up(
            **problem,
            call=CALL,
            throw=throw,
            passed_solver_state=passed_solver_state,
            round_trip_tolerance=self.round_trip_tolerance,
            restart_every=self.restart_every,
            backward_meter=self.progress_meter,
        )
        inexact, rest = eqx.partition(parts, eqx.is_inexact_array)
        parts = eqx.combine(jtu.tree_map(reverse_only, inexact), rest)
        solve_in_lanes = lambda parts, setup, axes: _solve(
            parts, setup=setup, axes=axes
        )
        final_state, aux_stats = batch_aware(solve_in_lanes)(parts, setup)
        if throw:
            final_state = raise_if_failed(final_state, setup)
        final_state = _detach_the_rest(final_state)
        event = problem["event"]
        if event is not None and event.root_finder is not None:
            y = setup.scheme.readout(final_state.solver_state.pair)
            final_state = eqx.tree_at(lambda s: s.y, final_state, y)
            del problem["init_state"]
            final_state = locate(final_state, **problem)
        return final_state, aux_stats


def _detach_the_rest(final_state: Any) -> Any:
    """All but what may be differentiated made constant."""
    outputs = outputs_of(final_state, final_state.solver_state)
    outputs = outputs, final_state.controller_state  # Of which the use is refused.
    kept = {id(x) for x in jtu.tree_leaves(outputs) if eqx.is_inexact_array(x)}

    def leaf(x):
        return detached(x) if eqx.is_array(x) and id(x) not in kept else x

    return jtu.tree_map(leaf, final_state)


ReversibleAdjoint.__init__.__doc__ = """**Arguments:**

- `round_trip_tolerance`: how far from `y0` the backward pass may arrive, relative to
    the largest size that the state had, per leaf of the state; dimensionless. By
    default zero with [`reversax.FixedPoint`][], else the square root of the machine
    epsilon: 3.5e-4 in single precision, 1.5e-8 in double; the coarsest leaf counts.
    (Some ulps of the largest leaf pass in any leaf.) `math.inf` switches the check off.
- `restart_every`: with [`reversax.FloatingPoint`][], at every how many accepted steps
    to keep the pair of states, for the backward pass to restart from (and to check its
    round trip by); a Python integer of at least 1, or `None` for never. By default,
    "auto", as seldom as the coupling, the precision of the state and the tolerance
    allow: at 0.999 some 13,500 steps in double precision and 3,400 in single; with
    [`reversax.Symmetric`][] after 20 halvings and 5. It knows nothing of the vector
    field: on a contracting flow give a smaller number. Needs `max_steps`, else nothing
    is kept. With [`reversax.FixedPoint`][] tangents of Hessians restart.
- `progress_meter`: shows how far the backward pass has come (the `progress_meter` of
    `diffrax.diffeqsolve` shows the forward pass), by default nothing; of a batch, how
    far the lane with most steps has.

**Raises:** `TypeError` and `ValueError` for arguments that are none. When a solve
begins, `TypeError` for a solver that is not [`reversax.Reversible`][], `ValueError` for
`max_steps=None` where there is something to record. When a solve fails,
`equinox.EquinoxRuntimeError`: with the result `diffrax.RESULTS.nonfinite` when the
vector field returned no number or a state left the range of its arithmetic, and with
`diffrax.RESULTS.nonlinear_divergence` when damping drove the twins apart, so far that
their gap is larger than the state, or, if no error estimate has it
([`reversax.McCallumFoster`][]), than 10,000 tolerances of the controller. When
differentiated, `NotImplementedError` in forward mode, in reverse mode once more, and
for a controller of your own whose steps have a derivative with respect to the state;
`equinox.EquinoxRuntimeError` for a derivative with respect to times through a returned
`controller_state`. In the backward pass, `equinox.EquinoxRuntimeError` if the round
trip exceeds the tolerance, or the tangents of a Hessian have lost half their digits.
With `throw=False` a solve that itself overflowed gets a gradient of NaN instead.
"""
