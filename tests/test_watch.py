"""A solve that failed says so, says why, and says first what to do."""

import math
import re

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from detest_problems import PROBLEMS, T1

import reversax as rvx
from reversax._schemes.watch import largest
from reversax._walk import stepping

APART = dfx.RESULTS.nonlinear_divergence
LOST = dfx.RESULTS.nonfinite
PID = dfx.PIDController(rtol=1e-6, atol=1e-9)
SELDOM = rvx.Symmetric(1 / 4)
HEAVY = pytest.mark.heavy
ADJOINTS = {
    "reversible": rvx.ReversibleAdjoint(),
    "checkpointed": dfx.RecursiveCheckpointAdjoint(),
}
SCHEMES = {
    "fixed-point": (SELDOM, rvx.FixedPoint()),
    "floating-point": (SELDOM, rvx.FloatingPoint()),
    "published": (rvx.McCallumFoster(), rvx.FloatingPoint()),
}
IN_FIXED_POINT = ["fixed-point", pytest.param("floating-point", marks=HEAVY)]


def solve(
    rate,
    scheme=(SELDOM, None),
    adjoint=ADJOINTS["reversible"],
    base=dfx.Tsit5(),  # noqa: B008
    field=lambda t, y, rate: -rate * (y - jnp.cos(t)),
    **kwargs,
):
    """`y' = rate*(cos(t) - y)`, in 200 steps of a tenth."""
    defaults = dict(t0=0.0, t1=20.0, dt0=0.1, y0=jnp.array([1.0, 0.5]), max_steps=256)
    run = eqx.filter_jit(dfx.diffeqsolve)
    return run(
        dfx.ODETerm(field), rvx.Reversible(base, *scheme), args=rate, adjoint=adjoint,
        **(defaults | kwargs),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("scheme", "adjoint"),
    [
        pytest.param(scheme, adjoint, marks=[HEAVY] if i + j == 2 else [])
        for i, scheme in enumerate(SCHEMES)
        for j, adjoint in enumerate(ADJOINTS)
    ],
)
def test_twins_driven_apart_in_constant_steps_are_no_success(scheme, adjoint):
    scheme, adjoint = SCHEMES[scheme], ADJOINTS[adjoint]
    solution = solve(10.0, scheme, adjoint, throw=False)
    assert solution.result == APART
    # A quarter of a halving suffices for a rate of 1.73, one in a thousand for none.
    healthy = solve(1.5, adjoint=adjoint, scheme=(SELDOM, scheme[1]), throw=False)
    assert healthy.result == dfx.RESULTS.successful


def test_if_nobody_looks_a_solve_that_blew_up_passes(monkeypatch):
    """So that the test above shows something."""
    monkeypatch.setattr(stepping, "look_sometimes", lambda watch, *_: watch)
    jax.clear_caches()
    solution = solve(4.0, throw=False, t1=12.0)
    jax.clear_caches()
    assert solution.result == dfx.RESULTS.successful
    assert jnp.abs(solution.ys).max() > 10


@pytest.mark.parametrize(
    "name", ["B2", *(pytest.param(x, marks=pytest.mark.heavy) for x in ("A1", "C3"))]
)
def test_the_published_scheme_fails_on_damped_problems_under_a_controller(name):
    """Those of DETEST of which it has returned errors up to 1e73 as a success."""
    kwargs = dict(stepsize_controller=PID, dt0=None, max_steps=1024, t1=T1, throw=False)
    field = lambda t, y, args: PROBLEMS[name].field(t, y)
    y0 = jnp.asarray(PROBLEMS[name].y0)
    published = solve(None, SCHEMES["published"], field=field, y0=y0, **kwargs)
    assert published.result == APART
    # As soon as that: before the twins are a hundredth of the state apart.
    twins = published.stats, published.ys
    assert jnp.abs(twins[1]).max() < 2
    default = solve(None, (), field=field, y0=y0, **kwargs)
    assert default.result == dfx.RESULTS.successful


def number_in(message):
    return float(re.search(r"halvings_per_step=(\d+)", message)[1])


