"""Events end a solve early: every case against direct differentiation.

The gradient is that of the final state and of the time of the event, in the initial
state, in `args`, and in what the functions of the event close over.
"""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
import pytest
from helpers import FEATURES_IN, SCHEMES, finite_sum_of_squares, in_cells, quick
from programs import DIRECT, OURS, agree_in_each_entry

import reversax as rvx

# Of which the interpolation has a curvature, unlike that of Heun.
SOLVER = rvx.Reversible(dfx.Bosh3(), *SCHEMES[FEATURES_IN])
NEWTON, BISECTION = optx.Newton(1e-12, 1e-12), optx.Bisection(1e-13, 1e-13)
PID = dfx.PIDController(rtol=1e-3, atol=1e-3)


def pendulum(t, y, args):
    """Driven, damped: its angle falls below 0.6 at 0.85, its speed below -1.1 later."""
    strength, damping = args
    force = -strength * jnp.sin(y[0]) - damping * y[1] + 0.1 * jnp.sin(t)
    return jnp.stack([y[1], force])


AT = dict(
    y0=jnp.array([1.0, 0.2]),
    args=(jnp.array(2.0), jnp.array(0.1)),
    level=jnp.array(0.3),
)


def run(adjoint, p, event, **kwargs):
    """A solve of the pendulum up to `event(p)`."""
    defaults = dict(
        terms=dfx.ODETerm(pendulum), solver=SOLVER, t0=0.0, t1=3.0, dt0=0.1,
        max_steps=64, y0=p["y0"], args=p["args"], event=event(p),
    )  # fmt: skip
    return dfx.diffeqsolve(**(defaults | kwargs), adjoint=adjoint)


def value_and_gradient(run, adjoint, at, arithmetic):
    """Of a loss of the times and states saved; with what says how the solve ended."""

    @eqx.filter_value_and_grad(has_aux=True)
    def of(p):
        solution = run(adjoint, p)
        end = solution.ts, solution.ys, solution.event_mask, solution.result
        return finite_sum_of_squares((solution.ts, solution.ys)), end

    return eqx.filter_jit(of, **quick(adjoint, arithmetic))(at)


def agree(run, at=AT, bound=1e-12, arithmetic=SOLVER.arithmetic):
    """`run(adjoint, p)` gives a solution that ends in the same way under both adjoints,
    and whose times and states have the same gradient, in each entry of `p`.

    Returns the end of the solution, `ts, ys, event_mask, result`, and the gradient.
    Measured between Diffrax's own two adjoints: up to 6e-15."""
    (value, end), ours = value_and_gradient(run, OURS, at, arithmetic)
    (expected, expected_end), direct = value_and_gradient(run, DIRECT, at, arithmetic)
    assert abs(value - expected) <= 1e-12 * max(1.0, abs(expected))
    assert eqx.tree_equal(end[2:], expected_end[2:])
    agree_in_each_entry(ours, direct, bound)
    return end, ours


def falls_to_the_level(p, root_finder=NEWTON, direction=None):
    """A function that depends on `args` and closes over a parameter."""
    real = lambda t, y, args, **kwargs: y[0] - p["level"] * args[0]
    return dfx.Event(real, root_finder, direction)


def is_below_the_level(p, root_finder=NEWTON):
    is_below = lambda t, y, args, **kwargs: y[0] < p["level"] * args[0]
    return dfx.Event(is_below, root_finder)


def field_changes_its_sign(p):
    """A function of the vector field, whose own parameters are differentiated too."""

    def force(t, y, args, *, terms, solver, **kwargs):
        return solver.func(terms, t, y, args)[1] + p["level"]

    return dfx.Event(force, NEWTON)


EVENTS = {
    "newton": falls_to_the_level,
    "bisection": lambda p: falls_to_the_level(p, BISECTION),
    "falling": lambda p: falls_to_the_level(p, direction=False),
    "of-the-field": field_changes_its_sign,
    "boolean": is_below_the_level,
    "no-root-finder": lambda p: falls_to_the_level(p, None),
    "boolean-no-root-finder": lambda p: is_below_the_level(p, None),
}
FOUND = ("newton", "bisection", "falling", "of-the-field")  # Between steps.
STEPPING = {
    "constant": dict(),
    "constant-to-infinity": dict(t1=jnp.inf),
    "pid": dict(stepsize_controller=PID, dt0=None),
    # The first steps are too long and are rejected.
    "pid-to-infinity": dict(stepsize_controller=PID, dt0=1.0, t1=jnp.inf),
}
# (A root between constant steps is daily where its output is looked at, below.)
DAILY = [
    ("of-the-field", "pid-to-infinity"),
]


