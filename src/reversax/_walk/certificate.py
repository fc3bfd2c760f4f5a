"""The certificate of a backward pass: it must arrive where the forward pass began.

The state at t0 is known, and so are those kept to restart from. With `d` the
reconstructed state minus the true one and `s` the largest size that it had at any step,
both per leaf and part of the state, the round trip is off by

    (E)    max over leaves and parts of  max|d| / s

which must not exceed a tolerance. In exact arithmetic that is zero by default: one bit
is an error. In floating point it is the square root of the state's machine epsilon
`eps` (3.5e-4 in single precision, 1.5e-8 in double): half the digits.
Of leaves of different precision the coarsest counts, since it disturbs the others.

A leaf may hold nothing but the round-off of others, such as an invariant that should be
zero. So `s` of a leaf is never taken smaller than

    (M)    64 sqrt(eps) * max over leaves of s,

by which, at the default tolerance, an error of 64 ulps of the largest leaf passes.

Where a gradient is differentiated in forward mode, the state has tangents, which are
floating-point numbers in every arithmetic: undoing a step magnifies their round-off. At
t0 and where the way back restarts their true values are known too, so they are checked
there, to the square root of `eps`.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int

from .._schemes.moves import Codes
from .._schemes.scheme import AbstractScheme, plain
from .._schemes.watch import Scale, default_tolerance, largest, not_too_small
from .._xla.guard import agreeing
from .faults import Messages
from .setup import CALL

_SMALLEST_DECADE = -17
_DECADES = range(_SMALLEST_DECADE, 3)


def largest_of(scheme: AbstractScheme, codes: Codes) -> Scale:
    """The largest size in each leaf of each part."""
    return largest(scheme.decode(plain(codes)))


def round_trip(
    scheme: AbstractScheme, reconstructed: Codes, true: Codes, scale: Scale
) -> list[Float[Array, ""]]:
    """(E) of each leaf; NaN where anything is."""

    def ratio(d, s):
        ratio = jnp.where(d == 0, 0, d / jnp.where(s == 0, 1, s))  # (E)
        # As precise as there is: a single bit is very little, and not zero.
        return ratio.astype(jnp.result_type(float))

    difference = scheme.difference(reconstructed, true)
    sizes, scales = jtu.tree_leaves(largest(difference)), not_too_small(scale)  # (M)
    return [ratio(d, s) for d, s in zip(sizes, scales, strict=True)]


_TANGENTS_LOST = (
    "Have the tangents of the states restart, "
    "`reversax.ReversibleAdjoint(restart_every=...)`, after as many steps as make 8 "
    "halvings in single precision or 16 in double (32 or 64 steps with "
    "`reversax.Symmetric(halvings_per_step=1/4)`), fewer on a contracting flow: a "
    "gradient was differentiated in forward mode (`jax.hessian`, `jax.jvp` of "
    "`jax.grad`), and its backward pass lost them. Undoing a step magnifies their "
    "round-off, in fixed point too. Or use `adjoint=diffrax.DirectAdjoint()` with the "
    "same solver."
)


def checked_tangents(
    tolerance: float | None,
    true: Codes,
    reconstructed: Codes,
    zero: Array,
    *others: Codes,
) -> tuple[Codes, Array]:
    """`true` and `zero`, which raise if there are tangents and those of the true state
    were not `reconstructed`, relative to the largest of theirs and of `others`."""
    values, rest = eqx.partition(true, eqx.is_inexact_array)
    leaves, treedef = jtu.tree_flatten(values)
    if tolerance == math.inf or len(leaves) == 0:
        return true, zero
    found, more = [
        jtu.tree_leaves(eqx.filter(x, eqx.is_inexact_array))
        for x in (reconstructed, others)
    ]
    *leaves, zero = agreeing(
        [*leaves, zero],
        [*found, zero],
        more,
        tolerance or default_tolerance(leaves),
        _TANGENTS_LOST,
    )
    return eqx.combine(treedef.unflatten(leaves), rest), zero


def _messages(tolerance: float | None, scheme: AbstractScheme) -> list[str]:
    """What to do first, then how far off the round trip was."""
    exact = scheme.arithmetic.exact
    if tolerance is not None:
        stated = f"a tolerance of {tolerance:g}"
    elif exact:
        stated = "not a bit allowed"
    else:
        stated = "a tolerance of the square root of the machine epsilon"
    first, more = scheme.unfound or (_EXACT if exact else _INEXACT)

    def message(size: str) -> str:
        return (
            f"{first} the backward pass did not find the initial state again (nor one "
            f"kept to restart from). It was off by {size}, with {stated}. {more} "
            f"({CALL})"
        )

    of_size = "of the state's largest size"
    sizes = [f"between 1e{k:+03d} and 1e{k + 1:+03d} {of_size}" for k in _DECADES]
    sizes[0] = f"less than 1e{_SMALLEST_DECADE + 1:+03d} {of_size}"
    sizes[-1] = f"more than 1e{_DECADES[-1]:+03d} {of_size}"
    return [message(size) for size in sizes]


_INEXACT = (
    "Use `arithmetic=reversax.FixedPoint()` with `reversax.Symmetric()`, the default "
    "of `reversax.Reversible`, which loses nothing:",
    "In floating point, restart from kept states more often "
    "(`reversax.ReversibleAdjoint(restart_every=...)`) or take 64-bit states. "
    "`reversax.round_trip_error` measures what is lost, and "
    "`reversax.ReversibleAdjoint(round_trip_tolerance=...)` accepts it.",
)
_EXACT = (
    "Pass all that the vector field reads through `args`:",
    "The field did not return the same values twice: does it read a Python variable "
    "that changes, call back to the host, or draw random numbers without a key; or "
    "does the device sum in no fixed order (for which there is "
    "`XLA_FLAGS=--xla_gpu_deterministic_ops=true`)? "
    "`reversax.ReversibleAdjoint(round_trip_tolerance=...)` accepts a difference.",
)


class Failed(NamedTuple):
    """That the solve itself did, which is to raise."""

    fault: Int[Array, ""]
    """Zero if it did not."""
    messages: Messages


def certificate(
    tolerance: float | None,
    scheme: AbstractScheme,
    round_trips: list[Float[Array, ""]],
    final: Codes,
    failed: Failed | None,
) -> Float[Array, ""]:
    """A zero to add to the gradient; getting it raises if (E) exceeds the tolerance, or
    if the solve itself `failed`.

    With `throw=False`, by which users ask to look at failures themselves, there is
    nothing to say of that: if the solve overflowed, so that the `final` state is not
    finite, the zero is NaN instead.
    A zero that every leaf of the gradient depends on: any of them may go unused, and
    passing them all through the check would copy them.
    """
    zero = jnp.zeros((), jnp.float32)
    wrong, index = jnp.array(False), jnp.array(0, jnp.int32)
    messages: Any = []
    if tolerance != math.inf and len(round_trips) > 0:
        wrong, index = _unfound(tolerance, scheme, round_trips, final)
        messages = _messages(tolerance, scheme)
    if failed is not None:
        # (A final state that is not finite is a fault too.)
        fault, of_faults = failed
        wrong, index = wrong | (fault != 0), jnp.where(fault == 0, index, fault)
        messages = of_faults.beside(messages)
        return eqx.branched_error_if(zero, wrong, index, messages)
    if len(messages) == 0:
        return zero
    finite = scheme.is_finite(final)
    zero = eqx.branched_error_if(zero, wrong & finite, index, messages)
    return jnp.where(finite, zero, jnp.nan)


def _unfound(
    tolerance: float | None,
    scheme: AbstractScheme,
    round_trips: list[Float[Array, ""]],
    final: Codes,
) -> tuple[Bool[Array, ""], Int[Array, ""]]:
    """Whether (E) exceeds the tolerance, and which message says by how much."""
    stated = tolerance
    if stated is None:
        leaves = jtu.tree_leaves(scheme.decode(final))
        stated = 0.0 if scheme.arithmetic.exact else default_tolerance(leaves)
    # Phrased so that NaN fails.
    unfound = ~jnp.stack([x <= stated for x in round_trips]).all()
    return unfound, _message_index(round_trips)


def _message_index(sizes: Sequence[Float[Array, ""]]) -> Array:
    worst = jnp.stack([x.astype(jnp.float32) for x in sizes]).max()
    decade = jnp.floor(jnp.log10(jnp.maximum(worst, 10.0**_SMALLEST_DECADE)))
    # Magnified until it overflowed, it is no number.
    index = jnp.where(jnp.isnan(worst), jnp.inf, decade - _SMALLEST_DECADE)
    return jnp.clip(index, 0, len(_DECADES) - 1).astype(jnp.int32)