def message_of(*args, **kwargs):
    with pytest.raises(eqx.EquinoxRuntimeError) as error:
        solve(*args, **kwargs)
    # Equinox writes a stack above it.
    text = re.search(r"(Use `|Take |Look at |Give the ).*", str(error.value))[0]
    # At most three sentences, besides where it comes from.
    assert len(re.findall(r"[.](?: |$)", text)) <= 3, text
    return text


@pytest.mark.parametrize("rate", [4.0, pytest.param(10.0, marks=HEAVY), 20.0])
@pytest.mark.parametrize("scheme", IN_FIXED_POINT)
def test_the_halvings_that_a_failed_solve_names_are_enough_and_no_more(rate, scheme):
    """In theory `rate*h/ln(2)`: 0.58, 1.4 and 2.9."""
    _, arithmetic = SCHEMES[scheme]
    message = message_of(rate, SCHEMES[scheme])
    assert message.startswith("Use `reversax.Symmetric(halvings_per_step=")
    assert number_in(message) == np.ceil(rate * 0.1 / np.log(2))
    advised = rvx.Symmetric(int(number_in(message)))
    solution = solve(rate, (advised, arithmetic))
    assert jnp.abs(solution.ys[0, 0] - solution.ys[0, 1]) < 1e-6


def test_steps_that_no_number_of_halvings_suffices_for_are_to_be_shorter():
    """Euler is not stable beyond `h*a = 2`: 2.9 halvings."""
    message = message_of(50.0, t1=40.0, dt0=0.1, max_steps=512)
    share = float(re.search(r"Take steps of at most ([\d.]+) of their", message)[1])
    assert 0.3 < share < 0.8
    shorter = share * 0.1
    steps = int(2 / shorter) + 2
    solve(50.0, (rvx.Symmetric(4),), t1=2.0, dt0=shorter, max_steps=steps)


def test_the_published_scheme_is_told_to_use_the_default():
    message = message_of(10.0, SCHEMES["published"])
    assert message.startswith("Use `coupling=reversax.Symmetric()`, the default")
    assert jnp.isfinite(solve(8.0, ()).ys).all()


GROWING = {
    "square": (lambda t, y, args: 5 * y**2, 64),
    "cube": (lambda t, y, args: y**3, 16),
    "exponential": (lambda t, y, args: jnp.exp(y), 8),
    "linear": (lambda t, y, args: 60 * y, 16),
}


@pytest.mark.parametrize(
    "solver", [dfx.Tsit5, pytest.param(dfx.Heun, marks=HEAVY), dfx.Euler]
)
@pytest.mark.parametrize("field", GROWING)
@pytest.mark.parametrize("coupling", [rvx.Symmetric(), rvx.McCallumFoster()])
def test_a_solution_that_blows_up_is_not_said_to_be_damped(field, solver, coupling):
    vector_field, num_steps = GROWING[field]
    solver = rvx.Reversible(solver(), coupling=coupling)
    with pytest.raises(eqx.EquinoxRuntimeError) as error:
        dfx.diffeqsolve(
            dfx.ODETerm(vector_field),
            solver,
            t0=0.0,
            t1=1.0,
            dt0=1 / num_steps,
            y0=jnp.ones(2),
            adjoint=rvx.ReversibleAdjoint(),
            max_steps=num_steps,
        )
    message = str(error.value)
    assert "damping drove" not in message
    remedies = "growth without bound", "Look at the vector field", "Give the size"
    assert any(remedy in message for remedy in remedies), message


LATE = lambda t, y, args: jnp.where(t > 7.3, jnp.nan, -0.1 * y)


@pytest.mark.parametrize(
    ("scheme", "backwards"),
    [
        ("fixed-point", True),
        ("floating-point", False),
        *(pytest.param("published", x, marks=HEAVY) for x in (True, False)),
    ],
)
def test_a_field_that_returns_no_number_is_said_to_from_its_time_on(scheme, backwards):
    scheme = SCHEMES[scheme]
    kwargs = dict(t0=0.0, t1=20.0, dt0=0.1)
    field = LATE
    if backwards:
        kwargs = dict(t0=20.0, t1=0.0, dt0=-0.1)
        field = lambda t, y, args: jnp.where(t < 7.3, jnp.nan, -0.1 * y)
    message = message_of(None, scheme, field=field, **kwargs)
    assert message.startswith("Look at the vector field: soon after t = ")
    time = float(re.search(r"t = ([\d.]+)", message)[1])
    # It is looked at at every fourth of the 200 steps.
    assert abs(time - 7.3) <= 0.5


