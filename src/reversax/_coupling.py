r"""How the two twins of a reversible step see each other.

A reversible solver advances a pair of twins `(y, z)`, both equal to `y0` at the start.
A *coupling* is the linear, invertible mixing of the pair that precedes each step; it
contracts the gap between the twins, which nothing else would do. With it the step is

    (C)    (y, z) = mix(y0, z0)
    (F1)   y1 = y + Psi_{h}(t0, z)
    (F2)   z1 = z - Psi_{-h}(t1, y1)

and what the user sees is `readout(y, z)`.

The symmetric coupling contracts the gap about the mean, by half at every `m`-th step
(counted from the first accepted one) and not at all at the others:

    (S)    mix(y, z) = (y - c, z + c),  c = (y - z)/4  if `m` divides the number of
           the step, else 0;            readout(y, z) = (y + z)/2

McCallum & Foster (arXiv 2410.11648, equation (4)) with `0 < lam <= 1`:

    (MF)   mix(y, z) = (lam*y + (1 - lam)*z, z),     readout(y, z) = y
"""

import abc
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.core
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Int, PyTree, UInt32

from ._arithmetic import AbstractArithmetic, State
from ._compat import unvmap_any

Index = Int[Array, ""] | int


def divided(count: Index, by: int) -> tuple[UInt32[Array, ""], UInt32[Array, ""]]:
    """The quotient and the remainder of a count, which is never negative.

    A signed one would take a compiler a dozen operations, to round down and not to
    zero; and it repeats them in all that is fused with what depends on them.
    """
    unsigned, divisor = jnp.asarray(count).astype(jnp.uint32), np.uint32(by)
    return lax.div(unsigned, divisor), lax.rem(unsigned, divisor)


class Pair(eqx.Module):
    """The twins of a reversible solver: two states of the same structure.

    `y` is the twin the step begins with in (F1), `z` the coupled one. Both are PyTrees
    of arrays shaped like `y0`.
    """

    y: PyTree[Array]
    z: PyTree[Array]


def _as_halve_every(value) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(
            "`reversax.Symmetric(halve_every=...)` needs a Python integer of at least "
            f"1, got {value!r}."
        )
    return value


class AbstractCoupling(eqx.Module):
    """Mixes the twins before each step. `mix` is linear and `unmix` its inverse.

    `index` counts the accepted steps, from 0.
    """

    @property
    @abc.abstractmethod
    def halve_every(self) -> int | None:
        """At every how many steps the gap is halved, which sheds a bit of an exact
        number; `None` if the mixing cannot be done in exact numbers."""

    @abc.abstractmethod
    def mix(self, arithmetic: AbstractArithmetic, pair: Pair, index: Index) -> Pair:
        """The pair that (F1) and (F2) start from."""

    @abc.abstractmethod
    def unmix(
        self,
        arithmetic: AbstractArithmetic,
        pair: Pair,
        index: Index,
        shed_bits: Callable[[], Any],
    ) -> Pair:
        """Undoes `mix`; `shed_bits()` are those that it shed at this step."""

    @abc.abstractmethod
    def readout(self, pair: Pair) -> State:
        """The solution that the decoded pair stands for, shaped like `y0`; linear."""

    @property
    @abc.abstractmethod
    def amplification(self) -> float:
        """By how much undoing a step magnifies round-off: its natural logarithm."""

    @property
    @abc.abstractmethod
    def watches_gap(self) -> bool:
        """Whether a controller of steps is to keep the gap small too."""

    @abc.abstractmethod
    def order(self, base_order: int) -> int:
        """The order of the readout, given that of the base."""


