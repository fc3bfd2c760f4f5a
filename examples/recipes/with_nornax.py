"""nornax: its Hermite solvers are one-step solvers like any other."""

import diffrax as dfx
import jax
import jax.numpy as jnp
from nornax import initialize_state
from nornax.forces import DirectSumGravity
from nornax.solvers import Hermite4
from nornax.terms import NBodyTerm

import reversax as rvx

positions = jnp.array([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
velocities = jnp.array([[0.0, 0.5, 0.0], [0.0, -0.5, 0.0], [0.6, 0.0, 0.1]])


def loss(masses, adjoint):
    gravity = DirectSumGravity()
    state = initialize_state(positions, velocities, masses, gravity)
    solver = rvx.Reversible(Hermite4(force_model=gravity))
    term = NBodyTerm(force_model=gravity)
    solution = dfx.diffeqsolve(
        term, solver, 0.0, 2.0, 0.04, state, adjoint=adjoint, max_steps=256
    )
    return jnp.sum(solution.ys.positions**2)


masses = jnp.array([1.0, 1.0, 0.1])
gradient = jax.grad(loss)(masses, rvx.ReversibleAdjoint())
checkpointed = jax.grad(loss)(masses, dfx.RecursiveCheckpointAdjoint())
print(gradient, checkpointed)
