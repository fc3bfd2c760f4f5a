"""Symplectic solvers for separable problems, for Diffrax and for `Reversible`."""

import abc
from collections.abc import Sequence
from typing import ClassVar

import diffrax as dfx
import numpy as np

from ._numbers.arithmetic import AbstractArithmetic, FloatingPoint
from ._schemes.native import AbstractNative
from ._schemes.scheme import Lost, Span
from ._schemes.symplectic import HermiteInterpolation, Separable


class AbstractNativeSolver(dfx.AbstractSolver):
    """A solver that undoes itself, for Diffrax, made of its scheme.

    Use it as a base for your own, with parts that are those of the state: see
    "Writing a scheme".
    """

    @abc.abstractmethod
    def reversible_scheme(self, arithmetic: AbstractArithmetic) -> AbstractNative:
        """How it steps; [`reversax.Reversible`][] asks for it."""

    def init(self, terms, t0, t1, y0, args):
        return None

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del solver_state, made_jump
        scheme = self.reversible_scheme(FloatingPoint())
        fields, span, codes = scheme.fields(terms, args), Span(t0, t1), scheme.start(y0)
        lost = Lost(0, 0)
        step = scheme.step(fields, span, codes, lost, error=False, dense=True)
        return scheme.readout(step.codes), None, step.dense_info, None, step.result


class AbstractSymplectic(AbstractNativeSolver):
    """What the symplectic solvers have in common."""

    term_structure: ClassVar = (dfx.AbstractTerm, dfx.AbstractTerm)
    interpolation_cls: ClassVar = HermiteInterpolation

    kicks: ClassVar[tuple[float, ...]]
    drifts: ClassVar[tuple[float, ...]]

    def reversible_scheme(self, arithmetic: AbstractArithmetic) -> Separable:
        return Separable(arithmetic=arithmetic, kicks=self.kicks, drifts=self.drifts)

    def func(self, terms, t0, y0, args):
        (first, second), (p, q) = terms, y0
        return first.vf(t0, q, args), second.vf(t0, p, args)


def composed(weights: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(C) of `symplectic.py`: the kicks and the drifts."""
    padded = np.array([0.0, *weights, 0.0])
    kicks = (padded[1:] + padded[:-1]) / 2
    return tuple(map(float, kicks)), tuple(map(float, weights))


class Verlet(AbstractSymplectic):
    """Stormer and Verlet's symplectic method, kick, drift, kick: order 2.

    For two parts, each driven by the other, `y = (p, q)` and a tuple of two
    `diffrax.ODETerm`s, the first of `f(t, q, args)` for `p` and the second of
    `g(t, p, args)` for `q`, taken like `diffrax.SemiImplicitEuler`. `p` is kicked at
    both ends of a step. Steps are constant, or prescribed by `diffrax.StepTo` (which
    is not symplectic any more).

    In [`reversax.Reversible`][] its steps are undone to the bit with nothing kept, and
    the memory of a gradient does not depend on the number of steps at all. Energy is
    kept within a bound for very long. Not for damped problems, nor for those of which
    the parts are not separate.

    Two evaluations of `f` and one of `g` a step.

    Source: Hairer, Lubich & Wanner, "Geometric Numerical Integration", 2nd edition
    (2006), equation (I.1.17).
    """

    kicks: ClassVar = (0.5, 0.5)
    drifts: ClassVar = (1.0,)

    def order(self, terms):
        return 2


_CUBE_ROOT = 2 ** (1 / 3)


class Yoshida4(AbstractSymplectic):
    """Three steps of [`reversax.Verlet`][] of different lengths: order 4.

    For the problems that `Verlet` is for, and taken like it. Four evaluations of
    `f` and three of `g` a step. [`reversax.BlanesMoan6`][] is
    mostly the better choice for the same work.

    Source: Yoshida, Physics Letters A 150 (1990), equation (2.11).
    """

    kicks, drifts = composed(
        (1 / (2 - _CUBE_ROOT), -_CUBE_ROOT / (2 - _CUBE_ROOT), 1 / (2 - _CUBE_ROOT))
    )

    def order(self, terms):
        return 4


def _symmetric(half: Sequence[float], total: float, *, middle: bool) -> tuple:
    """Coefficients of which the first ones are given, and all add up to `total`."""
    if middle:
        rest = total - 2 * sum(half)
        return (*half, rest, *half[::-1])
    last = total / 2 - sum(half)
    return (*half, last, last, *half[::-1])


class BlanesMoan6(AbstractSymplectic):
    """Blanes and Moan's symplectic method of ten stages: order 6.

    For the problems that [`reversax.Verlet`][] is for, and taken like it. Eleven
    evaluations of `f` and ten of `g` a step. Small error constants.

    Source: Blanes & Moan, Journal of Computational and Applied Mathematics 142 (2002),
    table 2, the method S10 of order 6.
    """

    kicks: ClassVar = _symmetric(
        (
            0.0502627644003922,
            0.413514300428344,
            0.0450798897943977,
            -0.188054853819569,
            0.541960678450780,
        ),
        1.0,
        middle=True,
    )
    drifts: ClassVar = _symmetric(
        (
            0.148816447901042,
            -0.132385865767784,
            0.067307604692185,
            0.432666402578175,
        ),
        1.0,
        middle=False,
    )

    def order(self, terms):
        return 6


class KahanLi8(AbstractSymplectic):
    """Seventeen steps of [`reversax.Verlet`][] of different lengths: order 8.

    For the problems that `Verlet` is for, and taken like it. Eighteen evaluations
    of `f` and seventeen of `g` a step. For round-off accuracy over
    long times.

    Source: Kahan & Li, Mathematics of Computation 66 (1997), table of s17odr8a;
    Hairer, Lubich & Wanner, "Geometric Numerical Integration", 2nd edition (2006),
    equation (V.3.14).
    """

    kicks, drifts = composed(
        _symmetric(
            (
                0.13020248308889008087881763,
                0.56116298177510838456196441,
                -0.38947496264484728640807860,
                0.15884190655515560089621075,
                -0.39590389413323757733623154,
                0.18453964097831570709183254,
                0.25837438768632204729397911,
                0.29501172360931029887096624,
            ),
            1.0,
            middle=True,
        )
    )

    def order(self, terms):
        return 8
