"""stochastix: the mean-field model takes the solver, and its call the adjoint."""

import diffrax as dfx
import jax
import jax.numpy as jnp
from stochastix import MeanFieldModel, Reaction, ReactionNetwork
from stochastix.kinetics import MassAction

import reversax as rvx


def loss(rates, **adjoint):
    production, decay = MassAction(rates[0]), MassAction(rates[1])
    reactions = [Reaction("0 -> X", production), Reaction("2 X -> 0", decay)]
    solver = rvx.Reversible(dfx.Dopri5(), rvx.Symmetric(halvings_per_step=4))
    model = MeanFieldModel(ReactionNetwork(reactions), solver=solver, T=2.0)
    return jnp.sum(model(None, jnp.array([1.0]), **adjoint).x ** 2)


rates = jnp.array([3.0, 0.5])
gradient = jax.grad(loss)(rates, adjoint=rvx.ReversibleAdjoint())
checkpointed = jax.grad(loss)(rates)
print(gradient, checkpointed)
