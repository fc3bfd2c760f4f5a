r"""How the two twins of a reversible step see each other.

A reversible solver advances a pair of twins `(y, z)`, both equal to `y0` at the start.
A *coupling* is the linear, invertible mixing of the pair that precedes each step; it
contracts the gap between the twins, which nothing else would do. With it the step is

    (C)    (y, z) = mix(y0, z0)
    (F1)   y1 = y + Psi_{h}(t0, z)
    (F2)   z1 = z - Psi_{-h}(t1, y1)

and what the user sees is `readout(y, z)`.

The symmetric coupling halves the gap about the mean, `b` times at a step, a number that
`schedule.py` has for each:

    (S)    mix(y, z) = (y - c, z + c),  c = (1 - 2**-b)*(y - z)/2,
           readout(y, z) = (y + z)/2

McCallum & Foster (arXiv 2410.11648, equation (4)) with `0 < lam <= 1`:

    (MF)   mix(y, z) = (lam*y + (1 - lam)*z, z),     readout(y, z) = y
"""

import abc
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.core
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._numbers.arithmetic import AbstractArithmetic, State, scaled
from .._numbers.schedule import MOST, SELDOM, AbstractSchedule, Count, Index, PerStep


class Pair(NamedTuple):
    """The twins of a reversible solver: two states of the same structure.

    `y` is the twin the step begins with in (F1), `z` the coupled one. Both are PyTrees
    of arrays shaped like `y0`.
    """

    y: PyTree[Array]
    z: PyTree[Array]


_MOST_OF_ALL = 30  # So that the bits of a step fit a word of 32.


def _as_halvings_per_step(value) -> int | float | str:
    if isinstance(value, str) and value == "auto":
        return value
    if type(value) is int and 1 <= value <= _MOST_OF_ALL:
        return value
    is_fraction = type(value) is not bool and hasattr(value, "__float__")
    if is_fraction and not isinstance(value, jax.core.Tracer | str):
        inverse = 1 / float(value) if 0 < float(value) <= 1 else math.nan
        if math.isfinite(inverse) and float(value) == 1 / round(inverse):
            return 1 / round(inverse) if round(inverse) > 1 else 1
    raise ValueError(
        f'Pass "auto", a Python integer from 1 to {_MOST_OF_ALL}, or 1/m for an '
        "integer m, such as 1/4, as `reversax.Symmetric(halvings_per_step=...)`, not "
        f"{value!r}."
    )


class AbstractCoupling(eqx.Module):
    """Mixes the twins before each step. `mix` is linear and `unmix` its inverse.

    `halvings` is how many times this step halves the gap, if it does so at all.
    """

    @property
    @abc.abstractmethod
    def halves(self) -> bool:
        """Whether the mixing halves the gap, and sheds whole bits of exact numbers."""

    @abc.abstractmethod
    def schedule(self, start: Index, chosen: AbstractSchedule) -> AbstractSchedule:
        """How many halvings each step makes, of a solve that goes on after `start`
        steps: as the user says, else as was `chosen`."""

    @abc.abstractmethod
    def mix(self, arithmetic: AbstractArithmetic, pair: Pair, halvings: Count) -> Pair:
        """The pair that (F1) and (F2) start from."""

    @abc.abstractmethod
    def unmix(
        self,
        arithmetic: AbstractArithmetic,
        pair: Pair,
        halvings: Count,
        shed_bits: Callable[[], Any],
    ) -> Pair:
        """Undoes `mix`; `shed_bits()` are those that it shed at this step."""

    @abc.abstractmethod
    def readout(self, pair: Pair) -> State:
        """The solution that the decoded pair stands for, shaped like `y0`; linear."""

    @property
    @abc.abstractmethod
    def amplification(self) -> float | None:
        """By how much undoing a step magnifies round-off: its natural logarithm; `None`
        if that depends on the solve."""

    @property
    @abc.abstractmethod
    def watches_gap(self) -> bool:
        """Whether a controller of steps is to keep the gap small too."""

    @abc.abstractmethod
    def order(self, base_order: int) -> int:
        """The order of the readout, given that of the base."""


