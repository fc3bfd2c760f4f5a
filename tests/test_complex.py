"""Complex states: as the same problem in real and imaginary parts, and as Diffrax's own
adjoints have them, with JAX's convention for complex gradients."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import pytest
from helpers import (
    BASES,
    SCHEMES,
    SameScheme,
    in_cells,
    quick,
    relative_difference,
)

import reversax as rvx

pytestmark = pytest.mark.filterwarnings("ignore:Complex dtype support in Diffrax")

OURS = rvx.ReversibleAdjoint()
DIRECT = SameScheme(dfx.DirectAdjoint())
Y0 = jnp.array([1.0 + 0.2j, 0.3 - 0.5j])
PARAMETERS = jnp.array(1.3), jnp.array(0.3 - 0.2j)
CONTROLLERS = {
    "constant": dfx.ConstantStepSize(),
    "adaptive": dfx.PIDController(rtol=1e-4, atol=1e-4),
}
SAVED = {
    "ts": dfx.SaveAt(ts=jnp.linspace(0.1, 0.9, 3)),
    "steps": dfx.SaveAt(steps=True),
    "fn": dfx.SaveAt(
        ts=jnp.linspace(0.1, 0.9, 3), fn=lambda t, y, args: jnp.abs(y) ** 2 + args[1]
    ),
}


def field(t, y, parameters):
    """A driven two-level system, and what is not holomorphic in the state."""
    drive, coupling = parameters
    off_diagonal = 0.4 * jnp.cos(drive * t) + coupling
    hamiltonian = jnp.array([[1.3, off_diagonal], [jnp.conj(off_diagonal), -0.4]])
    dy = -1j * (hamiltonian @ y) - 0.3 * jnp.abs(y) ** 2 * jnp.conj(y)
    return dy.astype(y.dtype)


def loss_of(ys):
    ys = jnp.where(jnp.isfinite(ys), ys, 0)
    weights = jnp.array([1.0, 2.0])
    return jnp.sum(weights * jnp.abs(ys) ** 2 + jnp.real(ys * (0.3 - 0.2j)))


def solve(terms, solver, adjoint, y0, parameters, controller, saveat):
    return dfx.diffeqsolve(
        *(terms, solver, 0.0, 1.0, 0.1, y0, parameters),
        adjoint=adjoint,
        stepsize_controller=CONTROLLERS[controller],
        saveat=SAVED[saveat],
        max_steps=256,
    ).ys


def differentiated(adjoint, base, scheme, controller, saveat, dtype=None, lanes=False):
    solver = rvx.Reversible(BASES[base], *SCHEMES[scheme])
    term = dfx.ODETerm(field)
    y0 = Y0 if dtype is None else Y0.astype(dtype)

    def loss(y0, parameters):
        ys = solve(term, solver, adjoint, y0, parameters, controller, saveat)
        return loss_of(ys)

    run = jax.value_and_grad(loss, argnums=(0, 1))
    if lanes:
        run = jax.vmap(run, in_axes=(0, None))
        y0 = jnp.stack([y0, 0.5j * y0, -y0])
    return jax.jit(run, **quick(adjoint, SCHEMES[scheme][1]))(y0, PARAMETERS)


CELLS = [
    (base, scheme, controller, saveat)
    for base in ("Heun", "Tsit5", "own-midpoint")
    for scheme in SCHEMES
    for controller in CONTROLLERS
    for saveat in SAVED
]
DAILY = {
    ("Heun", "fixed-point", "adaptive", "fn"),
}


@pytest.mark.parametrize("base, scheme, controller, saveat", in_cells(CELLS, DAILY))
def test_gradients_are_those_of_direct_differentiation(
    base, scheme, controller, saveat
):
    cell = base, scheme, controller, saveat
    value, gradient = differentiated(OURS, *cell)
    expected, oracle = differentiated(DIRECT, *cell)
    # Round-off; the published coupling magnifies it by the steps it undoes. Where steps
    # adapt, their ends have that of the error estimates, some 1e-5 of the state.
    bound = 1e-13 if controller == "constant" else 1e-11
    assert abs(value - expected) < bound
    assert relative_difference(gradient, oracle) < 10 * bound
    assert jnp.iscomplexobj(gradient[0]) and jnp.iscomplexobj(gradient[1][1])
    assert not jnp.iscomplexobj(gradient[1][0])


PARTS_CELLS = [(scheme, x) for scheme in SCHEMES for x in ("complex64", "complex128")]


@pytest.mark.parametrize(
    "scheme, dtype", in_cells(PARTS_CELLS, {("fixed-point", "complex64")})
)
def test_a_complex_state_is_solved_to_the_bit_as_its_parts_are(scheme, dtype):
    solver = rvx.Reversible(dfx.Heun(), *SCHEMES[scheme])
    y0 = Y0.astype(dtype)

    def of_parts(t, y, parameters):
        dy = field(t, jax.lax.complex(*y), parameters)
        return dy.real, dy.imag

    def loss(parts, parameters, split):
        if split:
            term, start = dfx.ODETerm(of_parts), parts
        else:
            term, start = dfx.ODETerm(field), jax.lax.complex(*parts)
        ys = solve(term, solver, OURS, start, parameters, "constant", "ts")
        return loss_of(jax.lax.complex(ys[0], ys[1]) if split else ys)

    run = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1)),
        static_argnums=2,
        **quick(OURS, SCHEMES[scheme][1]),
    )
    parts = y0.real, y0.imag
    value, gradient = run(parts, PARAMETERS, False)
    expected, oracle = run(parts, PARAMETERS, True)
    digits = float(jnp.finfo(dtype).eps)
    assert abs(value - expected) <= 4 * digits * abs(expected)
    # In floating point the round-off of what is undone grows by a bit a halving,
    # until the way back restarts: after 20 of them in double precision, 5 in single.
    halvings = 20 if dtype == "complex128" else 5
    magnified = 1 if scheme == "fixed-point" else 2**halvings
    assert relative_difference(gradient, oracle) < 64 * digits * magnified


@pytest.mark.heavy
def test_lanes_of_complex_states_take_steps_of_their_own():
    cell = "Heun", "published", "adaptive", "ts"
    value, gradient = differentiated(OURS, *cell, lanes=True)
    expected, oracle = differentiated(DIRECT, *cell, lanes=True)
    assert abs(value - expected).max() < 1e-12
    assert relative_difference(gradient, oracle) < 1e-11


DRIVEN = {
    "controlled": lambda key: dfx.LinearInterpolation(
        jnp.linspace(0, 1, 5), jnp.sin(3 * jnp.arange(10.0)).reshape(5, 2)
    ),
    "stochastic": lambda key: dfx.VirtualBrownianTree(0.0, 1.0, 1e-3, (2,), key),
}


@pytest.mark.parametrize(
    "driven", ["controlled", pytest.param("stochastic", marks=pytest.mark.heavy)]
)
def test_complex_states_may_be_driven_by_paths(driven):
    path = DRIVEN[driven](jax.random.key(0))
    solver = rvx.Reversible(dfx.Heun(), *SCHEMES["published"])

    def gradient(adjoint):
        def loss(y0, parameters):
            noise = lambda t, y, args: 0.3j * y[:, None] * args[1] + jnp.eye(2)
            terms = dfx.MultiTerm(dfx.ODETerm(field), dfx.ControlTerm(noise, path))
            problem = y0, parameters, "constant", "ts"
            return loss_of(solve(terms, solver, adjoint, *problem))

        run = jax.jit(jax.grad(loss, argnums=(0, 1)), **quick(adjoint))
        return run(Y0, PARAMETERS)

    assert relative_difference(gradient(OURS), gradient(DIRECT)) < 1e-12


def test_one_part_that_is_no_number_leaves_the_other_as_it_is():
    arithmetic = rvx.FixedPoint()
    start = arithmetic.encode(jnp.array([1.0 + 2.0j]))
    lost = arithmetic.add(start, jnp.array([complex(jnp.nan, 0.5)]))
    value = arithmetic.decode(lost)
    assert jnp.isnan(value.real[0]) and value.imag[0] == 2.5
    halved, _ = arithmetic.halve_gap(lost, start, 1)
    assert arithmetic.decode(halved).imag[0] == 2.375
    assert not arithmetic.outgrown(halved)
    grown = arithmetic.add(start, jnp.array([1e30j]))
    assert arithmetic.outgrown(grown)


def test_the_norm_of_a_complex_state_is_watched():
    """`y' = -30 y + i y`: damping drives the twins apart, which no result hides."""
    term = dfx.ODETerm(lambda t, y, args: (-30.0 + 1j) * y)
    result = dfx.diffeqsolve(
        *(term, rvx.Reversible(dfx.Heun(), rvx.McCallumFoster()), 0.0, 2.0, 0.02),
        Y0,
        adjoint=OURS,
        throw=False,
    ).result
    assert result == dfx.RESULTS.nonlinear_divergence
