"""The search of `reversax compare` for the coarsest steps that are accurate enough."""

import dataclasses
import math

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_compare import CHECKPOINTS, by_heun, exact, linear

import reversax as rvx
from reversax.compare import Candidate, default_candidates
from reversax.compare._gradient import (
    Reference,
    gradient_error,
    gradient_of,
    parts_of,
    split,
)
from reversax.compare._measure import Options, _nothing_of, _Run, compare
from reversax.compare._problem import prepared
from reversax.compare._search import coarsest, step_counts, tolerances
from reversax.compare._setting import Setting, find, method_of, settings_of

COUNTS = step_counts(4096)
SIZES = [1 / n for n in COUNTS]
WANTED = 1e-4


def found(error_of_count, order=2):
    """The number of steps that is found, and the most that were tried."""
    tried = []

    def error_of(index):
        tried.append(COUNTS[index])
        return error_of_count(COUNTS[index])

    return COUNTS[coarsest(error_of, WANTED, SIZES, order)], max(tried)


def falling(n):
    return 1.0 / n**2  # 1e-4 at 100 steps; 108 is the first setting beyond.


def test_settings_are_a_fixed_factor_apart_but_for_integers():
    assert COUNTS[:9] == [1, 2, 3, 4, 5, 6, 7, 8, 10]
    assert COUNTS[-1] == 4096
    ratios = np.divide(COUNTS[9:], COUNTS[8:-1])
    assert np.all((ratios > 1.09) & (ratios < 1.3))  # 2**(1/4) is 1.19.
    ratios = np.divide(tolerances(1e-9)[:-1], tolerances(1e-9)[1:])
    assert np.all((ratios > 1.7) & (ratios < 1.9))  # 10**(1/4) is 1.78.
    assert 1e-9 <= tolerances(1e-9)[-1] < 2e-9


def test_the_first_setting_that_is_accurate_enough_is_found():
    assert found(falling)[0] == 108


@pytest.mark.parametrize("what", [math.inf, 1e300])
def test_coarse_settings_that_fail_or_blow_up_are_passed(what):
    assert found(lambda n: what if n < 91 else falling(n))[0] == 108
    assert found(lambda n: what if n < 200 else falling(n))[0] == 215


def test_a_lone_coarse_setting_that_is_accurate_by_luck_is_not_taken():
    assert found(lambda n: 1e-9 if n == 7 else falling(n))[0] == 108


@pytest.mark.parametrize("missed", [64, 91, 128])
def test_a_lone_miss_is_not_held_against_a_setting(missed):
    assert found(lambda n: math.inf if n == missed else falling(n))[0] == 108


def test_an_error_that_no_longer_falls_ends_the_search():
    steps, most = found(lambda n: max(falling(n), 2e-4))
    assert falling(steps) <= 2e-4
    assert most < 512


def test_an_order_too_low_for_what_is_wanted_ends_the_search():
    steps, most = found(lambda n: 10 / n, order=1)  # 2e-3 at 4096.
    assert most < 256
    assert steps == most  # The nearest of those.
    assert found(lambda n: 0.3 / n, order=1)[0] == 3444


def test_a_plateau_of_tolerances_that_do_not_yet_decide_is_passed():
    every = tolerances(1e-12)
    error_of = lambda i: min(1e-5, every[i])
    assert every[coarsest(error_of, 1e-7, every, None)] == 1e-7


def fewest_by_formula(wanted):
    return min(n for n in COUNTS if gradient_error(by_heun(n), exact()) <= wanted)


@pytest.mark.parametrize(
    "factor",
    [
        pytest.param(10, id="ten times"),
        pytest.param(1 / 10, id="a tenth", marks=pytest.mark.heavy),
    ],
)
def test_the_steps_that_are_found_do_not_depend_on_dt0(factor):
    wanted = 2e-3
    steps = fewest_by_formula(wanted)
    assert steps == 23
    problem = prepared(linear(dt0=factor / steps))
    heun, said = Candidate("Heun", dfx.Heun(), CHECKPOINTS), []
    reference = Reference(0.0, exact(), 0.0, 0.0)
    search = find(problem, heun, reference, wanted, said.append)
    assert search.settings[0] == Setting(num_steps=steps)
    assert sum("compiles" in line for line in said) == 1  # One program for them all.


