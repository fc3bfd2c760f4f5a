"""Continuous normalising flows, as `examples/flow.py` has them: the trace, the density,
and what the log-density costs.

The oracle for a trace is the Jacobian, for a density that of a linear equation, and for
a gradient direct differentiation of the same scheme.
"""

import itertools

import diffrax as dfx
import equinox as eqx
import jax
import jax.extend.core
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
import pytest
from flow import (
    REVERSIBLE,
    Flow,
    State,
    exact_trace,
    hutchinson_trace,
    log_likelihood,
    log_normal,
    sample,
    sample_probe,
    solve,
)
from helpers import SameScheme, heavy, initial_states, quick, relative_difference

import reversax as rvx

OURS = rvx.ReversibleAdjoint()
DIRECT = SameScheme(dfx.DirectAdjoint())
DIM = 3
TRACES = pytest.mark.parametrize("trace", ["exact", "Hutchinson"])


def small_flow(dim=DIM, dtype=jnp.float64, scale=1.5):
    """With weights large enough that the density is far from normal."""
    flow = Flow(dim, width=8, depth=2, key=jax.random.key(0))
    arrays, static = eqx.partition(flow, eqx.is_array)
    arrays = jax.tree.map(lambda x: (scale * x).astype(dtype), arrays)
    return eqx.combine(arrays, static)


def probe_for(trace, y):
    return sample_probe(y, key=jax.random.key(5)) if trace == "Hutchinson" else None


def velocity_at(t):
    flow = small_flow()
    return lambda y: flow.velocity(t, y)


Y = initial_states(1, DIM)[0]


def test_exact_trace_is_that_of_the_jacobian():
    fn = velocity_at(0.3)
    dy, trace = jax.jit(lambda y: exact_trace(fn, y, None))(Y)
    expected = jnp.trace(jax.jacfwd(fn)(Y))
    assert abs(expected) > 0.01
    assert abs(trace - expected) <= 1e-14
    assert jnp.all(abs(dy - fn(Y)) <= 1e-15)


def test_hutchinson_trace_is_exact_on_average_over_all_probes():
    fn = velocity_at(0.3)
    probes = jnp.array(list(itertools.product((-1.0, 1.0), repeat=DIM)))
    dy, traces = jax.jit(jax.vmap(lambda p: hutchinson_trace(fn, Y, p)))(probes)
    _, expected = exact_trace(fn, Y, None)
    assert jnp.std(traces) > 0.01
    assert abs(jnp.mean(traces) - expected) <= 1e-14
    assert jnp.all(abs(dy - fn(Y)) <= 1e-15)


def test_probes_are_signs_that_differ_between_rows():
    probe = sample_probe(jnp.zeros((50, DIM)), key=jax.random.key(0))
    assert jnp.all(abs(probe) == 1)
    assert len(np.unique(probe, axis=0)) == 2**DIM


class Linear(eqx.Module):
    """dy/dt = (1 + t²) A y, with the solution exp((t + t³/3) A) y(0)."""

    matrix: jax.Array

    def __call__(self, y_and_t):
        *_, t = y_and_t
        return (1 + t**2) * self.matrix @ y_and_t[:-1]


@pytest.mark.parametrize(
    ("base", "order", "trace"),
    [
        pytest.param("Euler", 2, "exact", marks=pytest.mark.heavy),
        pytest.param("Euler", 2, "Hutchinson", marks=pytest.mark.heavy),
        pytest.param("Bosh3", 4, "exact", marks=pytest.mark.heavy),
    ],
)
def test_log_density_of_a_linear_flow_converges_at_the_order_of_the_solver(
    base, order, trace
):
    """A diagonal matrix has Hutchinson's trace exact for every probe, and a solution
    whose error does not cancel."""
    matrix = jnp.diag(jnp.array([0.7, -0.4, 0.3]))
    if trace == "exact":
        matrix += 0.5 * jnp.eye(DIM, k=1) - 0.6 * jnp.eye(DIM, k=-1)
    flow = eqx.tree_at(lambda f: f.network, small_flow(), Linear(matrix))
    y = initial_states(4, DIM)
    whole = 4 / 3
    expected = log_normal(y @ jsl.expm(whole * matrix).T) + whole * jnp.trace(matrix)
    solver = rvx.Reversible({"Euler": dfx.Euler(), "Bosh3": dfx.Bosh3()}[base])
    probe = probe_for(trace, y)
    num_steps = [128, 512]  # Bosh3 is at 3.4 between 16 and 32, at 3.9 between these.
    errors = [
        float(abs(log_likelihood(flow, y, probe, n, solver) - expected).max())
        for n in num_steps
    ]
    assert errors[1] <= errors[0] / 4 ** (order - 0.2), errors


