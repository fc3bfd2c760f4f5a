"""Symmetric multistep methods: one evaluation a step, undone to the bit.

The oracle of a gradient is direct differentiation of the same method in floating point,
whose values are those of fixed point up to round-off.
"""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from helpers import (
    flat,
    heavy,
    in_cells,
    network_field,
    relative_difference,
)
from multistep_method import (
    ARGS,
    ARITHMETICS,
    DIRECT,
    OURS,
    SAVED,
    T1,
    Y0,
    differentiated,
    method,
    solve,
)

import reversax as rvx
from reversax._schemes import multistep

pytestmark = pytest.mark.usefixtures("ring_of_any_size")
CELLS = [(str(k), a, s) for k in (4, 6) for a in ARITHMETICS for s in SAVED]
DAILY = {("6", "fixed-point", "ts")}


@pytest.mark.parametrize(("order", "arithmetic", "saved"), in_cells(CELLS, DAILY))
def test_gradients_are_those_of_direct_differentiation(order, arithmetic, saved):
    """With a correction at the last of 40 steps."""
    ours = method(int(order), arithmetic)
    value, gradient = differentiated(ours, 40, OURS, saved)
    oracle = method(int(order), "floating-point")
    expected, expected_gradient = differentiated(oracle, 40, DIRECT, saved)
    assert abs(value - expected) < 1e-12 * abs(expected)
    assert relative_difference(gradient, expected_gradient) < 1e-11


@pytest.mark.parametrize(
    "num", [3, *[pytest.param(n, marks=pytest.mark.heavy) for n in (1, 2, 4, 5, 6, 7)]]
)
def test_of_few_steps_the_starter_makes_the_first_or_all(num):
    value, gradient = differentiated(method(6), num, OURS)
    oracle = dfx.Tsit5() if num <= 5 else method(6, "floating-point")
    expected, expected_gradient = differentiated(oracle, num, DIRECT)
    assert abs(value - expected) < 1e-12 * abs(expected)
    assert relative_difference(gradient, expected_gradient) < 1e-11


def test_of_a_single_step_the_dense_output_is_cubic():
    at = jnp.array([0.1, 0.3])
    ours = solve(method(6), 1, t1=0.4, saveat=dfx.SaveAt(ts=at)).ys
    plain = solve(dfx.Tsit5(), 1, t1=0.4, adjoint=DIRECT).ys[-1]
    slope = lambda t, y: 0.4 * network_field(t, y, ARGS)
    cubic = dfx.ThirdOrderHermitePolynomialInterpolation(
        t0=0.0, t1=0.4, y0=Y0, y1=plain, k0=slope(0.0, Y0), k1=slope(0.4, plain)
    )
    assert jnp.max(jnp.abs(ours - jax.vmap(cubic.evaluate)(at))) < 1e-14


@pytest.mark.heavy
@pytest.mark.parametrize("order", [4, 6])
def test_the_gradient_of_a_thousand_steps_is_exact(order):
    _, gradient = differentiated(method(order, every=16), 1000, OURS)
    oracle = method(order, "floating-point", every=16)
    _, expected = differentiated(oracle, 1000, DIRECT)
    assert relative_difference(gradient, expected) < 1e-11


@pytest.mark.heavy
def test_a_million_steps_have_the_gradient_of_the_exact_solution_and_a_meter(capfd):
    """Of a pendulum over 150 swings; both passes are shown."""
    field = lambda t, y, args: jnp.stack([y[1], -args * jnp.sin(y[0])])
    meter = dfx.TextProgressMeter(0.1)

    def loss(args, y0, solver, num, **known):
        times = 0.0, 1000.0, 1000.0 / num
        term = dfx.ODETerm(field)
        return jnp.sum(
            dfx.diffeqsolve(term, solver, *times, y0, args, max_steps=num, **known).ys
            ** 2
        )

    def gradient(*how, **known):
        of = jax.grad(lambda a, y: loss(a, y, *how, **known), argnums=(0, 1))
        return eqx.filter_jit(of)(1.0, jnp.array([1.0, 0.0]))

    adjoint = rvx.ReversibleAdjoint(progress_meter=meter)
    ours = gradient(method(6), 1_000_000, adjoint=adjoint, progress_meter=meter)
    jax.block_until_ready(ours)
    assert capfd.readouterr().out.count("100.00%") == 2
    exact = gradient(dfx.Dopri8(), 20_000)
    # Dopri8's round-off adds up: at 20,000 steps it is off by 1.3e-9 of what
    # reversible methods agree on to 1e-11, at 80,000 by three times as much.
    assert relative_difference(ours, exact) < 1e-8


