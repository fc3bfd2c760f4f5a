"""How many halvings each step makes, and that both passes make the same ones."""

import math
from fractions import Fraction

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    SameScheme,
    network_arguments,
    network_field,
    quick,
    relative_difference,
)
from hypothesis import given, settings, strategies as st

import reversax as rvx
from reversax._numbers.schedule import OverTime, PerStep, over_steps, over_time
from reversax._schemes import coupling
from reversax._walk import tape

Y0 = jnp.array([[0.3, -0.7, 1.1]])
ARGS = network_arguments()
PID = dfx.PIDController(rtol=1e-6, atol=1e-9)
quickly = settings(max_examples=40, deadline=None)


def made(schedule, times):
    """By each of these steps."""
    of_step = jax.jit(
        jax.vmap(lambda k, t0, t1: jnp.asarray(schedule.of_step(k, t0, t1)))
    )
    return np.asarray(of_step(jnp.arange(len(times) - 1), times[:-1], times[1:]), int)


def steps(num):
    return jnp.linspace(0.0, 1.0, num + 1)


@pytest.mark.parametrize("num", [1, 7, 64, 65, 100, 255, 256, 700, 1023, 1024, 5000])
def test_a_known_number_of_steps_shares_256_bits_evenly(num):
    """(P), by exact fractions."""
    schedule = over_steps(jnp.array(num))
    rate = min(max(Fraction(256, num), Fraction(1, 4)), Fraction(4))
    until = [math.floor(k * rate) for k in range(num + 1)]
    found = made(schedule, steps(num))
    assert found.tolist() == np.diff(until).tolist()
    assert found.max() <= 4 and found.sum() <= max(256, num // 4)
    assert found.sum() <= schedule.most(num)


def test_steps_without_an_end_make_a_quarter_of_a_halving():
    found = made(over_steps(jnp.array(-1)), steps(40))
    assert found.tolist() == [0, 0, 0, 1] * 10


@quickly
@given(st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=300))
def test_steps_of_a_controller_share_320_bits_by_their_length(lengths):
    """Four at most, one at least at every fourth step, else what (T) says."""
    times = np.concatenate([[0.0], np.cumsum(lengths)])
    schedule = over_time(jnp.array(0.0), jnp.array(times[-1]))
    found = made(schedule, jnp.asarray(times))
    share = np.floor(320 * times / times[-1])
    least = np.arange(len(lengths)) % 4 == 3
    expected = np.maximum(np.minimum(np.diff(share), 4), least)
    # Round-off of a time may move a bit to the next step.
    assert np.abs(found - expected).max() <= 1
    assert found.max() <= 4 and found[3::4].min(initial=1) >= 1
    assert found.sum() <= schedule.most(len(lengths))


def test_an_interval_without_length_or_end_has_the_least_halvings():
    for t1, times in ((0.0, jnp.zeros(9)), (jnp.inf, steps(8))):
        found = made(OverTime(jnp.array(0.0), jnp.array(t1)), times)
        assert found.tolist() == [0, 0, 0, 1] * 2


@pytest.mark.parametrize("halvings", [1, 3, 30, 1 / 3, 1 / 4])
def test_a_number_given_is_made_in_phase_with_the_steps_before(halvings):
    schedule = rvx.Symmetric(halvings).schedule(jnp.array(5), over_steps(jnp.array(9)))
    assert isinstance(schedule, PerStep)
    rate = Fraction(halvings).limit_denominator(100)
    expected = [math.floor((k + 1) * rate) - math.floor(k * rate) for k in range(5, 25)]
    assert made(schedule, steps(20)).tolist() == expected
    assert sum(expected) <= schedule.most(20)


def _gradient(adjoint, args, length, coupling, kwargs):
    dtype = args[0].dtype
    # Of which the increments fill the bits to the last.
    largest = 2.0**30 if dtype == jnp.float32 else 2.0**75
    solver = rvx.Reversible(dfx.Heun(), coupling, rvx.FixedPoint(largest=largest))
    t0, t1 = jnp.zeros((), dtype), jnp.full((), 2, dtype)

    def of(args):
        solution = dfx.diffeqsolve(
            dfx.ODETerm(network_field), solver, t0, t1, length, y0=Y0.astype(dtype),
            args=args, adjoint=adjoint, **kwargs,
        )  # fmt: skip
        return jnp.sum(solution.ys**2)

    return jax.grad(of)(args)


_gradient_by = {
    alike: eqx.filter_jit(_gradient, **quick(None, rvx.FixedPoint(), adapts=alike))
    for alike in (True, False)
}


