"""The window of a symmetric multistep method, and what is computed of it: the equations
are those of `multistep_moves.py`."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Int, PyTree

from .._numbers.arithmetic import AbstractArithmetic, State
from .._numbers.words import parts_of, whole
from .._xla.guard import with_derivative_of
from .control import Control, times
from .kept import Kept
from .moves import Codes, Cotangents
from .multistep_weights import Weights

BITS = 32
"""Of a correction."""

Slopes = tuple[State, ...]
"""The derivatives of a window."""


def zeros_of(tree: PyTree) -> PyTree[Array]:
    return jtu.tree_map(jnp.zeros_like, tree)


def sum_of(*trees: PyTree[Array]) -> PyTree[Array]:
    return jtu.tree_map(lambda *xs: sum(xs[1:], start=xs[0]), *trees)


def weighted(weights: Any, trees: Any) -> State:
    return sum_of(*[times(w, x) for w, x in zip(weights, trees, strict=True) if w != 0])


def turned(xs: tuple) -> tuple:
    """(M2)."""
    return *xs[1:], xs[0]


def turned_back(xs: tuple) -> tuple:
    return xs[-1], *xs[:-1]


WORTH_KEEPING = 2048
"""Bytes of the residuals of an evaluation. Fewer are of one that costs less than to
take them from their row and put others there. (Measured: gradients of an orbit and of
one state of a small network took 1.4 and 1.2 times as long with a ring; of networks
of width 256, or of several states, 0.87 to 0.97 of the time.)"""


class Ring(eqx.Module):
    """The residuals of the evaluations that derivatives of a window come from, in rows.

    Going back, those of the oldest take the row of the newest, which is pulled back in
    the same step: the others stay where they are.
    """

    rows: list[Array]
    newest: Int[Array, ""]
    """Which row is of the newest. (With lanes all go back from their own ends at once,
    so that it is the same in all whose window is full.)"""

    def taken(self) -> list[Array]:
        """Those of the newest."""
        take = ft.partial(lax.dynamic_index_in_dim, index=self.newest, keepdims=False)
        return [take(x) for x in self.rows]

    def given(self, residuals: list[Array]) -> "Ring":
        """With these, of the oldest, in their place."""
        rows = [
            lax.dynamic_update_index_in_dim(x, new, self.newest, 0)
            for x, new in zip(self.rows, residuals, strict=True)
        ]
        last = len(self.rows[0]) - 1 if self.rows else 0
        return Ring(rows, jnp.where(self.newest > 0, self.newest - 1, last))


class Window(eqx.Module):
    """A state, taken apart."""

    values: Codes
    slopes: Slopes
    correction: PyTree[Array] | None
    """`None` of a method that does not correct."""
    residuals: PyTree[Array] = None
    """Those of the derivatives, if they are kept: a [`Ring`][], or what was taken."""

    @staticmethod
    def of(codes: Codes, steps: int) -> "Window":
        values, (slopes, *correction) = codes[:steps], codes[steps:]
        correction = correction[0].value if correction else None
        return Window(values, slopes.value, correction, slopes.residuals)

    def turned(self, turn: Callable[[tuple], tuple]) -> "Window":
        values, slopes = turn(self.values), turn(self.slopes)
        return Window(values, slopes, self.correction, self.residuals)

    @property
    def codes(self) -> Codes:
        correction = () if self.correction is None else (Kept(self.correction),)
        return *self.values, Kept(self.slopes, self.residuals), *correction


# Of cotangents the parts are those of the values that codes stand for.
def window_of_cotangents(ct: Cotangents, steps: int) -> Window:
    values, (slopes, *correction) = ct.parts[:steps], ct.parts[steps:]
    return Window(values, slopes, *(correction or [None]))


def cotangents_of(ct: Cotangents, window: Window) -> Cotangents:
    correction = () if window.correction is None else (window.correction,)
    return ct._replace(parts=(*window.values, window.slopes, *correction))


def differences(arithmetic: AbstractArithmetic, values: Codes) -> tuple[State, ...]:
    """Those that (M1) reads, of the outermost values first; but not of `w_0`."""
    pairs = [(len(values) - j, j) for j in range(1, len(values) // 2)]
    return tuple(arithmetic.difference(values[a], values[b]) for a, b in pairs)


def increment(
    weights: Weights, reads: tuple[tuple[State, ...], Slopes], length: Control
) -> State:
    """(M1)."""
    (apart, slopes), k = reads, weights.steps
    half = k // 2
    both = [sum_of(slopes[j - 1], slopes[k - j - 1]) for j in range(1, half)]
    slope = weighted(weights.betas[1 : half + 1], [*both, slopes[half - 1]])
    return sum_of(weighted(weights.alphas[1:half], apart), times(length, slope))


def amplitude(
    weights: Weights, steps: tuple[State, ...], slopes: Slopes, length: Control
) -> State:
    """(A), of the `steps` from each value to the next one."""
    # Their weights add up to zero.
    of_steps = -np.cumsum(weights.values)[:-1]
    slope = weighted(weights.slopes, slopes)
    return sum_of(weighted(of_steps, steps), times(length, slope))


def steps_of(arithmetic: AbstractArithmetic, values: Codes) -> tuple[State, ...]:
    pairs = zip(values[1:], values[:-1], strict=True)
    return tuple(arithmetic.difference(later, earlier) for later, earlier in pairs)


def rounded(d: State) -> PyTree[Array]:
    """(C1), real and imaginary parts along one more axis."""
    return jtu.tree_map(lambda x: parts_of(x).astype(jnp.float32), d)


def restored(correction: PyTree[Array], like: State) -> State:
    return jtu.tree_map(lambda x, y: whole(x, y.dtype), correction, like)


def as_kept(d: State) -> State:
    """`d` as it is restored from what is kept of it; differentiated as `d`."""
    value = lax.stop_gradient(restored(rounded(d), d))
    return jtu.tree_map(with_derivative_of, d, value)
