r"""The numbers that the twins are made of, and how an increment is added to one.

Reversing a step is exact only as far as `subtract` undoes `add`, and `double_gap`
undoes `halve_gap`:

    (A)    subtract(add(x, d), d) == x
    (H)    halve_gap:   y -> y - c,  z -> z + c,  c = (y - z)/4

In floating point both hold to round-off. In fixed point they hold to the bit: with the
twins integers, (A) is integer addition, and of `d = y - z` the division by four leaves
a remainder, of which the halved gap still knows the lower bit:

    (H1)   d = y - z,  c = d >> 2,  r = d & 3,  shed bit r >> 1
    (H2)   after it y - z = d - 2c = 2c + r, of which r & 1 is the lowest bit; so
           (y - z) >> 1 = c + (r >> 1),  c = ((y - z) >> 1) - bit

A fixed-point number `v` is an integer `n = v/q` of two machine words,

    (Q)    n = high * 2**W + low,   q = largest * 2**(1 - 2*W),   |v| < largest

with `W = 32` for single precision (and what is narrower) and 64 for double. `high` is
signed, `low` is not; sums wrap, as two's complement does. All scalings are by powers of
two, hence exact, so that compiling them in another way (fused, say) changes no bit.
"""

import abc
import functools as ft
import math
from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, Int, PyTree, UInt, UInt32

from ._guard import with_derivative_of

State = PyTree[Array]
Code = PyTree[Any]


class AbstractArithmetic(eqx.Module):
    """A representation of the state, in which increments are added and taken back."""

    @property
    @abc.abstractmethod
    def exact(self) -> bool:
        """Whether (A) and (H) are undone to the bit."""

    @abc.abstractmethod
    def encode(self, y: State) -> Code:
        """The code of a state; differentiable, as if it were the identity."""

    @abc.abstractmethod
    def decode(self, code: Code) -> State:
        """The state that a code stands for, or the cotangent of one from a code's."""

    @abc.abstractmethod
    def add(self, code: Code, increment: State) -> Code:
        """The code of the state advanced by `increment`."""

    @abc.abstractmethod
    def subtract(self, code: Code, increment: State) -> Code:
        """Undoes `add` of the same increment, (A)."""

    @abc.abstractmethod
    def halve_gap(self, y: Code, z: Code) -> tuple[Code, Code]:
        """Moves both towards their mean until half the gap is left, (H)."""

    @abc.abstractmethod
    def shed_bits(self, y: Code, z: Code) -> PyTree[UInt32[Array, "..."]] | None:
        """What `halve_gap(y, z)` loses: one bit an element, or nothing."""

    @abc.abstractmethod
    def double_gap(self, y: Code, z: Code, shed_bits: Any) -> tuple[Code, Code]:
        """Undoes `halve_gap`, given what it lost."""

    @abc.abstractmethod
    def difference(self, a: Code, b: Code) -> State:
        """`a - b`, zero only if they are the same number."""

    @abc.abstractmethod
    def cotangent(self, code: Code, ct: State) -> Code:
        """Undoes `decode` of a cotangent: that of a code, from that of its state."""


class FloatingPoint(AbstractArithmetic):
    """The state's own floating-point numbers.

    Costs nothing and works for any floating dtype; taking an increment back leaves a
    rounding error of half an ulp, which the coupling then amplifies from step to step.
    [`reversax.FixedPoint`][] leaves none.
    """

    @property
    def exact(self) -> bool:
        return False

    def encode(self, y: State) -> Code:
        return y

    def decode(self, code: Code) -> State:
        return code

    def add(self, code: Code, increment: State) -> Code:
        return jtu.tree_map(lambda x, d: x + d, code, increment)  # (A)

    def subtract(self, code: Code, increment: State) -> Code:
        return jtu.tree_map(lambda x, d: x - d, code, increment)  # (A)

    def halve_gap(self, y: Code, z: Code) -> tuple[Code, Code]:
        c = jtu.tree_map(lambda a, b: (a - b) / 4, y, z)
        return self.subtract(y, c), self.add(z, c)  # (H)

    def shed_bits(self, y: Code, z: Code) -> None:
        return None

    def double_gap(self, y: Code, z: Code, shed_bits: None) -> tuple[Code, Code]:
        c = jtu.tree_map(lambda a, b: (a - b) / 2, y, z)
        return self.add(y, c), self.subtract(z, c)  # (H)

    def difference(self, a: Code, b: Code) -> State:
        # An infinity that is found again is no error.
        return jtu.tree_map(lambda x, y: jnp.where(x == y, 0, x - y), a, b)

    def cotangent(self, code: Code, ct: State) -> Code:
        return ct


