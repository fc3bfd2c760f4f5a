"""`ReversibleAdjoint`: forward through Diffrax's own loop, backward without a tape.

`diffeqsolve` hands an adjoint everything about the solve. Here the increment and the
saved functions are closed over all the arrays they depend on, and those, with the
initial pair, are the inputs of one custom derivative rule. Forward it runs Diffrax's
loop and keeps the final pair; backward it walks the steps in reverse, `_backward.py`.
"""

import functools as ft
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._backward import Carry, StepBack, largest_of_pair, walk_back, wide
from ._certificate import certify
from ._compat import (
    integration_loop,
    nondifferentiable,
    nondifferentiable_backward,
    while_loop,
)
from ._coupling import Pair
from ._guard import reverse_only
from ._increment import make_increment
from ._observe import Observation, close_fn, is_subsaveat
from ._pair import Scheme
from ._solver import ClosedSolver, Reversible, check_problem
from ._tape import (
    AbstractTape,
    Index,
    PrescribedTape,
    Recorder,
    prescribes_times,
    recording_while_loop,
)

_CALL = "`diffrax.diffeqsolve(..., adjoint=reversax.ReversibleAdjoint())`"


class _Setup(eqx.Module):
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

    @property
    def subs(self) -> list[dfx.SubSaveAt]:
        return jtu.tree_leaves(self.saveat.subs, is_leaf=is_subsaveat)


def _is_none(x: Any) -> bool:
    return x is None


def _check_call(solver, stepsize_controller, event, saveat, max_steps) -> None:
    if not issubclass(type(solver), Reversible):
        name = type(solver).__name__
        raise TypeError(
            f"{_CALL} needs `solver=reversax.Reversible(...)`, got `{name}`. Wrap the "
            f"solver, for example `reversax.Reversible(diffrax.{name}())` if it is an "
            "explicit one-step method, or use "
            "`adjoint=diffrax.RecursiveCheckpointAdjoint()`."
        )
    if event is not None:
        raise NotImplementedError(
            f"{_CALL} does not support `event=...` yet, got {event!r}. Use "
            "`adjoint=diffrax.RecursiveCheckpointAdjoint()` with the same solver."
        )
    if saveat.dense:
        raise NotImplementedError(
            f"{_CALL} does not support `saveat=diffrax.SaveAt(dense=True)` yet. Save at "
            "given times with `SaveAt(ts=...)`, or use "
            "`adjoint=diffrax.RecursiveCheckpointAdjoint()` with the same solver."
        )
    if max_steps is None and not prescribes_times(stepsize_controller):
        name = type(stepsize_controller).__name__
        raise ValueError(
            f"{_CALL} got `max_steps=None` with `stepsize_controller={name}(...)`. The "
            "times of the steps that an adaptive controller accepts are recorded, two "
            "numbers a step, so their number must be bounded: pass `max_steps=...`, or "
            "use `diffrax.ConstantStepSize()` or `diffrax.StepTo(...)`, which need no "
            "record."
        )


def _constant(tree: PyTree, what: str) -> PyTree:
    """Refuses to be differentiated with respect to `tree`, rather than give zero."""
    message = (
        f"{_CALL} cannot be differentiated with respect to {what}: it gives gradients "
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
        f"{_CALL} got an infinite `t1`. Only an event could end such a solve, and "
        "events are not supported yet: pass a finite `t1`, or use "
        "`adjoint=diffrax.RecursiveCheckpointAdjoint()` with the same solver.",
    )


