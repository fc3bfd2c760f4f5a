r"""Fixed-point numbers as integers of two machine words.

A fixed-point number `v` is an integer `n = v/q` of two machine words,

    (Q)    n = high * 2**W + low,   q = largest * 2**(1 - 2*W),   |v| < largest

with `W = 32` for single precision (and what is narrower) and 64 for double. `high` is
signed, `low` is not; sums wrap, as two's complement does. All scalings are by powers of
two, hence exact, so that compiling them in another way (fused, say) changes no bit.

A float becomes an integer half a word at a time, from the top,

    (D)    i = x rounded to an integer,    x <- (x - i) * 2**(W/2),

without loss. The integer is read off the bits of `x + C`, where `C` is so large that
the last bit of the sum is a unit: it is never converted, which compilers guard by five
more operations, for NaN and for what is too large.
"""

import dataclasses
import functools as ft
import math
from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .._xla.bits import bits_of
from .schedule import Count


def parts_of(x: Array) -> Float[Array, "..."]:
    """The real numbers that an array consists of, along one more axis if it is complex:
    real part, imaginary part."""
    return jnp.stack([x.real, x.imag], axis=-1) if jnp.iscomplexobj(x) else x


def whole(parts: Float[Array, "..."], dtype: Any) -> Array:
    """Undoes `parts_of`, for an array of `dtype`."""
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


Words = tuple[Array, Array]


def plus(a: Words, b: Words) -> Words:
    low = a[1] + b[1]
    carry = (low < a[1]).astype(a[0].dtype)
    return a[0] + b[0] + carry, low


def minus(a: Words, b: Words) -> Words:
    low = a[1] - b[1]
    # Of what is read anyway: `b` may have to be computed first.
    borrow = (low > a[1]).astype(a[0].dtype)
    return a[0] - b[0] - borrow, low


def has_wrapped(total: Words, one: Words, other: Words) -> Bool[Array, "..."]:
    """Whether `total = one + other` is too large for its words."""
    return ((one[0] ^ total[0]) & (other[0] ^ total[0])) < 0


def outgrown(dtype: Any) -> np.ndarray:
    """The upper word, of this dtype, of a number that became too large."""
    return np.asarray(np.iinfo(dtype).min, dtype)


def undefined(dtype: Any) -> np.ndarray:
    """That of one to which NaN was added, or infinity."""
    return outgrown(dtype) + np.asarray(1, dtype)


def is_lost(high: Array) -> Bool[Array, "..."]:
    """Whether an upper word is that of a number that was lost."""
    return high <= undefined(high.dtype)


def shifted_right(a: Words, by: Count) -> Words:
    """By less than a word."""
    by, left = _shifts(a, by)
    # No shift is as wide as a word, which would not be defined.
    low = (a[1] >> by) | ((bits_of(a[0]) << 1) << left)
    return a[0] >> by.astype(a[0].dtype), low


def shifted_left(a: Words, by: Count) -> Words:
    by, right = _shifts(a, by)
    high = (bits_of(a[0]) << by) | ((a[1] >> 1) >> right)
    return _signed(high), a[1] << by


def _shifts(a: Words, by: Count) -> tuple[Array, Array]:
    """`by`, and what is left of a word, less one."""
    by, last = jnp.asarray(by).astype(a[1].dtype), a[1].dtype.itemsize * 8 - 1
    # Which tells a compiler that no shift is too wide: else it asks at each element.
    by = by & jnp.asarray(last, by.dtype)
    return by, jnp.asarray(last, by.dtype) - by


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

    def _unit(self, dtype: Any) -> tuple[int, Any]:
        """The binary exponent of a unit of `high`, and the dtype to compute in."""
        wide = jnp.float64 if _word(dtype) == 64 else jnp.float32
        return self.exponent(dtype) + 1 - _word(dtype), wide

    @ft.partial(jax.jit, static_argnums=0)  # Traced once for all that ask for it.
    def words(self, x: Array) -> Words:
        """The nearest integer to `x/q`, (Q)."""
        unit, wide = self._unit(x.dtype)
        half = _word(x.dtype) // 2
        step = np.asarray(2.0**half, wide)
        rest = parts_of(x).astype(wide) * np.asarray(2.0 ** (-unit - half), wide)
        halves, rests = [], []
        for _ in range(4):
            i, rest = _rounded(rest)
            halves.append(i)
            rests.append(rest)
            rest = rest * step  # (D)
        high = (halves[0] << half) + halves[1]
        # It may be half a unit of `high`, of which only the negative fits a signed
        # word; and so small a negative one that it is none.
        negative = rests[1] < np.asarray(-(2.0 ** (-2 * half - 1)), wide)
        low = bits_of((halves[2] << half) + halves[3])
        return high - negative.astype(high.dtype), low

    @ft.partial(jax.jit, static_argnums=(0, 2))
    def value(self, words: Words, dtype: Any) -> Array:
        """What words stand for: the parts of an array of `dtype`."""
        high, low = words
        unit, wide = self._unit(dtype)
        unit_high, unit_low = (
            np.asarray(2.0**k, wide) for k in (unit, unit - _word(dtype))
        )
        # With `low` in [-2**(W-1), 2**(W-1)) small negative numbers keep their digits.
        rest = _signed(low)
        high = high - (rest >> (_word(dtype) - 1))
        value = high.astype(wide) * unit_high + rest.astype(wide) * unit_low
        return value.astype(jnp.finfo(dtype).dtype)

    def out_of_range(self, x: Array) -> tuple[Array, Array]:
        """Whether `x` is too large to be a number, or added to one, and why."""
        size = jnp.abs(parts_of(lax.stop_gradient(x)))
        kind = jnp.dtype(f"int{_word(x.dtype)}")
        why = jnp.where(size < jnp.inf, outgrown(kind), undefined(kind))
        # Phrased so that NaN fails.
        return ~(size < 2.0 ** self.exponent(x.dtype)), why

    def upper(self, words: Words, wrong: Array, why: Any, dtype: Any) -> Array:
        """The upper word of these; or, if something is wrong, of a number lost."""
        if float(jnp.finfo(dtype).max) < 2.0 ** self.exponent(dtype):
            wrong = wrong | jnp.isinf(self.value(words, dtype))
        return jnp.where(wrong, why, words[0])


def _rounded(x: Array) -> tuple[Array, Array]:
    """The nearest integer, less than a quarter of the last that the dtype has, and what
    is left of `x`."""
    kind = jnp.finfo(x.dtype)
    large = np.asarray(1.5 * 2.0**kind.nmant, x.dtype)
    bits = lax.bitcast_convert_type(x + large, jnp.dtype(f"int{kind.bits}"))
    # Not `x - ((x + large) - large)`: XLA adds up constants in another order.
    return bits - large.view(bits.dtype), x - jnp.round(x)
