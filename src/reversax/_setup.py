"""What an adjoint is handed, checked, and split into what is differentiated and what
is not.

The increment and the saved functions are closed over all the arrays they depend on, so
that these, with the initial pair, are the inputs of one function, `_forward.run`.

In floating point the pair may be kept now and then, for the way back to restart from.
Undoing a step magnifies round-off `eps` by `exp(a)`, and each undone step adds its own,
so after `K` of them the round trip is off by about

    eps * exp(a*K) / sqrt(2*a)   <=   tolerance / 4                                 (K)

where the four is to spare.
"""

import math
from typing import Any, cast

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._arithmetic import State
from ._compat import nondifferentiable
from ._increment import Time, make_increment
from ._observe import close_fn, is_subsaveat
from ._pair import Scheme
from ._solver import Reversible, TwinState, check_problem
from ._tape import Plan, just_below, prescribes_times

CALL = "`diffrax.diffeqsolve(..., adjoint=reversax.ReversibleAdjoint())`"


class Setup(eqx.Module):
    """All of a solve that is not differentiated."""

    plan: Plan
    base_interpolation_cls: Any = eqx.field(static=True)
    error_order: Any
    error: bool = eqx.field(static=True)
    """Whether the controller needs error estimates."""
    dense: bool = eqx.field(static=True)
    """Whether any output lies between steps."""
    controller: dfx.AbstractStepSizeController
    saveat: dfx.SaveAt
    """With nothing in the place of each `fn`."""
    init_state: Any
    """Diffrax's own, with nothing in the places of `y` and `solver_state`."""
    t0: Array
    t1: Array
    just_below_t1: Time
    dt0: Array | None
    max_steps: int | None = eqx.field(static=True)
    progress_meter: dfx.AbstractProgressMeter
    round_trip_tolerance: float | None = eqx.field(static=True)
    throw: bool = eqx.field(static=True)

    @property
    def scheme(self) -> Scheme:
        return self.plan.scheme

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


def _check_call(
    call, solver, stepsize_controller, event, saveat, max_steps, restart_every
) -> None:
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
    prescribed = prescribes_times(stepsize_controller)
    if max_steps is None and not prescribed:
        name = type(stepsize_controller).__name__
        raise ValueError(
            f"{call} got `max_steps=None` with `stepsize_controller={name}(...)`. The "
            "times of the steps that an adaptive controller accepts are recorded, two "
            "numbers a step, so their number must be bounded: pass `max_steps=...`, or "
            "use `diffrax.ConstantStepSize()` or `diffrax.StepTo(...)`, which need no "
            "record."
        )
    if max_steps is None and solver.scheme.sheds_every is not None:
        raise ValueError(
            f"{call} got `max_steps=None` with `arithmetic=reversax.FixedPoint(...)`. "
            "The bits that its steps shed are recorded, "
            f"{1 / solver.scheme.sheds_every:g} bits a step for each element of the "
            "state, so the number of steps must be bounded: pass `max_steps=...`, or "
            "use `arithmetic=reversax.FloatingPoint()`, which needs no record."
        )
    is_number = type(restart_every) is int and restart_every >= 1
    if not (is_number or restart_every in (None, "auto")):
        raise ValueError(
            f"{call} got `restart_every={restart_every!r}`: it must be a Python "
            'integer of at least 1, `None`, or "auto".'
        )
    if is_number and max_steps is None:
        raise ValueError(
            f"{call} got `max_steps=None` with `restart_every={restart_every}`. The "
            "pairs kept to restart from are as many as the steps, so the number of "
            "steps must be bounded: pass `max_steps=...`, or `restart_every=None`."
        )


def _restart_every(
    asked: int | str | None,
    scheme: Scheme,
    y0: State,
    max_steps: int | None,
    tolerance: float | None,
) -> int | None:
    """At every how many steps to keep the pair, (K)."""
    if asked != "auto":
        return cast(int | None, asked)
    leaves, rate = jtu.tree_leaves(y0), scheme.coupling.amplification
    if scheme.arithmetic.exact or max_steps is None or rate == 0 or not leaves:
        return None
    eps = max(float(jnp.finfo(x.dtype).eps) for x in leaves)
    if tolerance is None or tolerance == math.inf:  # Not to check is not to be wrong.
        tolerance = math.sqrt(eps)
    digits = tolerance / (4 * eps) * math.sqrt(2 * rate)
    every = max(1, int(math.log(max(digits, 1)) / rate))  # (K)
    return every if every < max_steps else None


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


def _first_state(scheme: Scheme, y0: State, given: Any, passed: bool) -> TwinState:
    """The solver's state before the first step. If the user passed none, a new one, so
    that the derivative with respect to `y0` passes through no other."""
    if passed:
        return TwinState(scheme.rebase(given.pair, y0), given.num_steps)
    return TwinState(scheme.start(y0), jnp.zeros((), jnp.int32))


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
    restart_every,
):
    """Splits a solve into what is differentiated and a `Setup`."""
    controller = stepsize_controller
    _check_call(call, solver, controller, event, saveat, max_steps, restart_every)
    y0, scheme = init_state.y, solver.scheme
    check_problem(solver, terms, y0)
    state = _first_state(scheme, y0, init_state.solver_state, passed_solver_state)
    increment = make_increment(solver.solver, terms, args).close(t0, y0)
    fns = [close_fn(sub, args, t0, y0) for sub in _subs(saveat)]
    saveat = eqx.tree_at(lambda s: saved_fns(s), saveat, replace_fn=lambda _: None)
    places = lambda s: (s.y, s.solver_state)
    init_state = eqx.tree_at(places, init_state, (None, None), is_leaf=_is_none)
    # First, so that a derivative in one of these is not blamed on what follows from it.
    t0, t1, dt0 = _constant((t0, t1, dt0), "`t0`, `t1` or `dt0`")
    adapts = not prescribes_times(controller)
    every = _restart_every(restart_every, scheme, y0, max_steps, round_trip_tolerance)
    plan = Plan(
        scheme=_constant(scheme, "the coupling or the arithmetic"),
        times=adapts,
        restart_every=every,
        max_steps=max_steps,
        steps_before=state.num_steps,
    )
    return (state.pair, increment, fns), Setup(
        plan=plan,
        base_interpolation_cls=solver.solver.interpolation_cls,
        error_order=solver.error_order(terms),
        error=adapts,
        dense=any(sub.ts is not None for sub in _subs(saveat)),
        controller=_constant(controller, "the step-size controller"),
        saveat=_constant(saveat, "the times of `SaveAt(ts=...)`"),
        init_state=_constant(init_state, "the controller's state"),
        t0=t0,
        t1=_finite(t1),
        just_below_t1=just_below(t1),
        dt0=dt0,
        max_steps=max_steps,
        progress_meter=progress_meter,
        round_trip_tolerance=round_trip_tolerance,
        throw=throw,
    )


def _subs(saveat: dfx.SaveAt) -> list[dfx.SubSaveAt]:
    # `subs` may hold `None`s, and is one if only states are saved.
    leaves = jtu.tree_leaves(saveat.subs, is_leaf=is_subsaveat)
    return [sub for sub in leaves if is_subsaveat(sub)]


def saved_fns(saveat: dfx.SaveAt) -> list:
    return [sub.fn for sub in _subs(saveat)]