def gradient(adjoint, num, coupling=rvx.Symmetric(), dtype=jnp.float64, **kwargs):  # noqa: B008
    """Of a solve of so many steps; compiled once for all of the same `max_steps`."""
    args = jax.tree.map(lambda x: x.astype(dtype), ARGS)
    length = None if num is None else jnp.asarray(2 / num, dtype)
    # One more than needed: round-off of the length may make it one.
    of = _gradient_by[isinstance(adjoint, rvx.ReversibleAdjoint) or num is None]
    return of(adjoint, args, length, coupling, dict(max_steps=128) | kwargs)


@pytest.mark.parametrize(
    ("nums", "dtype"),
    [
        ((3, 63, 100, 127), jnp.float32),
        ((300, 1024, 1500), jnp.float64),
        pytest.param((3, 63, 100, 127), jnp.float64, marks=pytest.mark.heavy),
        pytest.param((300, 1024, 1500), jnp.float32, marks=pytest.mark.heavy),
    ],
    ids=str,
)
def test_constant_steps_are_undone_to_the_bit_however_many_share_the_bits(nums, dtype):
    """The certificate allows no bit: also where those of a step fill two words."""
    kwargs = dict(dtype=dtype, max_steps=nums[-1] + 1)
    for num in nums:
        found = gradient(rvx.ReversibleAdjoint(), num, **kwargs)
        assert jnp.isfinite(found[0]).all()


# Daily: how many are made, above; that so many are undone, in `test_pair.py`; and that
# both passes make the same ones, below.
@pytest.mark.heavy
@pytest.mark.parametrize("halvings", [3, 1, 5, 30, 1 / 4, 1 / 3])
def test_any_number_of_halvings_is_undone_to_the_bit(halvings):
    coupling = rvx.Symmetric(halvings)
    found = gradient(rvx.ReversibleAdjoint(), 50, coupling)
    direct = gradient(dfx.DirectAdjoint(), 50, coupling)
    assert relative_difference(found, direct) <= 1e-12


@pytest.mark.parametrize("num", [pytest.param(50, marks=pytest.mark.heavy), 100])
def test_the_gradient_is_that_of_the_same_halvings(num):
    found = gradient(rvx.ReversibleAdjoint(), num)
    direct = gradient(SameScheme(dfx.DirectAdjoint()), num)
    assert relative_difference(found, direct) <= 1e-12
    # Without being told, a solver makes four at each step.
    of_four = gradient(dfx.DirectAdjoint(), num)
    assert (relative_difference(found, of_four) <= 1e-12) == (num == 50)


@pytest.mark.heavy
def test_the_gradient_of_adaptive_steps_is_that_of_the_same_halvings():
    kwargs = dict(stepsize_controller=PID, max_steps=4096)
    found = gradient(rvx.ReversibleAdjoint(), None, **kwargs)
    direct = gradient(SameScheme(dfx.DirectAdjoint()), None, **kwargs)
    assert relative_difference(found, direct) <= 1e-12


DAMPED = dict(coupling=rvx.Symmetric(3))


def test_a_halving_too_few_undone_is_noticed(monkeypatch):
    unmix = coupling.Symmetric.unmix

    def too_few(self, arithmetic, pair, halvings, shed_bits):
        return unmix(self, arithmetic, pair, halvings - 1, shed_bits)

    monkeypatch.setattr(coupling.Symmetric, "unmix", too_few)
    jax.clear_caches()
    with pytest.raises(eqx.EquinoxRuntimeError, match="did not find the initial state"):
        gradient(rvx.ReversibleAdjoint(), 30, **DAMPED)
    jax.clear_caches()


@pytest.mark.parametrize("by", [pytest.param(1, marks=pytest.mark.heavy), 3])
def test_bits_counted_from_the_wrong_step_are_noticed(monkeypatch, by):
    read = tape.Tape.shed

    def wrong(self, lost):
        return read(self, lost._replace(before=jnp.maximum(lost.before, by) - by))

    monkeypatch.setattr(tape.Tape, "shed", wrong)
    jax.clear_caches()
    with pytest.raises(eqx.EquinoxRuntimeError, match="did not find the initial state"):
        gradient(rvx.ReversibleAdjoint(), 30, **DAMPED)
    jax.clear_caches()


def test_bits_beyond_the_end_of_a_word_are_kept(monkeypatch):
    """What a step sheds may begin in one word and end in the next."""
    add = tape.Recorder._add_bits

    def first_word_only(self, shed, halvings, keep, new, rows):
        self = eqx.tree_at(
            lambda s: s.plan.schedule, self, rvx.Symmetric(4).schedule(0, None)
        )
        return add(self, shed, halvings, keep, new, rows)

    monkeypatch.setattr(tape.Recorder, "_add_bits", first_word_only)
    jax.clear_caches()
    with pytest.raises(eqx.EquinoxRuntimeError, match="did not find the initial state"):
        gradient(rvx.ReversibleAdjoint(), 30, **DAMPED)
    jax.clear_caches()
