"""`Reversible` is an ordinary Diffrax solver, under every adjoint of Diffrax."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import pytest
from helpers import (
    BASES,
    initial_states,
    network_arguments,
    network_field,
    published,
    quick,
    relative_difference,
)

import reversax as rvx

TERM = dfx.ODETerm(network_field)


def solve(args, y0, adjoint, solver=None, **kwargs):
    solver = rvx.Reversible(dfx.Tsit5()) if solver is None else solver
    defaults = dict(max_steps=60)
    return dfx.diffeqsolve(
        TERM, solver, 0.0, 1.0, 0.02, y0, args, adjoint=adjoint, **(defaults | kwargs)
    )


def loss(args_and_y0, adjoint, solver=None, **kwargs):
    args, y0 = args_and_y0
    return jnp.sum(jnp.sin(solve(args, y0, adjoint, solver, **kwargs).ys))


POINT = (network_arguments(), initial_states())
ADJOINTS = {
    "RecursiveCheckpoint": dfx.RecursiveCheckpointAdjoint(),
    "Direct": dfx.DirectAdjoint(),
    "Reversible": rvx.ReversibleAdjoint(),
}


# (The value of a tableau is daily in every gradient of `programs.agree`.)
DAILY = ("own-midpoint",)


@pytest.mark.parametrize(
    "name",
    [x if x in DAILY else pytest.param(x, marks=pytest.mark.heavy) for x in BASES],
)
def test_values_are_the_same_under_reversible_and_checkpointed_adjoints(name):
    solver = rvx.Reversible(BASES[name])
    saveat = dfx.SaveAt(ts=jnp.array([0.1, 0.55, 1.0]))
    ours, theirs = (
        solve(*POINT, adjoint, solver, saveat=saveat).ys
        for adjoint in (rvx.ReversibleAdjoint(), dfx.RecursiveCheckpointAdjoint())
    )
    assert jnp.max(jnp.abs(ours - theirs)) < 1e-14


@pytest.mark.heavy  # Daily under both adjoints: every gradient of `programs.agree`.
@pytest.mark.parametrize("name", ["own-midpoint", "Tsit5", "HalfSolver-Heun"])
def test_direct_adjoint_gives_the_same_gradient(name):
    solver = rvx.Reversible(BASES[name])
    ours, direct = (
        jax.grad(loss)(POINT, adjoint, solver)
        for adjoint in (rvx.ReversibleAdjoint(), dfx.DirectAdjoint())
    )
    assert relative_difference(ours, direct) < 1e-13


@pytest.mark.parametrize("adjoint", [dfx.ForwardMode(), dfx.DirectAdjoint()], ids=repr)
def test_forward_mode_adjoints_agree_with_our_gradient(adjoint):
    solver = rvx.Reversible(dfx.Heun())
    of = lambda p: jax.jvp(lambda p: loss(p, adjoint, solver), (p,), (p,))[1]
    along = jax.jit(of, **quick(adjoint, solver.arithmetic))(POINT)
    gradient = jax.grad(loss)(POINT, rvx.ReversibleAdjoint(), solver)
    dots = jax.tree.map(lambda g, x: jnp.sum(g * x), gradient, POINT)
    assert abs(sum(jax.tree.leaves(dots)) - along) < 1e-12 * abs(along)


def test_backsolve_moves_the_state_between_saved_times_and_the_twins_follow():
    """`BacksolveAdjoint` hands a solver another `y0` than it returned; its gradient is
    approximate, but must converge to ours. Tsit5's own error here is about 1e-10."""
    kwargs = dict(
        saveat=dfx.SaveAt(ts=jnp.array([0.2, 0.6, 1.0])),
        solver=rvx.Reversible(dfx.Tsit5(), arithmetic=rvx.FloatingPoint()),
    )

    def gradient(adjoint):
        of = jax.grad(lambda p: loss(p, adjoint, **kwargs))
        return jax.jit(of, **quick())(POINT)

    ours, backsolve = map(gradient, (rvx.ReversibleAdjoint(), dfx.BacksolveAdjoint()))
    assert relative_difference(backsolve, ours) < 1e-8


