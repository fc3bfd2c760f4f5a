"""Functions whose closures are arrays among their own leaves.

As `equinox.filter_closure_convert`, but what they are called with need have only the
shapes and dtypes of the examples: inside `jax.shard_map` the type of an array also says
over which devices it may vary, which an example before a loop need not know.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.extend.core
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _kind(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))


class Closed(eqx.Module):
    """A function with all the arrays that it closes over among its leaves."""

    program: jax.extend.core.Jaxpr
    """A leaf, for transformations to find."""
    consts: list[Array]
    takes: tuple = eqx.field(static=True)
    returns: tuple = eqx.field(static=True)

    def __call__(self, *args: Any) -> Any:
        arrays, rest = eqx.partition(args, _is_array)
        leaves = jtu.tree_leaves(arrays)
        if self.takes != _described(arrays, rest):
            raise ValueError(
                "Call a closed function with what it was closed with: the shapes, "
                f"dtypes and constants {self.takes}, not {_described(arrays, rest)}."
            )
        closed = jax.extend.core.ClosedJaxpr(self.program, self.consts)
        out = jax.extend.core.jaxpr_as_fun(closed)(*leaves)
        treedef, other_treedef, others = self.returns
        return eqx.combine(treedef.unflatten(out), other_treedef.unflatten(others))

    def are_of(self, which: int) -> list[bool]:
        """Of the arguments of the program, which are of this one of the function."""
        treedef, *_ = self.takes
        sizes = [child.num_leaves for child in treedef.children()]
        return [i == which for i, size in enumerate(sizes) for _ in range(size)]


def _described(arrays: PyTree, rest: PyTree) -> tuple:
    kinds = [(_kind(x).shape, _kind(x).dtype) for x in jtu.tree_leaves(arrays)]
    return jtu.tree_structure(arrays), tuple(kinds), *_flattened(rest)


def _flattened(tree: PyTree) -> tuple:
    leaves, treedef = jtu.tree_flatten(tree)
    return treedef, tuple(leaves)


def closed(fn: Callable, *example: Any) -> Closed:
    """`fn`, traced here, once.

    **Arguments:** `fn`, a function of any trees; `example`, what it will be called
    with, or what has those shapes and dtypes.

    **Returns:** a function of the same arguments.
    """
    arrays, rest = eqx.partition(example, _is_array)
    kinds = jtu.tree_map(_kind, arrays)
    traced = eqx.filter_make_jaxpr(fn)(*eqx.combine(kinds, rest))
    program, shapes, others = traced
    returns = jtu.tree_structure(shapes), *_flattened(others)
    takes = _described(arrays, rest)
    return Closed(program.jaxpr, program.consts, takes, returns)
