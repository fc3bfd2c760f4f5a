"""`SaveAt(dense=True)`: what it gives, and its gradient, are those of direct
differentiation of the same scheme."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    BASES,
    FEATURES_IN,
    SCHEMES,
    finite_sum_of_squares,
    initial_states,
    network_field,
    quick,
    relative_difference,
)
from programs import ARGS, DIRECT, OURS, SOLVER, Y0, solve

import reversax as rvx

# Of which the interpolation has a curvature, unlike that of Heun.
BOSH3 = rvx.Reversible(dfx.Bosh3(), *SCHEMES[FEATURES_IN])
# The first steps are too long and are rejected.
PID = dict(stepsize_controller=dfx.PIDController(rtol=1e-3, atol=1e-3), dt0=0.5)
JUMPS = dfx.ClipStepSizeController(PID["stepsize_controller"], jump_ts=[0.3, 0.6])
STEPPING = {
    "constant": dict(),
    "pid": PID,
    "jumps": PID | dict(stepsize_controller=JUMPS),
    "step-to": dict(
        dt0=None, stepsize_controller=dfx.StepTo(jnp.array([0.0, 0.2, 0.7, 1.0]))
    ),
}
BACKWARDS = {
    "constant": dict(t0=1.0, t1=0.0, dt0=-0.02),
    "pid": PID | dict(t0=1.0, t1=0.0, dt0=-0.5),
}
SAVED = {
    "alone": dfx.SaveAt(dense=True),
    "beside-others": dfx.SaveAt(
        dense=True, t0=True, t1=True, steps=4, ts=[0.2, 0.5], solver_state=True
    ),
}
# Times to evaluate at: in the first step, in any, and at the end.
TIMES = jnp.array([0.0071, 0.3456, 0.62, 1.0])


def evaluated(solution, times):
    first, second, third, _ = times
    return (
        solution.evaluate(first),
        jax.vmap(solution.evaluate)(times),
        solution.evaluate(second, third),
        solution.derivative(second),
        solution.evaluate(third, left=False),
        solution.ys,
    )


def value_and_gradient(adjoint, run, at, arithmetic):
    """Of a loss of what `run` gives; and what it gives."""

    @eqx.filter_value_and_grad(has_aux=True)
    def of(p):
        out = run(adjoint, p)
        return finite_sum_of_squares(out), out

    return eqx.filter_jit(of, **quick(adjoint, arithmetic))(at)


def agree(run, at, bound=1e-12, arithmetic=SOLVER.arithmetic):
    """`run(adjoint, p)` gives the same under both adjoints, with the same gradient, in
    each entry of `p`. Measured between Diffrax's own two adjoints: up to 1e-14."""
    (_, out), ours = value_and_gradient(OURS, run, at, arithmetic)
    (_, expected), direct = value_and_gradient(DIRECT, run, at, arithmetic)
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-13)
    for name in at:
        difference = relative_difference(ours[name], direct[name])
        assert difference <= bound, (name, difference)


PARAMETERS = dict(y0=Y0, args=ARGS)


@pytest.mark.parametrize(
    ("kwargs", "saved"),
    [
        pytest.param(STEPPING["pid"], "alone", id="pid-alone"),
        pytest.param(
            BACKWARDS["constant"],
            "beside-others",
            id="backwards-beside",
            marks=pytest.mark.heavy,
        ),
        *(
            pytest.param(k, s, id=f"{name}-{s}", marks=pytest.mark.heavy)
            for name, k in STEPPING.items()
            for s in SAVED
            if (name, s) != ("pid", "alone")
        ),
        *(
            pytest.param(k, "alone", id=f"{name}-backwards", marks=pytest.mark.heavy)
            for name, k in BACKWARDS.items()
        ),
    ],
)
def test_dense_output_and_its_gradient(kwargs, saved):
    """In the state, the parameters, and the times of the evaluations."""
    saveat = SAVED[saved]
    if "t0" in kwargs and saved == "beside-others":
        saveat = eqx.tree_at(
            lambda s: s.subs.ts, saveat, replace_fn=lambda ts: ts[::-1]
        )

    def run(adjoint, p):
        at = dict(y0=p["y0"], args=p["args"], saveat=saveat) | kwargs
        return evaluated(solve(adjoint, solver=BOSH3, **at), p["times"])

    agree(run, PARAMETERS | dict(times=TIMES))


@pytest.mark.heavy  # Daily: a batch of solutions that is evaluated after the solve.
@pytest.mark.parametrize("name", ["pid", "constant"])
def test_lanes_that_are_evaluated_at_times_of_their_own(name):
    speeds = jnp.array([0.3, 2.0])

    def run(adjoint, p):
        def one(y0, times, speed):
            field = lambda t, y, args: speed * network_field(t, y, args)
            saveat = SAVED["alone"]
            at = dict(field=field, saveat=saveat, **STEPPING[name])
            solution = solve(adjoint, y0, p["args"], **at)
            return solution.evaluate(times[0], times[1]), solution.derivative(times[1])

        return jax.vmap(one)(p["y0"], p["times"], speeds)

    times = jnp.array([[0.1, 0.6], [0.9, 0.013]])
    agree(run, dict(y0=jnp.stack([Y0, -Y0]), args=ARGS, times=times))


