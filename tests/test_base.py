"""What a base must be: nothing it remembers counts, and a step of no length leads
nowhere."""

from typing import ClassVar

import diffrax as dfx
import jax
import jax.numpy as jnp
import pytest
from helpers import OwnMidpoint, quick

import reversax as rvx
from reversax._schemes.base import check_memory

OURS = rvx.ReversibleAdjoint()
TERM = dfx.ODETerm(lambda t, y, args: jax.tree.map(lambda x: args - 0.5 * x, y))
Y0 = jnp.array([0.2, 0.4])


def solve(base, args=1.4, y0=Y0, adjoint=OURS, term=TERM, **options):
    solver = rvx.Reversible(base, **options)
    times = dict(t0=0.0, t1=4.0, dt0=0.05)
    return dfx.diffeqsolve(
        term, solver, **times, y0=y0, args=args, adjoint=adjoint, max_steps=128
    ).ys


class Wrapper(dfx.AbstractWrappedSolver):
    """A user's own, around Euler."""

    solver: dfx.AbstractSolver = dfx.Euler()
    term_structure: ClassVar = dfx.AbstractTerm
    interpolation_cls: ClassVar = dfx.LocalLinearInterpolation

    def order(self, terms):
        return 1

    def init(self, terms, t0, t1, y0, args):
        return None

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def advance(self, terms, t0, t1, y0, args):
        return self.solver.step(terms, t0, t1, y0, args, None, False)[0]


class AdamsBashforth(Wrapper):
    """Multi-step: an increment extrapolated from this one and the one before."""

    def init(self, terms, t0, t1, y0, args):
        return jnp.zeros_like(y0), False

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        before, any_before = solver_state
        now = self.advance(terms, t0, t1, y0, args) - y0
        y1 = y0 + jnp.where(any_before, 1.5 * now - 0.5 * before, now)
        dense = dict(y0=y0, y1=y1)
        return y1, None, dense, (now, True), dfx.RESULTS.successful


class Counting(Wrapper):
    """Which carries an array that its steps do not read, inside a `jit` of its own."""

    def init(self, terms, t0, t1, y0, args):
        return jnp.zeros(())

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        advance = jax.jit(lambda t0, t1, y0, args, n: (self.advance(
            terms, t0, t1, y0, args), n + 1))  # fmt: skip
        y1, count = advance(t0, t1, y0, args, solver_state)
        return y1, None, dict(y0=y0, y1=y1), count, dfx.RESULTS.successful


class FirstSameAsLast(Wrapper):
    """Which keeps the field's value at the end of a step."""

    def init(self, terms, t0, t1, y0, args):
        return terms.vf(t0, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        y1 = y0 + terms.prod(solver_state, terms.contr(t0, t1))
        last = terms.vf(t1, y1, args)
        return y1, None, dict(y0=y0, y1=y1), last, dfx.RESULTS.successful


ADJOINTS = {"ours": OURS, "Diffrax's": dfx.RecursiveCheckpointAdjoint()}


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("base", [AdamsBashforth(), dfx.HalfSolver(AdamsBashforth())])
def test_a_base_whose_steps_read_what_earlier_ones_left_is_refused(base, adjoint):
    message = r"Keep the plain `\w+`.*arrays that the step before left.*memoryless=True"
    with pytest.raises(ValueError, match=message):
        solve(base, adjoint=ADJOINTS[adjoint])


@pytest.mark.parametrize(
    "base",
    [
        *(Counting(), OwnMidpoint()),
        *(dfx.HalfSolver(dfx.Tsit5()), dfx.ShARK(), dfx.StratonovichMilstein()),
    ],
    ids=lambda base: type(base).__name__,
)
def test_no_word_is_needed_for_a_base_that_reads_nothing_or_is_diffrax_own(base):
    check_memory(base, False, (TERM, 0.0, Y0, 1.0))


def test_with_the_users_word_a_kept_stage_is_found_again_by_the_base():
    with pytest.raises(ValueError, match=r"memoryless=True"):
        solve(FirstSameAsLast())
    loss = lambda base, **options: jax.jit(
        jax.value_and_grad(lambda args: jnp.sum(solve(base, args, **options) ** 2)),
        **quick(),
    )(1.4)
    value, gradient = loss(FirstSameAsLast(), memoryless=True)
    # It is Euler's method, written otherwise.
    value_of_euler, gradient_of_euler = loss(dfx.Euler())
    assert abs(value - value_of_euler) < 1e-13
    assert abs(gradient - gradient_of_euler) < 1e-13


class Resetting(dfx.Euler):
    """A spiking neuron: the potential begins anew where it exceeds one, and the second
    leaf says whether it just did."""

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        y1, *more = super().step(terms, t0, t1, y0, args, solver_state, made_jump)
        spikes = jnp.where(y1[0] > 1, 1.0, 0.0)
        y1 = y1[0] * (1 - spikes), spikes
        return y1, more[0], dict(y0=y0, y1=y1), *more[2:]


RESTING = jnp.array(0.0), jnp.array(0.0)
NEURON = dfx.ODETerm(lambda t, y, drive: (drive - 0.5 * y[0], jnp.zeros(())))
RESETS = r"base whose step of no length returns its state.*diffrax\.Event"


def test_a_base_that_resets_the_state_is_refused_when_a_solve_under_any_adjoint_does():
    adjoint = ADJOINTS["Diffrax's"]
    potential = lambda base, drive: solve(base, drive, RESTING, adjoint, NEURON)[0]
    run = jax.jit(lambda drive: potential(Resetting(), drive), **quick())
    with pytest.raises(Exception, match=RESETS):
        jax.block_until_ready(run(1.4))
    # Where nothing is reset it is Euler's method.
    assert abs(run(0.3) - potential(dfx.Euler(), 0.3)).max() < 1e-15


def test_one_lane_that_is_reset_is_enough_and_so_is_a_backward_pass():
    def loss(drive):
        return jnp.sum(solve(Resetting(), drive, RESTING, term=NEURON)[0])

    gradients = jax.jit(jax.vmap(jax.grad(loss)), **quick())
    with pytest.raises(Exception, match=RESETS):
        jax.block_until_ready(gradients(jnp.array([0.3, 1.4])))
