"""What the walk forward and back knows of a way of stepping that can be undone.

A scheme turns the state of a user, `y`, into parts that its moves, `moves.py`, act on,
and back. It says what a step loses that going back needs, how far a result can be
trusted, and what lies between the ends of a step. All that takes many steps (loops,
times, records, saved outputs, events, lanes, checks) is the walk's and knows no scheme
by name.
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree, UInt32

from .._numbers.arithmetic import AbstractArithmetic, State
from .._numbers.schedule import AbstractSchedule, Count, Index
from .._xla.isolation import Evaluation
from .control import Control, Leg, Time
from .fields import Fields
from .increment import AbstractIncrement
from .moves import (
    Codes,
    Context,
    Cotangents,
    Moves,
    Otherwise,
    Trail,
    add_some,
    add_trees,
    pull,
    undo,
    undo_and_pull,
)

Values = tuple[State, ...]
"""Of a state's parts."""


class Span(NamedTuple):
    """The times of a step; or their cotangents."""

    start: Any
    end: Any
    before: Any = None
    """Where the step before it began, for a scheme that looks back; else `None`."""


class Lost(NamedTuple):
    """How many bits of each number a step lost, and the steps before it. (A number that
    Python knows is one for all lanes.)"""

    number: Count
    before: Count


class Step(NamedTuple):
    """What a step leads to."""

    codes: Codes
    error: State | None
    """The error estimate, shaped like `y`; `None` if none was asked for."""
    dense_info: dict[str, Any]
    result: dfx.RESULTS


class Undoing(NamedTuple):
    """A step about to be undone, of all lanes."""

    span: Span
    lost: Lost
    codes: Codes
    """At its end, as the cotangents are."""
    ct: Cotangents


class Undone(NamedTuple):
    """The same at its start."""

    codes: Codes
    ct: Cotangents
    ct_span: Span | None
    """If the times are differentiated."""
    observed: Any
    """What else was returned by `observe`."""


class Dense(NamedTuple):
    """The dense output of a step, and its pull-back."""

    info: dict[str, Any]
    pull: Callable[[PyTree[Array]], "CotangentsOfDense"]


class CotangentsOfDense(NamedTuple):
    otherwise: Otherwise
    parameters: PyTree[Array]
    legs: Any
    """As the legs of the moves; `None` if nothing depends on these otherwise."""


