"""What a failed solve says: what was the matter, from when on, and what to do first.

A message is chosen when the program runs, by one integer: the fault, and a number that
the message has in it, a floating-point number of single precision less its last bits.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Int

from .._numbers.fixed_point import FixedPoint
from .._schemes.watch import APART, OUTGROWN
from .._xla.compat import DIVERGED, NONFINITE
from .setup import CALL, Setup

_KEPT, _CUT = 28, 4


def _coded(fault: Array, number: Array) -> Int[Array, ""]:
    bits = lax.bitcast_convert_type(number.astype(jnp.float32), jnp.uint32)
    code = (fault.astype(jnp.uint32) << _KEPT) | (bits >> _CUT)
    return lax.bitcast_convert_type(code, jnp.int32)


def _decoded(code: int) -> tuple[int, float]:
    fault, bits = divmod(code, 2**_KEPT)
    return fault, float(np.uint32(bits << _CUT).view(np.float32))


@dataclasses.dataclass(frozen=True)
class Messages:
    """Those of one setup, by code: for `equinox.branched_error_if`."""

    driven_apart: Callable[[float, bool], str]
    exact: bool
    adaptive: bool
    largest: str

    def __getitem__(self, code: int) -> str:
        fault, number = _decoded(code)
        if fault == APART:
            return f"{self.driven_apart(number, self.adaptive)} ({CALL})"
        if fault == OUTGROWN:
            return (
                "Give the size of the state, `reversax.Reversible(..., "
                "arithmetic=reversax.FixedPoint(largest=...))`: soon after "
                f"t = {number:.4g} it was larger than {self.largest}. If it grows "
                f"without bound, take smaller steps. ({CALL})"
            )
        overflowed = "" if self.exact else ", or the state overflowed"
        return (
            f"Look at the vector field: soon after t = {number:.4g} it returned NaN or "
            f"infinity{overflowed}. If it should not have been asked there, take "
            f"smaller steps. ({CALL})"
        )


def _messages(setup: Setup, dtypes: list) -> Messages:
    scheme, arithmetic = setup.scheme, setup.scheme.arithmetic
    largest = ""
    if isinstance(arithmetic, FixedPoint):
        sizes = {2.0 ** arithmetic.exponent(x) for x in dtypes}
        largest = " or ".join(f"{size:.2g}" for size in sorted(sizes))
    known = scheme.driven_apart, arithmetic.exact, setup.plan.times, largest
    return Messages(*known)


def raise_if_failed(final_state: Any, setup: Setup) -> Any:
    """The final state, which raises if the solve failed by a fault of ours to see."""
    result, watch = final_state.result, final_state.solver_state.watch
    number = jnp.where(watch.state == APART, watch.needed, watch.time * setup.direction)
    failed = (result == NONFINITE) | (result == DIVERGED)
    fault = jnp.where(failed, jnp.maximum(watch.state, APART), 0)
    dtypes = [x.dtype for x in jtu.tree_leaves(final_state.y)]
    code = _coded(fault, number)
    messages: Any = _messages(setup, dtypes)
    result = eqx.branched_error_if(result, failed, code, messages)
    return eqx.tree_at(lambda s: s.result, final_state, result)