class Symmetric(AbstractCoupling):
    """Halves the gap between the twins, about their mean, some times at a step.

    The default. The mean of the twins is what the solve returns. Compared with
    [`reversax.McCallumFoster`][] it

    - gains an order for every base of odd order (Euler becomes second, Bosh3 fourth,
      Tsit5 and Dopri5 sixth), since the errors of a step taken forwards and of one
      taken backwards differ in sign;
    - is stable on a damped mode `y' = alpha*y` for
      `h*|alpha| < halvings_per_step*ln(2)`, up to the limit of the base (for Tsit5
      2.8 at four halvings), and keeps the base's limit on the imaginary axis.

    In [`reversax.FixedPoint`][] arithmetic each halving sheds one bit per element of
    the state, which the adjoint keeps. In [`reversax.FloatingPoint`][] each doubles the
    round-off of what is undone. More halvings damp more and keep more; on a problem
    that is not damped their number changes next to nothing.

    By default, "auto", they are spread over the solve: four at each of up to 64
    constant steps; fewer at more steps, so that they are 256 in all, for which
    `|alpha|*T < 177` suffices; but at least one at every fourth step. With a
    controller that adapts they follow time, up to four a step. Under the adjoints of
    Diffrax, which need no bits, "auto" is four at every step.
    """

    halvings_per_step: int | float | str = eqx.field(
        default="auto", converter=_as_halvings_per_step, static=True
    )

    @property
    def halves(self) -> bool:
        return True

    def schedule(self, start: Index, chosen: AbstractSchedule) -> AbstractSchedule:
        number = self.halvings_per_step
        if isinstance(number, str):
            return chosen
        p, q = (number, 1) if isinstance(number, int) else (1, round(1 / number))
        return PerStep(p, q, start)

    def mix(self, arithmetic: AbstractArithmetic, pair: Pair, halvings: Count) -> Pair:
        return Pair(*arithmetic.halve_gap(pair.y, pair.z, halvings))  # (S)

    def unmix(
        self,
        arithmetic: AbstractArithmetic,
        pair: Pair,
        halvings: Count,
        shed_bits: Callable[[], Any],
    ) -> Pair:
        known = halvings, shed_bits
        return Pair(*arithmetic.double_gap(pair.y, pair.z, *known))  # (S)

    def readout(self, pair: Pair) -> State:
        return jtu.tree_map(lambda y, z: scaled(y + z, 0.5), pair.y, pair.z)  # (S)

    @property
    def amplification(self) -> float | None:
        number = self.halvings_per_step
        return None if isinstance(number, str) else math.log(2) * number

    @property
    def watches_gap(self) -> bool:
        return True

    def order(self, base_order: int) -> int:
        return base_order + base_order % 2


Symmetric.__init__.__doc__ = f"""**Arguments:**

- `halvings_per_step`: how many times the gap is halved at each accepted step: "auto",
    a Python integer from 1 to {_MOST_OF_ALL}, or `1/m`, which halves it once at every
    `m`-th step. More than {MOST} are of no use to an explicit base, and fewer than
    1/{SELDOM} suit only problems that are hardly damped, or are solved in very many
    steps.

**Raises:** `ValueError` for anything else.
"""


def _as_coupling_parameter(value) -> float:
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            "Pass a Python float as `reversax.McCallumFoster(coupling_parameter=...)`, "
            "outside of `jax.jit`, `jax.vmap` and `jax.grad`: it is a constant of the "
            f"scheme, and this is a traced value ({value})."
        )
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise TypeError(
            "Pass a number in (0, 1] as "
            f"`reversax.McCallumFoster(coupling_parameter=...)`, not {value!r}."
        )
    value = float(value)
    if not 0 < value <= 1:
        raise ValueError(
            "Pass a number in (0, 1] as "
            f"`reversax.McCallumFoster(coupling_parameter=...)`, not {value}. Values "
            "just below 1, such as the published 0.999, keep the backward "
            "reconstruction accurate; smaller values damp the gap between the twins "
            "faster."
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

    @property
    def halves(self) -> bool:
        return False

    def schedule(self, start: Index, chosen: AbstractSchedule) -> AbstractSchedule:
        return PerStep(0, 1, start)

    def mix(self, arithmetic: AbstractArithmetic, pair: Pair, halvings: Count) -> Pair:
        lam = self.coupling_parameter
        y = jtu.tree_map(lambda y, z: lam * y + (1 - lam) * z, pair.y, pair.z)  # (MF)
        return Pair(y, pair.z)

    def unmix(
        self,
        arithmetic: AbstractArithmetic,
        pair: Pair,
        halvings: Count,
        shed_bits: Callable[[], Any],
    ) -> Pair:
        lam = self.coupling_parameter
        y = jtu.tree_map(lambda y, z: (y - (1 - lam) * z) / lam, pair.y, pair.z)  # (MF)
        return Pair(y, pair.z)

    def readout(self, pair: Pair) -> State:
        return pair.y

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
