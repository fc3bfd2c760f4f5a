"""What an adjoint is handed, checked, and split into what is differentiated and what
is not.

The fields and the saved functions are closed over all the arrays they depend on, so
that these, with the initial state, are the inputs of one function, `run` of
`forward.py`.

In floating point the state may be kept now and then, for the way back to restart from.
Undoing a step magnifies round-off `eps` by `exp(a)`, and each undone step adds its own,
so after `K` of them the round trip is off by about

    eps * exp(a*K) / sqrt(2*a)   <=   tolerance / 4                                 (K)

where the four is to spare. Where the number of bits that steps lose follows from the
solve, so that `a` is not known, `a = ln(2)/4` is the smallest that it can be, and
`exp(a*K)` the power of two of the bits, by which the state is kept.
"""

import math
from typing import Any, NamedTuple, cast

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from .._numbers.arithmetic import State
from .._numbers.schedule import (
    MOST,
    SELDOM,
    AbstractSchedule,
    Index,
    over_steps,
    over_time,
)
from .._schemes.base import check_memory
from .._schemes.control import Time, direction_of
from .._schemes.problem import Problem, check_problem
from .._schemes.scheme import AbstractScheme
from .._schemes.watch import look_every
from .._solver import Reversible
from .._xla.compat import number_of_steps, step_length
from .beginning import Beginning
from .clock import Clock, Moment, Reads, close_controller, just_below
from .event import close_event, without_derivatives
from .observe import close_fn, is_subsaveat
from .tape import Plan, Restarts
from .times import prescribes_times

CALL = "`diffrax.diffeqsolve(..., adjoint=reversax.ReversibleAdjoint())`"


class Parts(NamedTuple):
    """All of a solve that may be differentiated; or what concerns each of these."""

    beginning: Any
    """Before the first step."""
    increment: Any
    """What the fields of a scheme are, closed over all that they depend on."""
    fns: Any
    """The saved functions, likewise."""
    clock: Any


class Setup(eqx.Module):
    """All of a solve that is not differentiated."""

    plan: Plan
    steps_before: Index
    """How many steps were taken before the solve, if it resumes another."""
    look_every: Any
    """At every how many steps to look whether all is well; at each, where it is not
    known which is the last."""
    direction: Any
    """Of time as the user has it, 1 or -1."""
    error_order: Any
    error: bool = eqx.field(static=True)
    """Whether the controller needs error estimates."""
    dense: bool = eqx.field(static=True)
    """Whether any output lies between steps."""
    saveat: dfx.SaveAt
    """With nothing in the place of each `fn` and `ts`."""
    event: dfx.Event | None
    """Without a root finder, and with conditions that are functions of time and state
    alone."""
    init_state: Any
    """Diffrax's own, with nothing in the places of `y`, of the times, and of the states
    of solver and controller."""
    just_below_t1: Time
    progress_meter: dfx.AbstractProgressMeter
    backward_meter: dfx.AbstractProgressMeter
    round_trip_tolerance: float | None = eqx.field(static=True)
    unbounded: str | None = eqx.field(static=True)
    """Why the solve cannot be walked back over, if so."""
    throw: bool = eqx.field(static=True)

    @property
    def scheme(self) -> AbstractScheme:
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


def _check_call(call, solver, restart_every) -> None:
    # By exact type: `isinstance` looks through wrappers such as `HalfSolver`, and the
    # adjoint takes the step of `Reversible`, whatever a subclass may do.
    if type(solver) is not Reversible:
        name = type(solver).__name__
        if isinstance(solver, Reversible):
            wrap = "Make `Reversible` the outermost wrapper, of no class but its own"
        else:
            wrap = f"Wrap an explicit solver: `reversax.Reversible({name}(...))`"
        raise TypeError(
            f"{wrap}; or use `adjoint=diffrax.RecursiveCheckpointAdjoint()`: {call} "
            f"needs `solver=reversax.Reversible(...)`, got `{name}`."
        )
    is_number = type(restart_every) is int and restart_every >= 1
    if not (is_number or restart_every in (None, "auto")):
        raise ValueError(
            'Pass a Python integer of at least 1, `None`, or "auto" as '
            f"`reversax.ReversibleAdjoint(restart_every=...)`, not {restart_every!r}."
        )


def _checked(problem: Problem, solver: Reversible) -> Problem:
    check_problem(solver.solver, solver.coupling, problem)
    check_memory(solver.solver, solver.memoryless, problem)
    return problem


