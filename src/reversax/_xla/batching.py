"""A function that is told when it is batched before it is differentiated.

`jax.vmap` of a custom derivative rule runs the backward rule once per lane: a parameter
that all lanes share gets a cotangent in every lane, and only at the very end are these
summed. A backward rule that walks over thousands of steps would carry them all along,
as many copies of the parameters as there are lanes.

`batch_aware` puts a primitive around such a function. If the primitive meets `vmap`
before differentiation, as in the gradient of a sum over lanes, the function is called
again with the axes of its arguments, and can sum over the lanes where that is cheapest.
Met by differentiation first, as in the gradient of each lane, it is called plainly.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.custom_batching
import jax.extend.core
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, PyTree


class Axes(NamedTuple):
    """How the arguments of a batched call are batched."""

    in_axes: tuple[PyTree[int | None], ...]
    """For each argument a tree of 0, for a leaf with a leading axis of lanes, and
    `None`, for one that all lanes share."""
    size: int
    """How many lanes there are."""
    name: Hashable
    """The name of the axis, for collectives."""


class _Call:
    """A function of arrays, with the rest of its arguments fixed.

    The same only as itself, which is how JAX compares the parameters of primitives.
    """

    def __init__(
        self, fn: Callable, treedef: Any, rest: PyTree, axes: Axes | None = None
    ):
        self.fn = fn
        self.treedef = treedef
        self.rest = rest
        self.axes = axes
        self.unflatten: Callable | None = None
        self.abstract: tuple[list, Any] | None = None
        """The types of what it returns, and its effects, once they are known."""

    def in_lanes(self, dims: Sequence[int | None], size: int, name: Hashable):
        """The same call of `size` lanes at once; `dims` are axes of its arguments."""
        axes = Axes(self.treedef.unflatten(dims), size, name)
        call = _Call(self.fn, self.treedef, self.rest, axes)
        if self.abstract is not None:
            # Known without tracing another time: those of one lane, in each.
            avals, effects = self.abstract
            each = lambda xs: [jnp.broadcast_to(x, (size, *x.shape)) for x in xs]
            call.abstract = jax.make_jaxpr(each)(avals).out_avals, effects
        return call

    def __call__(self, *flat):
        # The constants of an outer program come as literals, which are no arrays.
        arrays = self.treedef.unflatten(map(jnp.asarray, flat))
        args = eqx.combine(arrays, self.rest)
        arrays, rest = eqx.partition(self.fn(*args, axes=self.axes), eqx.is_array)
        leaves, treedef = jtu.tree_flatten(arrays)
        self.unflatten = lambda leaves: eqx.combine(treedef.unflatten(leaves), rest)
        return leaves


_call_p = jax.extend.core.Primitive("batch_aware_call")
_call_p.multiple_results = True
_call_p.def_impl(lambda *flat, call: call(*flat))
mlir.register_lowering(
    _call_p, mlir.lower_fun(lambda *flat, call: call(*flat), multiple_results=True)
)


@_call_p.def_effectful_abstract_eval
def _abstract(*avals, call):
    if call.abstract is None:
        jaxpr = jax.make_jaxpr(call)(*avals)
        call.abstract = jaxpr.out_avals, jaxpr.effects
    return call.abstract


def _jvp(primals, tangents, *, call):
    differentiated = [not isinstance(t, ad.Zero) for t in tangents]
    pick = lambda xs: [x for x, d in zip(xs, differentiated, strict=True) if d]

    def of_differentiated(*chosen):
        chosen = iter(chosen)
        flat = zip(primals, differentiated, strict=True)
        return call(*(next(chosen) if d else x for x, d in flat))

    out, ct_out = jax.jvp(of_differentiated, pick(primals), pick(tangents))
    zero = lambda x: ad.Zero(jax.typeof(x).to_tangent_aval())
    is_zero = lambda t: jax.dtypes.float0 == t.dtype
    pairs = zip(out, ct_out, strict=True)
    return out, [zero(x) if is_zero(t) else t for x, t in pairs]


def _batch(axis, flat, dims, *, call):
    over_devices = axis.spmd_name is not None or axis.explicit_mesh_axis is not None
    if over_devices or call.axes is not None:
        # Of lanes laid out over devices, and of lanes of lanes, what they share is
        # summed by JAX as usual.
        names: dict[str, Any] = dict(axis_name=axis.name, spmd_axis_name=axis.spmd_name)
        out = jax.vmap(call, in_axes=tuple(dims), **names)(*flat)
        return out, [0] * len(out)
    to_front = lambda x, d: x if d is None else jnp.moveaxis(x, d, 0)
    flat = [to_front(x, d) for x, d in zip(flat, dims, strict=True)]
    dims = [None if d is None else 0 for d in dims]
    lanes = call.in_lanes(dims, axis.size, axis.name)
    out = _call_p.bind(*flat, call=lanes)
    if call.unflatten is None:  # Nothing was traced before, under `jax.disable_jit`.
        call.unflatten = lanes.unflatten
    return out, [0] * len(out)


ad.primitive_jvps[_call_p] = _jvp
batching.fancy_primitive_batchers[_call_p] = _batch


def is_mapped(x: Array) -> bool:
    """Whether a value in a function that is mapped by `vmap` has an axis there. (It may
    also be said to have one if only a `vmap` further out gives it one.)"""
    noted = []
    ask = jax.custom_batching.custom_vmap(lambda x: x)

    @ask.def_vmap
    def _(size, batched, x):
        noted.append(True)
        return x, True

    ask(x)
    return bool(noted)


def if_mapped(x: Array) -> int | None:
    """For `out_axes` of `equinox.filter_vmap`: an axis of what has one."""
    return 0 if is_mapped(x) else None


def batch_aware(fn: Callable) -> Callable:
    """Wraps `fn(*args, axes)`, which may be called again when it is batched.

    **Arguments:** `fn`, of any trees, with a keyword `axes`: `None`, or, when batched
    before differentiation, the [`Axes`][] of `args`; all arrays that it returns must
    then have a leading axis of lanes.

    **Returns:** a function of `args`.
    """

    def call(*args):
        arrays, rest = eqx.partition(args, eqx.is_array)
        flat, treedef = jtu.tree_flatten(arrays)
        bound = _Call(fn, treedef, rest)
        leaves = _call_p.bind(*flat, call=bound)
        assert bound.unflatten is not None
        return bound.unflatten(leaves)

    return call
