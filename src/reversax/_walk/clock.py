r"""The times that a solve depends on, and how the times of its steps follow from them.

A solve depends on `t0`, `t1`, the end of its first step, the times to save at, and on
what numbers its controller holds. Each step's interval follows from these by sums,
differences and products with factors that Diffrax's controllers take for constants, so
to differentiate with respect to any of them is to carry a tangent through the
controller,

    (J)    (dt0, dt1, dstate)_{k+1} = D adapt(t0, t1, state; clock) (dt0, dt1, dstate)_k

for each number `x` of the clock that is differentiated, begun with the derivatives of
the first step's interval. The cotangent of `x` is then

    (JT)   ct_x = sum_k  ct_t0_k dt0_k/dx + ct_t1_k dt1_k/dx

A controller's steps may follow the state only by way of such constants; one whose steps
have a derivative with respect to the state is refused.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.flatten_util
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from .._numbers.arithmetic import State
from .._schemes.control import Time
from .._schemes.scheme import Grid
from .._xla.closure import closed
from .._xla.compat import clip_to_end, depends_on_argument, prevbefore


def just_below(t1: Time) -> Time:
    """100 ulps below `t1`: Diffrax's loop takes for `t1` what comes after."""
    t1 = lax.stop_gradient(t1)
    return lax.fori_loop(0, 100, lambda _, t: prevbefore(t), t1)


class Clock(eqx.Module):
    """The times that a solve depends on, any of which may be differentiated."""

    t0: Time
    t1: Time
    first_end: Time
    """Where the first step is to end."""
    controller: dfx.AbstractStepSizeController
    controller_state: PyTree
    ts: list[Array | None]
    """The times to save at, for each `SubSaveAt`."""
    length: Time | None = None
    """Of every step, for a scheme that takes equal ones."""

    @property
    def grid(self) -> Grid | None:
        if self.length is None:
            return None
        return Grid(self.t0, self.length, lax.stop_gradient(self.t1))


class ClosedController(dfx.AbstractStepSizeController):
    """A controller with all the arrays that it depends on among its own leaves: what
    its functions, such as a norm, close over, and the solve's `args`."""

    adapt: Callable

    def wrap(self, direction):
        raise NotImplementedError  # Done before it is closed.

    def init(self, *args, **kwargs):
        raise NotImplementedError  # The loop begins with a state that there is already.

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        del args, error_order  # Closed over.
        return self.adapt(t0, t1, (y0, y1_candidate, y_error), controller_state)

    def follows_state(self, moment: "Moment", y0: State, error: State | None) -> bool:
        """Whether the steps have a derivative with respect to the state, begun with
        these: not if they follow it by way of constants."""
        t0, t1, controller_state = moment

        def next_moment(states):
            said = self.adapt(t0, t1, states, controller_state)
            _, next_t0, next_t1, _, state, _ = said
            return inexact(Moment(jnp.asarray(next_t0), jnp.asarray(next_t1), state))

        moment, pull = jax.vjp(next_moment, (y0, y0, error))
        return depends_on_argument(pull, moment)


def error_like(y: State) -> State:
    """Absolute values, as errors are given."""
    return jtu.tree_map(jnp.abs, y)


class Reads(NamedTuple):
    """What a controller may depend on beside its own numbers."""

    args: PyTree
    error_order: Any
    moment: "Moment"
    """The first."""
    y0: State
    estimates: bool
    """Whether steps have an error estimate."""


def close_controller(
    controller: dfx.AbstractStepSizeController, reads: Reads
) -> tuple[ClosedController, PyTree]:
    """The controller, closed over all that it depends on but the times of a step, the
    states at its ends, its error (real, as sizes are) and the controller's own state;
    and that state as arrays."""
    args, error_order, moment, y0, estimates = reads
    error = error_like(y0) if estimates else None

    def adapt(t0, t1, states, controller_state):
        y0, y1, y_error = states
        return controller.adapt_step_size(
            t0, t1, y0, y1, args, y_error, error_order, controller_state
        )

    first = moment.t0, moment.t1, (y0, y0, error)
    # The first state may be of Python scalars: what a loop makes of these is up to the
    # next one.
    *_, after, _ = eqx.filter_eval_shape(adapt, *first, moment.controller_state)
    as_array = lambda x, later: (
        x if eqx.is_array(x) else jnp.asarray(x, jnp.result_type(later))
    )
    state = jtu.tree_map(as_array, moment.controller_state, after)
    return ClosedController(closed(adapt, *first, state)), state


def pull_through(fn: Callable, clock: Clock, other: Clock, ct: PyTree) -> Clock:
    """The cotangent of the differentiated part of a clock from that of `fn(whole)`."""
    _, pull = jax.vjp(lambda clock: fn(eqx.combine(clock, other)), clock)
    return pull(ct)[0]


class Moment(NamedTuple):
    """What a controller goes on from: the interval of the next step, and its state."""

    t0: Time
    t1: Time
    controller_state: PyTree


class Sensitivity(eqx.Module):
    """(J), for the part of a clock that is differentiated."""

    diff: Clock
    other: Clock

    def _vector(self) -> tuple[Float[Array, " n"], Callable]:
        return jax.flatten_util.ravel_pytree(self.diff)

    def _forward(self, fn: Callable, moment: PyTree, tangents: PyTree) -> PyTree[Array]:
        """The tangents of `fn(clock, moment)`, stacked."""
        vector, unravel = self._vector()
        of_vector = lambda v, m: inexact(fn(eqx.combine(unravel(v), self.other), m))
        push = lambda e, m: jax.jvp(of_vector, (vector, moment), (e, m))[1]
        basis: Any = jnp.eye(vector.size, dtype=vector.dtype)
        return jax.vmap(push)(basis, tangents)

    def begin(self) -> PyTree[Array]:
        """The tangents of the first [`Moment`][]."""
        first = lambda c, _: Moment(c.t0, c.first_end, c.controller_state)
        return self._forward(first, None, None)

    def adapt(
        self, tangents: PyTree, moment: Moment, adapt: Callable, end: Time
    ) -> PyTree[Array]:
        """The tangents of the next moment. `adapt(controller, moment)` is what the
        controller says, and Diffrax's loop takes what is after `end` for `t1`."""
        diff, rest = eqx.partition(moment, eqx.is_inexact_array)

        def next_moment(clock, diff):
            said = adapt(clock.controller, eqx.combine(diff, rest))
            keep, t0, t1, _, state, _ = said
            t0 = jnp.minimum(t0, clock.t1)
            return Moment(t0, clip_to_end(t0, t1, clock.t1, end, keep), state)

        return self._forward(next_moment, diff, tangents)  # (J)


def pull_row(row: tuple[Array, Array], ct: tuple[Time, Time], diff: Clock) -> Clock:
    """(JT) for one step, of which `row` has the derivatives of both times."""
    _, unravel = jax.flatten_util.ravel_pytree(diff)
    return unravel(jnp.asarray(ct[0] * row[0] + ct[1] * row[1]))


def any_of(perturbed: PyTree[bool] | None) -> bool:
    """Whether anything is differentiated."""
    return any(jtu.tree_leaves(perturbed))


def inexact(tree: PyTree) -> PyTree:
    """What of a tree may be differentiated, and `None` for the rest."""
    return eqx.filter(tree, eqx.is_inexact_array)
