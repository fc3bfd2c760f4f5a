"""A neural SDE that generates paths, and the energy distance by which it is trained.

For power_demand.py, which says what it is. A path starts where a network puts normally
distributed noise, and goes on by the Stratonovich equation

    dz = f(t, z) dt + g(t, z) o dW,        curve(t) = z_0(t),

with a diagonal g. All but the first component of z are hidden.
"""

from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax
from jaxtyping import Array, Float, PRNGKeyArray

import reversax

REVERSIBLE = reversax.Reversible(diffrax.Euler())
REVERSED = reversax.ReversibleAdjoint()
LARGEST_NOISE = 2.0  # In the data's standard deviations by the square root of a day.
CHECKPOINTED = diffrax.RecursiveCheckpointAdjoint()

Curves = Float[Array, "curves points"]


# --8<-- [start:generator]
class Generator(eqx.Module):
    start: eqx.nn.MLP
    drift: eqx.nn.MLP
    noise: eqx.nn.MLP
    size: int = eqx.field(static=True)

    def __init__(self, size: int, width: int, key: PRNGKeyArray):
        keys = jax.random.split(key, 3)

        def network(inputs, depth, key):
            return eqx.nn.MLP(inputs, size, width, depth, jax.nn.silu, key=key)

        self.start = network(size, 1, keys[0])
        self.drift = network(size + 2, 2, keys[1])
        self.noise = network(size + 2, 1, keys[2])
        self.size = size

    def _inputs(self, t, z):
        """The time of day as an angle, so that midnight is where it was before."""
        angle = 2 * jnp.pi * t
        clock = jnp.stack([jnp.sin(angle), jnp.cos(angle)])
        clock = jnp.broadcast_to(clock, (z.shape[0], 2))
        # A state that a bad network drove far away has a bounded derivative.
        return jnp.concatenate([clock, 4 * jnp.tanh(z / 4)], axis=1)

    def f(self, t, z, args):
        return 4 * jax.vmap(self.drift)(self._inputs(t, z))

    def g(self, t, z, args):
        bounded = jax.nn.sigmoid(jax.vmap(self.noise)(self._inputs(t, z)) - 1)
        return lineax.DiagonalLinearOperator(LARGEST_NOISE * bounded)


# --8<-- [end:generator]
class Solver(NamedTuple):
    """How paths are solved."""

    num_steps: int
    solver: diffrax.AbstractSolver = REVERSIBLE
    adjoint: diffrax.AbstractAdjoint = REVERSED


# --8<-- [start:generate]
def generate(
    generator: Generator, count: int, points: int, key: PRNGKeyArray, how: Solver
) -> Curves:
    """`count` curves at `points` times from 0 to 1, in one solve."""
    start_key, path_key = jax.random.split(key)
    noise = jax.random.normal(start_key, (count, generator.size))
    z0 = jax.vmap(generator.start)(noise)
    path = diffrax.VirtualBrownianTree(
        0.0,
        1.0,
        # A finer tree has more levels to descend at every step.
        tol=0.5 / how.num_steps,
        shape=jax.ShapeDtypeStruct(z0.shape, z0.dtype),
        key=path_key,
    )
    solution = diffrax.diffeqsolve(
        diffrax.MultiTerm(
            diffrax.ODETerm(generator.f), diffrax.ControlTerm(generator.g, path)
        ),
        how.solver,
        t0=0.0,
        t1=1.0,
        dt0=1 / how.num_steps,
        y0=z0,
        saveat=diffrax.SaveAt(
            ts=jnp.linspace(0.0, 1.0, points), fn=lambda t, z, args: z[:, 0]
        ),
        adjoint=how.adjoint,
        max_steps=how.num_steps + 1,
    )
    assert solution.ys is not None
    return solution.ys.T


# --8<-- [end:generate]
# --8<-- [start:distance]
def mean_distance(left: Curves, right: Curves, same: bool = False) -> Float[Array, ""]:
    """The mean Euclidean distance of all pairs, of different curves if `same`."""
    # By way of products, since all differences at once would take the most memory.
    lengths = jnp.sum(left**2, axis=1)[:, None] + jnp.sum(right**2, axis=1)
    squares = lengths - 2 * left @ right.T
    # A root has no derivative at zero, where a curve meets itself.
    apart = squares > 0
    if same:
        apart &= ~jnp.eye(left.shape[0], dtype=bool)
    distances = jnp.where(apart, jnp.sqrt(jnp.where(apart, squares, 1)), 0)
    return distances.sum() / (left.shape[0] * (right.shape[0] - same))


def energy_distance(generated: Curves, real: Curves) -> Float[Array, ""]:
    """How far two samples' distributions are apart: 2 E|X-Y| - E|X-X'| - E|Y-Y'|.

    Zero on average for samples of one distribution, and positive otherwise; unbiased,
    so also slightly negative at times (Székely and Rizzo, 2013).
    """
    across = mean_distance(generated, real)
    within = mean_distance(generated, generated, True) + mean_distance(real, real, True)
    return 2 * across - within


# --8<-- [end:distance]