@pytest.mark.parametrize("base", [dfx.Tsit5(), dfx.ReversibleHeun()])
def test_a_large_state_that_is_no_number_is_no_success(base):
    """The maximum of 4,096 numbers passes over those that are none, on a CPU."""
    y0 = jnp.ones(4096)
    solution = solve(None, (), base=base, field=LATE, y0=y0, throw=False)
    assert solution.result == LOST


@pytest.mark.parametrize("shape", [(4096,), (64, 64), (2, 4096), (4096, 2)])
def test_the_largest_of_many_is_no_number_if_one_is_none(shape):
    x = jnp.ones(shape).at[1, ...].set(jnp.nan)
    assert jnp.isnan(largest(x)) and largest(jnp.ones(shape)) == 1


@pytest.mark.parametrize("bad", [jnp.inf, pytest.param(jnp.nan, marks=HEAVY)])
def test_a_field_that_returns_no_number_stops_a_controller_with_the_same_words(bad):
    field = lambda t, y, args: jnp.where(t > 7.3, bad, -0.1 * y)
    kwargs = dict(stepsize_controller=PID, dt0=None, max_steps=128, field=field)
    message = message_of(None, (), **kwargs)
    assert message.startswith("Look at the vector field: soon after t = 7.3")
    assert solve(None, (), throw=False, **kwargs).result == LOST


@pytest.mark.parametrize("controller", ["constant", "pid"])
def test_a_state_that_is_too_large_for_its_arithmetic_is_told_how_to_make_room(
    controller,
):
    """`y' = y`, which is 1e5 at 11.5; by a range of `2**17` lost soon afterwards."""
    kwargs = dict(field=lambda t, y, args: y, t1=16.0)
    if controller == "pid":
        pid = dfx.PIDController(rtol=1e-6, atol=1e-9)
        kwargs |= dict(stepsize_controller=pid, dt0=None, max_steps=1024)
    message = message_of(None, (SELDOM, rvx.FixedPoint(1e5)), **kwargs)
    assert message.startswith("Give the size of the state, `reversax.Reversible(")
    assert "larger than 1.3e+05" in message
    time = float(re.search(r"t = ([\d.]+)", message)[1])
    assert 11.0 <= time <= 11.8
    room = rvx.FixedPoint(1e8)
    assert jnp.isfinite(solve(None, (SELDOM, room), **kwargs).ys).all()


HEALTHY = {
    "nothing": (lambda t, y, args: 0 * y, [0.0, 0.0]),
    "a pulse that begins and ends with nothing": (
        lambda t, y, args: jnp.where((t > 2) & (t < 8), jnp.sin(t - 2), 0) - 1.0 * y,
        [0.0, 0.0],
    ),
    "what decays to nothing": (lambda t, y, args: -1.5 * y, [1.0, 1e-3]),
    "one element of no size": (
        lambda t, y, args: jnp.stack([jnp.cos(t), 1e-13 * jnp.sin(9 * t)]),
        [1.0, 0.0],
    ),
    "growth": (lambda t, y, args: 0.5 * y, [1.0, 1e-6]),
}


@pytest.mark.parametrize(
    "base",
    [
        pytest.param(dfx.Euler(), id="Euler"),  # The nearer to the bound.
        pytest.param(dfx.Tsit5(), id="Tsit5", marks=HEAVY),
    ],
)
@pytest.mark.parametrize("scheme", IN_FIXED_POINT)
@pytest.mark.parametrize("problem", HEALTHY)
def test_healthy_solves_are_a_success(problem, scheme, base):
    field, y0 = HEALTHY[problem]
    solution = solve(
        *(None, SCHEMES[scheme]),
        **dict(field=field, y0=jnp.array(y0), base=base, throw=False),
        saveat=dfx.SaveAt(t1=True, solver_state=True),
    )
    assert solution.result == dfx.RESULTS.successful
    # And far from the bound, which is one; Euler by a tenth of a step.
    watch = solution.solver_state.watch
    assert watch.ratio <= (0.5 if base == dfx.Euler() else 1e-3)


