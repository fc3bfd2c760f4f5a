"""Solvers that say themselves how their steps are undone, by a `backward_step`.

The oracle is direct differentiation of the plain solver, of which the steps forward are
the same.
"""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from helpers import finite_sum_of_squares, in_cells, relative_difference
from retraced import (
    ARGS,
    BOUNDS,
    DIRECT,
    EES25,
    OURS,
    SAVED,
    SOLVERS,
    Y0,
    AsynchronousLeapfrog,
    agree,
    differentiated,
    field,
    solve,
)

import reversax as rvx


@pytest.mark.parametrize(
    "name, saveat",
    in_cells(
        [(name, saveat) for name in SOLVERS for saveat in SAVED],
        {("ALF", "steps")},
    ),
)
def test_gradients_are_those_of_the_plain_solver(name, saveat):
    agree(name, saveat=SAVED[saveat])


@pytest.mark.parametrize(
    "name, controller",
    in_cells(
        [("EES25", "adaptive"), ("leapfrog", "given"), ("ALF", "given")],
        {("leapfrog", "given")},
    ),
)
def test_steps_may_differ_in_length(name, controller):
    """The leapfrog is told by `ts_state` where the step before began."""
    if controller == "given":
        ts = jnp.array([0.0, 0.1, 0.25, 0.6, 0.7, 1.27])
        known = dict(stepsize_controller=dfx.StepTo(ts=ts), dt0=None)
        agree(name, saveat=SAVED["ts"], **known)
    else:
        known = dict(stepsize_controller=dfx.PIDController(rtol=1e-3, atol=1e-4))
        # Steps of up to a tenth.
        tolerant = rvx.ReversibleAdjoint(round_trip_tolerance=1e-5)
        agree(name, 1e-5, tolerant, saveat=SAVED["ts"], **known)


def test_lanes_of_their_own_lengths_share_parameters():
    y0s, t1s = jnp.stack([Y0, 0.5 * Y0, -Y0]), jnp.array([0.4, 1.27, 0.9])

    def loss(args, y0s, solver, adjoint):
        one = lambda y0, t1: solve(solver, adjoint, y0, args, t1).ys
        return finite_sum_of_squares(jax.vmap(one)(y0s, t1s))

    def gradient(*how):
        return jax.jit(jax.grad(lambda *x: loss(*x, *how), argnums=(0, 1)))(ARGS, y0s)

    ours = gradient(rvx.Reversible(SOLVERS["ALF"]), OURS)
    oracle = gradient(SOLVERS["ALF"], DIRECT)
    assert relative_difference(ours, oracle) < 1e-12


@pytest.mark.heavy
@pytest.mark.parametrize(
    "name", [pytest.param("EES25", marks=pytest.mark.heavy), "ALF"]
)
def test_the_time_of_an_event_is_differentiated(name):
    crosses = lambda t, y, args, **kwargs: y[1] - 0.6
    event = dfx.Event(crosses, optx.Newton(1e-12, 1e-12))

    def time(args, solver, adjoint):
        return solve(solver, adjoint, Y0, args, 5.0, event=event, max_steps=256).ts[-1]

    ours = rvx.Reversible(SOLVERS[name])
    gradient = jax.jit(jax.grad(lambda a: time(a, ours, OURS)))(ARGS)
    of, h = jax.jit(lambda a: time(a, SOLVERS[name], DIRECT)), 1e-5
    difference = (of(ARGS + h) - of(ARGS - h)) / (2 * h)
    assert abs(gradient - difference) < 1e-6 * abs(difference)


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["EES25", "ALF"])
def test_dense_output_is_differentiated(name):
    def loss(y0, args, solver, adjoint):
        solution = solve(solver, adjoint, y0, args, 1.27, saveat=dfx.SaveAt(dense=True))
        return jnp.sum(jax.vmap(solution.evaluate)(jnp.linspace(0.1, 1.2, 7)) ** 2)

    def gradient(*how):
        return jax.jit(jax.grad(lambda *x: loss(*x, *how), argnums=(0, 1)))(Y0, ARGS)

    ours = gradient(rvx.Reversible(SOLVERS[name]), OURS)
    oracle = gradient(SOLVERS[name], DIRECT)
    assert relative_difference(ours, oracle) < BOUNDS[name]


@pytest.mark.heavy
@pytest.mark.parametrize("adjoint", [dfx.RecursiveCheckpointAdjoint(), DIRECT])
@pytest.mark.parametrize("name", ["EES25", "ALF"])
def test_the_adjoints_of_diffrax_take_it_too(name, adjoint):
    agree(name, adjoint=adjoint, saveat=SAVED["ts"])


@pytest.mark.heavy
def test_a_hessian_is_that_of_the_plain_solver():
    def loss(y0, solver, adjoint):
        return finite_sum_of_squares(solve(solver, adjoint, y0, ARGS, 0.5).ys)

    ours = rvx.Reversible(SOLVERS["ALF"])
    hessian = jax.jit(jax.jacfwd(jax.grad(lambda y: loss(y, ours, OURS))))(Y0)
    oracle = jax.jit(jax.hessian(lambda y: loss(y, SOLVERS["ALF"], DIRECT)))(Y0)
    assert relative_difference(hessian, oracle) < 1e-11


