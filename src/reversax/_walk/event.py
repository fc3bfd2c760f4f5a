"""Events: found in the differentiated loop, located outside of it.

Where a solve ends is found in Diffrax's loop, by functions of time and state that are
constants to differentiation. If there is a root finder, the time of the event is
located afterwards, in the dense output of the last step, which the loop returns and
which is differentiated like any other output. Diffrax does that in the same function
that has the loop; so it is called again, with the final state and a loop that makes no
step.
"""

from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax.lax as lax
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._numbers.arithmetic import State
from .._schemes.control import Time
from .._schemes.scheme import AbstractScheme
from .._xla.closure import closed
from .._xla.compat import integration_loop, while_loop


def constant(tree: PyTree) -> PyTree:
    """The same, as a constant to differentiation."""
    arrays, rest = eqx.partition(tree, eqx.is_inexact_array)
    return eqx.combine(lax.stop_gradient(arrays), rest)


def close_event(
    event: dfx.Event, known: dict[str, Any], args: PyTree, t: Time, y: State
) -> dfx.Event:
    """The event without its root finder, its conditions closed over all they depend on
    but time and state, as constants."""

    def close(condition: Callable) -> Callable:
        known_too = lambda t, y: condition(t, y, args, **known)
        return constant(closed(known_too, t, y))

    conditions = jtu.tree_map(close, event.cond_fn, is_leaf=callable)
    return dfx.Event(conditions, direction=event.direction)


class _OfCodes(eqx.Module):
    """A condition on the state, as one on its parts."""

    condition: Callable
    scheme: AbstractScheme

    def __call__(self, t, y, args, **kwargs):
        del args, kwargs
        return self.condition(t, self.scheme.readout(y))


def reading_out(event: dfx.Event | None, scheme: AbstractScheme) -> dfx.Event | None:
    """The event, in a loop whose state is of the scheme's parts."""
    if event is None:
        return None
    conditions = jtu.tree_map(
        lambda c: _OfCodes(c, scheme), event.cond_fn, is_leaf=callable
    )
    return dfx.Event(conditions, direction=event.direction)


def without_derivatives(
    init_state: Any, y0: State, dense: bool, scheme: AbstractScheme
) -> Any:
    """The loop's initial state, with what concerns events made constant, and room for
    dense output only if there is any."""
    places = lambda s: (s.event_values, s.event_dense_info)
    dense_info = init_state.event_dense_info
    if not dense:
        empty = scheme.empty_dense_info(y0)
        dense_info = dense_info if empty is None else empty
    values = constant((init_state.event_values, dense_info))
    return eqx.tree_at(places, init_state, values, is_leaf=lambda x: x is None)


def locate(final_state: Any, saveat: dfx.SaveAt, **problem) -> Any:
    """The final state, with the event located, the outputs after it deleted, and the
    final one saved. `problem` is what Diffrax hands an adjoint."""

    def finish(sub: dfx.SubSaveAt) -> dfx.SubSaveAt:
        # What was saved in the loop is not saved again.
        places = lambda s: (s.t0, s.ts)
        return eqx.tree_at(places, sub, (False, None), is_leaf=lambda x: x is None)

    def uncount(sub: dfx.SubSaveAt, save_state: Any) -> Any:
        # Diffrax counted a row for the final state, though told not to save it, if it
        # may have been saved as one of `steps`.
        counted = int(sub.steps > 1)
        index = save_state.save_index - counted
        return eqx.tree_at(lambda s: s.save_index, save_state, index)

    is_sub = lambda x: isinstance(x, dfx.SubSaveAt)
    subs = jtu.tree_map(finish, saveat.subs, is_leaf=is_sub)
    save_state = jtu.tree_map(
        uncount, saveat.subs, final_state.save_state, is_leaf=is_sub
    )
    final_state = eqx.tree_at(
        lambda s: s.save_state, final_state, save_state, is_leaf=lambda x: x is None
    )
    final_state, _ = integration_loop(
        **problem,
        saveat=dfx.SaveAt(subs=subs),
        init_state=final_state,
        inner_while_loop=while_loop,
        outer_while_loop=lambda cond, body, state, **_: state,
    )
    return final_state