def _scheme_of(solver: Reversible, controller: Any) -> AbstractScheme:
    scheme = solver.scheme
    if scheme.equal_steps and type(controller) is not dfx.ConstantStepSize:
        raise TypeError(
            "Use `stepsize_controller=diffrax.ConstantStepSize()`, or a one-step base "
            "such as `reversax.Reversible(diffrax.Tsit5())` with this "
            f"`{type(controller).__name__}`: a multistep method reads states at equal "
            f"distances. ({CALL})"
        )
    # A controller of another kind may jump between two steps.
    return scheme.reusing() if prescribes_times(controller) else scheme


def _unbounded(solver, controller, event, max_steps, restart_every) -> str | None:
    """Why the solve cannot be walked back over, if the number of its steps has no
    bound: something is recorded at each."""
    if max_steps is not None:
        return None
    if event is not None:
        what = "before an event the times of all steps are recorded"
    elif not prescribes_times(controller):
        name = type(controller).__name__
        what = (
            f"the times that `{name}` chooses are recorded (`diffrax.ConstantStepSize` "
            "and `diffrax.StepTo` need no record)"
        )
    elif solver.scheme.sheds:
        what = solver.scheme.what_is_kept
    elif isinstance(restart_every, int):
        what = f"the state is kept at every {restart_every} steps (`restart_every`)"
    else:
        return None
    return f"Pass `max_steps=...`, a bound on the number of steps: {what}. ({CALL})"


def _restarts(
    asked: int | str | None,
    scheme: AbstractScheme,
    y0: State,
    max_steps: int | None,
    tolerance: float | None,
) -> Restarts | None:
    """Where to keep the state, (K)."""
    if asked != "auto":
        return None if asked is None else Restarts(cast(int, asked))
    leaves, rate = jtu.tree_leaves(y0), scheme.amplification
    if scheme.arithmetic.exact or max_steps is None or rate == 0 or not leaves:
        return None
    eps = max(float(jnp.finfo(x.dtype).eps) for x in leaves)
    if tolerance is None or tolerance == math.inf:  # Not to check is not to be wrong.
        tolerance = math.sqrt(eps)
    slowest = math.log(2) / SELDOM if rate is None else rate
    digits = math.log(max(tolerance / (4 * eps) * math.sqrt(2 * slowest), 1))
    if rate is None:
        # The state is kept at the step that has the last bit of them, or more.
        bits = int(digits / math.log(2)) - (MOST - 1)
        return Restarts(max(1, bits), counts_bits=True)
    every = max(1, int(digits / rate))  # (K)
    return Restarts(every) if every < max_steps else None


def _records_times(controller: Any, event: dfx.Event | None) -> bool:
    # Constant steps towards an event may have no end, and then are found by adding up.
    return event is not None or not prescribes_times(controller)


def _finite(t1: Array, event: dfx.Event | None) -> Array:
    if event is not None:
        return t1
    return eqx.error_if(
        t1,
        ~jnp.isfinite(t1),
        "Pass `event=...`, or a finite `t1`: only an event could end a solve to "
        f"infinity. ({CALL})",
    )


def _beginning(
    scheme: AbstractScheme, problem: Problem, init_state: Any, passed: bool
) -> tuple[Beginning, Index]:
    """Where a solve begins, and after how many steps. If the user passed no solver's
    state, it follows from the problem, so that the derivative with respect to `y0`
    passes through nothing else."""
    *_, y0, _ = problem
    if not passed:
        none = jnp.zeros((), jnp.int32)
        if scheme.arithmetic.exact:  # Then it follows from the state alone.
            return Beginning(None, y0), none
        return Beginning(scheme.first(problem, init_state.tnext), None), none
    if scheme.looks_back:
        raise ValueError(
            "Resume without the `solver_state` of the earlier solve, or with Diffrax's "
            "adjoints: a solver that looks back a step needs to know where that began, "
            f"which the backward pass does not. ({CALL})"
        )
    given = init_state.solver_state
    codes = scheme.resume(given.codes, y0)
    num_steps = given.num_steps
    if scheme.equal_steps:  # These are begun afresh.
        num_steps = jnp.zeros_like(num_steps)
    return Beginning(codes, None), num_steps


