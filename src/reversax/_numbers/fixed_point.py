r"""Twins made of integers, of which what is added is taken back to the bit.

With the twins integers, (A) of `arithmetic.py` is integer addition. To halve their gap
`b` times sheds `b` of its bits, those above the lowest, which stays:

    (H1)   d = y - z,  g = d >> 1,  c = g - (g >> b),  shed g & (2**b - 1)
    (H2)   after it y - z = d - 2c = (d & 1) + 2*(g >> b), of which the upper bits are
           g >> b; so  g = (((y - z) >> 1) << b) + shed,  c = g - ((y - z) >> 1)

No halving, `b = 0`, sheds nothing and moves nothing.

Adding to many numbers is a loop over memory for each of the two words, and a compiler
repeats in each what it needs. So a number that was lost has no third array to say so,
but one of the two lowest `high`; and its value is made of its words when it is read.
"""

import functools as ft
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Inexact, Int, PyTree, UInt, UInt32

from .._xla.compat import unvmap_any
from .._xla.elementwise import elementwise
from .._xla.guard import with_derivative_of
from .arithmetic import AbstractArithmetic, Code, State, power_of_two, scaled
from .schedule import Count
from .words import (
    Scale,
    Words,
    has_wrapped,
    is_lost,
    minus,
    outgrown,
    plus,
    shifted_left,
    shifted_right,
    whole,
)


class Number(eqx.Module):
    """A fixed-point number, and a zero that has its derivatives.

    A number that left its range has an upper word that says why, and so has everything
    made from it; it is read as NaN. The words of a complex number are those of its
    parts, along one more axis.
    """

    high: Int[Array, "..."]
    low: UInt[Array, "..."]
    carrier: Inexact[Array, "..."]


def _is_number(x: Any) -> bool:
    return isinstance(x, Number)


def _as_largest(value: Any) -> float | None:
    if value is None:
        return None
    is_number = isinstance(value, int | float) and type(value) is not bool
    if not (is_number and 0 < value < math.inf):
        raise ValueError(
            "Pass the largest absolute value that the state reaches, a positive Python "
            f"number, as `reversax.FixedPoint(largest=...)`, not {value!r}."
        )
    return float(value)


