"""The same function of several rows, one after the other: in a loop, traced and
compiled once, or written out."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree


def is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray)


def through(
    fn: Callable[[Any, Any], tuple[Any, Any]],
    carry: PyTree[Array],
    xs: PyTree,
    *,
    reverse: bool = False,
    unroll: bool = False,
    in_lanes: bool = False,
) -> tuple[PyTree[Array], PyTree[Any]]:
    """`jax.lax.scan` over rows, but `fn` may be given, and return, what is no array, if
    it is the same for all. With `in_lanes` it may ask what is the same in all lanes."""
    noted: list = []
    rows, static = eqx.partition(xs, is_array)

    def of_row(carry, row):
        carry, out = fn(carry, eqx.combine(row, static))
        arrays, others = eqx.partition(out, eqx.is_array)
        noted.append(others)
        return carry, arrays

    if unroll:
        carry, out = lax.scan(of_row, carry, rows, reverse=reverse, unroll=2)
        return carry, eqx.combine(out, noted[-1])
    rows, apart = _numbers_together(rows, in_lanes)

    # A compiler takes a row from the stack where it is used, in each operation on each
    # element, which is then none on vectors. One that the loop carries it does not.
    def body(state, following):
        carry, this = state
        carry, out = of_row(carry, apart(this))
        return (carry, following), out

    first = row(rows, -1 if reverse else 0)
    following = jtu.tree_map(lambda x: jnp.roll(x, 1 if reverse else -1, 0), rows)
    (carry, _), out = lax.scan(body, (carry, first), following, reverse=reverse)
    return carry, eqx.combine(out, noted[-1])


def _numbers_together(
    rows: PyTree[Array], in_lanes: bool
) -> tuple[tuple[list[Array], list[Array]], Callable]:
    """Rows, with the numbers among them in one array for each dtype: each buffer takes
    64 bytes, however little is in it. And what makes one of these rows as it was."""
    leaves, treedef = jtu.tree_flatten(rows)

    def is_number(x: Any) -> bool:
        # Constants among numbers of a lane would become those of a lane too.
        apart = in_lanes and isinstance(x, np.ndarray)
        return x.ndim == 1 and not apart and jnp.issubdtype(x.dtype, jnp.inexact)

    kinds = [str(x.dtype) if is_number(x) else "" for x in leaves]
    names = sorted({*kinds} - {""})
    of_kind = lambda name: [x for x, k in zip(leaves, kinds, strict=True) if k == name]
    together = [jnp.stack(of_kind(name), axis=1) for name in names]

    def apart(row: tuple[list[Array], list[Array]]) -> PyTree[Array]:
        numbers, others = row
        left = {name: iter(xs) for name, xs in zip(names, numbers, strict=True)}
        left[""] = iter(others)
        return treedef.unflatten([next(left[kind]) for kind in kinds])

    return (together, of_kind("")), apart


def row(stacked: PyTree, i: int) -> PyTree:
    """One of several, stacked."""
    return jtu.tree_map(lambda x: x[i] if is_array(x) else x, stacked)
