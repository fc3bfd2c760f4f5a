"""What a failed solve says: what was the matter, from when on, and what to do first.

A message is chosen when the program runs, by one integer: the fault, and a number that
the message has in it, a floating-point number of single precision less its last bits;
or the number of what Diffrax says.

The gradient of a solve that failed raises too. Where a loss is linear in what the solve
returned its value is not needed for its gradient, and a compiler leaves out all that
the value alone depends on: the check that Diffrax makes of it, and ours.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Int

from .._numbers.arithmetic import State
from .._numbers.fixed_point import FixedPoint
from .._schemes.watch import APART, LOST, OUTGROWN
from .._xla.bits import bits_of
from .._xla.compat import DIVERGED, NONFINITE, index_of, message_of
from .setup import CALL, Setup

_KEPT, _CUT = 28, 4
_OTHER = 1 + max(APART, LOST, OUTGROWN)
"""A fault that was Diffrax's to see."""


def _coded(fault: Array, bits: Array) -> Int[Array, ""]:
    code = (fault.astype(jnp.uint32) << _KEPT) | bits
    return lax.bitcast_convert_type(code, jnp.int32)


def _number_of(bits: int) -> float:
    return float(np.uint32(bits << _CUT).view(np.float32))


@dataclasses.dataclass(frozen=True)
class Messages:
    """Those of one setup, by code: for `equinox.branched_error_if`."""

    driven_apart: Callable[[float, bool], str]
    exact: bool
    adaptive: bool
    largest: str
    call: str
    """Of what failed."""
    others: Sequence[str] = ()
    """What is no fault of the solve."""

    def beside(self, others: Sequence[str]) -> "Messages":
        """These and others, which have the first numbers."""
        return dataclasses.replace(self, others=tuple(others))

    def __getitem__(self, code: int) -> str:
        fault, bits = divmod(code, 2**_KEPT)
        if fault == 0:
            return self.others[bits]
        if fault == _OTHER:
            return message_of(bits)
        number = _number_of(bits)
        if fault == APART:
            return f"{self.driven_apart(number, self.adaptive)} ({self.call})"
        if fault == OUTGROWN:
            return (
                "Give the size of the state, `reversax.Reversible(..., "
                "arithmetic=reversax.FixedPoint(largest=...))`: soon after "
                f"t = {number:.4g} it was larger than {self.largest}. If it grows "
                f"without bound, take smaller steps. ({self.call})"
            )
        overflowed = "" if self.exact else ", or the state overflowed"
        return (
            f"Look at the vector field: soon after t = {number:.4g} it returned NaN or "
            f"infinity{overflowed}. If it should not have been asked there, take "
            f"smaller steps. ({self.call})"
        )


def messages_of(setup: Setup, y: State, call: str = CALL) -> Messages:
    """For states of the dtypes of `y`."""
    dtypes = [x.dtype for x in jtu.tree_leaves(y)]
    scheme, arithmetic = setup.scheme, setup.scheme.arithmetic
    largest = ""
    if isinstance(arithmetic, FixedPoint):
        sizes = {2.0 ** arithmetic.exponent(x) for x in dtypes}
        largest = " or ".join(f"{size:.2g}" for size in sorted(sizes))
    known = scheme.driven_apart, arithmetic.exact, setup.plan.times, largest
    return Messages(*known, call)


def _is_ours(result: Any) -> Bool[Array, ""]:
    """Whether it is of a fault that the watch saw."""
    return (result == NONFINITE) | (result == DIVERGED)


def fault_of(final_state: Any, setup: Setup) -> Int[Array, ""]:
    """Which of [`Messages`][] says why the solve failed; zero if it did not."""
    result, watch = final_state.result, final_state.solver_state.watch
    number = jnp.where(watch.state == APART, watch.needed, watch.time * setup.direction)
    bits = bits_of(number.astype(jnp.float32)) >> _CUT
    code = _coded(jnp.maximum(watch.state, APART), bits)
    other = _coded(jnp.asarray(_OTHER), index_of(result).astype(jnp.uint32))
    code = jnp.where(_is_ours(result), code, other)
    return jnp.where(dfx.is_okay(result), 0, code)


def raise_if_failed(final_state: Any, setup: Setup, call: str = CALL) -> Any:
    """The final state, which raises if the solve failed by a fault of ours to see."""
    result = final_state.result
    failed = _is_ours(result)
    messages: Any = messages_of(setup, final_state.y, call)
    fault = jnp.where(failed, fault_of(final_state, setup), 0)
    result = eqx.branched_error_if(result, failed, fault, messages)
    return eqx.tree_at(lambda s: s.result, final_state, result)
