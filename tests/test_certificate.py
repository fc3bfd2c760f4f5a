"""The round trip: measured by `round_trip_error`, checked by every backward pass."""

import math

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from helpers import (
    BASES,
    initial_states,
    network_arguments,
    network_field,
    relative_difference,
)

import reversax as rvx

TERM = dfx.ODETerm(network_field)
ARGS, Y0 = network_arguments(), initial_states()
CONTROLLERS = {
    "constant": (dfx.ConstantStepSize(), 0.01),
    "pid": (dfx.PIDController(rtol=1e-6, atol=1e-6), None),
}


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("name", ["Heun", "Tsit5", "HalfSolver-Heun"])
def test_round_trip_of_a_healthy_solve_is_round_off(name, controller):
    stepsize_controller, dt0 = CONTROLLERS[controller]
    error, num_steps = rvx.round_trip_error(
        TERM,
        rvx.Reversible(BASES[name]),
        0.0,
        1.0,
        dt0,
        Y0,
        ARGS,
        stepsize_controller=stepsize_controller,
    )
    assert error.y.shape == error.z.shape == Y0.shape
    if controller == "constant":
        assert num_steps == 100
    # Half an ulp for each of six roundings a step, amplified by lam**-n <= e.
    bound = 3 * math.e * float(num_steps) * 2.3e-16 * float(jnp.max(jnp.abs(Y0)))
    assert 0 < max(float(jnp.max(jnp.abs(e))) for e in (error.y, error.z)) < bound


def test_round_trip_grows_as_the_theory_says():
    """Round-off of one step is amplified by `1/lam` with each later one: lam**-n."""

    def size(lam, n):
        solver = rvx.Reversible(dfx.Heun(), rvx.McCallumFoster(lam))
        error, _ = rvx.round_trip_error(TERM, solver, 0.0, 1.0, 1 / n, Y0, ARGS)
        return float(jnp.max(jnp.abs(error.y - error.z)))

    grown = size(0.95, 400) / size(0.95, 200)
    assert 0.02 < grown / 0.95**-200 < 50


def test_round_trip_has_the_structure_of_the_state():
    y0 = {"a": jnp.array(1.0), "b": (jnp.ones(2),)}
    field = lambda t, y, args: jax.tree.map(lambda x: -x * args, y)
    error, _ = rvx.round_trip_error(
        dfx.ODETerm(field), rvx.Reversible(dfx.Tsit5()), 0.0, 1.0, 0.1, y0, 0.5
    )
    assert jax.tree.structure(error.y) == jax.tree.structure(y0)


def gradient(lam, n, dtype=jnp.float64, tolerance=None, field=network_field, t1=1.0):
    solver = rvx.Reversible(dfx.Heun(), rvx.McCallumFoster(lam))
    adjoint = rvx.ReversibleAdjoint(round_trip_tolerance=tolerance)
    cast = lambda x: jnp.asarray(x, dtype)

    def loss(args):
        return jnp.sum(
            dfx.diffeqsolve(
                dfx.ODETerm(field),
                solver,
                cast(0.0),
                cast(t1),
                cast(t1 / n),
                cast(Y0),
                args,
                adjoint=adjoint,
                max_steps=n,
            ).ys
        )

    return eqx.filter_jit(jax.grad(loss))(jax.tree.map(cast, ARGS))


MESSAGE = (
    r"(?s)ReversibleAdjoint.*did not find the initial state again.*off by between "
    r"1e[-+]\d\d and 1e[-+]\d\d of.*tolerance is.*coupling_parameter.*fewer steps"
)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=["f32", "f64"])
def test_a_lossy_reversal_raises_and_a_healthy_one_does_not(dtype):
    # lam**-n is 2.7e4 at 0.9 and 97 steps in single precision: 2.7e4*6e-8 > 3.5e-4.
    n = 97 if dtype == jnp.float32 else 250
    with pytest.raises(eqx.EquinoxRuntimeError, match=MESSAGE):
        gradient(0.9, n, dtype)
    assert all(jnp.all(jnp.isfinite(g)) for g in gradient(0.999, n, dtype))


def test_the_message_says_by_how_much():
    """The error of the gradient withheld is of that size too."""
    with pytest.raises(eqx.EquinoxRuntimeError) as raised:
        gradient(0.9, 250)
    decade = str(raised.value).split("off by between ")[1].split(" ")[0]
    error, _ = rvx.round_trip_error(
        TERM,
        rvx.Reversible(dfx.Heun(), rvx.McCallumFoster(0.9)),
        0.0,
        1.0,
        1 / 250,
        Y0,
        ARGS,
    )
    size = max(float(jnp.max(jnp.abs(e))) for e in (error.y, error.z))
    # Two programs round differently, so the sizes agree only roughly.
    assert float(decade) / 30 < size < float(decade) * 300


