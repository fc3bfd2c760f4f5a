r"""Symmetric symplectic methods for separable problems.

Of a problem with two parts, each driven by the other,

    p' = f(t, q),        q' = g(t, p),

such as Hamilton's equations with `H = T(p) + V(q)`, each part is advanced exactly while
the other rests. A step of length `h` alternates `kicks` of `p` and `drifts` of `q`,

    (K)    p += a_i h f(t_i, q),     i = 0 ... n,   t_i = t0 + (b_1 + ... + b_i) h
    (D)    q += b_i h g(s_i, p),     i = 1 ... n,   s_i = t0 + (a_0 + ... + a_{i-1}) h

beginning and ending with a kick. With `a_i = a_{n-i}` and `b_i = b_{n+1-i}` it is its
own inverse with the sign of `h` changed, and its order is even. Time is a part of `q`
in (K) and of `p` in (D), so that the order is that for an autonomous problem.

`n = 1`, `a = (1/2, 1/2)`, `b = 1` is (SV), the method of Stormer and Verlet (Hairer,
Lubich & Wanner, "Geometric Numerical Integration", 2nd edition, 2006, section I.1.4).
Compositions of it with steps `w_1 h, ..., w_n h` have

    (C)    b_i = w_i,        a_i = (w_i + w_{i+1})/2        (w_0 = w_{n+1} = 0).

Between the ends of a step lies the cubic polynomial of Hermite, of third degree: it has
the values and the derivatives of both ends.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from .._numbers.arithmetic import AbstractArithmetic, State
from .._xla.run_time import rounded_product
from .control import Control, Leg, Time, is_of_time, whole_leg
from .moves import (
    Add,
    Codes,
    Context,
    Moves,
    Otherwise,
    Repeated,
    Trail,
    add_trees,
    stacked,
)
from .native import AbstractReusing
from .scheme import CotangentsOfDense, Dense, Lost, Span, Values
from .vector_fields import VectorFields, fields_of_two


class HermiteInterpolation(dfx.ThirdOrderHermitePolynomialInterpolation):
    """Diffrax's, also for the difference of two values of a tree."""

    def evaluate(self, t0, t1=None, left: bool = True) -> PyTree:
        if t1 is None:
            return super().evaluate(t0, left=left)
        start, end = super().evaluate(t0), super().evaluate(t1)
        return jtu.tree_map(lambda a, b: b - a, start, end)


