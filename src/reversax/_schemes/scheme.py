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
from jaxtyping import Array, Bool, PyTree

from .._numbers.arithmetic import AbstractArithmetic, State
from .._numbers.schedule import AbstractSchedule, Count, Index
from .control import Control, Time
from .fields import Fields
from .increment import AbstractIncrement
from .kept import Kept, value_of
from .moves import (
    Codes,
    Context,
    Moves,
    Otherwise,
    Trail,
    take,
)
from .problem import Problem

Values = tuple[State, ...]
"""Of a state's parts."""


class Grid(NamedTuple):
    """The times of all steps, of a scheme that takes equal ones; or their cotangents.
    (The `end` has none.)"""

    begin: Any
    length: Any
    end: Any


class Span(NamedTuple):
    """The times of a step; or their cotangents."""

    start: Any
    end: Any
    before: Any = None
    """Where the step before it began, for a scheme that looks back; else `None`."""
    grid: Grid | None = None
    """For a scheme that takes equal steps; else `None`."""


class Lost(NamedTuple):
    """How many bits of each number a step lost, and the steps before it; and which step
    it is. (Of lanes that all take the same steps, one number of each.)"""

    number: Count
    before: Count
    index: Index = 0


class Step(NamedTuple):
    """What a step leads to."""

    codes: Codes
    error: State | None
    """The error estimate, shaped like `y`; `None` if none was asked for."""
    dense_info: dict[str, Any]
    result: dfx.RESULTS


class Dense(NamedTuple):
    """The dense output of a step, and its pull-back."""

    info: dict[str, Any]
    pull: Callable[[PyTree[Array]], "CotangentsOfDense"]


class CotangentsOfDense(NamedTuple):
    otherwise: Otherwise
    parameters: PyTree[Array]
    legs: Any
    """As the legs of the moves; `None` if nothing depends on these otherwise."""


def plain(codes: Codes) -> Codes:
    """Without what is kept of other parts."""
    return tuple(part for part in codes if not isinstance(part, Kept))


class AbstractParts(eqx.Module):
    """The parts of a state in an arithmetic, and what follows from them."""

    arithmetic: eqx.AbstractVar[AbstractArithmetic]

    @abc.abstractmethod
    def read(self, values: Values) -> State:
        """The state that the parts stand for, shaped like `y0`; linear."""

    def decode(self, codes: Codes) -> Values:
        """The values of the parts; or their cotangents, from those of the parts."""
        return tuple(value_of(self.arithmetic, part) for part in codes)

    def cotangent(self, codes: Codes, ct: Values) -> Codes:
        """Undoes `decode` of cotangents, for those of `codes`, without what is kept."""
        return self.arithmetic.cotangent(plain(codes), ct[: len(plain(codes))])

    def readout(self, codes: Codes) -> State:
        return self.read(self.decode(codes))

    def pull_readout(self, ct_readout: State, codes: Codes) -> Values:
        """The cotangents of the parts from that of the readout."""
        return jax.vjp(self.read, self.decode(codes))[1](ct_readout)[0]

    def difference(self, a: Codes, b: Codes) -> Values:
        """`a - b`, decoded, without what is kept."""
        return self.arithmetic.difference(plain(a), plain(b))

    def is_finite(self, codes: Codes) -> Bool[Array, ""]:
        leaves = [jnp.isfinite(x).all() for x in jtu.tree_leaves(self.decode(codes))]
        return jnp.stack([jnp.array(True), *leaves]).all()

    def outgrown(self, codes: Codes) -> Bool[Array, ""]:
        """Whether a part was lost because it became too large."""
        return self.arithmetic.outgrown(plain(codes))


class AbstractRecorded(AbstractParts):
    """What steps lose, to be recorded."""

    @property
    @abc.abstractmethod
    def sheds(self) -> bool:
        """Whether steps lose bits that are to be kept."""

    @property
    def what_is_kept(self) -> str:
        """Of steps that lose bits, in words, and what loses none."""
        raise NotImplementedError

    @abc.abstractmethod
    def schedule(self, start: Index, chosen: AbstractSchedule) -> AbstractSchedule:
        """How many bits of each number every step loses, of a solve that goes on after
        `start` steps: as the user says, else as was `chosen`."""

    @abc.abstractmethod
    def shed(self, codes0: Codes, codes1: Codes, bits: Count) -> PyTree[Array]:
        """What the step between these loses: the lowest of words of 32 bits, which are
        recorded one behind the other; or numbers of so many bits, as these are."""

    @property
    @abc.abstractmethod
    def amplification(self) -> float | None:
        """By how much undoing a step magnifies round-off: its natural logarithm; `None`
        if that follows from the bits that it loses."""


