"""A problem for `reversax compare`: a damped network, fitted at forty times.

    reversax compare examples/compare_problem.py

`y' = MLP(y) - 2 y` takes a batch of states in eight dimensions towards the paths of a
damped rotation. It is damped, so the published scheme loses digits as it undoes its
solve; and not stiff, so that explicit solvers are for it. docs/compare.md reads the
result.
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from reversax.compare import Problem

STATE_SIZE, WIDTH, BATCH = 8, 32, 32
DAMPING = 2.0
TIMES = jnp.linspace(0.1, 4.0, 40)


def field(t, y: Float[Array, "batch state"], network: eqx.nn.MLP):
    return jax.vmap(network)(y) - DAMPING * y


def rotated(y0: Float[Array, "batch state"]) -> Float[Array, "times batch state"]:
    """Pairs of coordinates that rotate, each at a rate of its own, and shrink."""
    first, second = jnp.split(y0, 2, axis=1)
    angle = TIMES[:, None, None] * jnp.arange(1, STATE_SIZE // 2 + 1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    turned = [cos * first - sin * second, sin * first + cos * second]
    return jnp.exp(-TIMES / 2)[:, None, None] * jnp.concatenate(turned, axis=2)


def problem(seed: int = 0) -> Problem:
    key_network, key_y0 = jax.random.split(jax.random.key(seed))
    sizes = STATE_SIZE, STATE_SIZE, WIDTH, 2
    network = eqx.nn.MLP(*sizes, activation=jnp.tanh, key=key_network)
    y0 = jax.random.normal(key_y0, (BATCH, STATE_SIZE))
    target = rotated(y0)
    return Problem(
        terms=diffrax.ODETerm(field),
        y0=y0,
        t0=0.0,
        t1=4.0,
        dt0=0.05,
        args=network,  # What is trained.
        saveat=diffrax.SaveAt(ts=TIMES),
        loss=lambda ys, network: jnp.mean((ys - target) ** 2),
    )
