"""The forward pass: what an adjoint is handed, split into what is differentiated and
what is not, and run through Diffrax's own loop.

The increment and the saved functions are closed over all the arrays they depend on, so
that these, with the initial pair, are the inputs of one function, `run`.
"""

import functools as ft
from typing import Any, cast

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._compat import integration_loop, nondifferentiable, while_loop
from ._increment import make_increment
from ._observe import close_fn, is_subsaveat
from ._pair import Scheme
from ._solver import ClosedSolver, Reversible, check_problem
from ._tape import (
    AbstractTape,
    PrescribedTape,
    RecordedTape,
    Recorder,
    prescribes_times,
    recording_while_loop,
)

CALL = "`diffrax.diffeqsolve(..., adjoint=reversax.ReversibleAdjoint())`"


class Setup(eqx.Module):
    """All of a solve that is not differentiated."""

    scheme: Scheme
    base_interpolation_cls: Any = eqx.field(static=True)
    error_order: Any
    dense: bool = eqx.field(static=True)
    controller: dfx.AbstractStepSizeController
    saveat: dfx.SaveAt
    """With nothing in the place of each `fn`."""
    init_state: Any
    """Diffrax's own, with nothing in the places of `y` and `solver_state`."""
    t0: Array
    t1: Array
    dt0: Array | None
    max_steps: int | None = eqx.field(static=True)
    progress_meter: dfx.AbstractProgressMeter
    round_trip_tolerance: float | None = eqx.field(static=True)
    throw: bool = eqx.field(static=True)

    @property
    def subs(self) -> list[dfx.SubSaveAt]:
        return _subs(self.saveat)

    @staticmethod
    def save_states(state: Any) -> list:
        """Diffrax's record of saved outputs for each `SubSaveAt`, out of a state of
        its loop or the cotangent of one. (It has `None`s where `subs` has.)"""
        is_save_state = lambda x: hasattr(x, "saveat_ts_index")
        leaves = jtu.tree_leaves(state.save_state, is_leaf=is_save_state)
        return [x for x in leaves if is_save_state(x)]


def _is_none(x: Any) -> bool:
    return x is None


def _check_call(call, solver, stepsize_controller, event, saveat, max_steps) -> None:
    # By exact type: `isinstance` looks through wrappers such as `HalfSolver`, and the
    # adjoint takes the step of `Reversible`, whatever a subclass may do.
    if type(solver) is not Reversible:
        name = type(solver).__name__
        if isinstance(solver, Reversible):
            wrap = "Make `Reversible` the outermost wrapper, of no class but its own"
        else:
            wrap = f"Wrap an explicit solver: `reversax.Reversible({name}(...))`"
        raise TypeError(
            f"{call} needs `solver=reversax.Reversible(...)`, got `{name}`. {wrap}; or "
            "use `adjoint=diffrax.RecursiveCheckpointAdjoint()`."
        )
    if event is not None:
        raise NotImplementedError(
            f"{call} does not support `event=...` yet, got {event!r}. Use "
            "`adjoint=diffrax.RecursiveCheckpointAdjoint()` with the same solver."
        )
    if saveat.dense:
        raise NotImplementedError(
            f"{call} does not support `saveat=diffrax.SaveAt(dense=True)` yet. Save "
            "at given times with `SaveAt(ts=...)`, or use "
            "`adjoint=diffrax.RecursiveCheckpointAdjoint()` with the same solver."
        )
    if max_steps is None and not prescribes_times(stepsize_controller):
        name = type(stepsize_controller).__name__
        raise ValueError(
            f"{call} got `max_steps=None` with `stepsize_controller={name}(...)`. The "
            "times of the steps that an adaptive controller accepts are recorded, two "
            "numbers a step, so their number must be bounded: pass `max_steps=...`, or "
            "use `diffrax.ConstantStepSize()` or `diffrax.StepTo(...)`, which need no "
            "record."
        )


def _constant(tree: PyTree, what: str) -> PyTree:
    """Refuses to be differentiated with respect to `tree`, rather than give zero."""
    message = (
        f"{CALL} cannot be differentiated with respect to {what}: it gives gradients "
        "with respect to `y0`, `args`, and parameters of the terms and of "
        "`SaveAt(fn=...)`. Apply `jax.lax.stop_gradient` to it if no such gradient is "
        "wanted, or use `adjoint=diffrax.RecursiveCheckpointAdjoint()` with the same "
        "solver."
    )
    return nondifferentiable(tree, msg=message)