def errors_of(problem, candidate, settings, reference):
    """By a program of its own for each, as a user would write it."""

    def error_of(setting):
        method = method_of(problem, candidate, setting)
        differentiated, rest = split(problem)
        run = jax.jit(lambda trained: gradient_of(trained, rest, method))
        return gradient_error(parts_of(run(differentiated).parts), reference.parts)

    return [error_of(x) for x in settings]


REVERSIBLE = Candidate(
    "Reversible(Euler)", rvx.Reversible(dfx.Euler()), rvx.ReversibleAdjoint()
)
CONTROLLED = dataclasses.replace(
    REVERSIBLE, stepsize_controller=dfx.PIDController(rtol=1e-9, atol=1e-10)
)


@pytest.mark.parametrize(
    "candidate",
    [
        pytest.param(REVERSIBLE, id="steps"),
        pytest.param(CONTROLLED, id="rtol", marks=pytest.mark.heavy),
    ],
)
def test_what_is_found_is_accurate_as_compiled_by_itself_and_the_next_coarser_is_not(
    candidate,
):
    """More steps than 64, where the halvings depend on the number of steps."""
    problem = prepared(linear(dt0=1 / 200))
    wanted, reference = 1e-5, Reference(0.0, exact(), 0.0, 0.0)
    search = find(problem, candidate, reference, wanted, print)
    assert search.failure is None
    assert not search.driven_apart
    settings = settings_of(problem, candidate)
    here = settings.index(search.settings[0])
    around = settings[here - 1 : here + 1]
    coarser, chosen = errors_of(problem, candidate, around, reference)
    assert chosen <= wanted < coarser
    if candidate is CONTROLLED:
        controller = method_of(problem, candidate, around[1]).stepsize_controller
        assert controller.rtol == around[1].tolerance  # The larger one.
        assert controller.atol == pytest.approx(controller.rtol / 10)
        assert controller.rtol > 1e-9


def test_halvings_are_offered_beside_each_candidate_that_lacked_them(monkeypatch):
    measure = "reversax.compare._measure"
    nothing = Reference(0.0, exact(), 0.0, 0.0)
    monkeypatch.setattr(f"{measure}.solve_reference", lambda *_: nothing)

    def measured(task, candidate, report):
        return _Run(_nothing_of(candidate), None, driven_apart=True)

    monkeypatch.setattr(f"{measure}._measure", measured)
    names = lambda problem: [x.candidate for x in compare(problem, Options(), print)[1]]
    asked = [x.name for x in default_candidates(dfx.Tsit5())]
    got = names(linear())
    more = [x for x in got if x not in asked]
    bases = ["Tsit5", "Bosh3", "Euler"]
    assert more == [f"Reversible({x}, halvings_per_step=4)" for x in bases]
    for name in more:
        beside = name.replace(", halvings_per_step=4", "")
        assert got.index(name) == got.index(beside) + 1
    # Who says what to compare gets that.
    assert names(linear(candidates=[REVERSIBLE])) == [REVERSIBLE.name]


@pytest.mark.heavy
def test_damping_that_takes_more_halvings_is_solved_with_them(monkeypatch):
    monkeypatch.setattr(
        "reversax.compare._measure.default_candidates", lambda *_, **__: [REVERSIBLE]
    )
    rate = 300.0  # Too much for 177, in one unit of time.
    problem = linear(
        terms=dfx.ODETerm(lambda t, y, a: -a * (y - jnp.cos(t))),
        args=jnp.array(rate),
        dt0=1 / 512,
        max_steps=512,
    )
    _, (default, more) = compare(problem, Options(repeats=1), print)
    assert "drove the twins apart" in default.failure
    assert "halvings_per_step=4" in more.solver
    assert more.failure is None
    assert more.gradient_error <= Options().tolerance
    assert rate / more.num_steps < 4 * np.log(2)
