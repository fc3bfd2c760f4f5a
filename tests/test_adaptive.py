"""Adaptive control of the pair: it sees what the base's own error estimate cannot."""

import detest
import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import pytest
from helpers import BASES, Kutta3, OwnMidpoint

import reversax as rvx

HEAVY = pytest.mark.heavy

TERM = dfx.ODETerm(lambda t, y, args: y)


def damped(t, y, args):
    """Relaxes to `cos(t)` at a rate of 50."""
    return -50.0 * (y - jnp.cos(t)) - jnp.sin(t)


@eqx.filter_jit  # Once for every tolerance, which is an array.
def solve(field, solver, tolerance, y0, t1=4.0, **kwargs):
    return dfx.diffeqsolve(
        dfx.ODETerm(field),
        solver,
        0.0,
        t1,
        None,
        y0,
        stepsize_controller=dfx.PIDController(rtol=tolerance, atol=tolerance),
        adjoint=rvx.ReversibleAdjoint(),
        max_steps=200_000,
        **kwargs,
    )


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5])
@pytest.mark.parametrize(
    "name",
    [
        *("Euler", "Tsit5"),
        *(
            pytest.param(x, marks=HEAVY)
            for x in ("Midpoint", "own-Kutta3", "Bosh3", "own-midpoint")
        ),
    ],
)
def test_a_damped_problem_is_held_to_the_tolerance(name, tolerance):
    saveat = dfx.SaveAt(ts=jnp.linspace(1.0, 4.0, 31))
    solver = rvx.Reversible((BASES | {"own-Kutta3": Kutta3()})[name])
    tolerance = jnp.asarray(tolerance)
    solution = solve(damped, solver, tolerance, jnp.array([1.0]), saveat=saveat)
    error = jnp.max(jnp.abs(solution.ys[:, 0] - jnp.cos(solution.ts)))
    # As small as the gap that (E) tolerates: some tolerances. Measured: up to 8.
    assert error <= 20 * tolerance, (error, solution.stats["num_accepted_steps"])
    # Not by steps far below the limit of stability, ln(2)/4/50 = 0.0035 or 1,150 steps.
    assert solution.stats["num_accepted_steps"] <= 20_000


def test_the_base_own_estimate_alone_would_not_have_seen_it():
    """The same solve with (E) left out: the parasitic mode grows unnoticed."""
    seldom = rvx.Symmetric(1 / 4)
    sees, blind = rvx.Reversible(dfx.Tsit5(), seldom), Blind(dfx.Tsit5(), seldom)
    kwargs = dict(stepsize_controller=dfx.PIDController(rtol=1e-3, atol=1e-3))
    errors = [
        float(
            abs(
                dfx.diffeqsolve(
                    dfx.ODETerm(damped),
                    solver,
                    0.0,
                    4.0,
                    None,
                    jnp.array([1.0]),
                    max_steps=20_000,
                    throw=False,
                    **kwargs,
                ).ys[0, 0]
                - jnp.cos(4.0)
            )
        )
        for solver in (sees, blind)
    ]
    assert errors[0] < 1e-2 and not errors[1] < 1e-1, errors


class Blind(rvx.Reversible):
    """Hands the controller the base's error estimate alone."""

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        out = super().step(terms, t0, t1, y0, args, solver_state, made_jump)
        _, own, _, _, _ = self.solver.step(
            terms, t0, t1, y0, args, self.solver.init(terms, t0, t1, y0, args), True
        )
        return out[0], own, *out[2:]


@pytest.mark.parametrize("name", ["Euler", pytest.param("own-midpoint", marks=HEAVY)])
def test_bases_without_an_error_estimate_follow_the_tolerance(name):
    """`y' = cos(t) y`, so `y = exp(sin(t))`: tighter is better."""
    solver = rvx.Reversible(BASES[name])
    field = lambda t, y, args: jnp.cos(t) * y
    errors = [
        float(
            abs(solve(field, solver, tol, jnp.array(1.0)).ys[0] - jnp.exp(jnp.sin(4.0)))
        )
        for tol in jnp.array([1e-3, 1e-5, 1e-7])
    ]
    assert errors[0] > 5 * errors[1] > 25 * errors[2] > 0, errors
    assert errors[2] < 1e-4


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        (dfx.Euler(), 2),  # of (E)
        (OwnMidpoint(), 4),  # of (E), whose leading terms cancel for even orders
        (dfx.Bosh3(), dfx.Bosh3().error_order(TERM)),
        (dfx.Tsit5(), dfx.Tsit5().error_order(TERM)),
    ],
    ids=lambda x: type(x).__name__,
)
def test_the_order_of_the_error_estimate_is_what_the_controller_is_told(base, expected):
    assert rvx.Reversible(base).error_order(TERM) == expected