@pytest.mark.parametrize(
    ("event", "stepping"),
    in_cells([(event, stepping) for event in EVENTS for stepping in STEPPING], DAILY),
)
def test_state_and_time_of_an_event_are_differentiated(event, stepping):
    of_event = lambda adjoint, p: run(adjoint, p, EVENTS[event], **STEPPING[stepping])
    (ts, ys, mask, result), gradient = agree(of_event)
    assert mask and result == dfx.RESULTS.event_occurred
    above = ys[-1, 0] - 0.6
    if event == "of-the-field":
        above = pendulum(ts[-1], ys[-1], AT["args"])[1] + 0.3
    # The root is found to 1e-12; else the solve ends with a step, beyond the level.
    assert abs(above) < 1e-11 if event in FOUND else above < -1e-3
    # A solve that ends with a step does not depend on where in the step the event is.
    assert (gradient["level"] != 0) == (event in FOUND)


def test_lanes_with_an_event_without_one_and_with_one_at_the_start():
    """Two functions, of which one lane begins where the second is true already."""

    def either(p):
        is_fast = lambda t, y, args, **kwargs: y[1] > 2.5
        conditions = dict(falls=falls_to_the_level(p).cond_fn, fast=[is_fast])
        return dfx.Event(conditions, NEWTON, dict(falls=False, fast=[None]))

    def lanes(adjoint, p):
        saveat = dfx.SaveAt(ts=jnp.array([0.3, 0.84, 0.86, 2.0]), t1=True)
        one = lambda y0: run(adjoint, p | dict(y0=y0), either, saveat=saveat)
        return jax.vmap(one)(p["y0"])

    y0 = jnp.array([[1.0, 0.2], [1.0, -0.8], [-0.1, 0.3], [1.0, 2.6]])
    (ts, _, mask, result), _ = agree(lanes, AT | dict(y0=y0))
    assert mask["falls"].tolist() == [True, True, False, False]
    assert mask["fast"][0].tolist() == [False, False, False, True]
    occurred = result == dfx.RESULTS.event_occurred
    assert occurred.tolist() == [True, True, False, True]
    assert jnp.isfinite(ts).sum(axis=1).tolist() == [3, 2, 5, 1]
    assert ts[2, -1] == 3.0 and ts[3, 0] == 0.0


@pytest.mark.parametrize(
    "root_finder",
    [NEWTON, pytest.param(None, marks=pytest.mark.heavy)],
    ids=["newton", "none"],
)
@pytest.mark.parametrize(
    "steps", [pytest.param(n, marks=pytest.mark.heavy) for n in (4, 0, 1, 3)]
)
def test_what_would_be_saved_after_the_event_is_not(steps, root_finder):
    """The event is in the ninth step, which `steps=3` and `steps=1` save."""
    times = jnp.array([0.0, 0.31, 0.62, 0.84, 0.86, 2.0])
    saveat = dfx.SaveAt(ts=times, steps=steps, t1=True, fn=lambda t, y, args: t * y)
    event = lambda p: falls_to_the_level(p, root_finder)
    saved = lambda adjoint, p: run(adjoint, p, event, saveat=saveat)
    (ts, ys, mask, _), _ = agree(saved)
    kept = int(jnp.isfinite(ts).sum())
    assert mask and not jnp.isfinite(ts[kept:]).any()
    assert jnp.isfinite(ys[:kept]).all() and not jnp.isfinite(ys[kept:]).any()
    last = 0.9 if root_finder is None else 0.85019
    assert abs(ts[kept - 1] - last) < 1e-5
    assert kept == {0: 5, 1: 13, 3: 7, 4: 7}[steps] + (root_finder is None)


@pytest.mark.heavy
def test_dense_output_up_to_an_event():
    """Evaluated at a time that is differentiated itself."""

    def saved(adjoint, p):
        saveat = dfx.SaveAt(dense=True, t1=True)
        solution = run(adjoint, p, falls_to_the_level, saveat=saveat)
        end = solution.ts[-1]
        ys = solution.evaluate(end), solution.evaluate(0.3), solution.derivative(end)
        return eqx.tree_at(lambda s: s.ys, solution, ys)

    (_, (at_end, _, slope), _, _), _ = agree(saved)
    assert abs(at_end[0] - 0.6) < 1e-11
    assert abs(slope[0] - at_end[1]) < 1e-2  # The velocity, to the interpolation.


