r"""One reversible step and its inverse.

With the coupling's `mix`, the increment `Psi` and the arithmetic's `add`, `subtract`:

    (C)    (y, z) = mix(y0, z0)
    (F1)   y1 = y + Psi_{h}(t0, z)
    (F2)   z1 = z - Psi_{-h}(t1, y1)

and, undone in the opposite order,

    (B2)   z  = z1 + Psi_{-h}(t1, y1)
    (B1)   y  = y1 - Psi_{h}(t0, z)
    (BC)   (y0, z0) = unmix(y, z)

The two halves of a step have one form, `b += s Psi(from, to, a)` and then `a`, `b`
change places, begun with `(a, b) = (z, y)`: with `s = 1` from `t0` to `t1` it is (F1),
with `s = -1` from `t1` to `t0` (F2). They are written, traced and, in a loop of two
trips, compiled once.

(McCallum & Foster, arXiv 2410.11648, equations (4) and (5), with their coupling.) All
of these act on codes of states (`arithmetic.py`), the increments on states.

The increments do not quite cancel: their sum is what the step adds to the gap `y - z`,

    (E)    e = Psi_{h}(t0, z) + Psi_{-h}(t1, y1)

which is of order `h**(k + 1)` for a base of odd order `k`, `h**(k + 2)` for even, and
`h J (y - z)` where the twins are already apart, with `J` the Jacobian of the field. A
controller is told of it and of the base's own estimate `u`, with `b` the halvings of
this step,

    (U)    |u| + 5/2 * sqrt(|u|*|e|) + 2**-b * |e|

where the geometric mean counts most. On a smooth solution both are of one size, and (E)
sees errors of which `u` knows nothing; where steps are about as long as stability
allows, (E) is up to `exp(h*|J|)` times `u`, and as a plain sum it would have steps
rejected at every turn; and where `u` is blind to a gap that widens, because few
halvings are made, the last term has it.

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
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, PyTree

from .._numbers.arithmetic import AbstractArithmetic, FloatingPoint, State, power_of_two
from .._numbers.schedule import Count
from .control import Half, Time
from .coupling import AbstractCoupling, Pair
from .increment import Core


class Scheme(eqx.Module):
    """A coupling in an arithmetic: all of a reversible step but its increment."""

    coupling: AbstractCoupling
    arithmetic: AbstractArithmetic

    @property
    def sheds(self) -> bool:
        """Whether halvings shed a bit of each element of the state."""
        return self.coupling.halves and self.arithmetic.exact

    def decode(self, pair: Pair) -> Pair:
        """The twins' states; or the cotangents of these, from those of a pair."""
        return Pair(self.arithmetic.decode(pair.y), self.arithmetic.decode(pair.z))

    def cotangent(self, pair: Pair, ct: Pair) -> Pair:
        """Undoes `decode` of cotangents, for those of `pair`."""
        arithmetic = self.arithmetic
        return Pair(
            arithmetic.cotangent(pair.y, ct.y), arithmetic.cotangent(pair.z, ct.z)
        )

    def readout(self, pair: Pair) -> State:
        return self.coupling.readout(self.decode(pair))

    def mix(self, pair: Pair, halvings: Count) -> Pair:
        return self.coupling.mix(self.arithmetic, pair, halvings)  # (C)

    def unmix(self, pair: Pair, halvings: Count, shed_bits: Callable[[], Any]) -> Pair:
        return self.coupling.unmix(self.arithmetic, pair, halvings, shed_bits)  # (BC)

    def mix_states(self, pair: Pair, halvings: Count) -> Pair:
        """(C) on decoded states; linear."""
        return self.coupling.mix(FloatingPoint(), pair, halvings)

    def difference(self, a: Pair, b: Pair) -> Pair:
        """`a - b`, decoded."""
        difference = self.arithmetic.difference
        return Pair(difference(a.y, b.y), difference(a.z, b.z))

    def gap(self, pair: Pair) -> State:
        """`y - z`, decoded twin by twin."""
        twins = self.decode(pair)
        return jtu.tree_map(lambda y, z: y - z, twins.y, twins.z)

    def is_finite(self, pair: Pair) -> Bool[Array, ""]:
        """Whether all of the twins is."""
        leaves = [jnp.isfinite(x).all() for x in jtu.tree_leaves(self.decode(pair))]
        return jnp.stack([jnp.array(True), *leaves]).all()

    def outgrown(self, pair: Pair) -> Bool[Array, ""]:
        """Whether a twin was lost because it became too large."""
        return self.arithmetic.outgrown((pair.y, pair.z))

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


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray)