class AbstractScheme(eqx.Module):
    """A way of stepping that can be undone, and the numbers that it is done in."""

    arithmetic: eqx.AbstractVar[AbstractArithmetic]
    interpolation_cls: eqx.AbstractVar[Callable[..., dfx.AbstractLocalInterpolation]]
    """Made of `t0`, `t1` and the dense output of a step."""

    estimates_error: ClassVar[bool] = False
    """Whether a step has an error estimate."""
    looks_back: ClassVar[bool] = False
    """Whether a step depends on where the one before it began."""

    # The parts of a state.

    @abc.abstractmethod
    def start(self, y0: State) -> Codes:
        """The parts before the first step."""

    @abc.abstractmethod
    def read(self, values: Values) -> State:
        """The state that the parts stand for, shaped like `y0`; linear."""

    @abc.abstractmethod
    def rebase(self, codes: Codes, y0: State) -> Codes:
        """The parts, moved by what separates `y0` from what they stand for: usually
        nothing. Whoever drives the solver may hand it another `y0` than it returned."""

    # A step.

    @abc.abstractmethod
    def moves(self, span: Span, control: Control, lost: Lost) -> Moves:
        """What the step consists of."""

    @abc.abstractmethod
    def step(
        self,
        fields: Fields | AbstractIncrement,
        span: Span,
        codes: Codes,
        bits: Count,
        *,
        error: bool,
        dense: bool,
    ) -> Step:
        """The step from `codes`, which loses so many bits."""

    @abc.abstractmethod
    def dense(self, context: Context, moves: Moves, trail: Trail) -> Dense:
        """The dense output of a step that was undone, of all lanes."""

    @abc.abstractmethod
    def empty_dense_info(self, y0: State) -> dict[str, Any]:
        """What stands for the dense output of steps of which none was asked for."""

    def control_span(self, span: Span) -> tuple[Time, Time]:
        """From when to when the control of a step is."""
        return span.start, span.end

    # What a step loses.

    @property
    @abc.abstractmethod
    def sheds(self) -> bool:
        """Whether steps lose bits that are to be kept."""

    @property
    def bits_per_step(self) -> str:
        """How many of each number a step loses, in words."""
        return "no"

    @abc.abstractmethod
    def schedule(self, start: Index, chosen: AbstractSchedule) -> AbstractSchedule:
        """How many bits of each number every step loses, of a solve that goes on after
        `start` steps: as the user says, else as was `chosen`."""

    @abc.abstractmethod
    def shed_bits(self, codes: Codes, bits: Count) -> PyTree[UInt32[Array, "..."]]:
        """The bits that the step from `codes` loses."""

    @property
    @abc.abstractmethod
    def amplification(self) -> float | None:
        """By how much undoing a step magnifies round-off: its natural logarithm; `None`
        if that follows from the bits that it loses."""

    # Whether a result can be trusted.

    @abc.abstractmethod
    def mean(self, codes: Codes) -> State:
        """Whose size says how large the state is."""

    def reached(self, codes: Codes) -> State:
        """A state that a step led to, shaped like `y0`."""
        return self.readout(codes)

    def gap(self, codes: Codes) -> State | None:
        """What must stay smaller than the state; `None` if there is nothing."""
        return None

    def unwatched(self, codes: Codes) -> State | None:
        """What a controller of steps must be asked about, since no error estimate has
        it; `None` if there is nothing."""
        return None

    def driven_apart(self, needed: float, adaptive: bool) -> str:
        """What to do, and why, where the gap is larger than the state, and so many bits
        a step would have kept it small."""
        raise NotImplementedError

    # What follows for every scheme.

    def decode(self, codes: Codes) -> Values:
        """The values of the parts; or their cotangents, from those of the parts."""
        return self.arithmetic.decode(codes)

    def cotangent(self, codes: Codes, ct: Values) -> Codes:
        """Undoes `decode` of cotangents, for those of `codes`."""
        return self.arithmetic.cotangent(codes, ct)

    def readout(self, codes: Codes) -> State:
        return self.read(self.decode(codes))

    def pull_readout(self, ct_readout: State, codes: Codes) -> Values:
        """The cotangents of the parts from that of the readout."""
        return jax.vjp(self.read, self.decode(codes))[1](ct_readout)[0]

    def difference(self, a: Codes, b: Codes) -> Values:
        """`a - b`, decoded."""
        return self.arithmetic.difference(a, b)

    def is_finite(self, codes: Codes) -> Bool[Array, ""]:
        leaves = [jnp.isfinite(x).all() for x in jtu.tree_leaves(self.decode(codes))]
        return jnp.stack([jnp.array(True), *leaves]).all()

    def outgrown(self, codes: Codes) -> Bool[Array, ""]:
        """Whether a part was lost because it became too large."""
        return self.arithmetic.outgrown(codes)

    def undo(self, context: Context, undoing: Undoing) -> Codes:
        """The parts at the start of a step, without cotangents."""
        evaluation = context.fields.evaluate_control(*self.control_span(undoing.span))
        control = eqx.combine(evaluation.value, evaluation.other)
        moves = self.moves(undoing.span, control, undoing.lost)
        return undo(moves, context, undoing.codes).codes[0]

    def undo_and_pull(
        self, context: Context, undoing: Undoing, observe: Callable | None
    ) -> Undone:
        """Undoes a step and pulls its cotangents back.

        If there is something to `observe` inside it, all is undone first: `observe`
        is given the parts at the start and the dense output, and returns the cotangents
        of this and of the times, by what was observed.
        """
        fields, span = context.fields, undoing.span
        evaluation = fields.evaluate_control(*self.control_span(span))
        moves, pull_legs = self._moves_and_pull(fields, undoing, evaluation)
        codes1, ct, observed = undoing.codes, undoing.ct, None
        if observe is None:
            codes0, ct, ct_legs = undo_and_pull(moves, context, codes1, ct)
        else:
            trail = undo(moves, context, codes1)
            codes0, dense = trail.codes[0], self.dense(context, moves, trail)
            ct_info, observed = observe(codes0, dense.info)
            more = dense.pull(ct_info)
            ct = ct._replace(parameters=add_some(ct.parameters, more.parameters))
            ct, ct_legs = pull(moves, context, trail, ct, more.otherwise)
            ct_legs = add_some(ct_legs, more.legs)
        if not fields.pulls_control:
            return Undone(codes0, ct, None, observed)
        ct_span, ct_control = pull_legs(ct_legs)[0]
        ct_contr, ct_times = evaluation.pull(ct_control)[0]
        if jtu.tree_leaves(ct_contr):
            ct_contr = add_trees(ct.parameters.contr, ct_contr)
            parameters = eqx.tree_at(lambda p: p.contr, ct.parameters, ct_contr)
            ct = ct._replace(parameters=parameters)
        if ct_times is None:
            return Undone(codes0, ct, None, observed)
        _, pull_span = jax.vjp(self.control_span, span)
        ct_span = add_trees(ct_span, pull_span(ct_times)[0])
        return Undone(codes0, ct, ct_span, observed)

    def _moves_and_pull(
        self, fields: Fields, undoing: Undoing, evaluation: Evaluation
    ) -> tuple[Moves, Callable | None]:
        """The moves of a step, and the pull-back of what of their legs is
        differentiated: to the times, if these are, and to the control."""

        def make(varied):
            span, value = varied
            control = eqx.combine(value, evaluation.other)
            span = undoing.span if span is None else span
            moves = self.moves(span, control, undoing.lost)
            is_leg = lambda x: isinstance(x, Leg)
            varied = lambda leg: fields.varied(leg)[0]
            legs = [move.leg for move in moves]
            return jtu.tree_map(varied, legs, is_leaf=is_leg), moves

        span = jtu.tree_map(jnp.asarray, undoing.span) if fields.times else None
        if not fields.pulls_control:
            return make((None, evaluation.value))[1], None
        _, pull_legs, moves = jax.vjp(make, (span, evaluation.value), has_aux=True)
        return moves, pull_legs
