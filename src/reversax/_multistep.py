"""`SymmetricMultistep`: what users hand to `Reversible`."""

from typing import ClassVar

import diffrax as dfx
import equinox as eqx

from ._numbers.arithmetic import AbstractArithmetic, FloatingPoint
from ._schemes.increment import is_tableau
from ._schemes.multistep import Multistep
from ._schemes.multistep_dense import WindowInterpolation
from ._schemes.multistep_weights import ORDERS, weights_of_order
from ._solver import Reversible

_CALL = "`reversax.SymmetricMultistep(...)`"


class SymmetricMultistep(dfx.AbstractSolver):
    """An explicit symmetric multistep method, of order 4 or 6, at one evaluation of the
    vector field a step.

    Use it as `reversax.Reversible(reversax.SymmetricMultistep())` with
    [`reversax.ReversibleAdjoint`][], for problems that are not damped, or little, and
    solves of a hundred steps and more: where a step over a base costs twice the base's
    evaluations, one of this costs one, and two on the way back. A state is a window of
    4 or 6 values and as many derivatives.

    Do not use it where steps are to adapt: they must be constant, and are made equal,
    a whole number of them over the time of the solve; nor for stochastic equations; nor
    for damped problems, for which its stability interval is short. There
    `reversax.Reversible(diffrax.Tsit5())` is better. `docs/choosing.md` has a table.

    Source: Lambert & Watson, "Symmetric multistep methods for periodic initial value
    problems", IMA J. Appl. Math. 18 (1976), for the family; the coefficients were
    searched for, and what takes the parasitic mode from damped problems, a correction
    that is kept in 32 bits, is reversax's own: see "Multistep methods" in
    `docs/method.md`.
    """

    order_: int = eqx.field(static=True)
    correct_every: int | None = eqx.field(static=True)
    starter: dfx.AbstractSolver

    term_structure: ClassVar = dfx.AbstractTerm
    interpolation_cls: ClassVar = WindowInterpolation

    def __init__(
        self,
        order: int = 6,
        correct_every: int | None = 16,
        starter: dfx.AbstractSolver | None = None,
    ):
        if order not in ORDERS:
            raise ValueError(f"Pass `order=4` or `order=6`, not {order!r}. ({_CALL})")
        if correct_every is not None and not (
            type(correct_every) is int and correct_every >= order
        ):
            raise ValueError(
                f"Pass a Python integer of at least {order}, the length of the window, "
                f"or `None` for no corrections, as `correct_every`, not "
                f"{correct_every!r}. ({_CALL})"
            )
        starter = dfx.Tsit5() if starter is None else starter
        if not is_tableau(starter):
            raise ValueError(
                "Pass an explicit Runge-Kutta solver, such as `diffrax.Tsit5()`, as "
                f"`starter`, not {starter!r}. ({_CALL})"
            )
        self.order_ = order
        self.correct_every = correct_every
        self.starter = starter

    def reversible_scheme(self, arithmetic: AbstractArithmetic) -> Multistep:
        """How it steps; [`reversax.Reversible`][] asks for it."""
        return Multistep(
            arithmetic=arithmetic,
            weights=weights_of_order(self.order_),
            starter=self.starter,
            correct_every=self.correct_every,
        )

    def order(self, terms):
        return self.order_

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    @property
    def _reversible(self) -> Reversible:
        return Reversible(self, arithmetic=FloatingPoint())

    def init(self, terms, t0, t1, y0, args):
        return self._reversible.init(terms, t0, t1, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        known = (terms, t0, t1, y0, args, solver_state, made_jump)
        return self._reversible.step(*known)


SymmetricMultistep.__init__.__doc__ = """**Arguments:**

- `order`: 4 or 6, which is also how many values the window has. Order 6 from some five
    digits on; order 4 where fewer are wanted, or steps are few: it has a longer
    stability interval and starts in three steps instead of five.
- `correct_every`: at every how many steps what alternates from step to step is taken
    from the window, a Python integer not smaller than `order`; or `None`, never, which
    keeps nothing and is right where nothing is damped. Each correction is kept in 32
    bits for each element of the state. More often is stable for larger damping: see the
    table in `docs/choosing.md`.
- `starter`: the one-step method that takes the first `order - 1` steps, an explicit
    Runge-Kutta solver of an order not lower than `order - 1`; by default
    `diffrax.Tsit5()`. `diffrax.Bosh3()` starts order 4 in half the evaluations.

**Raises:** `ValueError` for arguments that are none. When a solve begins, `TypeError`
for a controller other than `diffrax.ConstantStepSize` and for terms other than a single
`diffrax.ODETerm`. During a solve by one of Diffrax's adjoints,
`equinox.EquinoxRuntimeError` for steps that are not equally long.
"""
