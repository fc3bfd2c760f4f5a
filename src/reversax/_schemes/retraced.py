r"""Solvers whose steps are undone by a `backward_step` of their own.

A solver carries a state `y` and what it remembers of earlier steps, its `solver_state`
`s`. With the interface of Diffrax's pull request 727 ("AbstractReversibleSolver"),

    (S)    y1, error, dense_info, s1 = step(t0, t1, y0, s0)
    (B)    y0, dense_info, s0 = backward_step(t0, t1, y1, s1; before)

where `before` is when the step before began, `t0` itself for the first. (B) undoes (S):
up to round-off where a method is algebraically reversible, to some power of the step
where it is so only nearly. Here (B) finds the start of a step again, and what is pulled
back is (S) at that start,

    (T)    ct(y0, s0), ct_parameters = pull(ct(y1, s1), ct(dense_info)),
           pull = vjp(step, (y0, s0), parameters)

so that the gradient is that of the steps forward, at states that are off by what (B)
misses. The certificate measures that. The first `s` is what `init` gives, outside of
the walk, and differentiated there.

Nothing is known of the numbers that such a step is made of, so these are the state's
own. What is remembered may hold integers and truth values, such as a counter: they have
no derivatives, and the certificate fails if one is not found again. A jump of the
vector field would have a solver throw away what it remembers, which could not be found
again.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from .._numbers.arithmetic import AbstractArithmetic, State
from .._xla.closure import closed
from .control import Control, Leg, Time, whole_leg
from .fields import Fields
from .increment import AbstractIncrement, Advance, Core
from .moves import (
    AbstractMove,
    Codes,
    Context,
    Cotangents,
    Moves,
    Otherwise,
    Trail,
    add_trees,
)
from .native import AbstractNative
from .problem import Problem
from .scheme import CotangentsOfDense, Dense, Lost, Span, Step, Values

THERE, BACK = 0, 1
"""Which way over a step."""


class Memory(eqx.Module):
    """A `solver_state`: what of it may be differentiated, and the rest."""

    inexact: PyTree[Array]
    other: PyTree[Array]


def _memory_of(solver_state: PyTree) -> Memory:
    # Python's numbers become arrays, which in a loop they are at once.
    is_number = lambda x: isinstance(x, bool | int | float | complex | np.generic)
    strict = lambda x: jnp.asarray(x, jnp.result_type(x)) if is_number(x) else x
    state = jtu.tree_map(strict, solver_state)
    return Memory(*eqx.partition(state, eqx.is_inexact_array))


def _known(result: dfx.RESULTS) -> dfx.RESULTS | None:
    return None if result is dfx.RESULTS.successful else result


class SolverSteps(AbstractIncrement):
    """The steps of a solver, for given terms and arguments. The states that they lead
    from and to are pairs of `y` and what of the memory may be differentiated; the rest
    of it stands in the place of the control of a leg."""

    contr: Callable
    begin: Callable | None
    there: Callable
    back: Callable
    may_move: ClassVar[bool] = False

    def core(self, leg: Leg, y: State, *, extends: bool, lanes: int = 1) -> Core:
        y, inexact = y
        if leg.which == THERE:
            memory = Memory(inexact, leg.control)
            return Core(*self.there(leg.start, leg.end, y, memory))
        before, other = leg.control
        memory = Memory(inexact, other)
        return Core(*self.back(leg.start, leg.end, before, y, memory))

    def extend(self, leg, y, core, *, error: bool, dense: bool) -> Advance:
        _, estimate, dense_info = core.rest
        return Advance(core.increment, estimate, dense_info)

    def close(self, t: Time, y: State) -> "SolverSteps":
        assert self.begin is not None
        memory = eqx.filter_eval_shape(self.begin, t, t, y)
        return SolverSteps(
            contr=closed(self.contr, t, t),
            begin=None,
            there=closed(self.there, t, t, y, memory),
            back=closed(self.back, t, t, t, y, memory),
        )


def steps_of(solver: Any, terms: PyTree[dfx.AbstractTerm], args: PyTree) -> SolverSteps:
    def there(t0, t1, y0, memory):
        state = eqx.combine(memory.inexact, memory.other)
        y1, error, dense_info, state, result = solver.step(
            terms, t0, t1, y0, args, state, False
        )  # (S)
        memory = _memory_of(state)
        rest = memory.other, error, dense_info
        return (y1, memory.inexact), rest, _known(result)

    def back(t0, t1, before, y1, memory):
        state = eqx.combine(memory.inexact, memory.other)
        y0, _, state, result = solver.backward_step(
            terms, t0, t1, y1, args, (before,), state, False
        )  # (B)
        memory = _memory_of(state)
        if _known(result) is not None:
            # No number, for the certificate to see.
            failed = ~jnp.asarray(dfx.is_okay(result))
            y0 = jtu.tree_map(lambda x: jnp.where(failed, jnp.nan, x), y0)
        return (y0, memory.inexact), memory.other, None

    return SolverSteps(
        contr=lambda t0, t1: (),
        begin=lambda t0, t1, y0: _memory_of(solver.init(terms, t0, t1, y0, args)),
        there=there,
        back=back,
    )


class WholeStep(AbstractMove):
    """(S), undone by (B), on `y` and the memory."""

    over: Leg
    before: Time

    @property
    def leg(self) -> Leg:
        return self.over

    def _leg(self, memory: Memory) -> Leg:
        return self.over._replace(control=memory.other)

    def take(self, context: Context, codes: Codes):
        y, memory = codes
        known = self._leg(memory), (y, memory.inexact)
        core = context.fields.core(*known, extends=context.extends)  # (S)
        y1, inexact = core.increment
        return (y1, Memory(inexact, core.rest[0])), core

    def undo(self, context: Context, codes: Codes):
        y1, memory = codes
        back = self.over._replace(control=(self.before, memory.other), which=BACK)
        found = context.fields.evaluate(back, (y1, memory.inexact))  # (B)
        (y0, inexact), (other, _) = found.value[0], found.other
        memory = Memory(inexact, other)
        evaluation = context.fields.evaluate(self._leg(memory), (y0, inexact))
        return (y0, memory), evaluation

    def pull(self, context: Context, met, ct: Cotangents, ct_met=None):
        ct_rest = jtu.tree_map(jnp.zeros_like, met.value[1])
        if ct_met is not None:
            ct_rest = *ct_rest[:2], ct_met
        ct_p, ct_leg, parts = met.pull((ct.parts, ct_rest))[0]  # (T)
        ct_leg = ct_leg._replace(control=self.over.control)
        return Cotangents(parts, add_trees(ct.parameters, ct_p)), ct_leg


class Retraced(AbstractNative):
    """(S), (B). The parts are `y` and what the solver remembers."""

    arithmetic: AbstractArithmetic
    interpolation_cls: Callable = eqx.field(static=True)
    estimates_error: bool = eqx.field(static=True)  # pyright: ignore
    name: str = eqx.field(static=True)
    """Of the solver."""
    solver: Any
    """`None` where nothing is to be begun or evaluated any more."""
    looks_back: ClassVar[bool] = True

    def fields(self, terms, args) -> SolverSteps:
        return steps_of(self.solver, terms, args)

    def first(self, problem: Problem, t1: Time) -> Codes:
        terms, t0, y0, args = problem
        return y0, _memory_of(self.solver.init(terms, t0, t1, y0, args))

    def bare(self) -> "Retraced":
        return dataclasses.replace(self, solver=None)

    def read(self, values: Values) -> State:
        return values[0]

    def rebase(self, codes: Codes, y0: State) -> Codes:
        return y0, codes[1]

    def decode(self, codes: Codes) -> Values:
        y, memory = codes
        return y, memory.inexact

    def cotangent(self, codes: Codes, ct: Values) -> Codes:
        nothing = jtu.tree_map(lambda _: None, codes[1].other)
        return ct[0], Memory(ct[1], nothing)

    def difference(self, a: Codes, b: Codes) -> Values:
        """Infinite where integers or truth values differ."""
        differ = jtu.tree_map(lambda x, y: jnp.any(x != y), a[1].other, b[1].other)
        differ = jnp.stack([jnp.array(False), *jtu.tree_leaves(differ)]).any()
        values = self.arithmetic.difference(self.decode(a), self.decode(b))
        return jtu.tree_map(lambda x: jnp.where(differ, jnp.inf, x), values)

    def moves(self, span: Span, control: Control, lost: Lost) -> Moves:
        leg = whole_leg(span.start, span.end, control)
        return (WholeStep(leg, span.before),)

    def step(
        self,
        fields: Fields | AbstractIncrement,
        span: Span,
        codes: Codes,
        lost: Lost,
        *,
        error: bool,
        dense: bool,
    ) -> Step:
        [move] = self.moves(span, (), lost)
        codes1, core = move.take(Context(self.arithmetic, fields), codes)
        _, estimate, dense_info = core.rest
        result = dfx.RESULTS.successful if core.result is None else core.result
        return Step(codes1, estimate if error else None, dense_info, result)

    def dense(self, context: Context, moves: Moves, trail: Trail) -> Dense:
        [met] = trail.met
        (*_, inexact), ((*_, rest), _) = met.value[1], met.other

        def pull(ct_info):
            otherwise = Otherwise([None, None], [ct_info])
            return CotangentsOfDense(otherwise, None, None)

        return Dense(eqx.combine(inexact, rest), pull)

    def empty_dense_info(self, y0: State) -> None:
        return None

    def check_jump(self, codes: Codes, made_jump: Any) -> None:
        if made_jump is False or not jtu.tree_leaves(codes[1]):
            return
        raise ValueError(
            "Give a controller that makes no jumps (no `jump_ts`), or end the solve at "
            "each jump and begin another one there: at a jump "
            f"`{self.name}` is to forget what its `solver_state` "
            "remembers, which its `backward_step` could not find again. "
            "(`reversax.Reversible(...)`)"
        )

    @property
    def unfound(self) -> tuple[str, str]:
        return (
            "Take smaller steps, or accept it by `reversax.ReversibleAdjoint("
            f"round_trip_tolerance=...)`, if `{self.name}.backward_step` undoes a step "
            "only nearly, and else correct that:",
            "The gradient is off by about as much. `reversax.round_trip_error` "
            "measures it, and restarting from kept states lessens it "
            "(`reversax.ReversibleAdjoint(restart_every=...)`).",
        )


def retraced(solver: dfx.AbstractSolver, arithmetic: AbstractArithmetic) -> Retraced:
    return Retraced(
        arithmetic=arithmetic,
        interpolation_cls=solver.interpolation_cls,
        estimates_error=isinstance(solver, dfx.AbstractAdaptiveSolver),
        name=type(solver).__name__,
        solver=solver,
    )
