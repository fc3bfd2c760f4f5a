r"""What a controller of steps should keep small, of a step of twins.

The increments of both halves do not quite cancel: their sum is what the step adds to
the gap `y - z`,

    (E)    e = Psi_{h}(t0, z) + Psi_{-h}(t1, y1)

which is of order `h**(k + 1)` for a base of odd order `k`, `h**(k + 2)` for even, and
`h J (y - z)` where the twins are already apart, with `J` the Jacobian of the field. A
controller is told of it and of the base's own estimate `u`, with `b` the halvings of
this step,

    (U)    |u| + 5/2 * sqrt(|u|*|e|) + 2**-b * |e|

where the geometric mean counts most. On a smooth solution both are of one size, and (E)
sees errors of which `u` knows nothing; where steps are about as long as stability
allows, (E) is up to `exp(h*|J|)` times `u`, and as a plain sum it would have steps
rejected at every turn; and where `u` is blind to a gap that widens, because few
halvings are made, the last term has it.
"""

import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._numbers.arithmetic import State, power_of_two
from .._numbers.schedule import Count


def error_estimate(
    increments: State, error: State | None, halvings: Count, watches_gap: bool
) -> State:
    """What a controller should keep small: the base's estimate and (E), or one of them.

    `increments` are those of both halves, stacked, `error` the base's estimate.

    (E) is there if the coupling watches the gap or the base has no estimate. The gap
    between the twins grows by (E) in this step. On a damped problem that is mostly the
    parasitic mode, which the base's own estimate cannot see.
    """
    gap = jtu.tree_map(lambda x: jnp.abs(x[0] + x[1]), increments)  # (E)
    if error is None:
        return gap
    error = jtu.tree_map(lambda e, g: jnp.abs(e).astype(g.dtype), error, gap)
    if not watches_gap:
        return error

    def both(u, e):
        # Of the square roots, whose product cannot underflow. At zero their derivative
        # is not finite, and no controller has one with respect to its error.
        mean = lax.stop_gradient(jnp.sqrt(u) * jnp.sqrt(e))
        return u + 2.5 * mean + e / power_of_two(halvings, e.dtype)  # (U)

    return jtu.tree_map(both, error, gap)