@pytest.mark.heavy
def test_a_batch_of_solutions_is_evaluated_after_the_solve():
    """The interpolation leaves the `vmap` as an output, and the `jit` too."""
    states = initial_states(batch=2)

    def run(adjoint, p):
        one = lambda y0: solve(adjoint, y0, p["args"], saveat=SAVED["alone"])
        solutions = eqx.filter_jit(eqx.filter_vmap(one))(p["y0"])
        at = lambda solution, t: solution.evaluate(t)
        return eqx.filter_vmap(at)(solutions, p["times"])

    agree(run, dict(y0=states, args=ARGS, times=jnp.array([0.35, 0.8])))


@pytest.mark.heavy
def test_dense_output_of_one_solve_drives_another():
    """It is evaluated at every stage of every step, and is differentiated in each."""

    def run(adjoint, p):
        driver = solve(adjoint, p["y0"], p["args"], saveat=SAVED["alone"], **PID)
        field = lambda t, y, args: jnp.sin(driver.evaluate(t)) * y
        control = dfx.ControlTerm(
            lambda t, y, args: jnp.stack([jnp.eye(3)] * 2), Lane(driver)
        )
        terms = dfx.MultiTerm(dfx.ODETerm(field), control)
        return solve(adjoint, p["y0"], p["args"], terms=terms, dt0=0.05).ys

    agree(run, PARAMETERS)


class Lane(dfx.AbstractPath):
    """One row of a solution, as a control."""

    solution: dfx.Solution

    @property
    def t0(self):
        return self.solution.t0

    @property
    def t1(self):
        return self.solution.t1

    def evaluate(self, t0, t1=None, left=True):
        return self.solution.evaluate(t0, t1, left)[0]


def test_dense_output_is_what_is_saved_at_the_same_times():
    """By the interpolation of the base: `SaveAt(ts=...)` is tested for its order."""
    ts = jnp.linspace(0.0, 1.0, 18)
    solution = solve(OURS, solver=BOSH3, saveat=dfx.SaveAt(dense=True, ts=ts), **PID)
    # The same interpolant, evaluated in another program: one ulp or two.
    difference = jnp.abs(jax.vmap(solution.evaluate)(ts) - solution.ys)
    assert jnp.max(difference) <= 1e-15 * jnp.max(jnp.abs(solution.ys))
    # And its derivative is that of the interpolant: central differences, h**2.
    t, h = 0.4321, 1e-5
    slope = solution.evaluate(t - h, t + h) / (2 * h)
    assert relative_difference(solution.derivative(t), slope) <= 1e-8


@pytest.mark.parametrize(
    ("base", "order"),
    [("Heun", 2), ("Bosh3", 3), ("Tsit5", 4)],
    ids=["Heun", "Bosh3", "Tsit5"],
)
def test_dense_output_has_the_order_of_the_base_interpolation(base, order):
    """`y' = cos(t) y`, so `y = exp(sin(t))`, in the default scheme."""
    times = jnp.linspace(0.01, 2.99, 50)

    @jax.jit
    def error(dt0):
        solution = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, args: jnp.cos(t) * y),
            rvx.Reversible(BASES[base]),
            0.0,
            3.0,
            dt0,
            jnp.array(1.0),
            saveat=SAVED["alone"],
            adjoint=OURS,
            max_steps=240,
        )
        values = jax.vmap(solution.evaluate)(times)
        return jnp.max(jnp.abs(values - jnp.exp(jnp.sin(times))))

    slope = jnp.log2(error(3 / 120) / error(3 / 240))
    assert slope >= order - 0.25


@pytest.mark.heavy
def test_a_solve_that_ran_out_of_steps_is_evaluated_as_far_as_it_went():
    def run(adjoint, p):
        limit = dict(max_steps=17, throw=False, saveat=SAVED["alone"])
        solution = solve(adjoint, p["y0"], p["args"], **limit)
        return solution.evaluate(p["t"])

    agree(run, PARAMETERS | dict(t=jnp.array(0.3)))
    beyond = run(OURS, PARAMETERS | dict(t=jnp.array(0.5)))
    assert jnp.isnan(beyond).all()


@pytest.mark.heavy
def test_no_time_at_all_is_evaluated_as_the_initial_state():
    def run(adjoint, p):
        span = dict(t0=0.5, t1=0.5, saveat=SAVED["alone"])
        return solve(adjoint, p["y0"], ARGS, **span).evaluate(0.5)

    agree(run, dict(y0=Y0))


@pytest.mark.heavy
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_base_in_every_scheme(base, scheme):
    solver = rvx.Reversible(BASES[base], *SCHEMES[scheme])

    def run(adjoint, p):
        at = dict(solver=solver, saveat=SAVED["alone"], **STEPPING["step-to"])
        return evaluated(solve(adjoint, p["y0"], p["args"], **at), p["times"])

    agree(run, PARAMETERS | dict(times=TIMES), arithmetic=solver.arithmetic)


def test_dense_output_needs_a_bound_on_the_number_of_steps():
    with pytest.raises(ValueError, match=r"max_steps=None.*saveat\.dense=True"):
        solve(OURS, solver=SOLVER, saveat=SAVED["alone"], max_steps=None)