class FixedPoint(AbstractArithmetic):
    """The twins as integers of two machine words: what is added can be taken back to
    the bit.

    This is the default, and makes reversing exact for any vector field, however
    contracting. The integers are multiples of a fixed step `q`, so that small numbers
    have fewer digits: by default `q` is 2.3e-13 and the range 2.1e6 for single
    precision, which suits states between 1e-6 and 1e6 in size, and 8.3e-25 and 1.4e14
    for double. For other sizes give `largest`. It is the wrong choice for a state whose
    elements span more than that, and for half precision gains nothing over single.

    A solve whose state leaves the range, or is not finite, has the result
    `diffrax.RESULTS.nonfinite`; a controller that adapts steps rejects such a step.

    Differentiation takes it for the identity: the rounding is of the size of others.
    """

    largest: float | None = eqx.field(default=None, converter=_as_largest, static=True)

    @property
    def exact(self) -> bool:
        return True

    @property
    def _scale(self) -> Scale:
        return Scale(self.largest)

    def exponent(self, dtype: Any) -> int:
        """`largest = 2**exponent` for states of this dtype."""
        return self._scale.exponent(dtype)

    def encode(self, y: State) -> Code:
        def leaf(x):
            words = self._scale.words(lax.stop_gradient(x))
            high = self._scale.upper(words, *self._scale.out_of_range(x), x.dtype)
            return _number(high, words[1], x)

        return jtu.tree_map(leaf, y)

    def decode(self, code: Code) -> State:
        def leaf(x):
            if x.high is None or x.high.dtype == jax.dtypes.float0:
                return x.carrier  # Of a cotangent.
            dtype = x.carrier.dtype
            value = self._scale.value((x.high, x.low), dtype)
            value = whole(jnp.where(is_lost(x.high), jnp.nan, value), dtype)
            return with_derivative_of(x.carrier, value)

        return jtu.tree_map(leaf, code, is_leaf=_is_number)

    def add(self, code: Code, increment: State) -> Code:
        def leaf(x, d):
            a, b = (x.high, x.low), self._scale.words(lax.stop_gradient(d))
            total = plus(a, b)  # (A)
            wrong = has_wrapped(total, a, b)
            high = _upper_of_sum(self._scale, x, d, total, wrong)
            return _number(high, total[1], x.carrier + d)

        return jtu.tree_map(leaf, code, increment, is_leaf=_is_number)

    def subtract(self, code: Code, increment: State) -> Code:
        def leaf(x, d):
            a, b = (x.high, x.low), self._scale.words(lax.stop_gradient(d))
            left = minus(a, b)  # (A)
            wrong = has_wrapped(a, left, b)
            high = _upper_of_sum(self._scale, x, d, left, wrong)
            return _number(high, left[1], x.carrier - d)

        return jtu.tree_map(leaf, code, increment, is_leaf=_is_number)

    def reflect(self, code: Code, about: Code) -> Code:
        def leaf(x, about):
            a, b = (about.high, about.low), (x.high, x.low)
            to = minus(a, b)
            words = plus(a, to)
            wrong = has_wrapped(a, to, b) | has_wrapped(words, a, to)
            why = outgrown(x.high.dtype)
            high = self._scale.upper(words, wrong, why, x.carrier.dtype)
            carrier = 2 * about.carrier - x.carrier
            high = _unless_lost(high, x.high, about.high)
            return _number(high, words[1], carrier)

        return jtu.tree_map(leaf, code, about, is_leaf=_is_number)

    def halve_gap(self, y: Code, z: Code, halvings: Count) -> tuple[Code, Code]:
        def leaf(dtype, halvings, a, b):
            gap = minus(a, b)
            g = shifted_right(gap, 1)  # (H1)
            c = minus(g, shifted_right(g, halvings))  # (H1)
            # Neither can leave the range, if the gap between them has not.
            wrong = has_wrapped(a, gap, b)
            new = minus(a, c), plus(b, c)
            return _moved_apart(self._scale, dtype, (a, b), new, wrong)

        factor = lambda dtype: (1 / power_of_two(halvings, dtype) - 1) / 2
        return _where_any(leaf, halvings, factor, y, z)

    def shed_bits(
        self, y: Code, z: Code, halvings: Count
    ) -> PyTree[UInt32[Array, "..."]]:
        mask = (np.uint32(1) << jnp.asarray(halvings, jnp.uint32)) - np.uint32(1)
        leaf = lambda y, z: ((y.low - z.low) >> 1).astype(jnp.uint32) & mask  # (H1)
        return jtu.tree_map(leaf, y, z, is_leaf=_is_number)

    def double_gap(
        self, y: Code, z: Code, halvings: Count, shed_bits: Callable[[], Any]
    ) -> tuple[Code, Code]:
        def leaf(dtype, halvings, a, b, bits):
            upper = shifted_right(minus(a, b), 1)
            # The lowest bits of what is shifted are zero.
            high, low = shifted_left(upper, halvings)
            g = high, low + bits.astype(low.dtype)  # (H2)
            c = minus(g, upper)  # (H2)
            y1, z1 = plus(a, c), minus(b, c)
            # Nothing that `halve_gap` returned is; nor would it take a gap of `2*g`
            # that is too large for words.
            wrong = shifted_right(g, halvings)[0] != upper[0]
            wrong = wrong | ((g[0] ^ (g[0] << 1)) < 0)
            wrong = wrong | has_wrapped(y1, a, c) | has_wrapped(b, z1, c)
            return _moved_apart(self._scale, dtype, (a, b), (y1, z1), wrong)

        factor = lambda dtype: (power_of_two(halvings, dtype) - 1) / 2
        return _where_any(leaf, halvings, factor, y, z, shed_bits)

    def outgrown(self, code: Code) -> Bool[Array, ""]:
        lost = lambda x: jnp.any(x.high == outgrown(x.high.dtype))
        found = map(lost, jtu.tree_leaves(code, is_leaf=_is_number))
        return ft.reduce(jnp.logical_or, found, jnp.array(False))

    def difference(self, a: Code, b: Code) -> State:
        def leaf(a, b):
            words = minus((a.high, a.low), (b.high, b.low))
            dtype = a.carrier.dtype
            value = self._scale.value(words, dtype)
            # Half precision has no number as small as a unit.
            same = (a.high == b.high) & (a.low == b.low)
            value = jnp.where(~same & (value == 0), jnp.finfo(dtype).tiny, value)
            lost = is_lost(a.high) | is_lost(b.high)
            value = whole(jnp.where(lost, jnp.nan, value), dtype)
            apart = a.carrier - b.carrier
            return with_derivative_of(apart, value)

        return jtu.tree_map(leaf, a, b, is_leaf=_is_number)

    def cotangent(self, code: Code, ct: State) -> Code:
        of: Any = lambda _, ct: Number(None, None, ct)  # pyright: ignore
        return jtu.tree_map(of, code, ct, is_leaf=_is_number)