def through_halves(
    fn: Callable[[Any, Any], tuple[Any, Any]],
    carry: PyTree[Array],
    halves: PyTree[Array],
    *,
    reverse: bool = False,
    unroll: bool = False,
) -> tuple[PyTree[Array], PyTree[Any]]:
    """`jax.lax.scan` over the two halves of a step, but `fn` may be given, and return,
    what is no array, if it is the same for both."""
    noted: list = []
    halves, static = eqx.partition(halves, _is_array)

    def body(carry, half):
        carry, out = fn(carry, eqx.combine(half, static))
        arrays, others = eqx.partition(out, eqx.is_array)
        noted.append(others)
        return carry, arrays

    carry, out = lax.scan(body, carry, halves, reverse=reverse, unroll=2 * unroll or 1)
    return carry, eqx.combine(out, noted[-1])


def half_of(stacked: PyTree, i: int) -> PyTree:
    """Of what both halves gave, stacked, that of (F1), 0, or of (F2), 1."""
    return jtu.tree_map(lambda x: x[i] if eqx.is_array(x) else x, stacked)


class Step(NamedTuple):
    """A reversible step: the pair at its end, and what was met on the way."""

    pair1: Pair
    z: State
    """The decoded twin that the forward increment started from."""
    core: Core
    """Of the increments of both halves, stacked."""


def take_step(
    scheme: Scheme,
    pair0: Pair,
    halvings: Count,
    halves: Half,
    core: Callable[[Half, State], Core],
) -> Step:
    """(C), (F1), (F2): `core(half, .)` is the increment over one of the `halves`."""
    arithmetic = scheme.arithmetic
    mixed = scheme.mix(pair0, halvings)  # (C)

    def take_half(twins, half: Half):
        a, b = twins
        out = core(half, arithmetic.decode(a))
        return (arithmetic.add(b, half.signed(out.increment)), a), out  # (F1, F2)

    (z1, y1), out = through_halves(take_half, (mixed.z, mixed.y), halves)
    return Step(Pair(y1, z1), arithmetic.decode(mixed.z), out)


def undo_step(
    scheme: Scheme,
    pair1: Pair,
    halves: Half,
    core: Callable[[Half, State, Any], tuple[State, Any, Any]],
    extra: PyTree[Array],
    *,
    unroll: bool,
) -> tuple[Pair, PyTree[Array], PyTree[Any]]:
    """(B2), (B1): the mixed pair, which `take_step` had after (C).

    `core(half, a, extra)` returns the increment of a half from the twin `a`, `extra` as
    it is to be handed to the other half, and anything else. The last `extra`, and what
    else both halves returned, stacked, are returned with the pair.
    """
    arithmetic = scheme.arithmetic

    def undo_half(carry, half: Half):
        (b, a), extra = carry
        increment, extra, out = core(half, arithmetic.decode(a), extra)
        b = arithmetic.subtract(b, half.signed(increment))  # (B2, B1)
        return ((a, b), extra), out

    carry = (pair1.z, pair1.y), extra
    ((z, y), extra), out = through_halves(
        undo_half, carry, halves, reverse=True, unroll=unroll
    )
    return Pair(y, z), extra, out


def error_estimate(
    increments: State, error: State | None, halvings: Count, watches_gap: bool
) -> State:
    """What a controller should keep small: the base's estimate and (E), or one of them.

    `increments` are those of both halves, stacked, `error` the base's estimate.

    (E) is there if the coupling watches the gap or the base has no estimate. The gap
    between the twins grows by (E) in this step. On a damped problem that is mostly the
    parasitic mode, which the base's own estimate cannot see.
    """
    gap = jtu.tree_map(lambda x: jnp.abs(x[0] + x[1]), increments)  # (E)
    if error is None:
        return gap
    error = jtu.tree_map(lambda e, g: jnp.abs(e).astype(g.dtype), error, gap)
    if not watches_gap:
        return error

    def both(u, e):
        # Of the square roots, whose product cannot underflow. At zero their derivative
        # is not finite, and no controller has one with respect to its error.
        mean = lax.stop_gradient(jnp.sqrt(u) * jnp.sqrt(e))
        return u + 2.5 * mean + e / power_of_two(halvings, e.dtype)  # (U)

    return jtu.tree_map(both, error, gap)


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
    cls: type[TwinInterpolation] = eqx.field(static=True, default=TwinInterpolation)

    def __call__(self, **kwargs) -> TwinInterpolation:
        return self.cls(base_cls=self.base_cls, **kwargs)