@pytest.mark.heavy
def test_a_ball_bounces_twice():
    """Solves that begin where the event of the one before ended them, at a time that is
    differentiated, in the default scheme. The wind makes the field depend on time."""

    def ball(t, y, args):
        gravity, wind = args
        return jnp.stack([y[1], -gravity + wind * jnp.sin(2 * t)])

    ground = dfx.Event(lambda t, y, args, **kwargs: y[0], NEWTON, direction=False)

    def bounce(adjoint, args, start, restitution):
        t0, y0 = start
        solution = dfx.diffeqsolve(
            dfx.ODETerm(ball), rvx.Reversible(dfx.Bosh3()), t0, jnp.inf, 0.1, y0, args,
            event=ground, adjoint=adjoint, max_steps=64,
        )  # fmt: skip
        t1, y1 = solution.ts[0], solution.ys[0]
        return (t1, y1 * jnp.stack([jnp.ones(()), -restitution])), solution

    def twice(adjoint, p):
        start = jnp.zeros(()), p["y0"]
        step = lambda start, r: bounce(adjoint, p["args"], start, r)
        return jax.lax.scan(step, start, p["restitution"])[1]

    at = dict(
        y0=jnp.array([2.0, 0.0]),
        args=(jnp.array(8.0), jnp.array(0.5)),
        restitution=jnp.array([0.8, 0.7]),
    )
    (ts, _, mask, _), gradient = agree(twice, at, arithmetic=rvx.FixedPoint())
    assert mask.all()
    # Without wind sqrt(2*2/8) = 0.707, and 1.6 times that to the second bounce.
    assert jnp.max(jnp.abs(ts[:, 0] - jnp.array([0.707, 1.838]))) < 0.05
    assert abs(gradient["restitution"][0]) > 1.0


@pytest.mark.heavy
def test_a_steady_state_ends_the_solve():
    """In the default scheme, and at a time that is not known beforehand.

    Ten times the controller's tolerances: by default the event has the same, and the
    parasitic mode, which grows until the controller sees it, never lets the slope fall
    below them (measured, with Heun, Bosh3 and Tsit5: 4,000 steps without an end)."""
    settled = dfx.Event(dfx.steady_state_event(rtol=1e-2, atol=1e-2))

    def steady(adjoint, p):
        return run(
            adjoint, p, lambda p: settled, t1=jnp.inf, stepsize_controller=PID,
            terms=dfx.ODETerm(lambda t, y, args: args[0] - y * args[1] * y), dt0=None,
            solver=rvx.Reversible(dfx.Heun()),
        )  # fmt: skip

    at = dict(y0=jnp.array([1.0, 3.0]), args=(jnp.array([2.0, 3.0]), jnp.array(0.7)))
    (_, ys, _, result), _ = agree(steady, at, arithmetic=rvx.FixedPoint())
    assert result == dfx.RESULTS.event_occurred
    # A slope of 0.01 + 0.01*2, at a rate of 2*sqrt(2*0.7) = 2.4: measured 0.016.
    assert jnp.max(jnp.abs(ys[0] - jnp.sqrt(at["args"][0] / 0.7))) < 0.02


def test_time_of_an_event_has_the_derivatives_of_the_exact_solution():
    """`y' = -a*y` from `b` falls to `c` at `ln(b/c)/a`."""

    def time(p):
        rate, start, level = p
        falls = dfx.Event(lambda t, y, args, **kwargs: y - level, NEWTON)
        return dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, rate: -rate * y), rvx.Reversible(dfx.Tsit5()),
            0.0, jnp.inf, 0.05, start, rate, event=falls, adjoint=OURS, max_steps=64,
        ).ts[0]  # fmt: skip

    rate, start, level = at = jnp.array([1.3, 2.0, 0.5])
    value, gradient = jax.jit(jax.value_and_grad(time))(at)
    expected = jnp.log(start / level) / rate
    slopes = jnp.stack([-expected / rate, 1 / (start * rate), -1 / (level * rate)])
    # The error of the interpolation, (h*a)**5 times a small constant.
    assert abs(value - expected) < 1e-7
    assert jnp.max(jnp.abs(gradient - slopes)) < 1e-5


@pytest.mark.heavy
def test_time_of_an_event_agrees_with_finite_differences():
    def time(x):
        p = dict(y0=x[:2], args=(x[2], x[3]), level=x[4])
        return run(OURS, p, falls_to_the_level).ts[0]

    at = jnp.array([1.0, 0.2, 2.0, 0.1, 0.3])
    along = jnp.array([0.3, -0.2, 0.5, 0.1, 0.4])
    time_at, gradient = jax.jit(time), jax.jit(jax.grad(time))(at)
    h = 1e-4  # central differences: error h**2 = 1e-8, the root's 1e-12/h = 1e-8
    difference = (time_at(at + h * along) - time_at(at - h * along)) / (2 * h)
    assert abs(gradient @ along - difference) <= 1e-7


