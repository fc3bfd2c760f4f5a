"""Parts of a state that follow from others, and are kept to be used again."""

import equinox as eqx
from jaxtyping import Array, PyTree

from .._numbers.arithmetic import AbstractArithmetic, Code


class Kept(eqx.Module):
    """A part that follows from others: what a field gave for them, to be used again."""

    value: PyTree[Array]
    residuals: PyTree[Array] = None
    """Of its evaluations, where they are kept from one step to the next one back. (With
    lanes they are of all together, and may have no axis of lanes.)"""


def bare(codes: tuple) -> tuple:
    """The parts of a state, without residuals."""
    without = lambda part: Kept(part.value) if isinstance(part, Kept) else part
    return tuple(map(without, codes))


def residuals_of(codes: tuple) -> list:
    """Of each part that is kept."""
    return [part.residuals for part in codes if isinstance(part, Kept)]


def with_residuals(codes: tuple, residuals: list) -> tuple:
    """Undoes `bare`, given `residuals_of` the same."""
    left = iter(residuals)
    put = lambda x: Kept(x.value, next(left)) if isinstance(x, Kept) else x
    return tuple(map(put, codes))


def value_of(arithmetic: AbstractArithmetic, part: Code | Kept) -> PyTree[Array]:
    return part.value if isinstance(part, Kept) else arithmetic.decode(part)