@pytest.mark.parametrize("name", ["Euler", "own-midpoint"])
def test_the_gap_of_one_step_has_the_order_told(name):
    solver = rvx.Reversible(BASES[name])
    term = dfx.ODETerm(lambda t, y, args: jnp.sin(3 * y) + t)
    y0 = jnp.array([0.7])

    def estimate(h):
        state = solver.init(term, 0.2, 0.2 + h, y0, None)
        return float(solver.step(term, 0.2, 0.2 + h, y0, None, state, False)[1][0])

    slope = jnp.log2(estimate(0.02) / estimate(0.01))
    assert abs(slope - solver.error_order(term)) < 0.2


ADJOINTS = {
    "checkpointed": dfx.RecursiveCheckpointAdjoint(),
    "reversible": rvx.ReversibleAdjoint(),
}


def solve_to_infinity(adjoint, **kwargs):
    """`y' = 5 y**2` from 1 is infinite at 0.2."""
    defaults = dict(dt0=0.05, max_steps=500)
    return dfx.diffeqsolve(
        dfx.ODETerm(lambda t, y, args: 5 * y**2),
        rvx.Reversible(dfx.Heun()),
        0.0,
        1.5,
        y0=jnp.array([1.0, 0.0]),
        adjoint=adjoint,
        **(defaults | kwargs),
    )


def solve_without_bound(adjoint, **kwargs):
    """`y' = 5 y`, which is 1.4e14, the end of the range, at 6.5."""
    return dfx.diffeqsolve(
        dfx.ODETerm(lambda t, y, args: 5 * y),
        *(rvx.Reversible(dfx.Heun()), 0.0, 8.0, 0.05, jnp.array([1.0, 0.0])),
        **(dict(adjoint=adjoint) | kwargs),
    )


@pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=ADJOINTS)
def test_what_overflows_ends_the_solve_with_a_result(adjoint):
    solution = solve_without_bound(adjoint, throw=False)
    assert solution.result == dfx.RESULTS.nonfinite
    # Steps that are too long for a singularity part the twins before.
    solution = solve_to_infinity(adjoint, throw=False)
    assert solution.result == dfx.RESULTS.nonlinear_divergence


@pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=ADJOINTS)
def test_a_controller_rejects_what_overflows(adjoint):
    """It creeps up to the singularity until the steps run out."""
    pid = dfx.PIDController(rtol=1e-3, atol=1e-3)
    solution = solve_to_infinity(
        adjoint, stepsize_controller=pid, dt0=1.4, max_steps=200, throw=False
    )
    assert solution.result == dfx.RESULTS.max_steps_reached
    assert jnp.isfinite(solution.ys).all() and solution.ys[0, 0] > 100
    assert solution.stats["num_rejected_steps"] > 0


def test_an_overflow_says_what_to_do():
    message = "FixedPoint.largest=.*larger than 1.4e.14.*smaller steps.*Reversible"
    with pytest.raises(eqx.EquinoxRuntimeError, match=message):
        solve_without_bound(rvx.ReversibleAdjoint())
    with pytest.raises(eqx.EquinoxRuntimeError, match="Nonfinite"):
        solve_without_bound(dfx.RecursiveCheckpointAdjoint())


@pytest.mark.parametrize(
    "name", ["B2", "B5", *(pytest.param(x, marks=HEAVY) for x in ("C2", "C4", "E5"))]
)
def test_a_tolerance_costs_and_means_what_it_does_for_the_plain_solver(name):
    """On problems of DETEST: damped ones, and those on which errors are the largest."""
    plain, ours = (
        detest.solve(name, detest.SOLVERS[label], 1e-6, 1e-9)
        for label in ("plain", "reversible")
    )
    assert ours.successful and ours.steps <= 1.3 * plain.steps
    assert ours.largest_error <= 3 * plain.largest_error
