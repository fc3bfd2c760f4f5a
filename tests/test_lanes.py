"""Lanes of a batch that all take the same steps, which are counted once."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import pytest
from helpers import finite_sum_of_squares, quick, relative_difference
from programs import ARGS, DIRECT, OURS, SOLVER, Y0, solve

import reversax as rvx
from reversax._xla.batching import is_mapped
from reversax._xla.programs import equations_of
from reversax._xla.run_time import run_time_zero

HEAVY = pytest.mark.heavy
STATES = jnp.stack([Y0, 2 * Y0, -Y0, 0.5 * Y0, 3 * Y0])
SAVES_ALL = dfx.SaveAt(ts=jnp.array([0.31, 0.7]), t0=True, steps=7, t1=True)


def total_of(adjoint, y0s, args, t1s=None, t1=1.0, **kwargs):
    """The loss of all lanes, which end together unless there are `t1s`."""

    def one(y0, own_t1):
        end = t1 if t1s is None else own_t1
        known = dict(t1=end, dt0=end / 50) | kwargs
        return finite_sum_of_squares(solve(adjoint, y0, args, **known).ys)

    ends = jnp.full(len(y0s), 1.0) if t1s is None else t1s
    return jnp.sum(jax.vmap(one)(y0s, ends))


def counters_of_loops(**kwargs):
    """How many integers each loop of the gradient carries for each lane."""
    of = lambda y0s: total_of(OURS, y0s, ARGS, **kwargs)
    program = jax.make_jaxpr(jax.grad(of))(STATES)
    loops = [x for x in equations_of(program.jaxpr) if x.primitive.name == "while"]
    of_lanes = lambda x: jnp.issubdtype(x.aval.dtype, jnp.integer) and x.aval.ndim == 1
    return [sum(map(of_lanes, loop.outvars)) for loop in loops]


def test_in_both_passes_such_lanes_have_one_count_of_their_steps():
    assert counters_of_loops() == [0, 0]
    forward, backward = counters_of_loops(t1s=jnp.full(len(STATES), 1.0))
    assert forward > 0 and backward > 0


MULTISTEP = rvx.Reversible(rvx.SymmetricMultistep(4, correct_every=8))
FLOATING = rvx.Reversible(dfx.Heun(), arithmetic=rvx.FloatingPoint())
STEPS = {
    "saves": dict(saveat=SAVES_ALL),
    "restarts": dict(solver=FLOATING, saveat=SAVES_ALL),
    "multistep": dict(solver=MULTISTEP),
}


def test_they_may_save_at_times_of_their_own():
    at = jnp.array([[0.1, 0.31, 0.7], [0.2, 0.4, 0.9]])

    def loss(adjoint, args, at):
        def one(ts):
            ys = solve(adjoint, Y0, args, saveat=dfx.SaveAt(ts=ts)).ys
            return finite_sum_of_squares(ys)

        return jnp.sum(jax.vmap(one)(at))

    gradient = lambda adjoint: jax.grad(lambda *x: loss(adjoint, *x), (0, 1))
    ours, direct = (jax.jit(gradient(x), **quick(x))(ARGS, at) for x in (OURS, DIRECT))
    assert relative_difference(ours, direct) <= 1e-11


@pytest.mark.parametrize("halvings", [pytest.param(4, marks=HEAVY), 0.5], ids=str)
def test_they_may_go_on_from_solves_of_their_own(halvings):
    """Of as many steps each, which Python does not know."""
    solver = rvx.Reversible(dfx.Heun(), rvx.Symmetric(halvings_per_step=halvings))

    def loss(y0, num):
        ends = jnp.linspace(0.0, 0.5, 3), jnp.linspace(0.5, 1.0, 3)
        known = dict(adjoint=OURS, solver=solver, dt0=0.1)
        first = dfx.SaveAt(t1=True, solver_state=True)
        begun = solve(y0=y0, t1=ends[0][num], saveat=first, **known)
        times = dict(t0=ends[1][0], t1=ends[1][num], solver_state=begun.solver_state)
        return finite_sum_of_squares(solve(y0=begun.ys[0], **times, **known).ys)

    each = jax.jit(jax.vmap(jax.grad(loss), (0, None)))(STATES, 2)
    total = jax.grad(lambda y0s: jnp.sum(jax.vmap(loss, (0, None))(y0s, 2)))
    assert relative_difference(jax.jit(total)(STATES), each) <= 1e-12


@pytest.mark.parametrize(
    "steps",
    ["saves", *(pytest.param(x, marks=HEAVY) for x in ("multistep", "restarts"))],
)
def test_their_gradient_is_the_direct_one(steps):
    """By what all share, the time of their end among it, and by what each has."""

    def value_and_gradient(adjoint):
        of = lambda args, y0s, t1: total_of(adjoint, y0s, args, t1=t1, **STEPS[steps])
        of = jax.value_and_grad(of, (0, 1, 2))
        arithmetic = STEPS[steps].get("solver", SOLVER).arithmetic
        return jax.jit(of, **quick(adjoint, arithmetic))(ARGS, STATES, jnp.array(1.0))

    (value, ours), (expected, direct) = map(value_and_gradient, (OURS, DIRECT))
    assert abs(value - expected) <= 1e-12 * expected
    assert relative_difference(ours, direct) <= 1e-11


def test_a_time_that_is_known_at_run_time_is_one_number_whatever_happened_to_a_lane():
    zero = jax.jit(jax.vmap(run_time_zero, out_axes=None))
    times = jnp.array([jnp.nan, -jnp.inf, 3.0, -2.0, jnp.inf])
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64):
        assert zero(times.astype(dtype)) == 0
        assert zero(times[:2].astype(dtype)) == -1
    assert zero(jnp.arange(5)) == 0


def test_what_is_mapped_is_found_inside_and_outside_of_transformations():
    noted = []

    @jax.vmap
    def fn(x):
        shared = jax.jit(lambda x: 2 * x)(jnp.ones(3))
        own = jax.lax.fori_loop(0, 3, lambda i, x: x + i, x)
        noted.append([is_mapped(y) for y in (x, own, shared, shared + x[0])])
        return x

    jax.jit(fn)(jnp.ones((4, 3)))
    fn(jnp.ones((4, 3)))
    assert noted == [[True, True, False, True]] * 2
    assert not is_mapped(jnp.ones(3))