class AbstractScheme(AbstractRecorded):
    """A way of stepping that can be undone, and the numbers that it is done in."""

    interpolation_cls: eqx.AbstractVar[Callable[..., dfx.AbstractLocalInterpolation]]
    """Made of `t0`, `t1` and the dense output of a step."""

    estimates_error: ClassVar[bool] = False
    """Whether a step has an error estimate."""
    looks_back: ClassVar[bool] = False
    """Whether a step depends on where the one before it began."""
    equal_steps: ClassVar[bool] = False
    """Whether all steps must be of the same length."""

    # The parts of a state.

    @abc.abstractmethod
    def start(self, y0: State) -> Codes:
        """The parts before the first step."""

    def first(self, problem: Problem, t1: Time) -> Codes:
        """The same, for a scheme that the rest of the problem matters to, with a first
        step that is to end at `t1`."""
        _, _, y0, _ = problem
        return self.start(y0)

    def with_kept(self, codes: Codes) -> Codes:
        """With places for what is to be kept of the parts, if anything."""
        return codes

    @property
    def prepares(self) -> bool:
        """Whether anything comes before the first step."""
        return False

    def first_moves(self, span: Span, control: Control) -> Moves:
        """What does."""
        return ()

    def begin(
        self, fields: Fields | AbstractIncrement, span: Span, codes: Codes
    ) -> Codes:
        """What the first step, of these times, starts from."""
        if not self.prepares:
            return codes
        control = fields.contr(*self.control_span(span))
        moves = self.first_moves(span, control)
        context = Context(self.arithmetic, fields)
        return take(moves, context, self.with_kept(codes))[0]

    def residuals(
        self, context: Context, span: Span, index: Index, codes: Codes
    ) -> list | None:
        """Of what is kept after a step, as [`Kept`][] has them; `None` if nothing is
        kept that is pulled back. (`index` says which step it is.)"""
        return None

    def reusing(self) -> "AbstractScheme":
        """The same, for steps of which each begins where the one before ended."""
        return self

    def bare(self) -> "AbstractScheme":
        """The same, without what nothing but `first` and the fields read."""
        return self

    @abc.abstractmethod
    def rebase(self, codes: Codes, y0: State) -> Codes:
        """The parts, moved by what separates `y0` from what they stand for: usually
        nothing. Whoever drives the solver may hand it another `y0` than it returned."""

    def resume(self, codes: Codes, y0: State) -> Codes:
        """The parts before the first step of a solve that goes on from `y0`, where
        another one ended with `codes`."""
        return self.rebase(codes, y0)

    def returned(self, codes: Codes) -> Codes:
        """What of them a solve returns."""
        return plain(codes)

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
        lost: Lost,
        *,
        error: bool,
        dense: bool,
    ) -> Step:
        """The step from `codes`. (How many bits earlier ones lost does not matter.)"""

    @abc.abstractmethod
    def dense(self, context: Context, moves: Moves, trail: Trail) -> Dense:
        """The dense output of a step that was undone, of all lanes."""

    @abc.abstractmethod
    def empty_dense_info(self, y0: State) -> dict[str, Any] | None:
        """What stands for the dense output of steps of which none was asked for; `None`
        if these have theirs nevertheless."""

    def control_span(self, span: Span) -> tuple[Time, Time]:
        """From when to when the control of a step is."""
        return span.start, span.end

    def check_jump(self, codes: Codes, made_jump: Any) -> None:
        """Refuses a jump of the vector field at the start of a step, if the scheme may
        not meet one. (Python's `False` says that there is none.)"""

    # Whether a result can be trusted.

    @abc.abstractmethod
    def mean(self, codes: Codes) -> State:
        """Whose size says how large the state is."""

    def reached(self, codes: Codes) -> State:
        """A state that a step led to, shaped like `y0`."""
        return self.readout(codes)

    def gap(self, codes: Codes, num_steps: Index) -> State | None:
        """What must stay smaller than the state, after so many steps; `None` if there
        is nothing."""
        return None

    def unwatched(self, codes: Codes) -> State | None:
        """What a controller of steps must be asked about, since no error estimate has
        it; `None` if there is nothing."""
        return None

    def driven_apart(self, needed: float, adaptive: bool) -> str:
        """What to do where the gap is larger than the state; more bits were needed."""
        raise NotImplementedError

    @property
    def unfound(self) -> tuple[str, str] | None:
        """What to do first where a backward pass did not find the initial state again,
        and what else there is to say; `None` if that follows from the arithmetic."""
        return None


class AbstractAlike(AbstractScheme):
    """Of parts that are both shaped like the state, and begin as it does."""

    def start(self, y0: State) -> Codes:
        code = self.arithmetic.encode(y0)
        return code, code

    def rebase(self, codes: Codes, y0: State) -> Codes:
        """Moves both alike: as `BacksolveAdjoint` needs it, say, between two saved
        times."""
        shift = jtu.tree_map(lambda a, b: a - b, y0, self.readout(codes))
        return tuple(self.arithmetic.add(code, shift) for code in codes)
