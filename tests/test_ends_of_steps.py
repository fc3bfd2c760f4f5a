"""Saved times that are ends of constant steps, up to round-off.

Which step such a time falls into is a matter of the last bit of the step's end. XLA
computes `t0 + (t1 - t0)*k/n` with other bits where `n` is a constant of the program and
where it is not, so that a pass which computes the ends again may find the time in
another step: then its value is differentiated in none, docs/ends_of_steps.md. Here both
passes have the same bits.
"""

import diffrax as dfx
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SCHEMES, SameScheme, quick

import reversax as rvx
from reversax._walk.clock import Clock
from reversax._walk.times import PrescribedTimes

# Steps, end, and how many equally spaced times are saved: in each of these the default
# adjoint of Diffrax 0.7.2 loses the derivative of a saved value.
SETTINGS = {"80-4-20": (80, 4, 20), "80-2-40": (80, 2, 40), "50-5-50": (50, 5, 50)}
MOST_STEPS, MOST_SAVED = 80, 50
DTYPES = [jnp.float64, pytest.param(jnp.float32, marks=pytest.mark.heavy)]
SCHEME = SCHEMES["published"]
ORACLE = SameScheme(dfx.DirectAdjoint())


def pendulum(t, y, args):
    return jnp.stack([args[0] * y[1], -args[1] * jnp.sin(y[0]) - args[2] * y[1]])


def derivatives(args, times, adjoint):
    """Of the angle at each of the saved times, a row for each."""
    t0, t1, dt0, ts = times

    def angles(args):
        return dfx.diffeqsolve(
            dfx.ODETerm(pendulum),
            rvx.Reversible(dfx.Euler(), *SCHEME),
            t0,
            t1,
            dt0,
            jnp.array([1.0, 0.3], args.dtype),
            args,
            saveat=dfx.SaveAt(ts=ts, fn=lambda t, y, args: y[0]),
            adjoint=adjoint,
            max_steps=MOST_STEPS,
        ).ys

    return jax.jacrev(angles)(args)


@pytest.fixture(scope="module")
def direct():
    """One program for all settings, the times of which are its arguments: it, too, has
    the same bits wherever it computes an end."""
    of = lambda args, times: derivatives(args, times, ORACLE)
    return jax.jit(of, **quick(ORACLE, SCHEME[1]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "setting",
    [
        pytest.param(s, id=name, marks=[pytest.mark.heavy] * (name != "80-4-20"))
        for name, s in SETTINGS.items()
    ],
)
def test_each_saved_value_has_its_derivative_where_times_are_constants(
    direct, setting, dtype
):
    """Each of the two passes is a program of its own, since nothing is jitted around
    them: what is a constant in one need not be one in the other."""
    num_steps, end, num_saved = setting
    ts = np.full(MOST_SAVED, end, dtype)  # The last one is saved again and again.
    ts[:num_saved] = np.asarray(jnp.linspace(0, end, num_saved + 1, dtype=dtype)[1:])
    args = jnp.array([1.0, 2.0, 0.1], dtype)
    times = 0.0, float(end), end / num_steps, ts
    ours = derivatives(args, times, rvx.ReversibleAdjoint())
    expected = direct(args, [jnp.asarray(x, dtype) for x in times])
    sizes = jnp.linalg.norm(expected, axis=1)
    assert jnp.all(sizes > 0.01), "the oracle is blind"
    # Measured: 5e-15 and 1e-5. (The published scheme loses digits on the way back.)
    bound = 1e-12 if dtype == jnp.float64 else 1e-3
    assert jnp.all(jnp.linalg.norm(ours - expected, axis=1) <= bound * sizes)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize("start", [0.0, 0.3])
def test_ends_of_steps_have_the_same_bits_whether_times_are_constants(start, dtype):

    def ends(num_steps, t0, t1):
        state = jnp.array(1), num_steps, t0, t1
        clock = Clock(t0, t1, t0, dfx.ConstantStepSize(), state, [])
        times = PrescribedTimes(clock, just_below_t1=t1)

        def write(index, ends):
            return ends.at[index].set(jnp.stack(times.interval(index)))

        return lax.fori_loop(0, MOST_STEPS, write, jnp.zeros((MOST_STEPS, 2), dtype))

    of_arguments = jax.jit(ends)
    for num_steps, end, _ in SETTINGS.values():
        times = jnp.asarray(num_steps), *jnp.array([start, start + end], dtype)
        of_constants = jax.jit(lambda times=times: ends(*times))
        np.testing.assert_array_equal(of_constants(), of_arguments(*times))
