r"""One reversible step and its inverse.

With the coupling's `mix`, the increment `Psi` and the arithmetic's `add`, `subtract`:

    (C)    (y, z) = mix(y0, z0)
    (F1)   y1 = y + Psi_{h}(t0, z)
    (F2)   z1 = z - Psi_{-h}(t1, y1)

and, undone in the opposite order,

    (B2)   z  = z1 + Psi_{-h}(t1, y1)
    (B1)   y  = y1 - Psi_{h}(t0, z)
    (BC)   (y0, z0) = unmix(y, z)

(McCallum & Foster, arXiv 2410.11648, equations (4) and (5), with their coupling.)

Between the ends of a step, `theta` running from 0 to 1, the solution is the base's own
interpolant `u` of its step from `z` plus the linear change of the difference between
the readout `r` and `u`:

    (D)    r(theta) = u(theta) + (1 - theta) (r0 - u(0)) + theta (r1 - u(1)).

It meets both end values. Since `r - u` is the gap between two solutions of the base's
order, (D) has the order of the base's interpolation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._arithmetic import AbstractArithmetic
from ._coupling import AbstractCoupling, Pair
from ._increment import Advance, State, Time


class Scheme(eqx.Module):
    """A coupling in an arithmetic: all of a reversible step but its increment."""

    coupling: AbstractCoupling
    arithmetic: AbstractArithmetic

    def decode(self, pair: Pair) -> Pair:
        return Pair(self.arithmetic.decode(pair.y), self.arithmetic.decode(pair.z))

    def readout(self, pair: Pair) -> State:
        return self.coupling.readout(self.decode(pair))

    def start(self, y0: State) -> Pair:
        """Both twins at `y0`."""
        code = self.arithmetic.encode(y0)
        return Pair(code, code)

    def rebase(self, pair: Pair, y0: State) -> Pair:
        """Moves both twins by what separates the readout from `y0`: usually nothing.

        Whoever drives the solver may hand it another `y0` than it returned (as
        `BacksolveAdjoint` does between two saved times); the twins then move along.
        """
        shift = jtu.tree_map(lambda a, b: a - b, y0, self.readout(pair))
        add = self.arithmetic.add
        return Pair(add(pair.y, shift), add(pair.z, shift))


class Step(NamedTuple):
    """A reversible step: the pair at its end, and what was met on the way."""

    pair1: Pair
    z: State
    """The decoded twin that the forward increment started from."""
    forward: Advance
    """The forward increment, with the base's error estimate and dense output."""
    backward: Advance


def take_step(
    scheme: Scheme,
    pair0: Pair,
    forward: Callable[[State], Advance],
    backward: Callable[[State], Advance],
) -> Step:
    """(C), (F1), (F2): `forward` is `Psi_h(t0, .)`, `backward` `Psi_{-h}(t1, .)`."""
    arithmetic = scheme.arithmetic
    mixed = scheme.coupling.mix(pair0)  # (C)
    z = arithmetic.decode(mixed.z)
    ahead = forward(z)
    y1 = arithmetic.add(mixed.y, ahead.increment)  # (F1)
    behind = backward(arithmetic.decode(y1))
    z1 = arithmetic.subtract(mixed.z, behind.increment)  # (F2)
    return Step(Pair(y1, z1), z, ahead, behind)


def undo_step(
    scheme: Scheme,
    pair1: Pair,
    forward: Callable[[State], State],
    backward: Callable[[State], State],
) -> Pair:
    """(B2), (B1), (BC): the pair that `take_step` started from.

    `forward` and `backward` are as there but return the increment alone.
    """
    arithmetic = scheme.arithmetic
    z = arithmetic.add(pair1.z, backward(arithmetic.decode(pair1.y)))  # (B2)
    y = arithmetic.subtract(pair1.y, forward(arithmetic.decode(z)))  # (B1)
    return scheme.coupling.unmix(Pair(y, z))  # (BC)


class StepEnds(NamedTuple):
    """The values that dense output of a step is made from."""

    readout0: State
    readout1: State
    z: State
    increment: State
    base_dense_info: PyTree[Array]


def dense_info(ends: StepEnds) -> dict[str, Any]:
    """The `dense_info` of a step, for [`TwinInterpolation`][]."""
    difference = lambda a, b: jtu.tree_map(lambda x, y: x - y, a, b)
    gap0 = difference(ends.readout0, ends.z)
    gap1 = difference(difference(ends.readout1, ends.z), ends.increment)
    return dict(base_dense_info=ends.base_dense_info, gap0=gap0, gap1=gap1)


class TwinInterpolation(dfx.AbstractLocalInterpolation):
    """(D) on one step. `base_cls` is the base's own interpolation."""

    t0: Time
    t1: Time
    base: dfx.AbstractLocalInterpolation | None
    gap0: State
    gap1: State

    def __init__(self, *, base_cls, t0, t1, base_dense_info, gap0, gap1):
        self.t0 = t0
        self.t1 = t1
        self.base = None
        if base_dense_info is not None:
            self.base = base_cls(t0=t0, t1=t1, **base_dense_info)
        self.gap0 = gap0
        self.gap1 = gap1

    def evaluate(self, t0, t1=None, left: bool = True) -> State:
        if t1 is not None:
            at_t0, at_t1 = self.evaluate(t0, left=left), self.evaluate(t1, left=left)
            return jtu.tree_map(lambda a, b: b - a, at_t0, at_t1)
        assert self.base is not None
        length = self.t1 - self.t0
        # A step of no length has gap0 == gap1 == r - u.
        theta = (t0 - self.t0) / jnp.where(length == 0, 1, length)
        u = self.base.evaluate(t0, left=left)
        mix = lambda u, a, b: u + ((1 - theta) * a + theta * b).astype(a.dtype)
        return jtu.tree_map(mix, u, self.gap0, self.gap1)  # (D)


class TwinInterpolationFactory(eqx.Module):
    """`TwinInterpolation` over one base interpolation: an `interpolation_cls`.

    A module rather than a `functools.partial`, so that two of them compare equal.
    """

    base_cls: Callable[..., dfx.AbstractLocalInterpolation] = eqx.field(static=True)

    def __call__(self, **kwargs) -> TwinInterpolation:
        return TwinInterpolation(base_cls=self.base_cls, **kwargs)
