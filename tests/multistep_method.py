"""What the tests of symmetric multistep methods solve, and differentiate."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from helpers import (
    initial_states,
    network_arguments,
    network_field,
)

import reversax as rvx

OURS, DIRECT = rvx.ReversibleAdjoint(), dfx.DirectAdjoint()
ARITHMETICS = {"fixed-point": rvx.FixedPoint(), "floating-point": rvx.FloatingPoint()}
Y0, ARGS, T1 = initial_states(), network_arguments(), 2.0
SAVED = {
    "end": dfx.SaveAt(t1=True),
    "ts": dfx.SaveAt(t0=True, ts=jnp.array([0.03, 0.07, 0.5, 1.21])),
    "steps": dfx.SaveAt(steps=3, fn=lambda t, y, args: t * jnp.sin(y * args[1][0])),
    "dense": dfx.SaveAt(dense=True),
}


def method(order, arithmetic="fixed-point", every=8, starter=None):
    base = rvx.SymmetricMultistep(order, every, starter)
    return rvx.Reversible(base, arithmetic=ARITHMETICS[arithmetic])


def solve(solver, num, y0=Y0, args=ARGS, t1=T1, **kwargs):
    known = dict(adjoint=OURS, max_steps=num)
    known.update(kwargs)
    term = dfx.ODETerm(network_field)
    return dfx.diffeqsolve(term, solver, 0.0, t1, t1 / num, y0, args, **known)


def outputs(solution):
    if solution.ys is None:
        at = jnp.array([0.02, 0.06, 0.9, 1.99])
        return jax.vmap(solution.evaluate)(at)
    return jnp.where(jnp.isfinite(solution.ys), solution.ys, 0)


def differentiated(solver, num, adjoint, saved="end", **kwargs):
    """The loss, and its gradient by the state, the arguments and the end."""

    def loss(y0, args, t1):
        known = dict(adjoint=adjoint, saveat=SAVED[saved], **kwargs)
        return jnp.sum(outputs(solve(solver, num, y0, args, t1, **known)) ** 2)

    of = jax.value_and_grad(loss, argnums=(0, 1, 2))
    return eqx.filter_jit(of)(Y0, ARGS, jnp.asarray(T1))
