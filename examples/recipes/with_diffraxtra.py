"""diffraxtra: solver and adjoint are fields of `DiffEqSolver`, made once."""

import diffrax as dfx
import jax
import jax.numpy as jnp
from diffraxtra import DiffEqSolver

import reversax as rvx


def loss(rate, adjoint):
    solve = DiffEqSolver(rvx.Reversible(dfx.Tsit5()), adjoint=adjoint)
    term = dfx.ODETerm(lambda t, y, rate: jnp.array([y[1], -rate * jnp.sin(y[0])]))
    y0 = jnp.array([1.0, 0.0])
    return jnp.sum(solve(term, t0=0.0, t1=3.0, dt0=0.05, y0=y0, args=rate).ys ** 2)


gradient = jax.grad(loss)(2.0, rvx.ReversibleAdjoint())
checkpointed = jax.grad(loss)(2.0, DiffEqSolver(dfx.Tsit5()).adjoint)
print(gradient, checkpointed)
