"""numpyro: the gradient that its samplers follow is that of the solve in the model."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpyro
from numpyro.distributions import LogNormal, Normal
from numpyro.infer.util import potential_energy

import reversax as rvx

ts = jnp.linspace(0.0, 5.0, 11)
observed = 1 / (1 + 9 * jnp.exp(-1.2 * ts))


def model(adjoint):
    rate = numpyro.sample("rate", LogNormal(0.0, 1.0))
    term = dfx.ODETerm(lambda t, y, rate: rate * y * (1 - y))
    solver, save = rvx.Reversible(dfx.Tsit5()), dfx.SaveAt(ts=ts)
    options = dict(args=rate, saveat=save, adjoint=adjoint, throw=False)
    solution = dfx.diffeqsolve(term, solver, 0.0, 5.0, 0.1, jnp.array(0.1), **options)
    solved = solution.result == dfx.RESULTS.successful
    numpyro.factor("solved", jnp.where(solved, 0.0, -jnp.inf))
    numpyro.sample("observed", Normal(solution.ys, 0.05), obs=observed)


def loss(rate, adjoint):
    return potential_energy(model, (adjoint,), {}, {"rate": rate})


gradient = jax.grad(loss)(1.0, rvx.ReversibleAdjoint())
checkpointed = jax.grad(loss)(1.0, dfx.RecursiveCheckpointAdjoint())
print(gradient, checkpointed)