class Separable(AbstractReusing):
    """(K), (D). The parts are `p` and `q`."""

    arithmetic: AbstractArithmetic
    kicks: tuple[float, ...] = eqx.field(static=True)
    """`a_0, ..., a_n`."""
    drifts: tuple[float, ...] = eqx.field(static=True)
    """`b_1, ..., b_n`."""
    interpolation_cls: Callable = eqx.field(static=True, default=HermiteInterpolation)
    reuses: bool = eqx.field(static=True, default=False)
    kept_of: ClassVar[int] = 1

    def read(self, values: Values) -> State:
        return values[:2]

    def fields(self, terms, args) -> VectorFields:
        if not all(map(is_of_time, terms)):
            raise TypeError(
                "Pass a tuple of two terms `diffrax.ODETerm`: a symplectic method "
                "divides each step into parts of its length, so that nothing but time "
                "may drive the terms. (`reversax.Verlet` and others)"
            )
        return fields_of_two(terms, args)

    def moves(self, span: Span, control: Control, lost: Lost) -> Moves:
        reached_q = np.cumsum([0.0, *self.drifts])
        reached_p = np.cumsum(self.kicks)
        leg = lambda share, factor, which: Leg(
            _between(span, share), span.end, np.asarray(factor), control, which
        )
        kicks = [leg(*x, 0) for x in zip(reached_q, self.kicks, strict=True)]
        drifts = [leg(*x, 1) for x in zip(reached_p, self.drifts, strict=False)]
        *between, last = [Add(drift, into=1, reads=0) for drift in drifts]  # (D)
        moves: list = [last]
        if between:
            inner = [Add(kick, into=0, reads=1) for kick in kicks[1:-1]]  # (K)
            moves = [Repeated((stacked(between), stacked(inner))), last]
        return self.between_kicks((kicks[0], kicks[-1]), moves)  # (K)

    # Dense output.

    def info(
        self,
        context: Context,
        span: Span,
        control: Control,
        ends: tuple[Codes, Codes],
        *,
        dense: bool,
    ) -> dict[str, Any]:
        y0, y1 = map(self.readout, ends)
        if not dense:
            return self.empty_dense_info(y0) | dict(y0=y0, y1=y1)
        core = lambda leg, y: context.fields.core(leg, y, extends=False).increment
        legs = [whole_leg(t, span.end, control) for t in (span.start, span.end)]
        k0, k1 = [
            tuple(core(*at) for at in _at_end(leg, y))
            for leg, y in zip(legs, (y0, y1), strict=True)
        ]
        return dict(y0=y0, y1=y1, k0=k0, k1=k1)

    def empty_dense_info(self, y0: State) -> dict[str, Any]:
        zeros = jtu.tree_map(jnp.zeros_like, tuple(y0))
        return dict(y0=tuple(y0), y1=tuple(y0), k0=zeros, k1=zeros)

    def dense(self, context: Context, moves: Moves, trail: Trail) -> Dense:
        ends = [self.readout(trail.codes[i]) for i in (0, -1)]
        kicks = moves[0].leg, moves[-1].leg  # They begin at the ends of the step.
        evaluations = [
            tuple(context.fields.evaluate(*at) for at in _at_end(leg, values))
            for leg, values in zip(kicks, ends, strict=True)
        ]
        k0, k1 = [(of_p.value[0], of_q.value[0]) for of_p, of_q in evaluations]

        def pull(ct_info):
            ct_p, pulled = None, []
            cts = (ct_info["y0"], ct_info["k0"]), (ct_info["y1"], ct_info["k1"])
            for (ct_y, ct_k), end in zip(cts, evaluations, strict=True):
                ct_here, ct_leg, ct_y = _pull_derivatives(end, ct_k, ct_y)
                ct_p = ct_here if ct_p is None else add_trees(ct_p, ct_here)
                pulled.append((ct_leg, ct_y))
            (ct_first, ct_y0), (ct_last, ct_y1) = pulled
            nothing = [None] * len(moves)
            of_kept = (None,) * (len(trail.codes[0]) - 2)
            parts = [(*ct_y0, *of_kept), *nothing[1:], (*ct_y1, *of_kept)]
            otherwise = Otherwise(parts, nothing)
            ct_legs = [ct_first, *[None] * (len(moves) - 2), ct_last]
            return CotangentsOfDense(otherwise, ct_p, ct_legs)

        return Dense(dict(y0=ends[0], y1=ends[1], k0=k0, k1=k1), pull)


def _at_end(leg: Leg, values: Values) -> tuple:
    """Over which leg and of which part `h f` and `h g` are evaluated at one end of a
    step, where `leg` begins."""
    p, q = values
    leg = leg._replace(factor=np.float32(1))
    return (leg._replace(which=0), q), (leg._replace(which=1), p)


def _pull_derivatives(end: tuple, ct_k: Values, ct_y: Values) -> tuple:
    """The cotangents of parameters, of the leg and of the parts at an end."""
    (of_p, of_q), (p, q) = end, ct_y
    ct_p, ct_leg, ct_of_q = of_p.pull((ct_k[0], of_p.value[1]))[0]
    more, ct_leg_too, ct_of_p = of_q.pull((ct_k[1], of_q.value[1]))[0]
    ct_y = add_trees(p, ct_of_p), add_trees(q, ct_of_q)
    return add_trees(ct_p, more), add_trees(ct_leg, ct_leg_too), ct_y


def _between(span: Span, share: float) -> Time:
    """With the same bits in both passes: the product is rounded by itself."""
    if abs(share) < 1e-15:
        return span.start
    if abs(share - 1) < 1e-15:
        return span.end
    return span.start + rounded_product(jnp.asarray(share), span.end - span.start)