@pytest.mark.heavy
@pytest.mark.parametrize("ito", [False, True])
def test_a_stochastic_equation_is_solved_in_the_sense_of_its_solver(ito):
    """No step is taken along the reversed path, so that an Ito solver stays one."""
    path = dfx.VirtualBrownianTree(0.0, 1.0, 1e-3, (2,), jax.random.key(3))
    sense = dfx.AbstractItoSolver if ito else dfx.AbstractStratonovichSolver
    solver = type("EES25", (EES25, sense), {})()

    def loss(args, solver, adjoint):
        noise = lambda t, y, args: jnp.diag(0.1 * jnp.cos(args * y))
        terms = dfx.MultiTerm(dfx.ODETerm(field), dfx.ControlTerm(noise, path))
        known = dict(saveat=SAVED["end"], adjoint=adjoint)
        solution = dfx.diffeqsolve(terms, solver, 0.0, 1.0, 1 / 256, Y0, args, **known)
        return finite_sum_of_squares(solution.ys)

    tolerant = rvx.ReversibleAdjoint(round_trip_tolerance=1e-6)
    ours = rvx.Reversible(solver)
    gradient = jax.jit(jax.grad(lambda a: loss(a, ours, tolerant)))(ARGS)
    oracle = jax.jit(jax.grad(lambda a: loss(a, solver, DIRECT)))(ARGS)
    assert relative_difference(gradient, oracle) < 1e-6


def test_no_bound_on_constant_steps_is_needed_and_a_number_in_the_solver_is_learned():
    def loss(number, adjoint, wrap, max_steps):
        solver = wrap(AsynchronousLeapfrog(number))
        return finite_sum_of_squares(
            solve(solver, adjoint, Y0, ARGS, 1.0, max_steps=max_steps).ys
        )

    number = jnp.array(0.9)
    ours = jax.jit(jax.grad(lambda x: loss(x, OURS, rvx.Reversible, None)))(number)
    oracle = jax.jit(jax.grad(lambda x: loss(x, DIRECT, lambda s: s, 64)))(number)
    assert relative_difference(ours, oracle) < 1e-10


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["EES25", "ALF"])
def test_memory_does_not_grow_with_the_number_of_steps(name):
    def taken(num):
        loss = lambda y0: finite_sum_of_squares(
            solve(
                rvx.Reversible(SOLVERS[name]),
                OURS,
                y0,
                ARGS,
                1.0,
                dt0=1 / num,
                max_steps=num,
            ).ys
        )
        compiled = jax.jit(jax.grad(loss)).lower(Y0).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert taken(64) == taken(65_536)


# The check at the end.


class Careless(AsynchronousLeapfrog):
    """Goes back as if the field did not depend on time."""

    def backward_step(self, terms, t0, t1, y1, *others):
        return super().backward_step(terms, t0 - 1, t1 - 1, y1, *others)


class Forgetful(AsynchronousLeapfrog):
    """Finds the state again, but not the derivative that it began with."""

    def backward_step(self, *args):
        y0, dense_info, (v0, number), result = super().backward_step(*args)
        v0 = jnp.where(number == 0, v0 + 1e-3, v0)
        return y0, dense_info, (v0, number), result


class Uncounted(AsynchronousLeapfrog):
    def backward_step(self, *args):
        y0, dense_info, (v0, number), result = super().backward_step(*args)
        return y0, dense_info, (v0, number + 1), result


class Failing(AsynchronousLeapfrog):
    def backward_step(self, *args):
        *found, _ = super().backward_step(*args)
        failed = dfx.RESULTS.nonlinear_divergence
        good = found[-1][1] != 3
        return *found, dfx.RESULTS.where(good, dfx.RESULTS.successful, failed)


@pytest.mark.parametrize(
    "cls, says",
    [
        (Careless, r"`Careless\.backward_step` undoes a step only nearly.*1e-0"),
        pytest.param(
            Forgetful,
            r"`Forgetful\.backward_step`.*between 1e-04 and 1e-03",
            marks=pytest.mark.heavy,
        ),
        pytest.param(Uncounted, "more than 1e", marks=pytest.mark.heavy),
        (Failing, "smaller steps"),
    ],
)
def test_a_backward_step_that_does_not_undo_a_step_raises(cls, says):
    with pytest.raises(eqx.EquinoxRuntimeError, match=says):
        jax.block_until_ready(differentiated(rvx.Reversible(cls()), OURS))


def test_a_nearly_exact_one_is_refused_or_accepted_by_the_tolerance():
    """EES25 with steps of a quarter misses 5e-5 of the state."""
    known = dict(dt0=0.25)
    solver, tolerance = rvx.Reversible(EES25()), 1e-4
    with pytest.raises(eqx.EquinoxRuntimeError, match="between 1e-05 and 1e-04"):
        jax.block_until_ready(differentiated(solver, OURS, **known))
    tolerant = rvx.ReversibleAdjoint(round_trip_tolerance=tolerance)
    agree("EES25", tolerance, tolerant, **known)
    found = rvx.round_trip_error(dfx.ODETerm(field), solver, 0.0, 1.27, 0.25, Y0, ARGS)
    off = jnp.abs(found.error[0]).max()
    assert 1e-5 < off < tolerance


