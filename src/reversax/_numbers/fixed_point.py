r"""Twins made of integers, of which what is added is taken back to the bit.

With the twins integers, (A) of `arithmetic.py` is integer addition. To halve their gap
`b` times sheds `b` of its bits, those above the lowest, which stays:

    (H1)   d = y - z,  g = d >> 1,  c = g - (g >> b),  shed g & (2**b - 1)
    (H2)   after it y - z = d - 2c = (d & 1) + 2*(g >> b), of which the upper bits are
           g >> b; so  g = (((y - z) >> 1) << b) + shed,  c = g - ((y - z) >> 1)

No halving, `b = 0`, sheds nothing and moves nothing.

A fixed-point number `v` is an integer `n = v/q` of two machine words,

    (Q)    n = high * 2**W + low,   q = largest * 2**(1 - 2*W),   |v| < largest

with `W = 32` for single precision (and what is narrower) and 64 for double. `high` is
signed, `low` is not; sums wrap, as two's complement does. All scalings are by powers of
two, hence exact, so that compiling them in another way (fused, say) changes no bit.
"""

import dataclasses
import functools as ft
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Inexact, Int, PyTree, UInt, UInt32

from .._xla.guard import with_derivative_of
from .arithmetic import AbstractArithmetic, Code, State, power_of_two, scaled
from .schedule import Count


class Number(eqx.Module):
    """A fixed-point number, and its value in floating point, which carries derivatives.

    NaN as the value marks a number that left its range, and everything made from it.
    The words of a complex number are those of its parts, along one more axis.
    """

    high: Int[Array, "..."]
    low: UInt[Array, "..."]
    value: Inexact[Array, "..."]


def _is_number(x: Any) -> bool:
    return isinstance(x, Number)


def parts_of(x: Array) -> Float[Array, "..."]:
    """The real numbers that an array consists of, along one more axis if it is complex:
    real part, imaginary part."""
    return jnp.stack([x.real, x.imag], axis=-1) if jnp.iscomplexobj(x) else x


def whole(parts: Float[Array, "..."], dtype: Any) -> Array:
    """Undoes `_parts`, for an array of `dtype`."""
    if not jnp.issubdtype(dtype, jnp.complexfloating):
        return parts.astype(dtype)
    parts = parts.astype(jnp.finfo(dtype).dtype)
    return lax.complex(parts[..., 0], parts[..., 1])


def _word(dtype: Any) -> int:
    """`W` in (Q)."""
    return 64 if jnp.finfo(dtype).bits == 64 else 32


def _signed(word: Array) -> Array:
    """An unsigned word's bits as a signed one."""
    return lax.bitcast_convert_type(word, jnp.dtype(f"int{word.dtype.itemsize * 8}"))


def _unsigned(word: Array) -> Array:
    return lax.bitcast_convert_type(word, jnp.dtype(f"uint{word.dtype.itemsize * 8}"))


Words = tuple[Array, Array]


def _plus(a: Words, b: Words) -> Words:
    low = a[1] + b[1]
    carry = (low < a[1]).astype(a[0].dtype)
    return a[0] + b[0] + carry, low


def _minus(a: Words, b: Words) -> Words:
    borrow = (a[1] < b[1]).astype(a[0].dtype)
    return a[0] - b[0] - borrow, a[1] - b[1]


def _shifted_right(a: Words, by: Count) -> Words:
    """By less than a word."""
    by, left = _shifts(a, by)
    # No shift is as wide as a word, which would not be defined.
    low = (a[1] >> by) | ((_unsigned(a[0]) << 1) << left)
    return a[0] >> by.astype(a[0].dtype), low


def _shifted_left(a: Words, by: Count) -> Words:
    by, right = _shifts(a, by)
    high = (_unsigned(a[0]) << by) | ((a[1] >> 1) >> right)
    return _signed(high), a[1] << by


def _shifts(a: Words, by: Count) -> tuple[Array, Array]:
    """`by`, and what is left of a word, less one."""
    by = jnp.asarray(by).astype(a[1].dtype)
    return by, jnp.asarray(a[1].dtype.itemsize * 8 - 1, a[1].dtype) - by


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