def _schedule(
    controller: Any, state: Any, start: Index, solver: Reversible, t0: Time, t1: Time
) -> AbstractSchedule:
    """How many bits each step loses."""
    if prescribes_times(controller):
        chosen = over_steps(number_of_steps(controller, state))
    else:
        chosen = over_time(t0, t1)
    return solver.scheme.schedule(start, chosen)


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
    backward_meter,
):
    """Splits a solve into what is differentiated and a `Setup`."""
    controller, first = stepsize_controller, init_state.controller_state
    _check_call(call, solver, restart_every)
    y0, scheme = init_state.y, _scheme_of(solver, controller)
    problem = _checked((terms, t0, y0, args), solver)
    begun, steps_before = _beginning(scheme, problem, init_state, passed_solver_state)
    increment = solver.fields(terms, args).close(t0, y0)
    fns = [close_fn(sub, args, t0, y0) for sub in _subs(saveat)]
    moment = Moment(t0, init_state.tnext, first)
    reads = Reads(args, solver.error_order(terms), moment, y0, scheme.estimates_error)
    clock = _clock(_finite(t1, event), controller, reads, saveat, scheme.equal_steps)
    located = event is not None and event.root_finder is not None
    dense = saveat.dense or located or any(ts is not None for ts in clock.ts)
    if event is not None:
        known = dict(terms=terms, solver=solver, t0=t0, t1=t1, dt0=dt0, saveat=saveat)
        known.update(stepsize_controller=stepsize_controller, max_steps=max_steps)
        event = close_event(event, known, args, t0, y0)
        init_state = without_derivatives(init_state, y0, dense, scheme)
    restarts = _restarts(restart_every, scheme, y0, max_steps, round_trip_tolerance)
    times = _records_times(controller, event)
    schedule = _schedule(controller, first, steps_before, solver, t0, t1)
    return Parts(begun, increment, fns, clock), Setup(
        plan=Plan(scheme.bare(), schedule, times, restarts, max_steps),
        steps_before=steps_before,
        look_every=1 if times else look_every(number_of_steps(controller, first)),
        direction=direction_of(terms),
        error_order=reads.error_order,
        error=scheme.estimates_error and not prescribes_times(controller),
        dense=dense,
        saveat=_without_arrays(saveat, located),
        event=event,
        init_state=_without_parts(init_state),
        just_below_t1=just_below(t1),
        progress_meter=progress_meter,
        backward_meter=backward_meter,
        round_trip_tolerance=round_trip_tolerance,
        unbounded=_unbounded(solver, controller, event, max_steps, restart_every),
        throw=throw,
    )


def _clock(
    t1: Array,
    controller: dfx.AbstractStepSizeController,
    reads: Reads,
    saveat: dfx.SaveAt,
    equal_steps: bool,
) -> Clock:
    """The clock; `reads` is what a controller may depend on beside its own."""
    moment, first_state = reads.moment, reads.moment.controller_state
    length, first_end = None, moment.t1
    if equal_steps:
        assert isinstance(controller, dfx.ConstantStepSize)
        # Diffrax's first step is of `dt0`, and all others of a share of the time.
        length = step_length(controller, first_state)
        only = number_of_steps(controller, first_state) == 1
        first_end = jnp.where(only, t1, moment.t0 + length)
    if not prescribes_times(controller):
        controller, first_state = close_controller(controller, reads)
    return Clock(
        t0=moment.t0,
        t1=t1,
        first_end=first_end,
        controller=controller,
        controller_state=first_state,
        ts=[sub.ts for sub in _subs(saveat)],
        length=length,
    )


def _without_arrays(saveat: dfx.SaveAt, located: bool) -> dfx.SaveAt:
    """With nothing in the place of each `fn` and `ts`; and if the final state is yet to
    be located, without saving it."""
    places = lambda s: [x for sub in _subs(s) for x in (sub.fn, sub.ts, sub.t1)]
    none_but_t1 = lambda sub: (None, None, sub.t1 and not located)
    instead = [x for sub in _subs(saveat) for x in none_but_t1(sub)]
    return eqx.tree_at(places, saveat, instead, is_leaf=_is_none)


def saveat_with(saveat: dfx.SaveAt, fns: list, ts: list) -> dfx.SaveAt:
    """With these in their places again."""
    places = lambda s: [x for sub in _subs(s) for x in (sub.fn, sub.ts)]
    instead = [x for pair in zip(fns, ts, strict=True) for x in pair]
    return eqx.tree_at(places, saveat, instead, is_leaf=_is_none)


def _without_parts(init_state: Any) -> Any:
    """With nothing in the places of what the differentiated parts hold."""
    places = lambda s: (
        *(s.y, s.solver_state, s.controller_state),
        *(s.tprev, s.tnext, s.event_tprev, s.event_tnext),
    )
    return eqx.tree_at(places, init_state, [None] * 7, is_leaf=_is_none)


def _subs(saveat: dfx.SaveAt) -> list[dfx.SubSaveAt]:
    # `subs` may hold `None`s, and is one if only states are saved.
    leaves = jtu.tree_leaves(saveat.subs, is_leaf=is_subsaveat)
    return [sub for sub in leaves if is_subsaveat(sub)]