def set_up(
    *,
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
    """Splits a solve into what is differentiated and a `_Setup`."""
    _check_call(solver, stepsize_controller, event, saveat, max_steps)
    y0, scheme = init_state.y, solver.scheme
    check_problem(solver, terms, y0)
    if passed_solver_state:
        pair0 = scheme.rebase(init_state.solver_state, y0)
    else:
        pair0 = scheme.start(y0)
    increment = make_increment(solver.solver, terms, args).close(t0, y0)
    subs = jtu.tree_leaves(saveat.subs, is_leaf=is_subsaveat)
    fns = [close_fn(sub, args, t0, y0) for sub in subs]
    saveat = eqx.tree_at(lambda s: _fns(s), saveat, replace_fn=lambda _: None)
    where_state = lambda s: (s.y, s.solver_state)
    init_state = eqx.tree_at(where_state, init_state, (None, None), is_leaf=_is_none)
    setup = _Setup(
        scheme=scheme,
        base_interpolation_cls=solver.solver.interpolation_cls,
        error_order=solver.error_order(terms),
        dense=any(sub.ts is not None for sub in subs),
        controller=_constant(stepsize_controller, "the step-size controller"),
        saveat=_constant(saveat, "the times of `SaveAt(ts=...)`"),
        init_state=_constant(init_state, "`t0`, `dt0` or the controller's state"),
        t0=_constant(t0, "`t0`"),
        t1=_finite(_constant(t1, "`t1`")),
        dt0=_constant(dt0, "`dt0`"),
        max_steps=max_steps,
        progress_meter=progress_meter,
        round_trip_tolerance=round_trip_tolerance,
    )
    return (pair0, increment, fns), setup


def _fns(saveat: dfx.SaveAt) -> list:
    return [sub.fn for sub in jtu.tree_leaves(saveat.subs, is_leaf=is_subsaveat)]


def _save_with(fn):
    return lambda t, y, args: fn(t, y)


def run(parts, setup: _Setup) -> tuple[Any, dict, AbstractTape]:
    """Solves forward in Diffrax's loop. The final pair is the final solver state."""
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
    controller = setup.controller
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
    if recorded:
        tape = final_state.controller_state.tape
        final_state = eqx.tree_at(
            lambda s: s.controller_state,
            final_state,
            final_state.controller_state.inner,
            is_leaf=_is_none,
        )
    else:
        first_end = setup.init_state.tnext
        tape = PrescribedTape(controller, first_state, setup.t0, setup.t1, first_end)
    return final_state, aux_stats, tape


class _Residuals(eqx.Module):
    """What the backward pass needs of the forward pass."""

    pair: Pair
    tape: AbstractTape
    num_steps: Index
    num_ts: list[Index]
    t_final: Array


def _save_states(state, setup: _Setup) -> list:
    """Diffrax's record of saved outputs for each `SubSaveAt`, or its cotangents."""
    structure = jtu.tree_structure(setup.saveat.subs, is_leaf=is_subsaveat)
    return structure.flatten_up_to(state.save_state)


def _materialise(like: PyTree[Array], ct: PyTree) -> PyTree[Array]:
    """Zeros for symbolic zeros; `None` for what has no cotangent."""

    def leaf(x, ct):
        if not eqx.is_inexact_array(x):
            return None
        return jnp.zeros_like(x) if ct is None else ct

    return jtu.tree_map(leaf, like, ct)


@eqx.filter_custom_vjp
def _solve(parts, *, setup: _Setup):
    final_state, aux_stats, _ = run(parts, setup)
    return final_state, aux_stats


@_solve.def_fwd
def _solve_fwd(perturbed, parts, *, setup: _Setup):
    del perturbed
    final_state, aux_stats, tape = run(parts, setup)
    save_states = _save_states(final_state, setup)
    residuals = _Residuals(
        pair=final_state.solver_state,
        tape=tape,
        num_steps=jnp.asarray(final_state.num_accepted_steps),
        num_ts=[jnp.asarray(s.saveat_ts_index) for s in save_states],
        t_final=final_state.tprev,
    )
    return (final_state, aux_stats), residuals


@_solve.def_bwd
def _solve_bwd(residuals: _Residuals, ct_out, perturbed, parts, *, setup: _Setup):
    pair0, *_ = parts
    ct_final_state, _ = ct_out
    saved = zip(
        setup.subs,
        _save_states(setup.init_state, setup),
        _save_states(ct_final_state, setup),
        strict=True,
    )
    observations = [
        Observation(sub, _materialise(state.ys, ct.ys)) for sub, state, ct in saved
    ]
    diff, nondiff = eqx.partition(parts[1:], perturbed[1:])
    step_back = StepBack(
        scheme=setup.scheme,
        tape=residuals.tape,
        base_interpolation_cls=setup.base_interpolation_cls,
        dense=setup.dense,
        observations=observations,
        diff=diff,
        nondiff=nondiff,
    )
    ct_pair = _materialise(residuals.pair, ct_final_state.solver_state)
    first = _first_carry(step_back, residuals, pair0, ct_pair)
    last = walk_back(step_back, first)
    ct_pair, ct_parameters = step_back.pull_outputs_at_start(
        last, setup.t0, setup.t0 == setup.t1
    )
    ct_parameters = jtu.tree_map(lambda d, ct: ct.astype(d.dtype), diff, ct_parameters)
    return certify(
        (ct_pair, *ct_parameters),
        setup.scheme,
        reconstructed=last.pair,
        true=pair0,
        scale=last.scale,
        tolerance=setup.round_trip_tolerance,
    )


def _first_carry(
    step_back: StepBack, residuals: _Residuals, pair0: Pair, ct_pair: Pair
) -> Carry:
    """Where the walk begins: at the end, with what was saved there pulled back."""
    sizes = [largest_of_pair(step_back.scheme, p) for p in (pair0, residuals.pair)]
    carry = Carry(
        num_steps=residuals.num_steps,
        pair=residuals.pair,
        ct_pair=ct_pair,
        ct_parameters=jtu.tree_map(lambda x: wide(jnp.zeros_like(x)), step_back.diff),
        num_ts=residuals.num_ts,
        scale=jtu.tree_map(jnp.maximum, *sizes),
    )
    return step_back.pull_outputs_at_end(carry, residuals.t_final)


def _only_outputs_differentiable(final_state: Any, setup: _Setup) -> Any:
    """Refuses cotangents of anything but the saved `ys` and the solver's state."""
    where = lambda s: [s.solver_state, *(x.ys for x in _save_states(s, setup))]
    message = (
        f"{_CALL} was differentiated through an output other than `ys` and "
        "`solver_state` (times, the controller's state, statistics); these have no "
        "gradient. Apply `jax.lax.stop_gradient` to it, or use "
        "`adjoint=diffrax.RecursiveCheckpointAdjoint()` with the same solver."
    )
    stopped = nondifferentiable_backward(final_state, msg=message, symbolic=False)
    return eqx.tree_at(where, stopped, where(final_state), is_leaf=_is_none)


class ReversibleAdjoint(dfx.AbstractAdjoint):
    """Exact gradients of `diffrax.diffeqsolve` in memory independent of the number of
    steps, for a [`reversax.Reversible`][] solver.

    The gradient is that of the discrete solve (up to the round-off of undoing its
    steps), as [`diffrax.RecursiveCheckpointAdjoint`][] would compute it, for the same
    solver. It is taken with respect to `y0`, `args` and the parameters of the terms
    and of `SaveAt(fn=...)`, including values that their functions close over.

    Use it for solves of many steps, or where memory is short. For a stiff problem, for
    an implicit solver, for events, dense output, derivatives with respect to times, or
    forward-mode differentiation use one of Diffrax's adjoints. For a short solve of a
    small state, checkpointing the plain base solver is as good.

    Memory is a few copies of the state and of the parameters, and with a controller
    that adapts two numbers per step of `max_steps`. Backward, each step costs as many
    vector field evaluations as forward, and their pull-backs.

    Every backward pass checks that it arrives at the initial state again.
    """

    round_trip_tolerance: float | None = None

    def __check_init__(self):
        tolerance = self.round_trip_tolerance
        if tolerance is None:
            return
        if not isinstance(tolerance, int | float) or not tolerance >= 0:
            raise ValueError(
                "`reversax.ReversibleAdjoint(round_trip_tolerance=...)` must be a "
                f"Python number of at least 0, `math.inf`, or `None`, got {tolerance!r}."
            )

    def loop(
        self,
        *,
        throw,
        passed_solver_state,
        passed_controller_state,
        **solve,
    ):
        del throw, passed_controller_state
        parts, setup = set_up(
            **solve,
            passed_solver_state=passed_solver_state,
            round_trip_tolerance=self.round_trip_tolerance,
        )
        inexact, rest = eqx.partition(parts, eqx.is_inexact_array)
        parts = eqx.combine(jtu.tree_map(reverse_only, inexact), rest)
        final_state, aux_stats = _solve(parts, setup=setup)
        return _only_outputs_differentiable(final_state, setup), aux_stats


ReversibleAdjoint.__init__.__doc__ = """**Arguments:**

- `round_trip_tolerance`: how far from `y0` the backward pass may arrive, relative to
    the largest size that the state had, per leaf of the state; dimensionless. By
    default the square root of the leaf's machine epsilon: 3.5e-4 in single precision,
    1.5e-8 in double. `math.inf` switches the check off.

**Raises:** when a solve begins, `TypeError` for a solver that is not
[`reversax.Reversible`][], `NotImplementedError` for `event=...` and
`SaveAt(dense=True)`, `ValueError` for `max_steps=None` with a controller that adapts.
When differentiated, an error for times and controllers, and `NotImplementedError` in
forward mode. In the backward pass, `equinox.EquinoxRuntimeError` if the round trip
exceeds the tolerance.
"""
