"""A continuous normalising flow: a network whose differential equation is a density.

The equation carries data to a standard normal distribution from t = 0 to t = 1, and
samples of that back to data from 1 to 0. Along a solution of dy/dt = f(t, y),

    d log p(y)/dt = - trace(df/dy),

so the state is the pair of `y` and `log p`, in one solve. The trace comes from the
same evaluation of the network as `f` itself:

- `exact_trace` pushes each unit vector through the network's linearisation, which
  costs about as many evaluations as `y` has dimensions;
- `hutchinson_trace` pushes through a single random vector of signs, the probe, and is
  right on average over probes. One probe serves a whole solve, so that the equation
  stays an ordinary one.

For continuous_flow.py, which trains two of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

import reversax

REVERSIBLE = reversax.Reversible(diffrax.Euler())  # Of second order.
REVERSED = reversax.ReversibleAdjoint()

Rows = Float[Array, "rows dim"]


T = TypeVar("T")


# --8<-- [start:flow]
class State(NamedTuple):
    y: Rows
    log_density: Float[Array, " rows"]


# --8<-- [end:flow]
# --8<-- [start:trace]
def exact_trace(fn, y: Float[Array, " dim"], probe: None):
    """`fn(y)`, and the trace of its Jacobian there."""
    dy, push = jax.linearize(fn, y)
    return dy, jnp.trace(jax.vmap(push)(jnp.eye(y.size, dtype=y.dtype)))


def hutchinson_trace(fn, y: Float[Array, " dim"], probe: Float[Array, " dim"]):
    """`fn(y)`, and an estimate of the trace of its Jacobian there, from a probe."""
    dy, pushed = jax.jvp(fn, (y,), (probe,))
    return dy, pushed @ probe


# --8<-- [end:trace]
def sample_probe(y: Rows, *, key: PRNGKeyArray) -> Rows:
    """Random signs, a vector of them for each row."""
    return jax.random.rademacher(key, y.shape, y.dtype)


# --8<-- [start:field]
class Flow(eqx.Module):
    network: Callable[[Float[Array, " dim+1"]], Float[Array, " dim"]]
    """Of `y` and `t`, one after the other."""

    def __init__(self, dim: int, width: int, depth: int, *, key: PRNGKeyArray):
        network = eqx.nn.MLP(dim + 1, dim, width, depth, activation=jnp.tanh, key=key)
        # It starts as the map that changes nothing.
        last = lambda network: network.layers[-1].weight
        self.network = eqx.tree_at(last, network, replace_fn=lambda w: 0.1 * w)

    def velocity(self, t, y: Float[Array, " dim"]) -> Float[Array, " dim"]:
        return self.network(jnp.append(y, t))

    def __call__(self, t, state: State, probe: Rows | None) -> State:
        """The field of the solve: `args` is the probe, or None for the exact trace."""
        trace = exact_trace if probe is None else hutchinson_trace
        one_row = lambda y, probe: trace(lambda y: self.velocity(t, y), y, probe)
        dy, divergence = jax.vmap(one_row)(state.y, probe)
        return State(dy, -divergence)


# --8<-- [end:field]
# --8<-- [start:solve]
def solve(
    field: Callable[[Any, T, Rows | None], T],
    start: T,
    probe: Rows | None,
    num_steps: int,
    to_data: bool = False,
    solver: diffrax.AbstractSolver = REVERSIBLE,
    adjoint: diffrax.AbstractAdjoint = REVERSED,
) -> T:
    """From data to the base distribution, or back; a flow is such a field."""
    t0, t1 = (1.0, 0.0) if to_data else (0.0, 1.0)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        solver,
        t0=t0,
        t1=t1,
        dt0=(t1 - t0) / num_steps,
        y0=start,
        args=probe,
        adjoint=adjoint,
        max_steps=num_steps,
    )
    assert solution.ys is not None
    return jax.tree.map(lambda ys: ys[0], solution.ys)


# --8<-- [end:solve]
# --8<-- [start:likelihood]
def log_normal(y: Rows) -> Float[Array, " rows"]:
    """The logarithm of the base's density, of a standard normal distribution."""
    return jax.scipy.stats.norm.logpdf(y).sum(axis=1)


def log_likelihood(
    flow: Flow, y: Rows, probe: Rows | None, num_steps: int, *how
) -> Float[Array, " rows"]:
    """The logarithm of the flow's density at each row; `how`: see `solve`."""
    start = State(y, jnp.zeros(len(y), y.dtype))
    end = solve(flow, start, probe, num_steps, False, *how)
    return log_normal(end.y) - end.log_density


def sample(flow: Flow, rows: int, dim: int, num_steps: int, *, key) -> State:
    """Samples, and the logarithms of their densities."""
    y = jax.random.normal(key, (rows, dim))
    return solve(flow, State(y, log_normal(y)), None, num_steps, to_data=True)


# --8<-- [end:likelihood]
