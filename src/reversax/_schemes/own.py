"""Which solvers undo themselves, so that they need no twins."""

from collections.abc import Callable

import diffrax as dfx

from .._numbers.arithmetic import AbstractArithmetic, FloatingPoint
from .native import AbstractNative, LeapfrogMidpoint, ReversibleHeun, SemiImplicitEuler
from .problem import has_backward_step
from .retraced import Retraced, retraced


def own_scheme(
    solver: dfx.AbstractSolver, arithmetic: AbstractArithmetic
) -> AbstractNative | None:
    """That of a solver which undoes itself, else `None`. By exact type: a subclass may
    step otherwise."""
    of_diffrax: dict[type, Callable] = {
        dfx.SemiImplicitEuler: SemiImplicitEuler,
        dfx.LeapfrogMidpoint: LeapfrogMidpoint,
        dfx.ReversibleHeun: ReversibleHeun,
    }
    if type(solver) in of_diffrax:
        return of_diffrax[type(solver)](arithmetic)
    make = getattr(type(solver), "reversible_scheme", None)
    if make is not None:
        return make(solver, arithmetic)
    return retraced(solver, arithmetic) if has_backward_step(solver) else None


def undoes_itself(solver: dfx.AbstractSolver) -> bool:
    return own_scheme(solver, FloatingPoint()) is not None


def undoes_itself_inexactly(solver: dfx.AbstractSolver) -> bool:
    """Whether that is in floating point only."""
    return type(own_scheme(solver, FloatingPoint())) is Retraced