@dataclasses.dataclass(frozen=True)
class Scale:
    """(Q), for a largest number that was given or not."""

    largest: float | None

    def exponent(self, dtype: Any) -> int:
        """`largest = 2**exponent` for states of this dtype.

        **Raises:** `ValueError` if numbers of that dtype cannot be scaled so far.
        """
        word = _word(dtype)
        if self.largest is None:
            return 21 if word == 32 else 47
        exponent = math.ceil(math.log2(self.largest))
        # All scale factors must be normal numbers of the dtype that computes.
        limit = (126 if word == 32 else 1022) - 2 * word
        if not -limit <= exponent <= limit:
            raise ValueError(
                f"Rescale the state: `reversax.FixedPoint(largest={self.largest:g})` "
                f"cannot hold numbers of dtype {dtype}, for which `largest` must lie "
                f"between 2**{-limit} and 2**{limit}."
            )
        return exponent

    def _scales(self, dtype: Any) -> tuple[np.ndarray, np.ndarray, Any]:
        """The values of a unit of `high` and of `low`, and the dtype to compute in."""
        wide = jnp.float64 if _word(dtype) == 64 else jnp.float32
        word, exponent = _word(dtype), self.exponent(dtype)
        scale = lambda k: np.asarray(2.0**k, wide)
        return scale(exponent + 1 - word), scale(exponent + 1 - 2 * word), wide

    def words(self, x: Array) -> Words:
        """The nearest integer to `x/q`, (Q)."""
        unit, _, wide = self._scales(x.dtype)
        word = _word(x.dtype)
        scaled = parts_of(x).astype(wide) * (1 / unit)
        high = jnp.round(scaled)
        # Exact, since it has no digits that `scaled` had not. In [-1/2, 1/2], of which
        # both ends fit a signed word only below zero.
        rest = jnp.round((scaled - high) * np.asarray(2.0**word, wide))
        signed = jnp.dtype(f"int{word}")
        magnitude = -_unsigned((-jnp.abs(rest)).astype(signed))
        negative = rest < 0
        low = jnp.where(negative, -magnitude, magnitude)
        return high.astype(signed) - negative.astype(signed), low

    def value(self, words: Words, dtype: Any) -> Array:
        high, low = words
        unit_high, unit_low, wide = self._scales(dtype)
        # With `low` in [-2**(W-1), 2**(W-1)) small negative numbers keep their digits.
        rest = _signed(low)
        high = high - (rest >> (_word(dtype) - 1))
        value = high.astype(wide) * unit_high + rest.astype(wide) * unit_low
        return whole(value, dtype)

    def exactly(self, words: Words, value: Array) -> tuple[Words, Array]:
        """The words, and their value, differentiated as one that it rounds."""
        exact = self.value(words, value.dtype)
        exact = jnp.where(jnp.isnan(value), jnp.nan, exact)
        return words, with_derivative_of(value, exact)


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

    def _number(
        self, words: Words, value: Array, before: "Number | None", addend: Array
    ) -> Number:
        """The number of these words, differentiated as `value`, which it rounds: of
        what was `before`, and of what was added.

        If one of the last two is out of range, words wrapped. Then the upper word says
        whether the number was lost by its own size.
        """
        largest = 2.0 ** self.exponent(value.dtype)
        # Phrased so that NaN fails.
        constant = lambda x: parts_of(lax.stop_gradient(x))
        inside, small = [jnp.abs(constant(x)) < largest for x in (value, addend)]
        inside = inside & small
        exact = parts_of(self._scale.value(words, value.dtype))
        exact = whole(jnp.where(inside, exact, jnp.nan), value.dtype)
        high, low = words
        why = jnp.isfinite(constant(addend)).astype(high.dtype)
        if before is not None:
            why = jnp.where(jnp.isnan(constant(before.value)), before.high, why)
        exact = with_derivative_of(value, exact)
        return Number(jnp.where(inside, high, why), low, exact)

    def encode(self, y: State) -> Code:
        return jtu.tree_map(lambda x: self._number(self._scale.words(x), x, None, x), y)

    def decode(self, code: Code) -> State:
        return jtu.tree_map(lambda x: x.value, code, is_leaf=_is_number)

    def add(self, code: Code, increment: State) -> Code:
        return self._moved(_plus, code, increment)

    def subtract(self, code: Code, increment: State) -> Code:
        return self._moved(_minus, code, increment)

    def _moved(self, by: Callable, code: Code, increment: State) -> Code:
        def leaf(x, d):
            words = by((x.high, x.low), self._scale.words(lax.stop_gradient(d)))
            value = x.value + d if by is _plus else x.value - d
            return self._number(words, value, x, d)  # (A)

        return jtu.tree_map(leaf, code, increment, is_leaf=_is_number)

    def reflect(self, code: Code, about: Code) -> Code:
        def leaf(x, a):
            to = _minus((a.high, a.low), (x.high, x.low))
            distance = a.value - x.value
            words = _plus((a.high, a.low), to)
            return self._number(words, a.value + distance, a, distance)

        return jtu.tree_map(leaf, code, about, is_leaf=_is_number)

    def halve_gap(self, y: Code, z: Code, halvings: Count) -> tuple[Code, Code]:
        def leaf(y, z):
            a, b = (y.high, y.low), (z.high, z.low)
            g = _shifted_right(_minus(a, b), 1)  # (H1)
            c = _minus(g, _shifted_right(g, halvings))  # (H1)
            gap = y.value - z.value
            share = (1 - 1 / power_of_two(halvings, gap.dtype)) / 2
            move = scaled(gap, share)
            return (
                self._number(_minus(a, c), y.value - move, y, gap),
                self._number(_plus(b, c), z.value + move, z, gap),
            )

        return _unzip(jtu.tree_map(leaf, y, z, is_leaf=_is_number))

    def shed_bits(
        self, y: Code, z: Code, halvings: Count
    ) -> PyTree[UInt32[Array, "..."]]:
        mask = (np.uint32(1) << jnp.asarray(halvings, jnp.uint32)) - np.uint32(1)
        leaf = lambda y, z: ((y.low - z.low) >> 1).astype(jnp.uint32) & mask  # (H1)
        return jtu.tree_map(leaf, y, z, is_leaf=_is_number)

    def double_gap(
        self, y: Code, z: Code, halvings: Count, shed_bits: Any
    ) -> tuple[Code, Code]:
        exactly = self._scale.exactly

        def leaf(y, z, bits):
            a, b = (y.high, y.low), (z.high, z.low)
            upper = _shifted_right(_minus(a, b), 1)
            # The lowest bits of what is shifted are zero.
            high, low = _shifted_left(upper, halvings)
            g = high, low + bits.astype(low.dtype)  # (H2)
            c = _minus(g, upper)  # (H2)
            factor = power_of_two(halvings, y.value.dtype)
            # From the integers: the halved gap has lost the digits of its value.
            gap = scaled(self._scale.value(g, y.value.dtype), 2)
            move = scaled(y.value - z.value, (factor - 1) / 2)
            return (
                self._number(*exactly(_plus(a, c), y.value + move), y, gap),
                self._number(*exactly(_minus(b, c), z.value - move), z, gap),
            )

        return _unzip(jtu.tree_map(leaf, y, z, shed_bits, is_leaf=_is_number))

    def outgrown(self, code: Code) -> Bool[Array, ""]:
        lost = lambda x: jnp.any(jnp.isnan(parts_of(x.value)) & (x.high != 0))
        found = map(lost, jtu.tree_leaves(code, is_leaf=_is_number))
        return ft.reduce(jnp.logical_or, found, jnp.array(False))

    def difference(self, a: Code, b: Code) -> State:
        def leaf(a, b):
            words = _minus((a.high, a.low), (b.high, b.low))
            value = parts_of(self._scale.value(words, dtype := a.value.dtype))
            # Half precision has no number as small as a unit.
            same = (a.high == b.high) & (a.low == b.low)
            value = jnp.where(~same & (value == 0), jnp.finfo(dtype).tiny, value)
            apart = a.value - b.value  # NaN if either is.
            value = jnp.where(jnp.isnan(apart), jnp.nan, whole(value, dtype))
            return with_derivative_of(apart, value)

        return jtu.tree_map(leaf, a, b, is_leaf=_is_number)

    def cotangent(self, code: Code, ct: State) -> Code:
        of: Any = lambda _, ct: Number(None, None, ct)  # pyright: ignore
        return jtu.tree_map(of, code, ct, is_leaf=_is_number)


def _unzip(pairs: PyTree) -> tuple[Code, Code]:
    is_pair = lambda x: type(x) is tuple and len(x) == 2 and _is_number(x[0])
    pick = lambda i: jtu.tree_map(lambda x: x[i], pairs, is_leaf=is_pair)
    return pick(0), pick(1)


FixedPoint.__init__.__doc__ = """**Arguments:**

- `largest`: the largest absolute value that the state reaches at any step (with that
    of its increments, which is smaller as a rule), a positive Python number in units of
    the state; rounded up to a power of two. The fixed step is
    `2**-63` of it for single precision and `2**-127` for double. By default `2**21` and
    `2**47`.

**Raises:** `ValueError` for what is no positive number; when a solve begins, for one
that numbers of the state's dtype cannot be scaled by.
"""
