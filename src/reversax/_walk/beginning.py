"""Where a solve begins, in the numbers of its scheme.

Both passes need that: one to begin with, the other to see whether it came back to it.
Kept from one to the other it would lie in memory through both loops. Exact numbers
follow from the state of the user, by roundings of what is scaled by powers of two, the
same wherever that is compiled; so the way back has them from the state again.
"""

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from .._numbers.arithmetic import State
from .._schemes.moves import Codes
from .._schemes.scheme import AbstractScheme, Values, plain
from .._xla.run_time import run_time_true


class Beginning(eqx.Module):
    """The parts before the first step; or the state that they follow from."""

    codes: Codes | None
    y0: State | None

    def encoded(self, scheme: AbstractScheme) -> Codes:
        """The parts."""
        return scheme.start(self.y0) if self.codes is None else self.codes

    def encoded_again(self, scheme: AbstractScheme, run_time: Array) -> Codes:
        """The same, not before `run_time` is known."""
        if self.codes is not None:
            return self.codes
        # Else XLA would take what was encoded first.
        is_known = run_time_true(run_time)
        nothing = lambda y0: jtu.tree_map(jnp.zeros_like, scheme.start(y0))
        return lax.cond(is_known, scheme.start, nothing, self.y0)

    def cotangent(self, scheme: AbstractScheme, ct: Values) -> "Beginning":
        """From that of the values of the parts, and of what is kept of them."""
        if self.codes is not None:
            return Beginning(scheme.cotangent(self.codes, ct), None)
        of_parts = lambda y0: scheme.decode(plain(scheme.start(y0)))
        values, pull = jax.vjp(of_parts, self.y0)
        return Beginning(None, *pull(ct[: len(values)]))

    def in_lanes(self, scheme: AbstractScheme, like: Codes) -> "Beginning":
        """Copied into each lane, as `like` are, if they all share it."""
        copied = lambda x, like: jnp.broadcast_to(x, like.shape)
        if self.codes is not None:
            return Beginning(jtu.tree_map(copied, self.codes, like), None)
        return Beginning(None, jtu.tree_map(copied, self.y0, scheme.readout(like)))
