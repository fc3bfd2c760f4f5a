"""Optimistix: a least-squares fit, told to take its Jacobian in reverse mode."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import optimistix as optx

import reversax as rvx

ts = jnp.linspace(0.0, 5.0, 11)
observed = jnp.exp(-0.15 * ts) * jnp.cos(1.9 * ts)


def residuals(parameters, adjoint):
    field = lambda t, y, p: jnp.array([y[1], -p[0] * y[0] - p[1] * y[1]])
    solver, save = rvx.Reversible(dfx.Tsit5()), dfx.SaveAt(ts=ts)
    options = dict(args=parameters, saveat=save, adjoint=adjoint)
    start, term = jnp.array([1.0, 0.0]), dfx.ODETerm(field)
    path = dfx.diffeqsolve(term, solver, 0.0, 5.0, 0.1, start, **options).ys
    return path[:, 0] - observed


def fit(adjoint):
    optimiser = optx.LevenbergMarquardt(rtol=1e-10, atol=1e-10)
    guess, options = jnp.array([3.0, 0.1]), dict(jac="bwd")  # "fwd" by default
    return optx.least_squares(residuals, optimiser, guess, adjoint, options).value


fitted = fit(rvx.ReversibleAdjoint())
gradient = jax.jacrev(residuals)(fitted, rvx.ReversibleAdjoint())
checkpointed = jax.jacrev(residuals)(fitted, dfx.RecursiveCheckpointAdjoint())
print(fitted)