@pytest.mark.heavy
def test_density_of_a_flow_integrates_to_one():
    flow, side = small_flow(dim=2), jnp.linspace(-8.0, 8.0, 97)
    grid = jnp.stack(jnp.meshgrid(side, side), axis=-1).reshape(-1, 2)
    density = jnp.exp(jax.jit(lambda y: log_likelihood(flow, y, None, 64))(grid))
    assert jnp.std(density / jnp.exp(log_normal(grid))) > 0.1, "hardly a flow"
    total = jnp.sum(density) * (side[1] - side[0]) ** 2
    assert abs(total - 1) <= 1e-4


@pytest.mark.heavy
def test_samples_carry_the_log_density_that_the_flow_gives_them():
    """One is solved towards the data and the other from there."""
    flow = small_flow()
    drawn = jax.jit(lambda: sample(flow, 6, DIM, 128, key=jax.random.key(2)))()
    again = log_likelihood(flow, drawn.y, None, 128)
    assert jnp.std(again - log_normal(drawn.y)) > 0.1
    assert jnp.all(abs(again - drawn.log_density) <= 1e-4)


@pytest.mark.parametrize(
    "trace", ["exact", pytest.param("Hutchinson", marks=pytest.mark.heavy)]
)
def test_gradient_of_the_likelihood_is_that_of_direct_differentiation(trace):
    flow, y = small_flow(), initial_states(4, DIM)
    arrays, static = eqx.partition(flow, eqx.is_array)
    probe = probe_for(trace, y)

    def gradient(adjoint):
        loss = lambda arrays, y: (
            -jnp.mean(
                log_likelihood(
                    eqx.combine(arrays, static), y, probe, 12, REVERSIBLE, adjoint
                )
            )
        )
        of = jax.grad(loss, argnums=(0, 1))
        return jax.jit(of, **quick(adjoint, REVERSIBLE.arithmetic))(arrays, y)

    assert relative_difference(gradient(OURS), gradient(DIRECT)) <= 1e-11


@pytest.mark.heavy  # Daily: the certificate of the gradient above allows no bit.
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@TRACES
def test_not_one_bit_of_a_flow_is_lost(trace, dtype):
    y = initial_states(4, DIM, dtype)
    one = jnp.ones((), dtype)
    out = rvx.round_trip_error(
        dfx.ODETerm(small_flow(dtype=dtype)),
        REVERSIBLE,
        *(0 * one, one, one / 50),
        State(y, jnp.zeros(len(y), dtype)),
        probe_for(trace, y),
    )
    assert out.num_steps == 50
    for x in jax.tree.leaves(out.error):
        assert not jnp.any(x)


class Counted(eqx.Module):
    """A network that calls back at each evaluation."""

    network: eqx.nn.MLP
    evaluations: list = eqx.field(static=True)

    def __call__(self, y_and_t):
        jax.debug.callback(lambda: self.evaluations.append(1))
        return self.network(y_and_t)


@pytest.mark.parametrize(
    "differentiate",
    [pytest.param(False, id="solve", marks=pytest.mark.heavy), True],
    ids=lambda x: "gradient" if x is True else None,
)
@pytest.mark.parametrize(
    "trace",
    [
        "exact",
        *heavy("none", "Hutchinson"),
    ],
)
def test_the_log_density_does_not_evaluate_the_network_again(trace, differentiate):
    """Two evaluations a step in each pass, with it and without."""
    flow, num_steps, evaluations = small_flow(), 10, []
    flow = eqx.tree_at(lambda f: f.network, flow, Counted(flow.network, evaluations))
    y = initial_states(1, DIM)
    probe = probe_for(trace, y)

    def loss(y):
        if trace != "none":
            return log_likelihood(flow, y, probe, num_steps)[0]
        field = lambda t, y, args: flow.velocity(t, y[0])[None]
        return jnp.sum(solve(field, y, None, num_steps))

    jax.block_until_ready(jax.jit(jax.grad(loss) if differentiate else loss)(y))
    jax.effects_barrier()
    assert len(evaluations) == (4 if differentiate else 2) * num_steps


def operations(jaxpr, name):
    """How often a primitive occurs in a program, inner ones included."""
    inner = jax.extend.core.jaxprs_in_params
    return sum(
        (equation.primitive.name == name)
        + sum(operations(part, name) for part in inner(equation.params))
        for equation in jaxpr.eqns
    )


@TRACES
def test_the_log_density_takes_no_more_activations_than_the_network(trace):
    flow, y = small_flow(), initial_states(4, DIM)
    probe, state = probe_for(trace, y), State(y, jnp.zeros(len(y)))
    alone = jax.make_jaxpr(jax.vmap(lambda y: flow.velocity(0.3, y)))(y)
    both = jax.make_jaxpr(lambda state: flow(0.3, state, probe))(state)
    assert operations(alone.jaxpr, "tanh") == 2  # As deep as the network is.
    assert operations(both.jaxpr, "tanh") == 2


def test_state_is_a_tree_whose_shape_a_solve_keeps():
    y = initial_states(4, DIM)
    start = State(y, jnp.zeros(4))
    end = solve(small_flow(), start, None, 4)
    assert jax.tree.map(jnp.shape, end) == jax.tree.map(jnp.shape, start)