class Symmetric(AbstractCoupling):
    """Halves the gap between the twins, about their mean, at every few steps.

    The default. The mean of the twins is what the solve returns. Compared with
    [`reversax.McCallumFoster`][] it

    - gains an order for every base of odd order (Euler becomes second, Bosh3 fourth,
      Tsit5 and Dopri5 sixth), since the errors of a step taken forwards and of one
      taken backwards differ in sign;
    - is stable on a damped mode `y' = alpha*y` for `h*|alpha| < ln(2)/halve_every`
      (0.17 at the default), and keeps the base's limit on the imaginary axis.

    In [`reversax.FixedPoint`][] arithmetic each halving sheds one bit per element of
    the state, which the adjoint keeps: `1/halve_every` bits per step and element. In
    [`reversax.FloatingPoint`][] undoing `n` steps magnifies round-off by
    `2**(n/halve_every)`. A smaller `halve_every` damps more and keeps more.
    """

    halve_every: int = eqx.field(  # pyright: ignore[reportIncompatibleMethodOverride]
        default=4, converter=_as_halve_every, static=True
    )

    def _where_halved(
        self, index: Index, pair: Pair, move: Callable[[], tuple], skip: bool
    ) -> Pair:
        """The moved pair at the steps that halve, and `pair` at the others."""
        _, phase = divided(index, self.halve_every)
        halves = phase == self.halve_every - 1
        choose = lambda a, b: jnp.where(halves, a, b)
        moved = lambda: jtu.tree_map(choose, Pair(*move()), pair)
        if not skip:
            return moved()
        # Few steps do halve, so that skipping is worth a conditional. One for all the
        # lanes of a batch, for it to remain one.
        return lax.cond(unvmap_any(halves), moved, lambda: pair)

    def mix(self, arithmetic: AbstractArithmetic, pair: Pair, index: Index) -> Pair:
        halve = lambda: arithmetic.halve_gap(pair.y, pair.z)
        return self._where_halved(index, pair, halve, arithmetic.exact)  # (S)

    def unmix(
        self,
        arithmetic: AbstractArithmetic,
        pair: Pair,
        index: Index,
        shed_bits: Callable[[], Any],
    ) -> Pair:
        double = lambda: arithmetic.double_gap(pair.y, pair.z, shed_bits())
        return self._where_halved(index, pair, double, arithmetic.exact)  # (S)

    def readout(self, pair: Pair) -> State:
        return jtu.tree_map(lambda y, z: (y + z) / 2, pair.y, pair.z)  # (S)

    @property
    def amplification(self) -> float:
        return math.log(2) / self.halve_every

    @property
    def watches_gap(self) -> bool:
        return True

    def order(self, base_order: int) -> int:
        return base_order + base_order % 2


Symmetric.__init__.__doc__ = """**Arguments:**

- `halve_every`: the gap is halved at every so many accepted steps; a Python integer of
    at least 1.

**Raises:** `ValueError` for anything else.
"""


def _as_coupling_parameter(value) -> float:
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            "`reversax.McCallumFoster(coupling_parameter=...)` got a traced value "
            f"({value}). The coupling parameter is a constant of the scheme: pass a "
            "Python float, outside of `jax.jit`, `jax.vmap` and `jax.grad`."
        )
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise TypeError(
            "`reversax.McCallumFoster(coupling_parameter=...)` needs a number in "
            f"(0, 1], got {value!r}."
        )
    value = float(value)
    if not 0 < value <= 1:
        raise ValueError(
            "`reversax.McCallumFoster(coupling_parameter=...)` must lie in (0, 1], got "
            f"{value}. Values just below 1, such as the published 0.999, keep the "
            "backward reconstruction accurate; smaller values damp the gap between the "
            "twins faster."
        )
    return value


class McCallumFoster(AbstractCoupling):
    """The coupling of McCallum & Foster, "Efficient, Accurate and Stable Gradients for
    Neural ODEs" (arXiv 2410.11648, equation (4)).

    The published method, for comparison with it and for work that builds on it; only in
    [`reversax.FloatingPoint`][] arithmetic, since a multiplication by `lam` at every
    step would shed a fraction of a bit each time. Else use [`reversax.Symmetric`][].
    Suits non-stiff problems of up to some thousands of steps: undoing a step
    amplifies round-off by `1/coupling_parameter`, hence `n` steps by
    `coupling_parameter**-n`, and the scheme is stable on a damped mode `y' = alpha*y`
    only for `h*|alpha| < -ln(coupling_parameter)` (0.001 at the default). Every
    backward pass checks what it lost, see [`reversax.ReversibleAdjoint`][].

    The order is that of the base solver.
    """

    coupling_parameter: float = eqx.field(
        default=0.999, converter=_as_coupling_parameter, static=True
    )

    def mix(self, arithmetic: AbstractArithmetic, pair: Pair, index: Index) -> Pair:
        lam = self.coupling_parameter
        y = jtu.tree_map(lambda y, z: lam * y + (1 - lam) * z, pair.y, pair.z)  # (MF)
        return Pair(y, pair.z)

    def unmix(
        self,
        arithmetic: AbstractArithmetic,
        pair: Pair,
        index: Index,
        shed_bits: Callable[[], Any],
    ) -> Pair:
        lam = self.coupling_parameter
        y = jtu.tree_map(lambda y, z: (y - (1 - lam) * z) / lam, pair.y, pair.z)  # (MF)
        return Pair(y, pair.z)

    def readout(self, pair: Pair) -> State:
        return pair.y

    @property
    def halve_every(self) -> None:
        return None

    @property
    def amplification(self) -> float:
        return -math.log(self.coupling_parameter)

    @property
    def watches_gap(self) -> bool:
        # It hardly contracts the gap, so that ever smaller steps would be of no avail.
        return False

    def order(self, base_order: int) -> int:
        return base_order


McCallumFoster.__init__.__doc__ = """**Arguments:**

- `coupling_parameter`: `lam` in (MF), a Python float in (0, 1]; dimensionless.

**Raises:** `ValueError` outside (0, 1], `TypeError` for a traced value.
"""
