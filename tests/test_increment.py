"""The increment of a base solver is what its own step adds to the state."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import pytest
from helpers import (
    BASES,
    TABLEAU_BASES,
    OwnMidpoint,
    RungeKutta4,
    initial_states,
    network_arguments,
    network_field,
)

from reversax._schemes.increment import (
    StepIncrement,
    TableauIncrement,
    _tableau,
    make_increment,
)
from reversax._schemes.rows import row
from reversax._schemes.scheme import Span
from reversax._schemes.twins import legs_of

STAGES_FOR_THE_SUM = {
    "Euler": 1,
    "Heun": 2,
    "Midpoint": 2,
    "Ralston": 2,
    "Bosh3": 3,
    "Tsit5": 6,
    "Dopri5": 6,
    "Dopri8": 13,
    "own-RungeKutta4": 4,
}


def step_of(solver, t0, t1, y0, args, term):
    state = solver.init(term, t0, t1, y0, args)
    return solver.step(term, t0, t1, y0, args, state, made_jump=True)


def evaluate(increment, t0, t1, y, *, error=False, dense=False):
    """The increment over the forward half of a step, or over the reverse half."""
    early, late = jnp.minimum(t0, t1), jnp.maximum(t0, t1)
    legs = legs_of(Span(early, late), increment.contr(early, late))
    leg = row(legs, 0 if t0 < t1 else 1)
    return increment(leg, y, error=error, dense=dense)


def same_to_ulps(a, b, scale, ulps=8):
    bound = ulps * jnp.finfo(a.dtype).eps * (1 + jnp.max(jnp.abs(scale)))
    return bool(jnp.all(jnp.abs(a - b) <= bound))


# A tableau of two stages and of more, and either kind without a tableau.
DAILY = ("Heun", "Tsit5", "HalfSolver-Heun", "own-midpoint")


@pytest.mark.parametrize("times", [(0.3, 0.37), (0.37, 0.3)], ids=["forth", "back"])
@pytest.mark.parametrize(
    "name",
    [x if x in DAILY else pytest.param(x, marks=pytest.mark.heavy) for x in BASES],
)
def test_increment_is_what_the_solver_adds(name, times):
    # A sum of up to 13 stages in another order: 8 ulps of the state's size.
    solver, term = BASES[name], dfx.ODETerm(network_field)
    args, y0 = network_arguments(), initial_states()
    t0, t1 = map(jnp.asarray, times)
    y1, error, dense_info, _, _ = step_of(solver, t0, t1, y0, args, term)
    increment = make_increment(solver, term, args)
    ours = evaluate(increment, t0, t1, y0, error=True, dense=True)
    assert same_to_ulps(y0 + ours.increment, y1, y0)
    assert (error is None) == (ours.error is None)
    if error is not None:
        assert ours.error is not None
        assert same_to_ulps(ours.error, error, y0)
    assert dense_info.keys() == ours.dense_info.keys()
    for key in dense_info:
        assert same_to_ulps(ours.dense_info[key], dense_info[key], y0)


@pytest.mark.parametrize("name", TABLEAU_BASES)
def test_closing_an_increment_leaves_its_value(name):
    solver, term = BASES[name], dfx.ODETerm(network_field)
    args, y0 = network_arguments(), initial_states()
    t0, t1 = jnp.asarray(0.3), jnp.asarray(0.4)
    open_ = make_increment(solver, term, args)
    closed = open_.close(t0, y0)
    ours, theirs = (evaluate(x, t0, t1, y0).increment for x in (closed, open_))
    assert same_to_ulps(ours, theirs, y0)


def test_closing_an_increment_gathers_what_the_field_closes_over():
    found = []

    @jax.make_jaxpr
    def trace(w):
        term = dfx.ODETerm(lambda t, y, args: jnp.tanh(y @ w))
        increment = make_increment(dfx.Heun(), term, None)
        closed = increment.close(jnp.asarray(0.0), initial_states())
        found.extend(x for x in jax.tree.leaves(closed) if x is w)
        return w

    # Inside a transformation `w` is a tracer; as a leaf it can be differentiated.
    trace(jnp.eye(3))
    assert len(found) == 1


@pytest.mark.parametrize("name", TABLEAU_BASES)
def test_tableau_bases_take_the_fast_path(name):
    increment = make_increment(BASES[name], dfx.ODETerm(network_field), None)
    assert isinstance(increment, TableauIncrement)


@pytest.mark.parametrize("name", sorted(BASES.keys() - TABLEAU_BASES.keys()))
def test_other_bases_go_through_their_own_step(name):
    increment = make_increment(BASES[name], dfx.ODETerm(network_field), None)
    assert isinstance(increment, StepIncrement)


def test_a_solver_of_other_argument_names_is_called_by_position():
    class Renamed(OwnMidpoint):
        def step(self, terms, a, b, y, args, state, jumped):
            return super().step(terms, a, b, y, args, state, jumped)

    increment = make_increment(Renamed(), dfx.ODETerm(lambda t, y, args: -y), None)
    one = jnp.asarray(1.0)
    out = evaluate(increment, one, 2 * one, one)
    assert out.increment == -0.5


def test_a_tableau_solver_with_a_step_of_its_own_goes_through_that():
    class Doubled(RungeKutta4):
        def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
            y1, *rest = super().step(terms, t0, t1, y0, args, solver_state, made_jump)
            return (y1 + (y1 - y0), *rest)

    assert _tableau(Doubled()) is None


@pytest.mark.parametrize("name", TABLEAU_BASES)
def test_only_stages_behind_the_sum_are_evaluated(name):
    tableau = _tableau(BASES[name])
    assert tableau is not None
    assert len(tableau.stages_behind(tableau.b)) == STAGES_FOR_THE_SUM[name]
    counted = []

    def field(t, y, args):
        counted.append(t)
        return -y

    increment = make_increment(BASES[name], dfx.ODETerm(field), None)
    one = jnp.asarray(1.0)
    evaluate(increment, one, 2 * one, one)
    assert len(counted) == STAGES_FOR_THE_SUM[name]


def test_a_field_of_another_dtype_is_refused_with_both_named():
    # `ODETerm` would promote; a term that does not must not slip through.
    class Narrow(dfx.ODETerm):
        def vf_prod(self, t, y, args, control):
            return (self.vf(t, y, args) * control).astype(jnp.float32)

    increment = make_increment(dfx.Heun(), Narrow(lambda t, y, args: -y), None)
    one = jnp.asarray(1.0)
    with pytest.raises(ValueError, match=r"Cast.*float64.*gave.*float32"):
        evaluate(increment, one, 2 * one, one)
