"""The cotangents of what a solve returned, as Diffrax's final state has them."""

from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._numbers.schedule import Index
from .._schemes.moves import add_trees
from .observe import Interior, zeros_like_inexact
from .setup import Setup


class Outputs(NamedTuple):
    """What of Diffrax's final state may be differentiated, or its cotangents."""

    codes: Any
    ys: list[PyTree[Array]]
    ts: list[Array | None]
    dense_infos: PyTree[Array]
    """Of all steps, and the times of their ends after the first start; `None` unless
    asked for, as what concerns events."""
    dense_ts: Array | None
    event_dense_info: PyTree[Array]
    """Of the last step, and its interval."""
    event_tprev: Array | None
    event_tnext: Array | None


def outputs_of(final_state: Any, codes: Any) -> Outputs:
    """What of a final state, or of the cotangent of one, concerns differentiation."""
    save_states = Setup.save_states(final_state)
    return Outputs(
        codes,
        [s.ys for s in save_states],
        [s.ts for s in save_states],
        final_state.dense_infos,
        final_state.dense_ts,
        final_state.event_dense_info,
        final_state.event_tprev,
        final_state.event_tnext,
    )


class CotangentOfDense(eqx.Module):
    """The cotangents of the dense output of all steps, and of the last one."""

    ct: Outputs
    num_steps: Index
    """How many steps were accepted."""
    last_end: Array | None
    """Where the last step that was made ended, if there is an event."""

    def of_start(self) -> Array | float:
        """The cotangent of `t0`."""
        ct, total = self.ct, 0.0
        if ct.dense_ts is not None:
            total = total + ct.dense_ts[0]
        if ct.event_tprev is not None and ct.event_tnext is not None:
            both = ct.event_tprev + ct.event_tnext
            total = total + jnp.where(self.num_steps == 0, both, 0)
        return total

    def of_step(self, index: Index, interior: Interior) -> Interior:
        """The cotangent of a step's interior."""
        ct = self.ct
        (ct_t0, ct_t1), ct_info = zeros_like_inexact(interior)
        if ct.dense_ts is not None:
            row = jtu.tree_map(lambda x: x[index], ct.dense_infos)
            ct_info = add_trees(ct_info, row)
            ct_t1 = ct_t1 + ct.dense_ts[index + 1]
        if ct.event_dense_info is not None:
            last = index == self.num_steps - 1
            at_last = lambda x: jnp.where(last, x, 0)
            event = ct.event_dense_info, (ct.event_tprev, ct.event_tnext)
            # A solve that ended with a rejected step has the dense output of that one,
            # which cannot be found again.
            accepted = interior.interval[1] == self.last_end
            lost = lambda x: jnp.where(accepted | (x == 0), x, jnp.nan)
            event = jtu.tree_map(lost, event)
            ct_event, (ct_start, ct_end) = jtu.tree_map(at_last, event)
            ct_info = add_trees(ct_info, ct_event)
            ct_t0, ct_t1 = ct_t0 + ct_start, ct_t1 + ct_end
        return Interior((ct_t0, ct_t1), ct_info)
