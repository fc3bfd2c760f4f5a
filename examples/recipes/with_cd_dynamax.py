"""cd-dynamax: settings of the filter's solves, one between every two observations."""

import diffrax as dfx
import jax
import jax.numpy as jnp
from cd_dynamax import ContDiscreteNonlinearGaussianSSM, EKFHyperParams

import reversax as rvx

ts = jnp.linspace(0.0, 4.0, 9)[:, None]
observed = jnp.cos(ts)
model = ContDiscreteNonlinearGaussianSSM(state_dim=2, emission_dim=1)
parameters, _ = model.initialize()


def loss(weights, **adjoint):
    drift = parameters.dynamics.drift._replace(weights=weights)
    dynamics = parameters.dynamics._replace(drift=drift)
    settings = dict(solver=rvx.Reversible(dfx.Heun()), dt0=0.05, **adjoint)
    chosen = EKFHyperParams(diffeqsolve_settings=settings)
    changed = parameters._replace(dynamics=dynamics)
    return model.marginal_log_prob(changed, observed, ts, chosen)


weights = jnp.array([[0.0, 1.0], [-0.8, -0.2]])
gradient = jax.grad(loss)(weights, adjoint=rvx.ReversibleAdjoint())
checkpointed = jax.grad(loss)(weights)
print(gradient, checkpointed)