def test_a_solve_is_undone_to_the_bit():
    term = dfx.ODETerm(network_field)
    measure = jax.jit(
        lambda y0: rvx.round_trip_error(
            *(term, method(6), 0.0, T1, T1 / 100, y0, ARGS), max_steps=128
        )
    )
    error, num_steps = measure(Y0)
    assert num_steps == 100 and jnp.all(flat(error) == 0)


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("num", [50, pytest.param(80, marks=pytest.mark.heavy)])
def test_derivatives_have_the_same_bits_whichever_move_found_them(num):
    """Those that a window begins with, and the same found again at its first steps: by
    a function of more than the field they were off by a bit, for some lengths of step,
    and the way back was refused."""
    known = dict(max_steps=num, adjoint=OURS)

    def loss(y0):
        times = 0.0, 1.0, 1 / num
        term = dfx.ODETerm(network_field)
        return jnp.sum(dfx.diffeqsolve(term, method(4), *times, y0, ARGS, **known).ys)

    assert jnp.all(jnp.isfinite(jax.jit(jax.grad(loss))(Y0)))


@pytest.mark.heavy
def test_a_gradient_has_the_same_bits_if_nothing_is_worth_keeping(monkeypatch):
    """Evaluated again from the same numbers, residuals are the same."""
    kept = differentiated(method(6), 40, OURS, "ts")
    monkeypatch.setattr(multistep, "WORTH_KEEPING", 2**31)
    jax.clear_caches()  # Of the same solve.
    found_again = differentiated(method(6), 40, OURS, "ts")
    assert jnp.array_equal(flat(kept), flat(found_again))


def test_lanes_have_their_own_lengths():
    y0s, t1s = jnp.stack([Y0, -Y0, 2 * Y0]), jnp.array([0.12, 1.0, 1.7])

    def loss(args, solver, adjoint):
        def one(y0, t1):
            known = dict(adjoint=adjoint, max_steps=40)
            term = dfx.ODETerm(network_field)
            # Of 3 steps, 25 and 43/... the dt0 of each divides its own time.
            dt0 = t1 / jnp.round(t1 / 0.05)
            return dfx.diffeqsolve(term, solver, 0.0, t1, dt0, y0, args, **known).ys

        return jnp.sum(jax.vmap(one)(y0s, t1s) ** 2)

    gradient = eqx.filter_jit(jax.grad(lambda a: loss(a, method(4), OURS)))(ARGS)
    plain = method(4, "floating-point")
    oracle = eqx.filter_jit(jax.grad(lambda a: loss(a, plain, DIRECT)))(ARGS)
    assert relative_difference(gradient, oracle) < 1e-11


@pytest.mark.heavy
def test_a_lane_that_is_done_has_no_part_in_what_the_others_evaluate():
    """Of a field that is not defined where no solution goes: zero times NaN is NaN."""
    t1s = jnp.array([0.2, 2.0])

    def loss(args, solver, adjoint):
        def one(t1):
            known = dict(adjoint=adjoint, max_steps=40)
            term = dfx.ODETerm(lambda t, y, args: args * jnp.sqrt(y - 0.99))
            return dfx.diffeqsolve(term, solver, 0, t1, 0.05, 1.0, args, **known).ys

        return jnp.sum(jax.vmap(one)(t1s) ** 2)

    gradient = jax.jit(jax.grad(lambda a: loss(a, method(6), OURS)))(0.7)
    plain = method(6, "floating-point")
    oracle = jax.jit(jax.grad(lambda a: loss(a, plain, DIRECT)))(0.7)
    assert abs(gradient - oracle) < 1e-11 * abs(oracle)


