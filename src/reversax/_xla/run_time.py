"""Numbers that are not known before run time, and what a compiler may not see through
for their sake."""

from typing import Any

import jax
import jax.extend.core
import jax.lax as lax
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Bool, Float

from .bits import bits_of


def _zero(x: Array) -> Float[Array, ""]:
    # Of a constant, such as a time given as a number, nothing would be left to ask at
    # run time. (That barriers are removed before fusion is late enough.)
    x = lax.optimization_barrier(x)
    # Of the smallest of all lanes, since any one may have gone wrong. Compared by bits,
    # many at a time: a compiler keeps to the order of floating-point numbers.
    bits = bits_of(x)
    size = bits & jnp.array(jnp.iinfo(bits.dtype).max // 2, bits.dtype)
    is_number = jnp.issubdtype(x.dtype, jnp.floating)
    number = x.dtype if is_number else f"float{x.dtype.itemsize * 8}"
    smallest = lax.bitcast_convert_type(size.min(), number)
    # Not a property of bits, which the backend would see through.
    zero = jnp.where(jnp.isfinite(smallest), smallest * 0, -1)
    return zero.astype(jnp.float32)


_run_time_zero_p = jax.extend.core.Primitive("run_time_zero")
_run_time_zero_p.def_impl(_zero)
_run_time_zero_p.def_abstract_eval(lambda x: jax.typeof(jnp.zeros((), jnp.float32)))
mlir.register_lowering(
    _run_time_zero_p, mlir.lower_fun(_zero, multiple_results=False), cacheable=False
)


def _batch(args, dims):
    # One for all lanes: the predicate does not become one for each.
    return _run_time_zero_p.bind(*args), None


def _jvp(primals, tangents):
    out = _run_time_zero_p.bind(*primals)
    return out, ad.Zero(jax.typeof(out).to_tangent_aval())


batching.primitive_batchers[_run_time_zero_p] = _batch
ad.primitive_jvps[_run_time_zero_p] = _jvp


def run_time_zero(x: Array) -> Float[Array, ""]:
    """Zero (of either sign), but not to the compiler; one value for all lanes of a
    batch.

    **Arguments:** `x`, a time (which is finite in some lane), or a count; it may be a
    constant.
    """
    return _run_time_zero_p.bind(jnp.asarray(x))


def run_time_true(x: Array) -> Bool[Array, ""]:
    """True in the same way."""
    return run_time_zero(x) > -1


def nothing_like(like: Any) -> Array:
    """Of its shape and dtype, what is seen to be none."""
    fill = jnp.nan if jnp.issubdtype(like.dtype, jnp.inexact) else 0
    return jnp.full(like.shape, fill, like.dtype)


def rounded_product(a: Array, b: Array) -> Array:
    """`a*b`, rounded by itself whatever is done with it, (P) of `rounding.py`. `b` is
    a run-time number."""
    b = jnp.asarray(b)
    product = a * b
    return product + run_time_zero(b).astype(product.dtype)