FloatingPoint.__init__.__doc__ = """**Arguments:** None"""


class Number(eqx.Module):
    """A fixed-point number, and its value in floating point, which carries derivatives.

    NaN as the value marks a number that left its range, and everything made from it.
    """

    high: Int[Array, "..."]
    low: UInt[Array, "..."]
    value: Float[Array, "..."]


def _is_number(x: Any) -> bool:
    return isinstance(x, Number)


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


def _shifted_right(a: Words, by: int) -> Words:
    word = a[1].dtype.itemsize * 8
    low = (a[1] >> by) | (_unsigned(a[0]) << (word - by))
    return a[0] >> by, low


def _as_largest(value: Any) -> float | None:
    if value is None:
        return None
    is_number = isinstance(value, int | float) and type(value) is not bool
    if not (is_number and 0 < value < math.inf):
        raise ValueError(
            "`reversax.FixedPoint(largest=...)` needs a positive Python number, the "
            f"largest absolute value that the state reaches, got {value!r}."
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

    Differentiation takes it for the identity (integers have no derivative, and the
    rounding to multiples of `q` is of the size of other round-off).
    """

    largest: float | None = eqx.field(default=None, converter=_as_largest, static=True)

    @property
    def exact(self) -> bool:
        return True

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
                f"`reversax.FixedPoint(largest={self.largest:g})` cannot hold states "
                f"of dtype {dtype}: `largest` must lie between 2**{-limit} and "
                f"2**{limit}. Rescale the state."
            )
        return exponent

    def _scales(self, dtype: Any) -> tuple[np.ndarray, np.ndarray, Any]:
        """The values of a unit of `high` and of `low`, and the dtype to compute in."""
        wide = jnp.float64 if _word(dtype) == 64 else jnp.float32
        word, exponent = _word(dtype), self.exponent(dtype)
        scale = lambda k: np.asarray(2.0**k, wide)
        return scale(exponent + 1 - word), scale(exponent + 1 - 2 * word), wide

    def _words(self, x: Array) -> Words:
        """The nearest integer to `x/q`, (Q)."""
        unit, _, wide = self._scales(x.dtype)
        word = _word(x.dtype)
        scaled = x.astype(wide) * (1 / unit)
        high = jnp.round(scaled)
        # Exact, since it has no digits that `scaled` had not. In [-1/2, 1/2], of which
        # both ends fit a signed word only below zero.
        rest = jnp.round((scaled - high) * np.asarray(2.0**word, wide))
        signed = jnp.dtype(f"int{word}")
        magnitude = -_unsigned((-jnp.abs(rest)).astype(signed))
        negative = rest < 0
        low = jnp.where(negative, -magnitude, magnitude)
        return high.astype(signed) - negative.astype(signed), low

    def _value(self, words: Words, dtype: Any) -> Array:
        high, low = words
        unit_high, unit_low, wide = self._scales(dtype)
        # With `low` in [-2**(W-1), 2**(W-1)) small negative numbers keep their digits.
        rest = _signed(low)
        high = high - (rest >> (_word(dtype) - 1))
        value = high.astype(wide) * unit_high + rest.astype(wide) * unit_low
        return value.astype(dtype)

    def _number(self, words: Words, value: Array, *addends: Array) -> Number:
        """The number of these words, differentiated as `value`, which it rounds.

        If it or one of the `addends` it was made with is out of range, words wrapped.
        """
        largest = 2.0 ** self.exponent(value.dtype)
        # Phrased so that NaN fails.
        inside = [jnp.abs(lax.stop_gradient(x)) < largest for x in (value, *addends)]
        inside = ft.reduce(jnp.logical_and, inside)
        exact = self._value(words, value.dtype)
        return Number(
            *words, with_derivative_of(value, jnp.where(inside, exact, jnp.nan))
        )

    def encode(self, y: State) -> Code:
        return jtu.tree_map(lambda x: self._number(self._words(x), x), y)

    def decode(self, code: Code) -> State:
        return jtu.tree_map(lambda x: x.value, code, is_leaf=_is_number)

    def add(self, code: Code, increment: State) -> Code:
        def leaf(x, d):
            words = _plus((x.high, x.low), self._words(lax.stop_gradient(d)))
            return self._number(words, x.value + d, d)  # (A)

        return jtu.tree_map(leaf, code, increment, is_leaf=_is_number)

    def subtract(self, code: Code, increment: State) -> Code:
        def leaf(x, d):
            words = _minus((x.high, x.low), self._words(lax.stop_gradient(d)))
            return self._number(words, x.value - d, d)  # (A)

        return jtu.tree_map(leaf, code, increment, is_leaf=_is_number)

    def halve_gap(self, y: Code, z: Code) -> tuple[Code, Code]:
        def leaf(y, z):
            a, b = (y.high, y.low), (z.high, z.low)
            c = _shifted_right(_minus(a, b), 2)  # (H1)
            gap = y.value - z.value
            return (
                self._number(_minus(a, c), y.value - gap / 4, gap),
                self._number(_plus(b, c), z.value + gap / 4, gap),
            )

        return _unzip(jtu.tree_map(leaf, y, z, is_leaf=_is_number))

    def shed_bits(self, y: Code, z: Code) -> PyTree[UInt32[Array, "..."]]:
        leaf = lambda y, z: (((y.low - z.low) >> 1) & 1).astype(jnp.uint32)  # (H1)
        return jtu.tree_map(leaf, y, z, is_leaf=_is_number)

    def double_gap(self, y: Code, z: Code, shed_bits: Any) -> tuple[Code, Code]:
        def leaf(y, z, bit):
            a, b = (y.high, y.low), (z.high, z.low)
            gap = _minus(a, b)
            bit = bit.astype(gap[1].dtype)
            c = _minus(_shifted_right(gap, 1), (jnp.zeros_like(gap[0]), bit))  # (H2)
            half = y.value - z.value
            return (
                self._number(_plus(a, c), y.value + half / 2, 2 * half),
                self._number(_minus(b, c), z.value - half / 2, 2 * half),
            )

        return _unzip(jtu.tree_map(leaf, y, z, shed_bits, is_leaf=_is_number))

    def difference(self, a: Code, b: Code) -> State:
        def leaf(a, b):
            words = _minus((a.high, a.low), (b.high, b.low))
            dtype = a.value.dtype
            value = self._value(words, dtype)
            # Half precision has no number as small as a unit.
            same = (a.high == b.high) & (a.low == b.low)
            value = jnp.where(~same & (value == 0), jnp.finfo(dtype).tiny, value)
            lost = jnp.isnan(a.value) | jnp.isnan(b.value)
            return jnp.where(lost, jnp.nan, value)

        return jtu.tree_map(leaf, a, b, is_leaf=_is_number)

    def cotangent(self, code: Code, ct: State) -> Code:
        leaf: Any = lambda _, ct: Number(None, None, ct)  # pyright: ignore
        return jtu.tree_map(leaf, code, ct, is_leaf=_is_number)


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