def several(p):
    """The angle rises to the level, the speed falls to -1.1, or the time is over."""
    rises = falls_to_the_level(p).cond_fn
    is_fast = lambda t, y, args, **kwargs: y[1] + 1.1
    is_late = lambda t, y, args, **kwargs: t > 2.5
    conditions = dict(a=rises, b=[is_fast, is_late])
    return dfx.Event(conditions, NEWTON, dict(a=True, b=[False, None]))


@pytest.mark.heavy
@pytest.mark.parametrize("stepping", STEPPING)
def test_the_first_of_several_events_in_its_direction(stepping):
    of_event = lambda adjoint, p: run(adjoint, p, several, **STEPPING[stepping])
    (_, ys, mask, result), _ = agree(of_event)
    assert result == dfx.RESULTS.event_occurred
    assert not mask["a"] and bool(mask["b"][0]) and not mask["b"][1]
    assert abs(ys[0, 1] + 1.1) < 1e-11


@pytest.mark.heavy
@pytest.mark.parametrize("root_finder", [NEWTON, None], ids=["newton", "none"])
@pytest.mark.parametrize("when", ["never", "at-the-start"])
def test_an_event_that_never_happens_or_is_there_from_the_start(when, root_finder):
    never = when == "never"
    saveat = dfx.SaveAt(t0=True, t1=True, ts=jnp.array([0.0, 1.0]), steps=7)

    def event(p):
        if never:
            return falls_to_the_level(p | dict(level=-p["level"] * 9), root_finder)
        return dfx.Event(lambda t, y, args, **kwargs: y[0] > p["level"], root_finder)

    of_event = lambda adjoint, p: run(adjoint, p, event, saveat=saveat)
    (ts, _, mask, result), gradient = agree(of_event)
    assert (result == dfx.RESULTS.event_occurred) == mask == (not never)
    assert jnp.max(jnp.where(jnp.isfinite(ts), ts, 0)) == (3.0 if never else 0.0)
    assert gradient["level"] == 0


@pytest.mark.heavy
@pytest.mark.parametrize("stepping", ["constant", "pid"])
def test_an_event_of_a_solve_backwards_in_time(stepping):
    span = STEPPING[stepping] | dict(t0=3.0, t1=0.0)
    if stepping == "constant":
        span |= dict(dt0=-0.1)
    saveat = dfx.SaveAt(ts=jnp.array([2.9, 2.5, 1.0]), t1=True)
    of_event = lambda adjoint, p: run(
        adjoint, p, falls_to_the_level, saveat=saveat, **span
    )
    (ts, _, mask, _), _ = agree(of_event)
    assert mask and jnp.isinf(ts).sum() == 1 and 1.0 < jnp.min(ts) < 2.5


@pytest.mark.heavy
@pytest.mark.parametrize("stepping", ["constant", "pid"])
def test_time_of_an_event_is_differentiated_in_the_times_of_the_solve(stepping):
    times = dict(t0=jnp.array(0.05), t1=jnp.array(3.0), dt0=jnp.array(0.11))

    def of_event(adjoint, p):
        kwargs = STEPPING[stepping] | {name: p[name] for name in times}
        return run(adjoint, p, falls_to_the_level, **kwargs)

    agree(of_event, AT | times)


@pytest.mark.heavy
@pytest.mark.parametrize("base", [dfx.Heun(), dfx.Tsit5()], ids=["Heun", "Tsit5"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme(scheme, base):
    solver = rvx.Reversible(base, *SCHEMES[scheme])
    of_event = lambda adjoint, p: run(adjoint, p, falls_to_the_level, solver=solver)
    agree(of_event, arithmetic=solver.arithmetic)


@pytest.mark.heavy
def test_a_root_that_is_not_found_is_reported():
    """As Diffrax reports it: the tolerances of this root finder are out of reach."""
    event = lambda p: falls_to_the_level(p, optx.Newton(0.0, 0.0))
    results = [run(a, AT, event, throw=False).result for a in (OURS, DIRECT)]
    assert results[0] == results[1] != dfx.RESULTS.event_occurred
    with pytest.raises(eqx.EquinoxRuntimeError, match="nonlinear solver"):
        run(OURS, AT, event)
