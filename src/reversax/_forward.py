"""The forward pass, through Diffrax's own loop."""

import functools as ft
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, cast

import diffrax as dfx
import equinox as eqx
from jaxtyping import PyTree

from ._compat import NONFINITE, integration_loop, while_loop
from ._coupling import Pair
from ._increment import AbstractIncrement
from ._pair import Scheme
from ._psi import Psi
from ._setup import Setup, saved_fns
from ._solver import ClosedSolver, Interpolated, TwinState, is_finite
from ._tape import (
    AbstractTimes,
    PrescribedTimes,
    Record,
    Recorder,
    RecorderState,
    Tape,
    recording_while_loop,
)


class Forward(NamedTuple):
    """What a forward pass returns."""

    final_state: Any
    """Diffrax's, with the solver's state as [`reversax.Reversible`][] has it."""
    aux_stats: dict
    pair: Pair
    record: Record


def run(
    parts: tuple[Pair, AbstractIncrement, list],
    setup: Setup,
    *,
    perturbed: PyTree[bool],
    axes: tuple | None = None,
    axis_name: Hashable = None,
) -> Forward:
    """Solves forward in Diffrax's loop.

    `perturbed` says what of the increment will be differentiated, and `axes` what of it
    has an axis of lanes, both so that the two passes evaluate it alike. If `perturbed`
    is `None` there is no other pass.
    """
    pair0, increment, fns = parts
    scheme, plan = setup.scheme, setup.plan
    isolated = scheme.arithmetic.exact and perturbed is not None
    diff, nondiff = eqx.partition(increment, perturbed if isolated else False)
    psi = Psi(diff, nondiff, axes, axis_name, isolated, setup.error, setup.dense)
    solver = ClosedSolver(scheme, psi, setup.base_interpolation_cls, setup.error_order)
    fns = [_save_with(fn, scheme) for fn in fns]
    saveat = eqx.tree_at(saved_fns, setup.saveat, fns, is_leaf=lambda x: x is None)
    controller: Any = setup.controller
    controller_state = setup.init_state.controller_state
    if not plan.empty:
        prescribed = times_of(setup) if scheme.arithmetic.exact else None
        controller = Recorder(controller, plan, prescribed)
        controller_state = controller.begin(controller_state, setup.t0, pair0)
    init_state = eqx.tree_at(
        lambda s: (s.y, s.solver_state, s.controller_state),
        setup.init_state,
        (pair0, plan.steps_before, controller_state),
        is_leaf=lambda x: x is None,
    )
    final_state, aux_stats = integration_loop(
        solver=solver,
        stepsize_controller=controller,
        event=None,
        saveat=saveat,
        t0=setup.t0,
        t1=setup.t1,
        dt0=setup.dt0,
        max_steps=setup.max_steps,
        terms=None,
        args=None,
        init_state=init_state,
        inner_while_loop=ft.partial(while_loop, kind="lax"),
        outer_while_loop=recording_while_loop,
        progress_meter=setup.progress_meter,
    )
    return _taken_apart(final_state, aux_stats, scheme)


def _taken_apart(final_state: Any, aux_stats: dict, scheme: Scheme) -> Forward:
    """What the loop returns, in its parts."""
    pair, record = final_state.y, Record(None, None, None)
    controller_state = final_state.controller_state
    if isinstance(controller_state, RecorderState):
        record, controller_state = controller_state.record, controller_state.inner
    result = final_state.result
    if scheme.arithmetic.exact:
        # Looked at now, not at every step, so that lanes of a batch that take the same
        # steps may share a clock: what is not finite remains so.
        failed = dfx.is_okay(result) & ~is_finite(scheme, pair)
        result = dfx.RESULTS.where(failed, NONFINITE, result)
    final_state = eqx.tree_at(
        lambda s: (s.y, s.solver_state, s.controller_state, s.result),
        final_state,
        (
            scheme.readout(pair),
            TwinState(pair, final_state.solver_state),
            controller_state,
            result,
        ),
        is_leaf=lambda x: x is None,
    )
    return Forward(final_state, aux_stats, pair, record)


def _save_with(fn: Callable, scheme: Scheme) -> Callable:
    def save(t, y, args):
        return fn(t, y.y if isinstance(y, Interpolated) else scheme.readout(y))

    return save


def times_of(setup: Setup) -> PrescribedTimes | None:
    """The times of the steps, if the controller prescribes them."""
    if setup.plan.times:
        return None
    init, controller = setup.init_state, cast(Any, setup.controller)
    return PrescribedTimes(
        controller,
        init.controller_state,
        setup.t0,
        setup.t1,
        init.tnext,
        setup.just_below_t1,
        setup.scheme.arithmetic.exact,
    )


def tape_of(setup: Setup, record: Record) -> Tape:
    """What the way back reads."""
    times = record.times if setup.plan.times else times_of(setup)
    return Tape(cast(AbstractTimes, times), record, setup.plan)
