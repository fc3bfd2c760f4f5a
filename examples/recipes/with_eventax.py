"""eventax: solver and adjoint are static fields of a network of spiking neurons."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from eventax.evnn import EvNN
from eventax.neuron_models import LIF

import reversax as rvx


def network(adjoint):
    neurons = dict(
        n_neurons=3, thresh=1.0, tsyn=0.5, tmem=1.0, wmean=4.0, wlim=1.0, blim=0.1
    )
    times = dict(max_solver_time=2.0, solver_stepsize=0.05)
    numbers = dict(key=jax.random.key(0), dtype=jnp.result_type(float))
    solver = rvx.Reversible(dfx.Euler())
    chosen = dict(solver=solver, adjoint=adjoint)
    return EvNN(LIF, in_size=1, **neurons, **times, **numbers, **chosen)


@eqx.filter_jit
@eqx.filter_grad
def grad_loss(network):
    return jnp.sum(network.ttfs(jnp.array([[0.1, 0.4]])) ** 2)


gradient = grad_loss(network(rvx.ReversibleAdjoint())).neuron_model.weights
checkpointed = grad_loss(network(None)).neuron_model.weights
print(gradient, checkpointed)