Two = tuple[Words, Words]


def _number(high: Array, low: Array, carrier: Array) -> Number:
    """With a carrier that is the same in all numbers: no loop has to carry it."""
    zeros = jnp.zeros_like(carrier)
    return Number(high, low, with_derivative_of(carrier, zeros))


def _upper_of_sum(
    scale: Scale, x: Number, d: Array, words: Words, wrong: Array
) -> Array:
    """The upper word of `x` moved by `d` to these, unless one of the two was lost."""
    too_large, why = scale.out_of_range(d)
    high = scale.upper(words, wrong | too_large, why, d.dtype)
    return jnp.where(is_lost(x.high), x.high, high)


def _unless_lost(high: Array, a: Array, b: Array) -> Array:
    """The upper word of what follows from two numbers with the upper words `a`, `b`."""
    before = jnp.minimum(a, b)
    return jnp.where(is_lost(before), before, high)


def _moved_apart(
    scale: Scale, dtype: Any, old: Two, new: Two, wrong: Array
) -> list[Array]:
    """The new words of two numbers, unless one of them was lost."""
    why = outgrown(old[0][0].dtype)
    uppers = [scale.upper(x, wrong, why, dtype) for x in new]
    uppers = [_unless_lost(x, old[0][0], old[1][0]) for x in uppers]
    return [uppers[0], new[0][1], uppers[1], new[1][1]]


def _where_any(
    leaf: Callable, halvings: Count, factor: Callable, y: Code, z: Code, *more: Callable
) -> tuple[Code, Code]:
    """The numbers of the words that `leaf` returns of those of `y` and `z` (and of
    `more`), which move apart by `factor` of their gap, if there are halvings."""
    ys, treedef = jtu.tree_flatten(y, is_leaf=_is_number)
    zs = jtu.tree_leaves(z, is_leaf=_is_number)
    words = [[y.high, y.low, z.high, z.low] for y, z in zip(ys, zs, strict=True)]

    def moved(words: list[list[Array]]) -> list[list[Array]]:
        out, others = [], [jtu.tree_leaves(fn()) for fn in more]
        for i, y in enumerate(ys):
            of_words = ft.partial(_of_words, leaf, y.carrier.dtype)
            rest = [other[i] for other in others]
            out.append(elementwise(of_words, halvings, *words[i], *rest))
        return out

    if isinstance(halvings, int):
        words = moved(words)
    else:
        # Of many steps few do halve. One decision for all the lanes of a batch, for
        # skipping to remain possible.
        words = _if_due(unvmap_any(halvings > 0), moved, words)
    out = []
    for y, z, (y_high, y_low, z_high, z_low) in zip(ys, zs, words, strict=True):
        move = scaled(y.carrier - z.carrier, factor(y.carrier.dtype))
        y1 = _number(y_high, y_low, y.carrier + move)
        out.append((y1, _number(z_high, z_low, z.carrier - move)))
    pick = lambda i: treedef.unflatten([pair[i] for pair in out])
    return pick(0), pick(1)


_FEW = 256
"""Of so many numbers copying is not what a step costs."""


def _if_due(
    due: Bool[Array, ""], moved: Callable, words: list[list[Array]]
) -> list[list[Array]]:
    """`moved(words)`, or, where that is not due, `words`."""
    if sum(high.size for high, *_ in words) > _FEW:
        return lax.cond(due, moved, lambda words: words, words)
    # A loop of one turn or none, which has one table of addresses where a conditional
    # has three, and copies what it is given instead of what it returns.
    once = lambda state: (jnp.array(False), moved(state[1]))
    return lax.while_loop(lambda state: state[0], once, (due, words))[1]


def _of_words(leaf, dtype, halvings, y_high, y_low, z_high, z_low, *rest):
    return leaf(dtype, halvings, (y_high, y_low), (z_high, z_low), *rest)


FixedPoint.__init__.__doc__ = """**Arguments:**

- `largest`: the largest absolute value that the state reaches at any step (with that
    of its increments, which is smaller as a rule), a positive Python number in units of
    the state; rounded up to a power of two. The fixed step is
    `2**-63` of it for single precision and `2**-127` for double. By default `2**21` and
    `2**47`.

**Raises:** `ValueError` for what is no positive number; when a solve begins, for one
that numbers of the state's dtype cannot be scaled by.
"""
