"""Solves that are taken up again, that fail, and that report how far they are: every
gradient against direct differentiation of the same scheme."""

from itertools import pairwise

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SCHEMES, finite_sum_of_squares, relative_difference
from programs import ARGS, DIRECT, OURS, PID, Y0, agree, solve

import reversax as rvx

DEFAULT = rvx.Reversible(dfx.Heun())
STATES = dfx.SaveAt(t1=True, solver_state=True, controller_state=True, made_jump=True)


def resumed(adjoint, y0, args, first, second, *, controller=True, **kwargs):
    """A solve of what `first` says, taken up again with `second`."""
    before = solve(adjoint, y0, args, saveat=STATES, **(kwargs | first))
    states = dict(solver_state=before.solver_state, made_jump=before.made_jump)
    if controller:
        states |= dict(controller_state=before.controller_state)
    y1 = before.ys[-1]
    return solve(adjoint, y1, args, saveat=STATES, **states, **(kwargs | second)).ys


STEPS = jnp.array([0.0, 0.07, 0.2, 0.33, 0.5, 0.55, 0.7, 0.81, 1.0])
FIRST, SECOND = dict(t0=0.0, t1=0.5), dict(t0=0.5, t1=1.0)
step_to = lambda ts: dict(dt0=None, stepsize_controller=dfx.StepTo(ts))
# As one solve, and in two parts. (The state of `StepTo` is a place in its own `ts`.)
PARTS = {
    "constant": (dict(dt0=1 / 32), FIRST, SECOND, True),
    "constant-begun-afresh": (dict(dt0=1 / 32), FIRST, SECOND, False),
    "step-to": (
        step_to(STEPS),
        FIRST | step_to(STEPS[:5]),
        SECOND | step_to(STEPS[4:]),
        False,
    ),
}


@pytest.mark.parametrize(
    ("parts", "scheme"),
    [
        pytest.param(parts, scheme, marks=pytest.mark.heavy)
        for parts in PARTS
        for scheme in SCHEMES
    ],
)
def test_a_solve_in_two_parts_is_that_in_one(parts, scheme):
    """The same bits, and the gradient of the whole, through the state handed over."""
    whole, first, second, controller = PARTS[parts]
    kwargs = dict(solver=rvx.Reversible(dfx.Heun(), *SCHEMES[scheme]))

    @jax.jit
    @jax.value_and_grad
    def in_one(p):
        return jnp.sum(jnp.sin(solve(DIRECT, *p, **kwargs, **whole).ys))

    @jax.jit
    @jax.value_and_grad
    def in_two(p):
        kw = dict(controller=controller, **kwargs, **(whole if "dt0" in whole else {}))
        return jnp.sum(jnp.sin(resumed(OURS, *p, first, second, **kw)))

    (value, ours), (expected, direct) = in_two((Y0, ARGS)), in_one((Y0, ARGS))
    assert value == expected
    # Measured between direct differentiation of one and of two: 1e-16.
    assert relative_difference(ours, direct) <= 1e-13


@pytest.mark.parametrize(
    "clip",
    [dict(), pytest.param(dict(jump_ts=[0.3, 0.5]), marks=pytest.mark.heavy)],
    ids=["pid", "jump-ts"],
)
def test_an_adaptive_solve_is_taken_up_with_its_controller(clip):
    pid = dfx.PIDController(rtol=1e-3, atol=1e-3, pcoeff=0.3, icoeff=0.4)
    if clip:
        pid = dfx.ClipStepSizeController(pid, **clip)
    # The first steps are too long and are rejected.
    kwargs = dict(stepsize_controller=pid, dt0=0.5)
    second = SECOND | dict(dt0=0.1)
    loss = lambda adjoint, p: jnp.sum(
        jnp.sin(resumed(adjoint, *p, FIRST, second, **kwargs))
    )
    agree(loss, (Y0, ARGS))


def test_the_state_handed_over_is_differentiated():
    """Of the solve taken up alone: in the other twin, which is not `y0`."""
    before = solve(DIRECT, saveat=STATES, solver=DEFAULT, **FIRST)
    scheme = DEFAULT.scheme
    diff, rest = eqx.partition(before.solver_state, eqx.is_inexact_array)

    def loss(adjoint, p):
        y1, diff = p
        state = eqx.combine(diff, rest)
        after = solve(
            adjoint, y1, saveat=STATES, solver=DEFAULT, solver_state=state, **SECOND
        )
        other = scheme.decode(after.solver_state.codes)[1]
        return jnp.sum(jnp.sin(after.ys)) + jnp.sum(other**2)

    agree(loss, (before.ys[-1], diff), arithmetic=rvx.FixedPoint())


