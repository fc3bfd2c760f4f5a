"""Long and damped solves: where a reversal without fixed point would be lost.

All heavy. The oracle is direct differentiation of the same scheme, or where said a
tight reference of the equation itself.
"""

import diffrax as dfx
import jax
import jax.numpy as jnp
import pytest
from helpers import RungeKutta4, SameScheme, relative_difference

import reversax as rvx

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("optimised")]


def lorenz(t, y, args):
    sigma, rho, beta = args
    u, v, w = y
    return jnp.stack([sigma * (v - u), u * (rho - w) - v, u * v - beta * w])


def damped(t, y, args):
    return jnp.tanh(args[0] @ y) * args[1] - 5 * y + jnp.sin(t)


KEY = jax.random.key(0)
LORENZ_START = jnp.array([1.0, 1.0, 20.0])
# name -> (field, y0, args, t1). The gradient of Lorenz's grows as exp(0.9 t). In single
# precision, at t1 = 2, ours is 4.8e-6 from the gradient in double and that of direct
# differentiation 4.5e-5; at t1 = 5 these are 1.4e-5 and 1.7e-4.
PROBLEMS = {
    "damped": (
        damped,
        jnp.array([0.3, -0.2, 0.5]),
        (jax.random.normal(KEY, (3, 3)), jnp.array(2.0)),
        100.0,
    ),
    "lorenz": (
        lorenz,
        jnp.array([1.0, 1.0, 20.0]),
        jnp.array([10.0, 28.0, 8 / 3]),
        2.0,
    ),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("base", [dfx.Euler(), dfx.Bosh3()], ids=["Euler", "Bosh3"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_gradient_after_10_000_steps_is_that_of_direct_differentiation(
    problem, base, dtype
):
    field, y0, args, t1 = PROBLEMS[problem]
    max_steps = 10_001
    cast = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)

    def loss(point, adjoint):
        y0, args = point
        saveat = dfx.SaveAt(ts=cast(jnp.linspace(0.1, t1, 11)))
        times = cast((0.0, t1, t1 / 10_000))
        solution = dfx.diffeqsolve(
            dfx.ODETerm(field),
            rvx.Reversible(base),
            *times,
            y0,
            args,
            saveat=saveat,
            adjoint=adjoint,
            max_steps=max_steps,
        )
        return jnp.mean(solution.ys**2), solution.stats["num_accepted_steps"]

    of = lambda adjoint: jax.jit(
        jax.grad(lambda p: loss(p, adjoint), has_aux=True)
    )(cast((y0, args)))  # fmt: skip
    (ours, num_steps), (direct, _) = (
        of(rvx.ReversibleAdjoint()),
        # Of as many checkpoints as steps: with fewer it loses values that are saved at
        # the ends of steps (docs/ends_of_steps.md), as some are here.
        of(SameScheme(dfx.RecursiveCheckpointAdjoint(checkpoints=max_steps))),
    )
    assert abs(num_steps - 10_000) <= 1
    bound = 1e-4 if dtype == jnp.float32 else 1e-9
    assert relative_difference(ours, direct) <= bound


@pytest.mark.parametrize("base", [dfx.Bosh3(), RungeKutta4()], ids=["Bosh3", "RK4"])
def test_a_damped_network_has_the_value_and_gradient_of_a_tight_reference(base):
    """`y' = MLP(y) - 5 y`, 8 dimensions, batch 32, T = 4, 200 steps, single precision,
    the loss over the whole path. Against Tsit5 at tolerance 1e-10 in double."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (8, 64), (64, 64), (64, 8)
    weights = [
        jax.random.normal(k, s, jnp.float32) / s[0] ** 0.5
        for k, s in zip(keys, shapes, strict=False)
    ]
    y0 = jax.random.normal(keys[3], (32, 8), jnp.float32)
    ts = jnp.linspace(0.1, 4.0, 40)

    def field(t, y, weights):
        first, second, last = weights
        return jnp.tanh(jnp.tanh(y @ first) @ second) @ last - 5 * y

    def loss(point, dtype, solver, dt0, adjoint, controller):
        weights, y0 = jax.tree.map(lambda x: x.astype(dtype), point)
        ys = dfx.diffeqsolve(
            dfx.ODETerm(field),
            solver,
            dtype(0.0),
            dtype(4.0),
            dt0,
            y0,
            weights,
            saveat=dfx.SaveAt(ts=ts.astype(dtype)),
            stepsize_controller=controller,
            adjoint=adjoint,
            max_steps=4096,
        ).ys
        return jnp.mean(ys**2)

    point = (weights, y0)
    ours, gradient = jax.jit(
        jax.value_and_grad(
            lambda p: loss(
                p,
                jnp.float32,
                rvx.Reversible(base),
                jnp.float32(0.02),
                rvx.ReversibleAdjoint(),
                dfx.ConstantStepSize(),
            )
        )
    )(point)
    value, reference = jax.jit(
        jax.value_and_grad(
            lambda p: loss(
                p,
                jnp.float64,
                dfx.Tsit5(),
                None,
                dfx.RecursiveCheckpointAdjoint(),
                dfx.PIDController(rtol=1e-10, atol=1e-10),
            )
        )
    )(point)
    assert abs(ours - value) <= 1e-4 * value
    assert relative_difference(gradient, reference) <= 1e-4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=["f32", "f64"])
def test_gradient_after_a_million_steps_is_that_of_the_exact_solution(dtype):
    """`y' = -k y` at `k = 3` for a time of 1, in steps of 1e-6 by reversible Euler, of
    second order, so that its error is far below round-off in double.

    `k` is kept in double and cast within the field. The cotangent of a parameter is a
    sum over the steps: a million terms in single precision are wrong by 1 % (measured;
    0.3 % for plain Euler, checkpointed), a fault of the sum and not of the states.
    """
    steps = 1_000_000

    def loss(point):
        y0, k = point
        return jnp.sum(
            dfx.diffeqsolve(
                dfx.ODETerm(lambda t, y, k: -k.astype(dtype) * y),
                rvx.Reversible(dfx.Euler()),
                *(dtype(0), dtype(1), dtype(1 / steps)),
                y0,
                k,
                adjoint=rvx.ReversibleAdjoint(),
                max_steps=steps + 1,
            ).ys
        )

    y0, k = jnp.asarray([0.3, -0.7, 1.1], dtype), jnp.asarray(3.0, jnp.float64)
    ct_y0, ct_k = jax.jit(jax.grad(loss))((y0, k))
    decay = jnp.exp(-3.0)
    # Euler's increments of 1e-6 in single precision have 24 bits of their own.
    bound = 1e-4 if dtype == jnp.float32 else 1e-9
    assert jnp.all(jnp.abs(ct_y0 - decay) <= bound * decay)
    assert abs(ct_k + jnp.sum(y0) * decay) <= bound * abs(jnp.sum(y0) * decay)
