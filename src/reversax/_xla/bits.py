"""What numbers look like in memory."""

import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, UInt


def bits_of(x: Array) -> UInt[Array, "..."]:
    """The bits of each number as an unsigned integer, which is as wide. Of real
    floating-point numbers of one sign these are in the same order; those of what is no
    number come last."""
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{x.dtype.itemsize * 8}"))
