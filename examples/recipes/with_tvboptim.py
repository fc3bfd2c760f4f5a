"""tvboptim: `DiffraxSolver` hands what it does not know to `diffeqsolve`."""

import diffrax as dfx
import jax
import jax.numpy as jnp
from tvboptim.experimental.network_dynamics import Network, prepare
from tvboptim.experimental.network_dynamics.coupling import LinearCoupling
from tvboptim.experimental.network_dynamics.dynamics.tvb import Generic2dOscillator
from tvboptim.experimental.network_dynamics.graph import DenseGraph
from tvboptim.experimental.network_dynamics.solvers import DiffraxSolver

import reversax as rvx

weights = jnp.array([[0.0, 1.0, 0.5], [0.2, 0.0, 0.3], [0.4, 0.1, 0.0]])


def loss(strength, **adjoint):
    coupling = {"instant": LinearCoupling(incoming_states="V", G=1.0)}
    network = Network(Generic2dOscillator(), coupling, DenseGraph(weights))
    save = dfx.SaveAt(ts=jnp.linspace(0.0, 60.0, 11))
    solver = DiffraxSolver(rvx.Reversible(dfx.Heun()), saveat=save, **adjoint)
    solve, config = prepare(network, solver, t0=0.0, t1=60.0, dt=1.0)
    config.coupling.instant.G = strength
    return jnp.mean(solve(config).ys ** 2)


gradient = jax.grad(loss)(1.5, adjoint=rvx.ReversibleAdjoint())
checkpointed = jax.grad(loss)(1.5)
print(gradient, checkpointed)