def test_a_leaf_that_is_the_round_off_of_others_is_a_success():
    def field(t, y, args):
        x = y["x"]
        turned = jnp.stack([-x[1], x[0]])
        return dict(x=turned, invariant=jnp.dot(x, turned))

    y0 = dict(x=jnp.array([1.0, 0.0]), invariant=jnp.array(0.0))
    solution = solve(None, field=field, y0=y0, throw=False)
    assert solution.result == dfx.RESULTS.successful


def test_each_lane_has_its_own_result():
    rates = jnp.array([1.0, 10.0, 1.5])
    lanes = jax.vmap(lambda rate: solve(rate, throw=False))(rates)
    expected = [False, True, False]
    assert (lanes.result == APART).tolist() == expected
    assert (lanes.result == dfx.RESULTS.successful).tolist() == [
        not x for x in expected
    ]


def test_one_lane_that_fails_raises_with_its_own_number():
    with pytest.raises(Exception, match=r"halvings_per_step=2"):
        jax.block_until_ready(jax.vmap(lambda r: solve(r).ys)(jnp.array([1.0, 10.0])))


def gradient_of_a_sum(rate, adjoint=ADJOINTS["reversible"], batched=None, **kwargs):
    """Of a loss of which the value is not needed for its gradient: a compiler leaves
    out what checks the value."""

    def final(rate):
        return dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, rate: -rate * (y - jnp.cos(t))),
            *(rvx.Reversible(dfx.Tsit5(), SELDOM), 0.0, 20.0),
            **(dict(dt0=0.1, max_steps=256) | kwargs),
            y0=jnp.array([1.0, 0.5]),
            args=rate,
            adjoint=adjoint,
        ).ys.sum()

    if batched == "inside":
        return jax.jit(jax.grad(lambda rates: jax.vmap(final)(rates).sum()))(rate)
    gradient = jax.grad(final)
    return jax.jit(jax.vmap(gradient) if batched == "outside" else gradient)(rate)


FEW_STEPS = dict(max_steps=50)
NO_SHORT_STEPS = dfx.PIDController(1e-13, 1e-13, dtmin=0.05, force_dtmin=False)
LANES = jnp.array([1.0, 4.0])
FAILURES = {
    "too-few-steps": (1.0, FEW_STEPS, "maximum number of solver steps"),
    "steps-too-long": (
        1.0,
        dict(stepsize_controller=NO_SHORT_STEPS),
        "minimum step size was reached",
    ),
    "twins-driven-apart": (4.0, {}, r"halvings_per_step=1"),
    "no-number": (jnp.inf, {}, "Look at the vector field"),
    "one-lane": (LANES, dict(batched="inside"), r"halvings_per_step=1"),
    "one-gradient": (LANES, dict(batched="outside"), r"halvings_per_step=1"),
    "unchecked": (
        1.0,
        FEW_STEPS | dict(adjoint=rvx.ReversibleAdjoint(round_trip_tolerance=math.inf)),
        "maximum number of solver steps",
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_the_gradient_of_a_solve_that_failed_raises_where_its_value_is_not_needed(
    failure,
):
    rate, kwargs, message = FAILURES[failure]
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(gradient_of_a_sum(rate, **kwargs))


def test_the_gradient_of_a_solve_that_was_cut_short_is_had_with_throw_false():
    """Of as many steps as were made."""
    found = gradient_of_a_sum(1.0, throw=False, **FEW_STEPS)
    direct = gradient_of_a_sum(1.0, dfx.DirectAdjoint(), throw=False, **FEW_STEPS)
    assert abs(found - direct) <= 1e-13 * abs(direct)
    # Of which the check is left out too, so that the tests above show something.
    assert gradient_of_a_sum(1.0, dfx.DirectAdjoint(), **FEW_STEPS) == direct


def test_measuring_the_round_trip_of_a_solve_that_failed_says_what_to_do():
    term = dfx.ODETerm(lambda t, y, args: -4.0 * (y - jnp.cos(t)))
    solver = rvx.Reversible(dfx.Tsit5(), SELDOM)
    with pytest.raises(
        eqx.EquinoxRuntimeError, match=r"halvings_per_step=1.*round_trip_error\("
    ):
        rvx.round_trip_error(term, solver, 0.0, 20.0, 0.1, jnp.ones(2))
