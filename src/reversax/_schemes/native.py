r"""Solvers that undo themselves, once their additions are exact.

Some solvers advance parts of a state in turns, each part by an increment that follows
from the others alone. With additions that can be taken back to the bit, such a step is
undone by taking them back in the opposite order: no twins, nothing to keep, and half
the evaluations of a step of twins. So it was done in molecular dynamics (Levesque &
Verlet, J. Stat. Phys. 72, 1993) and for planets (Rein & Tamayo, MNRAS 473, 2018).

`diffrax.SemiImplicitEuler`, with `h` the control of a step and the parts `(y, z)`,

    (SE1)  y1 = y + h f(t0, z)
    (SE2)  z1 = z + h g(t0, y1)

`diffrax.LeapfrogMidpoint`, whose parts are the state and the one before,

    (LM)   y1 = y_{-1} + (t1 - t_{-1}) f(t0, y),        y_{-1} = y at the first step

`diffrax.ReversibleHeun` (Kidger, Foster, Li & Lyons 2021, arXiv 2105.13493, algorithm
1), also for stochastic equations, with the parts `(y, v)`: its

    v1 = 2 y - v + h f(t0, v),    y1 = y + h (f(t0, v) + f(t1, v1))/2

are, with `m` for the state in the middle of the step,

    (RH1)  m  = y + h f(t0, v)/2
    (RH2)  v1 = 2 m - v
    (RH3)  y1 = m + h f(t1, v1)/2

and the error estimate is half the difference of the two increments.

In floating point what is taken back is off by a rounding; nothing magnifies that but
the problem itself.

Where a step begins with the field that the one before ended with, as in (RH3) and the
next (RH1), its value is kept as one more part of the state: one evaluation a step, and
going back one, which finds again what was kept, and of which the residuals are handed
on to the step before, that pulls it back.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import diffrax as dfx
import equinox as eqx
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from .._numbers.arithmetic import AbstractArithmetic, State
from .._numbers.schedule import AbstractSchedule, Count, Index, PerStep
from .control import Control, Leg, Time, whole_leg
from .fields import Fields
from .increment import AbstractIncrement
from .moves import (
    AbstractMove,
    Add,
    Codes,
    Context,
    Cotangents,
    Moves,
    Otherwise,
    Recall,
    Renew,
    Swap,
    Trail,
    add_trees,
    take,
)
from .scheme import (
    AbstractAlike,
    AbstractScheme,
    CotangentsOfDense,
    Dense,
    Lost,
    Span,
    Step,
    Values,
)
from .vector_fields import PROD, VF, VectorFields, field_of, fields_of_two


class AbstractNative(AbstractScheme):
    """What schemes have in common of which nothing is shed and nothing drifts apart."""

    arithmetic: eqx.AbstractVar[AbstractArithmetic]

    @abc.abstractmethod
    def fields(self, terms: PyTree[dfx.AbstractTerm], args: PyTree) -> VectorFields:
        """What the moves evaluate."""

    # The parts are those of the state, unless a scheme says otherwise.

    def start(self, y0: State) -> Codes:
        return tuple(self.arithmetic.encode(part) for part in y0)

    def read(self, values: Values) -> State:
        return values

    def rebase(self, codes: Codes, y0: State) -> Codes:
        shift = jtu.tree_map(lambda a, b: a - b, tuple(y0), self.decode(codes))
        add = self.arithmetic.add
        return tuple(add(code, by) for code, by in zip(codes, shift, strict=True))

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
        control = fields.contr(*self.control_span(span))
        context = Context(self.arithmetic, fields)
        moves = self.moves(span, control, lost)
        codes1, cores = take(moves, context, codes)
        estimate = self.estimate(cores) if error else None
        ends = codes, codes1
        info = self.info(context, span, control, ends, dense=dense)
        return Step(codes1, estimate, info, dfx.RESULTS.successful)

    def info(
        self,
        context: Context,
        span: Span,
        control: Control,
        ends: tuple[Codes, Codes],
        *,
        dense: bool,
    ) -> dict[str, Any]:
        """The dense output of a step from one of the `ends` to the other."""
        y0, y1 = map(self.readout, ends)
        return dict(y0=y0, y1=y1)

    def estimate(self, cores: list) -> State | None:
        """The error estimate, of what the moves met."""
        return None

    def dense(self, context: Context, moves: Moves, trail: Trail) -> Dense:
        ends = trail.codes[0], trail.codes[-1]
        readout = lambda _, codes: self.readout(codes)
        y0, y1 = [context.each(readout, codes) for codes in ends]

        def pull(ct_info):
            cts = ct_info["y0"], ct_info["y1"]
            return self.pulled_ends(context, moves, trail, cts)

        return Dense(dict(y0=y0, y1=y1), pull)

    def pulled_ends(
        self, context: Context, moves: Moves, trail: Trail, cts: tuple[State, State]
    ) -> CotangentsOfDense:
        """The cotangents of the parts at both ends from those of the readouts."""
        pull_readout = lambda _, ct, codes: self.pull_readout(ct, codes)
        ends = trail.codes[0], trail.codes[-1]
        start, end = [
            context.each(pull_readout, ct, codes)
            for ct, codes in zip(cts, ends, strict=True)
        ]
        nothing = [None] * len(moves)
        otherwise = Otherwise([start, *nothing[1:], end], nothing)
        return CotangentsOfDense(otherwise, None, None)

    def empty_dense_info(self, y0: State) -> dict[str, Any]:
        return dict(y0=y0, y1=y0)

    @property
    def sheds(self) -> bool:
        return False

    def schedule(self, start: Index, chosen: AbstractSchedule) -> AbstractSchedule:
        return PerStep(0, 1, start)

    def shed(self, codes0: Codes, codes1: Codes, bits: Count) -> Any:
        return None

    @property
    def amplification(self) -> float:
        return 0.0

    def mean(self, codes: Codes) -> State:
        return self.readout(codes)


class Reflect(AbstractMove):
    """(RH2): the second part, reflected about the first; its own inverse."""

    def take(self, context: Context, codes: Codes):
        about, code, *others = codes
        return (about, context.arithmetic.reflect(code, about), *others), None  # (RH2)

    def undo(self, context: Context, codes: Codes):
        return self.take(context, codes)

    def pull(self, context: Context, met, ct: Cotangents, ct_met=None):
        about, reflected, *others = ct.parts
        twice = jtu.tree_map(lambda x: 2 * x, reflected)
        negated = jtu.tree_map(lambda x: -x, reflected)
        parts = add_trees(about, twice), negated, *others
        return ct._replace(parts=parts), None


class AbstractReusing(AbstractNative):
    """Of which a step begins with the field that the one before ended with: the value
    is kept as one more part, and a step has one evaluation of it less.

    Only where each step begins where the last ended; where a controller may jump, both
    are evaluated.
    """

    reuses: eqx.AbstractVar[bool]
    kept_of: ClassVar[int]
    """Which part it follows from."""

    def reusing(self) -> "AbstractReusing":
        return dataclasses.replace(self, reuses=True)

    def _kept_leg(self, t: Time) -> Leg:
        return Leg(t, t, np.float32(1), None, VF)

    def residuals(
        self, context: Context, span: Span, index: Index, codes: Codes
    ) -> list | None:
        if not self.reuses:
            return None
        at = self._kept_leg(span.end), self.arithmetic.decode(codes[self.kept_of])
        return [context.fields.evaluate(*at, keeps=True).residuals]

    @property
    def prepares(self) -> bool:
        return self.reuses

    def first_moves(self, span: Span, control: Control) -> Moves:
        return (Renew(self._kept_leg(span.start), reads=self.kept_of, kept=2),)

    def between_kicks(self, kicks: tuple[Leg, Leg], moves: list) -> Moves:
        """The moves between two kicks of the first part, and these."""
        if not self.reuses:
            add = lambda leg: Add(leg, into=0, reads=self.kept_of)
            return add(kicks[0]), *moves, add(kicks[1])
        add = lambda leg: Add(leg._replace(which=PROD), into=0, reads=2)
        known = dict(reads=self.kept_of, kept=2)
        recall, renew = [
            make(self._kept_leg(leg.start), **known)
            for make, leg in zip((Recall, Renew), kicks, strict=True)
        ]
        return add(kicks[0]), recall, *moves, renew, add(kicks[1])


class SemiImplicitEuler(AbstractNative):
    """(SE1), (SE2)."""

    arithmetic: AbstractArithmetic
    interpolation_cls: Callable = eqx.field(
        static=True, default=dfx.SemiImplicitEuler.interpolation_cls
    )

    def fields(self, terms, args) -> VectorFields:
        return fields_of_two(terms, args)

    def moves(self, span: Span, control: Control, lost: Lost) -> Moves:
        leg = whole_leg(span.start, span.end, control)
        first = Add(leg, into=0, reads=1)  # (SE1)
        return first, Add(leg._replace(which=1), into=1, reads=0)  # (SE2)


class AbstractTwice(AbstractAlike, AbstractNative):
    """Of one equation, with two parts that are both shaped like the state."""

    def fields(self, terms, args) -> VectorFields:
        return field_of(terms, args)


class LeapfrogMidpoint(AbstractTwice):
    """(LM)."""

    arithmetic: AbstractArithmetic
    interpolation_cls: Callable = eqx.field(
        static=True, default=dfx.LeapfrogMidpoint.interpolation_cls
    )
    looks_back: ClassVar[bool] = True

    def read(self, values: Values) -> State:
        return values[1]

    def control_span(self, span: Span) -> tuple[Time, Time]:
        return span.before, span.end

    def moves(self, span: Span, control: Control, lost: Lost) -> Moves:
        leg = whole_leg(span.start, span.end, control)
        return Add(leg, into=0, reads=1), Swap()  # (LM)


class ReversibleHeun(AbstractReusing, AbstractTwice):
    """(RH1), (RH2), (RH3)."""

    arithmetic: AbstractArithmetic
    reuses: bool = eqx.field(static=True, default=False)
    kept_of: ClassVar[int] = 1
    interpolation_cls: Callable = eqx.field(
        static=True, default=dfx.ReversibleHeun.interpolation_cls
    )
    estimates_error: ClassVar[bool] = True

    def read(self, values: Values) -> State:
        return values[0]

    def moves(self, span: Span, control: Control, lost: Lost) -> Moves:
        half = np.float32(0.5)
        first = Leg(span.start, span.end, half, control)
        last = Leg(span.end, span.end, half, control)
        return self.between_kicks((first, last), [Reflect()])

    def estimate(self, cores: list) -> State:
        first, last = cores[0].increment, cores[-1].increment
        return jtu.tree_map(lambda a, b: (b - a) / 2, first, last)
