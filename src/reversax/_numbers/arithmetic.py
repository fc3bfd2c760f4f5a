r"""The numbers that the twins are made of, and how an increment is added to one.

Reversing a step is exact only as far as `subtract` undoes `add`, and `double_gap`
undoes `halve_gap`, which halves the gap between the twins `b` times:

    (A)    subtract(add(x, d), d) == x
    (H)    halve_gap:   y -> y - c,  z -> z + c,  c = (1 - 2**-b)*(y - z)/2

In floating point both hold to round-off; in fixed point, `fixed_point.py`, to the bit.
"""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, PyTree, UInt32

from .schedule import Count

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
    def reflect(self, code: Code, about: Code) -> Code:
        """`2*about - code`, its own inverse."""

    @abc.abstractmethod
    def halve_gap(self, y: Code, z: Code, halvings: Count) -> tuple[Code, Code]:
        """Moves both towards their mean until half the gap is left, so many times,
        (H)."""

    @abc.abstractmethod
    def shed_bits(
        self, y: Code, z: Code, halvings: Count
    ) -> PyTree[UInt32[Array, "..."]] | None:
        """What `halve_gap` loses of these: a bit an element and halving, or nothing."""

    @abc.abstractmethod
    def double_gap(
        self, y: Code, z: Code, halvings: Count, shed_bits: Callable[[], Any]
    ) -> tuple[Code, Code]:
        """Undoes `halve_gap`, given what it lost, which is `shed_bits()`."""

    @abc.abstractmethod
    def outgrown(self, code: Code) -> Bool[Array, ""]:
        """Whether a code was lost because it became too large."""

    @abc.abstractmethod
    def difference(self, a: Code, b: Code) -> State:
        """`a - b`, zero only if they are the same number; differentiable."""

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

    def reflect(self, code: Code, about: Code) -> Code:
        return jtu.tree_map(lambda x, a: 2 * a - x, code, about)

    def halve_gap(self, y: Code, z: Code, halvings: Count) -> tuple[Code, Code]:
        share = lambda x: (1 - 1 / power_of_two(halvings, x.dtype)) / 2
        c = jtu.tree_map(lambda a, b: scaled(a - b, share(a)), y, z)
        return self.subtract(y, c), self.add(z, c)  # (H)

    def shed_bits(self, y: Code, z: Code, halvings: Count) -> None:
        return None

    def double_gap(
        self, y: Code, z: Code, halvings: Count, shed_bits: Any = None
    ) -> tuple[Code, Code]:
        share = lambda x: (power_of_two(halvings, x.dtype) - 1) / 2
        c = jtu.tree_map(lambda a, b: scaled(a - b, share(a)), y, z)
        return self.add(y, c), self.subtract(z, c)  # (H)

    def outgrown(self, code: Code) -> Bool[Array, ""]:
        return jnp.array(False)

    def difference(self, a: Code, b: Code) -> State:
        # An infinity that is found again is no error.
        return jtu.tree_map(lambda x, y: jnp.where(x == y, 0, x - y), a, b)

    def cotangent(self, code: Code, ct: State) -> Code:
        return ct


def power_of_two(exponent: Count, dtype: Any) -> Array:
    """A real number, in the precision of `dtype`, which may be complex."""
    power = np.uint32(1) << jnp.asarray(exponent, jnp.uint32)
    return power.astype(jnp.finfo(dtype).dtype)


def scaled(x: Array, factor: Any) -> Array:
    """`x` times a real number; part by part if it is complex, of which one part may be
    infinite, or no number, and not the other."""
    if not jnp.iscomplexobj(x):
        return x * factor
    return lax.complex(x.real * factor, x.imag * factor)


FloatingPoint.__init__.__doc__ = """**Arguments:** None"""
