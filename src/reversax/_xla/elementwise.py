"""Functions of each element by itself, as one loop over all elements.

XLA's loops on a CPU have one level for each axis. Where the last axis is short (states
of three numbers, in a batch or under `vmap`) the innermost has a few turns, and unless
it is so small that it is written out, the compiler uses no vector instructions: five
times the time for a function of twenty operations. Of the arrays as one axis it does.

Under `vmap` the last axis remains that of a lane, so that this cannot be done where the
function is written, but only where it is compiled.
"""

from collections.abc import Callable

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from .compat import number_of_devices

_SHORT = 16
"""An axis shorter than the vectors of any CPU, some times over."""

Function = Callable[..., list[Array]]

_elementwise_p = jax.extend.core.Primitive("elementwise")
_elementwise_p.multiple_results = True


@_elementwise_p.def_abstract_eval
def _abstract(*avals, fn: Function):
    return [jax.typeof(x) for x in jax.eval_shape(fn, *avals)]


def _along_one_axis(*args, fn: Function) -> list[Array]:
    shape = jnp.broadcast_shapes(*[x.shape for x in args])
    if len(shape) < 2 or shape[-1] >= _SHORT:
        return fn(*args)
    flat = [x.reshape(-1) if x.ndim else x for x in args]
    return [x.reshape(shape) for x in fn(*flat)]


_on_cpu = mlir.lower_fun(_along_one_axis, multiple_results=True)
_plainly = mlir.lower_fun(lambda *args, fn: fn(*args), multiple_results=True)


def _lower_on_cpu(ctx, *args, fn):
    # Laid out over devices, an array of one axis might be gathered.
    lower = _on_cpu if number_of_devices(ctx.module_context) == 1 else _plainly
    return lower(ctx, *args, fn=fn)


_elementwise_p.def_impl(lambda *args, fn: jax.jit(fn)(*args))
mlir.register_lowering(_elementwise_p, _plainly)
mlir.register_lowering(_elementwise_p, _lower_on_cpu, platform="cpu")


def _batch(args, dims, *, fn):
    # (The constants of an outer program come as literals, which are no arrays.)
    pairs = list(zip(map(jnp.asarray, args), dims, strict=True))
    (size,) = {x.shape[d] for x, d in pairs if d is not None}
    of_lane = lambda x, d: x.shape if d is None else x.shape[:d] + x.shape[d + 1 :]
    shape = jnp.broadcast_shapes(*(of_lane(x, d) for x, d in pairs))

    def in_lanes(x, d):
        if d is None:
            return x if x.ndim == 0 else jnp.broadcast_to(x, (size, *shape))
        x = jnp.moveaxis(x, d, 0)
        if x.ndim == 1:
            x = x.reshape(size, *(1 for _ in shape))
        return jnp.broadcast_to(x, (size, *shape))

    out = _elementwise_p.bind(*(in_lanes(x, d) for x, d in pairs), fn=fn)
    return out, [0 for _ in out]


def _jvp(primals, tangents, *, fn):
    out = _elementwise_p.bind(*primals, fn=fn)
    return out, [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in out]


batching.primitive_batchers[_elementwise_p] = _batch
ad.primitive_jvps[_elementwise_p] = _jvp


def elementwise(fn: Function, *args: Array | int) -> list[Array]:
    """`fn(*args)`, of integers, element by element.

    **Arguments:** `fn`, of arrays of any one shape and of numbers among them, which
    returns a list of arrays of that shape; `args`, these: integers, which have no
    derivative.
    """
    return _elementwise_p.bind(*map(jnp.asarray, args), fn=fn)
