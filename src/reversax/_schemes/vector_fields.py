"""The vector fields of solvers that undo themselves."""

from collections.abc import Callable
from typing import ClassVar

import diffrax as dfx
import equinox as eqx
from jaxtyping import PyTree

from .._numbers.arithmetic import State
from .._xla.closure import closed
from .control import Leg, Time, is_of_time
from .increment import AbstractIncrement, Advance, Core, check_like_state

VF, PROD = 2, 3
"""Which of the fields, beside those times a control."""


class VectorFields(AbstractIncrement):
    """Vector fields times a control, evaluated at single points."""

    contr: Callable
    vf_prods: tuple[Callable, ...]
    vf: Callable
    """The first of the fields alone."""
    prod: Callable
    """Times a control."""
    of_time: bool = eqx.field(static=True)
    """Whether that is the length of a step."""
    may_move: ClassVar[bool] = False

    def core(self, leg: Leg, y: State, *, extends: bool, lanes: int = 1) -> Core:
        if leg.which == VF:
            return Core(self.vf(leg.start, y), (), None)
        if leg.which == PROD:
            return Core(self.prod(y, leg.control), (), None)
        increment = self.vf_prods[leg.which](leg.start, y, leg.control)
        check_like_state(increment, y)
        return Core(increment, (), None)

    def is_certain(self, which: int) -> bool:
        return self.of_time and which == PROD

    def extend(self, leg, y, core, *, error: bool, dense: bool) -> Advance:
        return Advance(core.increment, None, None)

    def close(self, t: Time, y: State) -> "VectorFields":
        contr = closed(self.contr, t, t)
        control = eqx.filter_eval_shape(self.contr, t, t)
        states = y if len(self.vf_prods) == 2 else (y,)
        # Of two, each reads the part that the other advances.
        pairs = zip(self.vf_prods, states[::-1], strict=True)
        vf_prods = tuple(closed(fn, t, part, control) for fn, part in pairs)
        vf = closed(self.vf, t, states[-1])
        prod = closed(self.prod, eqx.filter_eval_shape(self.vf, t, states[-1]), control)
        return VectorFields(contr, vf_prods, vf, prod, self.of_time)


def field_of(terms: dfx.AbstractTerm, args: PyTree) -> VectorFields:
    """The one of a single equation."""
    return VectorFields(
        contr=lambda t0, t1: terms.contr(t0, t1),
        vf_prods=(lambda t, y, control: terms.vf_prod(t, y, args, control),),
        vf=lambda t, y: terms.vf(t, y, args),
        prod=lambda vf, control: terms.prod(vf, control),
        of_time=is_of_time(terms),
    )


def fields_of_two(terms: tuple, args: PyTree) -> VectorFields:
    """Those of two parts, each of which is driven by the other."""
    first, second = terms
    contr = lambda t0, t1: (first.contr(t0, t1), second.contr(t0, t1))
    prods = (
        lambda t, y, control: first.vf_prod(t, y, args, control[0]),
        lambda t, y, control: second.vf_prod(t, y, args, control[1]),
    )
    return VectorFields(
        contr=contr,
        vf_prods=prods,
        vf=lambda t, y: first.vf(t, y, args),
        prod=lambda vf, control: first.prod(vf, control[0]),
        of_time=is_of_time(first),
    )