def test_implicit_adjoint_differentiates_a_steady_state():
    """`y' = a - y` rests at `a`, whatever the start."""
    term = dfx.ODETerm(lambda t, y, a: a - y)

    def rest(a):
        return dfx.diffeqsolve(
            term,
            rvx.Reversible(dfx.Tsit5()),
            0.0,
            jnp.inf,
            0.01,
            jnp.array(0.3),
            a,
            event=dfx.Event(dfx.steady_state_event(1e-7, 1e-7, jnp.abs)),
            adjoint=dfx.ImplicitAdjoint(),
            max_steps=None,
        ).ys[0]

    assert abs(rest(jnp.array(2.0)) - 2.0) < 1e-5
    assert abs(jax.grad(rest)(jnp.array(2.0)) - 1.0) < 1e-5


def test_dense_output_and_events_work_under_diffraxs_adjoints():
    solution = solve(
        *POINT,
        dfx.RecursiveCheckpointAdjoint(),
        saveat=dfx.SaveAt(dense=True, ts=jnp.array([0.123, 0.456])),
    )
    again = jax.vmap(solution.evaluate)(jnp.array([0.123, 0.456]))
    assert jnp.max(jnp.abs(again - solution.ys)) < 1e-14
    field_there = network_field(0.456, solution.ys[1], POINT[0])
    derivative = solution.derivative(jnp.array(0.456))
    assert jnp.max(jnp.abs(derivative - field_there)) < 1e-6

    stopped = solve(
        *POINT,
        dfx.RecursiveCheckpointAdjoint(),
        event=dfx.Event(lambda t, y, args, **kwargs: t > 0.5),
    )
    assert 0.5 < float(stopped.ts[-1]) <= 0.52


@pytest.mark.parametrize(
    "adjoint",
    [
        pytest.param(
            a, id=name, marks=[pytest.mark.heavy] * name.startswith(("D", "Rev"))
        )
        for name, a in ADJOINTS.items()
    ],
)
def test_a_solve_in_two_pieces_is_the_whole_solve(adjoint):
    def pieces(p):
        args, y0 = p
        solver = rvx.Reversible(dfx.Bosh3(), rvx.McCallumFoster(0.9))
        solve = lambda t0, t1, y, state: dfx.diffeqsolve(
            TERM,
            solver,
            t0,
            t1,
            0.125,
            y,
            args,
            saveat=dfx.SaveAt(t1=True, solver_state=True),
            adjoint=adjoint,
            solver_state=state,
            max_steps=8,
        )
        first = solve(0.0, 0.5, y0, None)
        return solve(0.5, 1.0, first.ys[0], first.solver_state).ys

    def whole(p):
        args, y0 = p
        solver = rvx.Reversible(dfx.Bosh3(), rvx.McCallumFoster(0.9))
        return dfx.diffeqsolve(
            TERM,
            solver,
            0.0,
            1.0,
            0.125,
            y0,
            args,
            adjoint=dfx.RecursiveCheckpointAdjoint(),
            max_steps=8,
        ).ys

    loss = lambda f: jax.value_and_grad(lambda p: jnp.sum(jnp.sin(f(p))))
    of = lambda f: jax.jit(loss(f), **quick())(POINT)
    (value, gradient), (expected, expected_gradient) = of(pieces), of(whole)
    assert abs(value - expected) < 1e-14 * abs(expected)
    assert relative_difference(gradient, expected_gradient) < 1e-13


def test_a_reversible_solver_can_itself_be_halved():
    """`HalfSolver(Reversible(...))` is right under Diffrax's adjoints; it is not a
    `Reversible` solver, which `ReversibleAdjoint` must see through the disguise of."""
    halved = dfx.HalfSolver(rvx.Reversible(dfx.Heun()))
    fine = solve(*POINT, dfx.RecursiveCheckpointAdjoint(), dfx.Tsit5()).ys
    coarse = solve(*POINT, dfx.RecursiveCheckpointAdjoint(), halved).ys
    assert jnp.max(jnp.abs(fine - coarse)) < 1e-4
    with pytest.raises(TypeError, match=r"outermost.*got `HalfSolver`"):
        solve(*POINT, rvx.ReversibleAdjoint(), halved)


def test_order_and_error_order_of_the_published_scheme_are_those_of_the_base():
    for base in BASES.values():
        solver = published(base)
        assert solver.order(TERM) == base.order(TERM)
        if isinstance(base, dfx.AbstractAdaptiveSolver):
            assert solver.error_order(TERM) == base.error_order(TERM)
        assert solver.term_structure is base.term_structure
