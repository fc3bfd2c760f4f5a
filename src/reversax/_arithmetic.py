"""The numbers that the twins are made of, and how an increment is added to one.

Reversing a step is exact only as far as `subtract` undoes `add`:

    (A)    subtract(add(x, d), d) == x

In floating point (A) holds to half an ulp of `x + d`.
"""

import abc

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import Array, PyTree


class AbstractArithmetic(eqx.Module):
    """A representation of the state, in which increments are added and taken back."""

    @abc.abstractmethod
    def encode(self, y: PyTree[Array]) -> PyTree[Array]:
        """The code of a state."""

    @abc.abstractmethod
    def decode(self, code: PyTree[Array]) -> PyTree[Array]:
        """The state that a code stands for."""

    @abc.abstractmethod
    def add(self, code: PyTree[Array], increment: PyTree[Array]) -> PyTree[Array]:
        """The code of the state advanced by `increment`."""

    @abc.abstractmethod
    def subtract(self, code: PyTree[Array], increment: PyTree[Array]) -> PyTree[Array]:
        """Undoes `add` of the same increment, (A)."""


class FloatingPoint(AbstractArithmetic):
    """The state's own floating-point numbers.

    Costs nothing and works for any floating dtype; taking an increment back leaves a
    rounding error of half an ulp, which the coupling then amplifies from step to step.
    """

    def encode(self, y: PyTree[Array]) -> PyTree[Array]:
        return y

    def decode(self, code: PyTree[Array]) -> PyTree[Array]:
        return code

    def add(self, code: PyTree[Array], increment: PyTree[Array]) -> PyTree[Array]:
        return jtu.tree_map(lambda x, d: x + d, code, increment)

    def subtract(self, code: PyTree[Array], increment: PyTree[Array]) -> PyTree[Array]:
        return jtu.tree_map(lambda x, d: x - d, code, increment)


FloatingPoint.__init__.__doc__ = """**Arguments:** None"""