# What ends the solve of `y' = k*y**2`, infinite at 1/(k*y0), before its time.
FAILURES = {
    "max-steps": (
        dict(stepsize_controller=PID, dt0=1.4),
        dfx.RESULTS.max_steps_reached,
    ),
    "dt-min": (
        dict(
            stepsize_controller=dfx.PIDController(
                rtol=1e-3, atol=1e-3, dtmin=2e-3, force_dtmin=False
            ),
            dt0=0.02,
        ),
        dfx.RESULTS.dt_min_reached,
    ),
}


def to_infinity(adjoint, p, **kwargs):
    y0, rate = p
    defaults = dict(
        solver=DEFAULT, t1=1.5, dt0=0.05, max_steps=64, throw=False,
        saveat=dfx.SaveAt(ts=jnp.array([0.1, 0.15, 1.0]), t0=True, steps=5, t1=True),
        field=lambda t, y, rate: rate * y**2,
    )  # fmt: skip
    return solve(adjoint, y0, rate, **(defaults | kwargs))


EXPLOSIVE = jnp.array([1.0, 0.1]), jnp.array(5.0)


@pytest.mark.parametrize(
    "name", ["dt-min", pytest.param("max-steps", marks=pytest.mark.heavy)]
)
def test_a_solve_that_failed_has_the_gradient_of_what_it_did(name):
    kwargs, expected = FAILURES[name]

    @eqx.filter_jit
    @eqx.filter_value_and_grad(has_aux=True)
    def loss(p, adjoint):
        solution = to_infinity(adjoint, p, **kwargs)
        return finite_sum_of_squares(solution.ys), (solution.result, solution.ts)

    (value, (result, ts)), ours = loss(EXPLOSIVE, OURS)
    (direct_value, (direct_result, direct_ts)), direct = loss(EXPLOSIVE, DIRECT)
    assert result == direct_result == expected
    assert jnp.isfinite(ts).sum() > 3, "it did nothing"
    np.testing.assert_allclose(ts, direct_ts, rtol=1e-13)
    assert abs(value - direct_value) <= 1e-13 * direct_value
    # Where a solution grows without bound its derivatives do so faster.
    assert relative_difference(ours, direct) <= 1e-11


def test_a_lane_that_overflows_leaves_the_others_their_gradient():
    """Its own is not finite: neither is that of direct differentiation."""
    rates = jnp.array([0.5, 5.0])

    @eqx.filter_jit
    def lanes(adjoint):
        @eqx.filter_value_and_grad(has_aux=True)
        def loss(rate):
            solution = to_infinity(adjoint, (EXPLOSIVE[0], rate))
            return finite_sum_of_squares(solution.ys), solution.result

        return eqx.filter_vmap(loss)(rates)

    (_, result), ours = lanes(OURS)
    (_, direct_result), direct = lanes(DIRECT)
    for each in (result, direct_result):
        assert (each == dfx.RESULTS.successful).tolist() == [True, False]
        # Its steps are too long for the singularity, which parts the twins.
        apart = dfx.RESULTS.nonlinear_divergence
        assert (each == apart).tolist() == [False, True]
    assert abs(ours[0] - direct[0]) <= 1e-12 * abs(direct[0])
    assert jnp.isnan(ours[1]) and jnp.isnan(direct[1])


@pytest.mark.heavy
def test_lanes_of_very_different_stiffness_of_which_one_runs_out_of_steps():
    """1, 200 and 4000: the first takes a few steps, the last does not arrive."""
    rates = jnp.array([1.0, 200.0, 4000.0])

    @eqx.filter_jit
    @eqx.filter_value_and_grad(has_aux=True)
    def total(rates, adjoint):
        def one(rate):
            field = lambda t, y, rate: rate * (jnp.cos(3 * t) - y)
            solution = solve(
                adjoint, jnp.array([0.0, 2.0]), rate, field, solver=DEFAULT, t1=0.2,
                stepsize_controller=PID, dt0=None, max_steps=400, throw=False,
            )  # fmt: skip
            return solution.ys, solution.result, solution.stats["num_steps"]

        ys, *aux = eqx.filter_vmap(one)(rates)
        return finite_sum_of_squares(ys), aux

    (value, (result, num_steps)), ours = total(rates, OURS)
    (expected, _), direct = total(rates, DIRECT)
    reached = result == dfx.RESULTS.max_steps_reached
    assert reached.tolist() == [False, False, True]
    assert num_steps[0] < 20 and 40 < num_steps[1] < 400 == num_steps[2]
    assert abs(value - expected) <= 1e-13 * expected
    # Contraction magnifies round-off in the derivative of the fast lanes.
    assert jnp.max(jnp.abs(ours - direct) / jnp.abs(direct)) <= 1e-9