def _finite(t1: Array) -> Array:
    return eqx.error_if(
        t1,
        ~jnp.isfinite(t1),
        f"{CALL} got an infinite `t1`. Only an event could end such a solve, and "
        "events are not supported yet: pass a finite `t1`, or use "
        "`adjoint=diffrax.RecursiveCheckpointAdjoint()` with the same solver.",
    )


def set_up(
    *,
    call,
    throw,
    args,
    terms,
    solver,
    stepsize_controller,
    event,
    saveat,
    t0,
    t1,
    dt0,
    max_steps,
    init_state,
    passed_solver_state,
    progress_meter,
    round_trip_tolerance,
):
    """Splits a solve into what is differentiated and a `Setup`."""
    _check_call(call, solver, stepsize_controller, event, saveat, max_steps)
    y0, scheme = init_state.y, solver.scheme
    check_problem(solver, terms, y0)
    if passed_solver_state:
        pair0 = scheme.rebase(init_state.solver_state, y0)
    else:
        pair0 = scheme.start(y0)
    increment = make_increment(solver.solver, terms, args).close(t0, y0)
    subs = _subs(saveat)
    fns = [close_fn(sub, args, t0, y0) for sub in subs]
    saveat = eqx.tree_at(lambda s: _fns(s), saveat, replace_fn=lambda _: None)
    where_state = lambda s: (s.y, s.solver_state)
    init_state = eqx.tree_at(where_state, init_state, (None, None), is_leaf=_is_none)
    # First, so that a derivative in one of these is not blamed on what follows from it.
    t0, t1, dt0 = _constant((t0, t1, dt0), "`t0`, `t1` or `dt0`")
    setup = Setup(
        scheme=_constant(scheme, "the coupling or the arithmetic"),
        base_interpolation_cls=solver.solver.interpolation_cls,
        error_order=solver.error_order(terms),
        dense=any(sub.ts is not None for sub in subs),
        controller=_constant(stepsize_controller, "the step-size controller"),
        saveat=_constant(saveat, "the times of `SaveAt(ts=...)`"),
        init_state=_constant(init_state, "the controller's state"),
        t0=t0,
        t1=_finite(t1),
        dt0=dt0,
        max_steps=max_steps,
        progress_meter=progress_meter,
        round_trip_tolerance=round_trip_tolerance,
        throw=throw,
    )
    return (pair0, increment, fns), setup


def _subs(saveat: dfx.SaveAt) -> list[dfx.SubSaveAt]:
    # `subs` may hold `None`s, and is one if only states are saved.
    leaves = jtu.tree_leaves(saveat.subs, is_leaf=is_subsaveat)
    return [sub for sub in leaves if is_subsaveat(sub)]


def _fns(saveat: dfx.SaveAt) -> list:
    return [sub.fn for sub in _subs(saveat)]


def _save_with(fn):
    return lambda t, y, args: fn(t, y)


def run(parts, setup: Setup) -> tuple[Any, dict, RecordedTape | None]:
    """Solves forward in Diffrax's loop. The final pair is the final solver state, and
    the times are returned if they had to be recorded."""
    pair0, increment, fns = parts
    recorded = not prescribes_times(setup.controller)
    solver = ClosedSolver(
        setup.scheme,
        increment,
        setup.base_interpolation_cls,
        setup.error_order,
        error=recorded,
        dense=setup.dense,
    )
    saveat = eqx.tree_at(
        _fns, setup.saveat, [_save_with(fn) for fn in fns], is_leaf=_is_none
    )
    controller: Any = setup.controller
    first_state = setup.init_state.controller_state
    controller_state = first_state
    if recorded:
        assert setup.max_steps is not None
        controller = Recorder(controller)
        controller_state = controller.begin(first_state, setup.t0, setup.max_steps)
    init_state = eqx.tree_at(
        lambda s: (s.y, s.solver_state, s.controller_state),
        setup.init_state,
        (setup.scheme.readout(pair0), pair0, controller_state),
        is_leaf=_is_none,
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
    recorded_tape = None
    if isinstance(controller, Recorder):
        recorded_tape = final_state.controller_state.tape
        final_state = eqx.tree_at(
            lambda s: s.controller_state,
            final_state,
            final_state.controller_state.inner,
            is_leaf=_is_none,
        )
    return final_state, aux_stats, recorded_tape


def tape_of(setup: Setup, recorded: RecordedTape | None) -> AbstractTape:
    """The times of the steps, recorded or prescribed by the controller."""
    if recorded is not None:
        return recorded
    init, controller = setup.init_state, cast(Any, setup.controller)
    return PrescribedTape(
        controller, init.controller_state, setup.t0, setup.t1, init.tnext
    )