def test_the_tolerance_is_the_users():
    assert all(jnp.all(jnp.isfinite(g)) for g in gradient(0.9, 250, tolerance=1.0))
    with pytest.raises(eqx.EquinoxRuntimeError, match=r"tolerance is 1e-16"):
        gradient(0.999, 97, tolerance=1e-16)
    unchecked = gradient(0.9, 250, tolerance=math.inf)
    # What the check protects from: this gradient is wrong.
    assert relative_difference(unchecked, gradient(0.999, 250)) > 1e-8


def test_a_contracting_flow_raises_rather_than_lie():
    """y' = -30 y forgets where it began: exp(30) is 1e13, beyond single precision."""
    field = lambda t, y, args: -30.0 * y + 0.0 * args[1][0]
    with pytest.raises(eqx.EquinoxRuntimeError, match="did not find the initial state"):
        gradient(0.999, 400, jnp.float32, field=field)


def test_an_overflow_raises_and_says_so():
    field = lambda t, y, args: y**3 * 1e6 + args[1][0]
    with pytest.raises(eqx.EquinoxRuntimeError, match=r"not finite.*smaller steps"):
        gradient(0.999, 50, field=field)


def test_one_bad_lane_is_enough():
    def loss(args, rate):
        field = lambda t, y, a: -rate * y + network_field(t, y, a)
        return jnp.sum(
            dfx.diffeqsolve(
                dfx.ODETerm(field),
                rvx.Reversible(dfx.Heun()),
                0.0,
                1.0,
                1e-3,
                Y0,
                args,
                adjoint=rvx.ReversibleAdjoint(),
                max_steps=1000,
            ).ys
        )

    total = lambda args, rates: jnp.sum(jax.vmap(loss, (None, 0))(args, rates))
    gradient_of_total = eqx.filter_jit(jax.grad(total))
    healthy = gradient_of_total(ARGS, jnp.array([0.0, 0.1]))
    assert all(jnp.all(jnp.isfinite(g)) for g in healthy)
    with pytest.raises(eqx.EquinoxRuntimeError, match="did not find the initial state"):
        jax.block_until_ready(gradient_of_total(ARGS, jnp.array([0.0, 60.0])))


def test_an_overflow_with_throw_false_is_nan_in_its_own_lane():
    field = lambda t, y, args: y**3 * args

    def loss(args, y0):
        return jnp.sum(
            dfx.diffeqsolve(
                dfx.ODETerm(field),
                rvx.Reversible(dfx.Heun()),
                0.0,
                1.0,
                0.02,
                y0,
                args,
                adjoint=rvx.ReversibleAdjoint(),
                throw=False,
                max_steps=50,
            ).ys
        )

    lanes = jax.vmap(jax.grad(loss))(jnp.array([0.1, 1e8]), jnp.ones((2, 1)))
    assert jnp.isfinite(lanes[0]) and jnp.isnan(lanes[1])


def test_a_leaf_of_nothing_but_round_off_raises_no_false_alarm():
    """`a - b` is an invariant, kept as a state of its own: zero but for round-off."""

    def field(t, y, args):
        rate = args * jnp.cos(3 * t)
        flow = rate * (y["a"] + 0.1)
        other = rate * y["a"] + rate * 0.1
        return {"a": flow, "invariant": (flow - other) * 1.7}

    def loss(args):
        y0 = {"a": jnp.array(1.0), "invariant": jnp.array(0.0)}
        solution = dfx.diffeqsolve(
            dfx.ODETerm(field),
            rvx.Reversible(dfx.Heun()),
            0.0,
            1.0,
            1e-3,
            y0,
            args,
            adjoint=rvx.ReversibleAdjoint(),
            max_steps=1000,
        )
        assert solution.ys is not None
        return jnp.sum(solution.ys["a"] + solution.ys["invariant"])

    value = jax.grad(loss)(jnp.array(0.7))
    exact = jnp.sin(3.0) / 3 * 1.1 * jnp.exp(0.7 * jnp.sin(3.0) / 3)
    assert abs(value - exact) < 1e-5 * abs(exact)  # Heun's own error at 1,000 steps


def test_measuring_a_round_trip_has_no_derivative():
    def size(y0):
        error, _ = rvx.round_trip_error(
            TERM, rvx.Reversible(dfx.Heun()), 0.0, 1.0, 0.1, y0, ARGS
        )
        return jnp.sum(error.y)

    with pytest.raises(Exception, match=r"round_trip_error.*was differentiated"):
        jax.grad(size)(Y0)


def test_a_state_that_begins_and_ends_at_zero_raises_no_false_alarm():
    """The round trip is measured against the largest state met, not against y0."""
    field = lambda t, y, args: jnp.cos(2 * jnp.pi * t) * args[1][:3] * 1e3
    zeros = jnp.zeros_like(Y0)

    def loss(args):
        return jnp.sum(
            dfx.diffeqsolve(
                dfx.ODETerm(field),
                rvx.Reversible(dfx.Midpoint()),
                0.0,
                1.0,
                1e-3,
                zeros,
                args,
                adjoint=rvx.ReversibleAdjoint(),
                max_steps=1000,
            ).ys
        )

    assert all(jnp.all(jnp.isfinite(g)) for g in jax.grad(loss)(ARGS))