def test_steps_are_made_equal():
    """Where `dt0` does not divide the time: 67 steps of 2/67, not of 0.03."""
    known = dict(max_steps=67, saveat=dfx.SaveAt(steps=True, t0=True))
    solution = dfx.diffeqsolve(
        *(dfx.ODETerm(network_field), method(4), 0.0, T1, 0.03, Y0, ARGS),
        adjoint=OURS,
        **known,
    )
    ts = np.asarray(solution.ts)
    assert np.allclose(np.diff(ts), 2 / 67, atol=1e-15)
    exact = dfx.diffeqsolve(
        *(dfx.ODETerm(network_field), dfx.Dopri8(), 0.0, T1, 2 / 134, Y0, ARGS),
        saveat=dfx.SaveAt(ts=ts),
    )
    # What the method is off by.
    assert jnp.max(jnp.abs(solution.ys - exact.ys)) < 1e-4


def test_time_may_run_backwards_and_fields_be_trees():
    field = lambda t, y, args: (args * jnp.cos(t) * y[1], -args * y[0])

    def loss(args, solver, adjoint):
        y0 = jnp.array([1.0]), jnp.array([0.3])
        known = dict(adjoint=adjoint, max_steps=32)
        times = 2.0, 0.5, -1.5 / 24
        ys = dfx.diffeqsolve(dfx.ODETerm(field), solver, *times, y0, args, **known).ys
        return jnp.sum(ys[0] ** 2) + jnp.sum(ys[1])

    of = lambda s, a: eqx.filter_jit(jax.value_and_grad(lambda x: loss(x, s, a)))(1.3)
    value, gradient = of(method(6, "floating-point"), OURS)
    expected, oracle = of(method(6, "floating-point"), DIRECT)
    exact, _ = of(dfx.Dopri8(), DIRECT)
    assert abs(value - exact) < 1e-5
    assert abs(value - expected) < 1e-13 and abs(gradient - oracle) < 1e-12


class Wave(dfx.AbstractPath):
    """A smooth one."""

    t0: float = 0.0
    t1: float = 1.0

    def evaluate(self, t0, t1=None, left=True):
        at = lambda t: jnp.sin(3 * t)[None]
        return at(t0) if t1 is None else at(t1) - at(t0)

    def derivative(self, t, left=True):
        return 3 * jnp.cos(3 * t)[None]


@pytest.mark.heavy
def test_a_controlled_equation_is_solved_as_an_ordinary_one():
    field = lambda t, y, args: jnp.cos(args * y)[:, None]
    term = dfx.ControlTerm(field, Wave()).to_ode()

    def loss(args, solver, adjoint):
        known = dict(adjoint=adjoint, max_steps=64)
        return jnp.sum(
            dfx.diffeqsolve(term, solver, 0.0, 1.0, 1 / 64, Y0[0], args, **known).ys
        )

    of = lambda s, a: eqx.filter_jit(jax.grad(lambda x: loss(x, s, a)))(1.3)
    gradient = of(method(4, "floating-point"), OURS)
    assert abs(gradient - of(method(4, "floating-point"), DIRECT)) < 1e-12
    # What the method is off by, of order 4 in 64 steps.
    assert abs(gradient - of(dfx.Tsit5(), DIRECT)) < 2e-4


