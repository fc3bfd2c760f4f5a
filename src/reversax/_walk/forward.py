"""The forward pass, through Diffrax's own loop."""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp

from .._numbers.schedule import Count
from .._schemes.base import checked_at
from .._schemes.fields import NO_LANES, Fields, Lanes
from .._schemes.increment import AbstractIncrement
from .._schemes.moves import Codes
from .._schemes.scheme import AbstractScheme, Grid, Span
from .._schemes.watch import APART, LOST, OUTGROWN, SOUND, Watch, begin
from .._solver import ReversibleState, result_of
from .._xla.compat import DIVERGED, integration_loop, while_loop
from .clock import (
    Clock,
    ClosedController,
    Moment,
    Sensitivity,
    any_of,
    error_like,
)
from .event import reading_out
from .setup import CALL, Parts, Setup, saveat_with
from .stepping import ClosedSolver, Interpolated, Progress
from .tape import Record, Recorder, RecorderState, Tape, recording_while_loop
from .times import AbstractTimes, PrescribedTimes


class Forward(NamedTuple):
    """What a forward pass returns."""

    final_state: Any
    """Diffrax's, with the solver's state as [`reversax.Reversible`][] has it."""
    aux_stats: dict
    codes: Codes
    record: Record
    num_shed: Count
    """How many bits of each number were lost."""


def run(
    parts: Parts, setup: Setup, *, perturbed: Any, lanes: Lanes = NO_LANES
) -> Forward:
    """Solves forward in Diffrax's loop.

    `perturbed` says what of the `parts` will be differentiated, and `lanes` of which
    lanes this is one, both so that the two passes evaluate the fields alike. If
    `perturbed` is `None` there is no other pass, and nothing is recorded for it.

    **Raises:** `ValueError` if something would have to be, of a number of steps that
    has no bound.
    """
    if perturbed is not None and setup.unbounded is not None:
        raise ValueError(setup.unbounded)
    scheme, clock = setup.scheme, parts.clock
    fields = _fields(parts.increment, setup, perturbed, lanes)
    first_span = Span(clock.t0, clock.first_end, grid=clock.grid)
    codes = parts.beginning.encoded(scheme)
    codes0 = scheme.begin(fields, first_span, codes)
    solver = ClosedSolver(
        scheme=scheme,
        fields=fields,
        schedule=setup.plan.schedule,
        look_every=setup.look_every,
        end=clock.t1,
        grid=clock.grid,
        known_error_order=setup.error_order,
    )
    fns = [_save_with(fn, scheme) for fn in parts.fns]
    saveat = saveat_with(setup.saveat, fns, clock.ts)
    controller = _recorder(setup, clock, perturbed)
    first = clock.controller_state, clock.t0, codes0
    controller_state = controller.begin(*first, records=perturbed is not None)
    final_state, aux_stats = integration_loop(
        solver=solver,
        stepsize_controller=controller,
        event=reading_out(setup.event, scheme),
        saveat=saveat,
        t0=clock.t0,
        t1=clock.t1,
        dt0=None,
        max_steps=setup.plan.max_steps,
        terms=None,
        args=None,
        init_state=_first_state(setup, clock, codes0, controller_state),
        inner_while_loop=ft.partial(while_loop, kind="lax"),
        outer_while_loop=recording_while_loop,
        progress_meter=setup.progress_meter,
    )
    forward = _taken_apart(final_state, aux_stats, setup, clock.grid)
    begun = clock.t0, scheme.reached(codes)
    last = final_state.tprev, scheme.reached(forward.codes)
    return checked_at(forward, parts.increment, begun, last)


def _first_state(
    setup: Setup, clock: Clock, codes0: Codes, controller_state: RecorderState
) -> Any:
    """Diffrax's own, in which the state is of the scheme's parts."""
    no_step = (None, None) if setup.event is None else (clock.t0, clock.t0)
    watch = begin(setup.scheme.readout(codes0), clock.t0)
    before = clock.t0 if setup.scheme.looks_back else None
    progress = Progress(jnp.zeros((), jnp.int32), watch, before)
    return eqx.tree_at(
        lambda s: (
            *(s.y, s.solver_state, s.controller_state),
            *(s.tprev, s.tnext, s.event_tprev, s.event_tnext),
        ),
        setup.init_state,
        (codes0, progress, controller_state, clock.t0, clock.first_end, *no_step),
        is_leaf=lambda x: x is None,
    )