def percentages(captured):
    """What meters printed, as numbers, each meter's from its own 0 on."""
    jax.effects_barrier()
    lines = captured.readouterr().out.split()
    assert all(line.endswith("%") for line in lines), lines
    numbers = [float(line[:-1]) for line in lines]
    starts = [i for i, x in enumerate(numbers) if x == 0]
    return [numbers[i:j] for i, j in pairwise([*starts, len(numbers)])]


def is_complete(numbers):
    """From 0 to 100, upwards, often enough to be of use and not at every step."""
    assert numbers[0] == 0 and numbers[-1] == 100, numbers
    assert numbers == sorted(set(numbers)), numbers
    return 20 <= len(numbers) <= 52


METER = dfx.TextProgressMeter()
BATCHING = {"one": lambda f: f, "vmap": lambda f: jax.vmap(f)}


def measured(adjoint, batching, **kwargs):
    """A gradient over 200 steps, shown by the meters."""
    kwargs = dict(dt0=0.005, max_steps=256, solver=DEFAULT) | kwargs
    many = BATCHING[batching](lambda y0: solve(adjoint, y0, ARGS, **kwargs).ys)
    return jax.jit(jax.grad(lambda y0: jnp.sum(jnp.sin(many(y0)))))(Y0)


@pytest.mark.heavy
def test_a_meter_shows_how_far_a_differentiated_solve_is(capsys):
    gradient = measured(OURS, "one", progress_meter=METER)
    (forward,) = percentages(capsys)
    assert is_complete(forward)
    # It leaves the gradient alone.
    assert relative_difference(gradient, measured(OURS, "one")) <= 1e-13


@pytest.mark.parametrize(
    ("batching", "adaptive"),
    [
        ("vmap", True),
        pytest.param("one", False, marks=pytest.mark.heavy),
        pytest.param("one", True, marks=pytest.mark.heavy),
        pytest.param("vmap", False, marks=pytest.mark.heavy),
    ],
)
def test_a_meter_of_the_adjoint_shows_how_far_the_way_back_is(
    batching, adaptive, capsys
):
    adjoint = rvx.ReversibleAdjoint(progress_meter=METER)
    pid = dfx.PIDController(rtol=1e-7, atol=1e-7)
    kwargs = dict(stepsize_controller=pid, max_steps=4096) if adaptive else dict()
    gradient = measured(adjoint, batching, **kwargs)
    (backward,) = percentages(capsys)
    assert is_complete(backward)
    without = measured(rvx.ReversibleAdjoint(), batching, **kwargs)
    assert percentages(capsys) == []
    assert relative_difference(gradient, without) <= 1e-13
    # Nothing is shown of a solve that is not differentiated.
    solve(adjoint)
    assert percentages(capsys) == []


@pytest.mark.heavy
def test_both_ways_may_be_shown(capsys):
    adjoint = rvx.ReversibleAdjoint(progress_meter=METER)
    gradient = measured(adjoint, "one", progress_meter=METER)
    forward, backward = percentages(capsys)
    assert is_complete(forward) and is_complete(backward)
    # And left alone is the gradient.
    assert relative_difference(gradient, measured(OURS, "one")) <= 1e-13


@pytest.mark.parametrize("meter", [None, True, dfx.TextProgressMeter], ids=repr)
def test_a_meter_that_is_none_is_refused(meter):
    with pytest.raises(
        TypeError, match=r"progress meter.*ReversibleAdjoint\(progress_meter="
    ):
        rvx.ReversibleAdjoint(progress_meter=meter)


def test_no_meter_is_the_default():
    assert isinstance(rvx.ReversibleAdjoint().progress_meter, dfx.NoProgressMeter)