@pytest.mark.heavy
def test_the_time_of_an_event_is_differentiated():
    crosses = lambda t, y, args, **kwargs: y[0, 0] + 0.9
    event = dfx.Event(crosses, optx.Newton(1e-12, 1e-12))

    def time(args, solver, num, adjoint):
        known = dict(event=event, adjoint=adjoint, max_steps=num)
        return solve(solver, num, Y0, args, 4.0, **known).ts[-1]

    args = jax.tree.map(lambda x: 0.5 * x, ARGS)
    ours = eqx.filter_jit(jax.value_and_grad(lambda a: time(a, method(6), 128, OURS)))
    exact = eqx.filter_jit(
        jax.value_and_grad(lambda a: time(a, dfx.Dopri8(), 64, DIRECT))
    )
    (found, gradient), (expected, oracle) = ours(args), exact(args)
    assert 0.1 < expected < 3.9
    # The error of the method at these steps.
    assert abs(found - expected) < 1e-6
    assert relative_difference(gradient, oracle) < 1e-5


def test_a_solve_may_go_on_from_another():
    saved = dfx.SaveAt(t1=True, solver_state=True)
    first = solve(method(6), 100, saveat=saved)
    term = dfx.ODETerm(network_field)
    second = dfx.diffeqsolve(
        *(term, method(6), T1, 2 * T1, T1 / 100, first.ys[-1], ARGS),
        solver_state=first.solver_state,
        adjoint=OURS,
    )
    exact = solve(dfx.Dopri8(), 100, t1=2 * T1, adjoint=DIRECT).ys
    assert jnp.max(jnp.abs(second.ys - exact)) < 1e-6
    # Diffrax's adjoints go on with the window.
    third = dfx.diffeqsolve(
        *(term, method(6), T1, 2 * T1, T1 / 100, first.ys[-1], ARGS),
        solver_state=first.solver_state,
    )
    whole = solve(method(6), 200, t1=2 * T1)
    assert jnp.max(jnp.abs(third.ys - whole.ys)) < 1e-13


@pytest.mark.heavy
def test_under_the_adjoints_of_diffrax_a_solve_in_two_parts_is_that_in_one():
    term, solver = dfx.ODETerm(network_field), method(6, "floating-point")
    saved = dfx.SaveAt(t1=True, solver_state=True)
    run = lambda t0, t1, y0, state: dfx.diffeqsolve(
        *(term, solver, t0, t1, 1 / 32, y0, ARGS), saveat=saved, solver_state=state
    )
    first = run(0.0, 1.0, Y0, None)
    second = run(1.0, 2.0, first.ys[-1], first.solver_state)
    whole = run(0.0, 2.0, Y0, None)
    assert jnp.max(jnp.abs(second.ys - whole.ys)) < 1e-14


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("every", [16, *heavy(None)])
def test_memory_grows_by_the_corrections_alone(every):
    term = dfx.ODETerm(lambda t, y, args: -y)

    def compiled(num):
        def loss(y0):
            times = 0.0, 1.0, 1 / num
            known = dict(adjoint=OURS, max_steps=num)
            solver = method(4, every=every)
            return jnp.sum(dfx.diffeqsolve(term, solver, *times, y0, **known).ys)

        program = jax.jit(jax.grad(loss))
        return program.lower(Y0).compile().memory_analysis().temp_size_in_bytes

    grown = compiled(4096) - compiled(64)
    if every is None:
        assert grown == 0
    else:
        # A word of an element at every 16 steps; and what rounds these up.
        assert abs(grown - Y0.size * 4 * (4096 - 64) // 16) <= 256


@pytest.mark.heavy
def test_second_derivatives_are_those_of_direct_differentiation():
    restart = rvx.ReversibleAdjoint(restart_every=8)

    def loss(x, solver, adjoint):
        return jnp.sum(solve(solver, 24, x * Y0, adjoint=adjoint).ys ** 2)

    def second(solver, adjoint):
        of = jax.grad(lambda x: loss(x, solver, adjoint))
        return eqx.filter_jit(lambda x: jax.jvp(of, (x,), (1.0,))[1])(jnp.asarray(1.0))

    ours = second(method(4), restart)
    oracle = second(method(4, "floating-point"), DIRECT)
    assert abs(ours - oracle) < 1e-9 * abs(oracle)