def _fields(
    increment: AbstractIncrement, setup: Setup, perturbed: Any, lanes: Lanes
) -> Fields:
    """Of a scheme, as both passes evaluate them."""
    isolated, differentiated, times = False, False, False
    if perturbed is not None and setup.scheme.arithmetic.exact:
        isolated, differentiated = True, perturbed.increment
        times = any_of(perturbed.clock)
    diff, nondiff = eqx.partition(increment, differentiated)
    return Fields(
        diff=diff,
        nondiff=nondiff,
        axes=lanes.axes,
        axis_name=lanes.axis_name,
        isolated=isolated,
        error=setup.error,
        dense=setup.dense,
        times=times,
        lane=lanes.lane,
    )


def run_for_derivative(parts: Parts, setup: Setup, **kwargs) -> Forward:
    """`run`, where a derivative is to follow.

    **Raises:** `NotImplementedError` if that would lack a part.
    """
    clock, scheme = parts.clock, setup.scheme
    y0 = scheme.readout(parts.beginning.encoded(scheme))
    moment = Moment(clock.t0, clock.first_end, clock.controller_state)
    known = moment, y0, error_like(y0) if setup.error else None
    is_closed = isinstance(clock.controller, ClosedController)
    if is_closed and clock.controller.follows_state(*known):
        raise NotImplementedError(_FOLLOWS_STATE)
    return run(parts, setup, **kwargs)


_FOLLOWS_STATE = (
    "Apply `jax.lax.stop_gradient` to what your `stepsize_controller` computes from "
    "`y0`, `y1_candidate` or `y_error`: the sizes of its steps have a derivative with "
    "respect to the state, and are constants here, as those of Diffrax's own "
    "controllers are. Or use `adjoint=diffrax.RecursiveCheckpointAdjoint()` with the "
    f"same solver. ({CALL})"
)


def _recorder(setup: Setup, clock: Clock, perturbed: Any) -> Recorder:
    """The controller, made to record, with the derivatives of what it records by those
    numbers of the clock that are differentiated."""
    sensitivity, varied = None, None if perturbed is None else perturbed.clock
    if setup.plan.times and any_of(varied):
        sensitivity = Sensitivity(*eqx.partition(clock, varied))
    controller: Any = clock.controller
    prescribed = times_of(setup, clock)
    return Recorder(
        controller, setup.plan, prescribed, sensitivity, setup.just_below_t1
    )


def _taken_apart(
    final_state: Any, aux_stats: dict, setup: Setup, grid: Grid | None
) -> Forward:
    """What the loop returns, in its parts."""
    codes, recorded = final_state.y, final_state.controller_state
    progress, scheme = final_state.solver_state, setup.scheme
    # Only now is it stopped by what was seen, so that lanes of a batch that take the
    # same steps may share a clock: what is not sound remains so.
    watch = _with_last_try(progress.watch, final_state, recorded.tried, scheme)
    result = final_state.result
    result = dfx.RESULTS.where(watch.is_sound, result, result_of(watch))
    num_steps = setup.steps_before + progress.num_steps
    final_state = eqx.tree_at(
        lambda s: (s.y, s.solver_state, s.controller_state, s.result),
        final_state,
        (
            scheme.readout(codes),
            ReversibleState(
                codes=scheme.returned(codes),
                num_steps=num_steps,
                watch=watch,
                before=progress.before,
                grid=None if grid is None else grid._replace(end=jnp.inf),
            ),
            recorded.inner,
            result,
        ),
        is_leaf=lambda x: x is None,
    )
    return Forward(final_state, aux_stats, codes, recorded.record, recorded.num_shed)


def _with_last_try(
    watch: Watch, final_state: Any, tried: Any, scheme: AbstractScheme
) -> Watch:
    """What was seen, and what of the last step that was tried: a controller that gave
    up may have been rejecting steps that were no numbers, or have stopped where the gap
    was too large for it."""
    result, state = final_state.result, watch.state
    outgrown = (state == LOST) & scheme.outgrown(final_state.y)
    state = jnp.where(outgrown, OUTGROWN, state)
    state = jnp.where(result == DIVERGED, APART, state)
    if tried is not None:
        gave_up = ~dfx.is_okay(result) & (state == SOUND)
        state = jnp.where(gave_up, tried, state)
    return watch.with_state(state)


def _save_with(fn: Callable, scheme: AbstractScheme) -> Callable:
    def save(t, y, args):
        return fn(t, y.y if isinstance(y, Interpolated) else scheme.readout(y))

    return save


def times_of(setup: Setup, clock: Clock) -> PrescribedTimes | None:
    """The times of the steps, if the controller prescribes them."""
    if setup.plan.times:
        return None
    return PrescribedTimes(clock, setup.just_below_t1)


def tape_of(setup: Setup, clock: Clock, record: Record) -> Tape:
    """What the way back reads."""
    times = record.times if setup.plan.times else times_of(setup, clock)
    return Tape(cast(AbstractTimes, times), record, setup.plan)