@pytest.mark.heavy
def test_restarts_from_kept_states_lessen_what_a_nearly_exact_one_misses():
    def off(every):
        adjoint = rvx.ReversibleAdjoint(restart_every=every)
        _, gradient = differentiated(rvx.Reversible(EES25()), adjoint)
        return relative_difference(gradient, oracle)

    _, oracle = differentiated(EES25(), DIRECT)
    assert off(1) < 0.1 * off(None) < 1e-9


def test_ees25_is_of_order_two_and_nearly_symmetric_to_order_five():
    term, solver = dfx.ODETerm(field), EES25()

    @jax.jit
    def errors(h):
        known = jnp.zeros(()), h
        state = solver.init(term, *known, Y0, ARGS)
        y1, *_, state, _ = solver.step(term, *known, Y0, ARGS, state, False)
        y0, *_ = solver.backward_step(term, *known, y1, ARGS, (known[0],), state, False)
        return jnp.abs(y0 - Y0).max()

    few, many = errors(0.2), errors(0.1)
    assert 5.8 < np.log2(few / many) < 6.3

    end = lambda num: solve(solver, DIRECT, Y0, ARGS, 1.0, dt0=1 / num).ys
    exact = solve(dfx.Dopri8(), DIRECT, Y0, ARGS, 1.0, dt0=1 / 64).ys
    few, many = [jnp.abs(end(n) - exact).max() for n in (16, 32)]
    assert 1.9 < np.log2(few / many) < 2.2


# What is refused.


@pytest.mark.parametrize(
    "make, says",
    [
        (
            lambda s: rvx.Reversible(s, arithmetic=rvx.FixedPoint()),
            "Leave out `arithmetic`.*`EES25`.*`backward_step`",
        ),
        (lambda s: rvx.Reversible(s, rvx.Symmetric(2)), "Leave out `coupling`.*EES25"),
        (lambda s: rvx.Reversible(dfx.HalfSolver(s)), "Use a Runge-Kutta solver"),
    ],
    ids=["fixed-point", "coupling", "wrapper"],
)
def test_what_a_solver_that_undoes_itself_does_not_take_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make(EES25())


def test_a_solver_that_is_not_wrapped_is_refused_as_any_other():
    with pytest.raises(TypeError, match=r"reversax\.Reversible\(EES25\(\.\.\.\)\)"):
        solve(EES25(), OURS, Y0, ARGS, 1.0)


def test_a_jump_that_would_have_a_solver_forget_is_refused():
    pid = dfx.PIDController(rtol=1e-3, atol=1e-3)
    jumps = dfx.ClipStepSizeController(pid, jump_ts=jnp.array([0.5]))
    with pytest.raises(ValueError, match=r"makes no jumps.*`AdaptiveALF`"):
        solver = rvx.Reversible(AdaptiveALF())
        solve(solver, OURS, Y0, ARGS, 1.0, stepsize_controller=jumps)


def test_the_state_of_an_earlier_solve_is_refused():
    solver, saveat = rvx.Reversible(SOLVERS["ALF"]), dfx.SaveAt(solver_state=True)
    state = solve(solver, OURS, Y0, ARGS, 0.5, saveat=saveat).solver_state
    with pytest.raises(ValueError, match="Resume without the `solver_state`"):
        solve(solver, OURS, Y0, ARGS, 1.0, solver_state=state)


class AdaptiveALF(AsynchronousLeapfrog, dfx.AbstractAdaptiveSolver):
    """Whose error estimate is how far the derivative is from its mirror image."""

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        y1, _, info, state, result = super().step(
            terms, t0, t1, y0, args, solver_state, made_jump
        )
        error = (state[0] - solver_state[0]) * (t1 - t0) ** 2
        return y1, error, info, state, result


@pytest.mark.heavy
def test_an_error_estimate_and_a_memory_go_together():
    pid = dfx.PIDController(rtol=1e-4, atol=1e-4)
    ours, plain = rvx.Reversible(AdaptiveALF()), AdaptiveALF()
    known = dict(stepsize_controller=pid, saveat=SAVED["ts"])
    value, gradient = differentiated(ours, OURS, **known)
    expected, oracle = differentiated(plain, DIRECT, **known)
    assert abs(value - expected) < 1e-12
    assert relative_difference(gradient, oracle) < 1e-10


def test_a_scheme_of_moves_comes_before_a_backward_step():
    cls = type("Both", (rvx.Verlet,), dict(backward_step=EES25.backward_step))
    scheme, verlet = [rvx.Reversible(s).scheme for s in (cls(), rvx.Verlet())]
    assert type(scheme) is type(verlet)
    assert scheme.arithmetic == rvx.FixedPoint()
