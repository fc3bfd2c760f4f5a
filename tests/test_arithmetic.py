"""Fixed-point numbers: what is added is taken back to the bit.

The oracle is Python's integers, of any length.
"""

import math
from fractions import Fraction

import diffrax as dfx
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import reversax as rvx

FIXED = rvx.FixedPoint()
HALVE = jax.jit(FIXED.halve_gap)
SHED = jax.jit(FIXED.shed_bits)
DOUBLE = jax.jit(
    lambda y, z, number, bits: FIXED.double_gap(y, z, number, lambda: bits)
)
DTYPES = {"float32": np.float32, "float64": np.float64}
WORD = {np.float32: 32, np.float64: 64}
by_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
quickly = settings(max_examples=40, deadline=None)


def integers(number):
    """The integers `n` of (Q), as Python has them."""
    high, low = np.asarray(number.high), np.asarray(number.low)
    word = 8 * low.dtype.itemsize
    pairs = zip(high.ravel(), low.ravel(), strict=True)
    return [int(h) * 2**word + int(x) for h, x in pairs]


def unit(dtype, arithmetic=FIXED):
    """`q` of (Q)."""
    exponent = arithmetic.exponent(dtype) + 1 - 2 * WORD[dtype]
    return Fraction(2) ** exponent


def arrays(dtype, largest=1e6):
    width = 8 * np.dtype(dtype).itemsize
    bound = float(dtype(largest))
    return hnp.arrays(dtype, 5, elements=st.floats(-bound, bound, width=width))


@by_dtype
@quickly
@given(data=st.data())
def test_a_code_is_the_nearest_integer_and_its_value_the_nearest_float(dtype, data):
    x = data.draw(arrays(dtype))
    code = FIXED.encode(jnp.asarray(x))
    assert code.low.dtype == f"uint{WORD[dtype]}"
    for n, value, original in zip(integers(code), FIXED.decode(code), x, strict=True):
        assert abs(n - Fraction(float(original)) / unit(dtype)) <= Fraction(1, 2)
        exact = n * unit(dtype)
        # Each word is rounded once, and their sum once more.
        ulp = Fraction(float(np.spacing(np.abs(np.asarray(value)))))
        assert abs(Fraction(float(value)) - exact) <= ulp


@by_dtype
def test_halves_of_the_upper_word_are_coded_exactly(dtype):
    # Both ends of what is left for the lower word, of which one is no signed word.
    half = unit(dtype) * 2 ** (WORD[dtype] - 1)
    numbers = [float(k * half) for k in (-3, -1, 1, 3, 1049677)]
    code = FIXED.encode(jnp.asarray(numbers, dtype))
    assert [n * unit(dtype) for n in integers(code)] == [Fraction(x) for x in numbers]


@by_dtype
def test_a_constant_has_the_code_of_a_number_at_run_time(dtype):
    """XLA folds what follows from constants, and adds them up in another order."""
    for x in (1.0, -1.0, 0.1, 2.0**-20, 3e-9):
        x = dtype(x)
        known = jax.jit(lambda x=x: FIXED.encode(jnp.asarray(x)))()
        assert integers(known) == integers(jax.jit(FIXED.encode)(jnp.asarray(x)))


@by_dtype
@quickly
@given(data=st.data())
def test_sums_are_those_of_the_integers_and_undone_to_the_bit(dtype, data):
    x, d = data.draw(arrays(dtype)), data.draw(arrays(dtype))
    code, increment = FIXED.encode(jnp.asarray(x)), jnp.asarray(d)
    total = FIXED.add(code, increment)
    sums = [
        a + b
        for a, b in zip(integers(code), integers(FIXED.encode(increment)), strict=True)
    ]
    assert integers(total) == sums
    again = FIXED.subtract(total, increment)
    assert integers(again) == integers(code)
    # Half of a step's increments come with a minus sign.
    assert integers(FIXED.add(code, -increment)) == integers(
        FIXED.subtract(code, increment)
    )
    assert jnp.array_equal(FIXED.decode(again), FIXED.decode(code))


@by_dtype
@quickly
@given(data=st.data(), halvings=st.integers(0, 30))
def test_a_halved_gap_is_doubled_to_the_bit_with_the_bits_it_shed(
    dtype, data, halvings
):
    y, z = (FIXED.encode(jnp.asarray(data.draw(arrays(dtype)))) for _ in range(2))
    number = jnp.uint32(halvings)
    bits = SHED(y, z, number)
    assert bits.dtype == jnp.uint32
    halved = HALVE(y, z, number)
    of_all = zip(*map(integers, (y, z, *halved)), bits.tolist(), strict=True)
    for a, b, c, d, shed in of_all:
        # (H1), (H2), in integers without end. The mean stays.
        g = (a - b) >> 1
        assert shed == g % 2**halvings
        assert a + b == c + d
        assert c - d == (a - b) % 2 + 2 * (g >> halvings)
    again = DOUBLE(*halved, number, bits)
    for new, old in zip(again, (y, z), strict=True):
        assert integers(new) == integers(old)
        assert jnp.array_equal(FIXED.decode(new), FIXED.decode(old))
    # Each bit matters.
    for k in {0, halvings - 1} if halvings else ():
        wrong = DOUBLE(*halved, number, bits ^ jnp.uint32(2**k))
        assert integers(wrong[0]) != integers(y)


def _random_gap(dtype, *shape):
    numbers = np.random.default_rng(0).standard_normal((2, *shape)).astype(dtype)
    return [FIXED.encode(jnp.asarray(x)) for x in numbers]


@by_dtype
@pytest.mark.parametrize("halvings", [0, 1, 4, 30])
def test_halvings_known_beforehand_are_those_of_a_number_at_run_time(dtype, halvings):
    y, z = _random_gap(dtype, 5)
    number, bits = jnp.uint32(halvings), FIXED.shed_bits(y, z, halvings)
    halved = FIXED.halve_gap(y, z, halvings)
    at_run_time = HALVE(y, z, number)
    assert [*map(integers, halved)] == [*map(integers, at_run_time)]
    again = FIXED.double_gap(*halved, halvings, lambda: bits)
    assert [*map(integers, again)] == [integers(y), integers(z)]


@by_dtype
@pytest.mark.parametrize("size", [3, 300])
def test_a_lane_without_halvings_keeps_its_numbers_beside_one_that_halves(dtype, size):
    """Few numbers, and so many that leaving them is worth a conditional."""
    y, z = _random_gap(dtype, 3, size)
    for numbers in [0, 0, 0], [0, 3, 1]:
        number = jnp.asarray(numbers, jnp.uint32)
        bits = jax.vmap(SHED)(y, z, number)
        halved = jax.jit(jax.vmap(HALVE))(y, z, number)
        for i, halvings in enumerate(numbers):
            alone = [jax.tree.map(lambda x, i=i: x[i], code) for code in (y, z)]
            expected = FIXED.halve_gap(*alone, halvings) if halvings else alone
            found = [jax.tree.map(lambda x, i=i: x[i], code) for code in halved]
            assert [*map(integers, found)] == [*map(integers, expected)]
        again = jax.jit(jax.vmap(DOUBLE))(*halved, number, bits)
        assert [*map(integers, again)] == [integers(y), integers(z)]


@quickly
@given(y=st.floats(-1e6, 1e6), z=st.floats(-1e6, 1e6), halvings=st.integers(0, 30))
def test_a_gap_of_floats_is_contracted_about_the_mean_and_widened_again(y, z, halvings):
    pair = jnp.float64(y), jnp.float64(z)
    halved = rvx.FloatingPoint().halve_gap(*pair, halvings)
    size = 2.3e-16 * max(abs(y), abs(z), 1e-291)
    assert abs(sum(halved) - sum(pair)) <= 4 * size
    assert abs((halved[0] - halved[1]) - (y - z) / 2**halvings) <= 4 * size
    again = rvx.FloatingPoint().double_gap(*halved, halvings)
    for a, b in zip(again, pair, strict=True):
        assert abs(a - b) <= 8 * 2**halvings * size


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 1e3, 1e6])
def test_single_precision_states_from_1e_minus_6_to_1e6_keep_their_digits(size):
    x = (size * np.linspace(0.5, 1.0, 1001)).astype(np.float32)
    value = FIXED.decode(FIXED.encode(jnp.asarray(x)))
    # Half a unit is 1.1e-13, an ulp of 5e-7 is 5.7e-14: four units in the last place
    # at the smallest size, none from 1e-3 on.
    ulps = np.abs(np.asarray(value) - x) / np.spacing(x)
    assert ulps.max() <= (4 if size == 1e-6 else 0)


def test_sums_of_many_small_increments_are_more_accurate_than_floats():
    """An increment below an ulp of the state is not lost."""
    steps, increment = 10_000, jnp.float32(1e-8)
    add = jax.jit(lambda x: jax.lax.fori_loop(
        0, steps, lambda _, c: FIXED.add(c, increment), FIXED.encode(x)
    ))  # fmt: skip
    assert abs(float(FIXED.decode(add(jnp.float32(1.0)))) - 1.0001) < 2e-7


@by_dtype
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, "too-large"])
def test_what_leaves_the_range_is_nan_and_remains_so(dtype, bad):
    if bad == "too-large":
        bad = 2.0 ** FIXED.exponent(dtype)
    good = FIXED.encode(jnp.array([1.0, 2.0], dtype))
    spoilt = FIXED.add(good, jnp.array([bad, 0.0], dtype))
    assert np.array_equal(FIXED.decode(spoilt), [np.nan, 2], equal_nan=True)
    back = FIXED.add(spoilt, jnp.array([-1.0, 1.0], dtype))
    assert np.array_equal(FIXED.decode(back), [np.nan, 3], equal_nan=True)
    halved = FIXED.halve_gap(spoilt, good, 2)
    assert all(jnp.isnan(FIXED.decode(code)[0]) for code in halved)
    # It is remembered whether it was lost by its own size.
    by_size = jnp.isfinite(bad)
    for code in (spoilt, back, halved):
        assert FIXED.outgrown(code) == by_size
    assert not FIXED.outgrown(good)


@by_dtype
def test_an_increment_or_a_gap_beyond_the_range_is_not_taken_for_a_smaller_one(dtype):
    """Though what it leads to lies within."""
    arithmetic = rvx.FixedPoint(largest=1.0)
    encode = lambda x: arithmetic.encode(jnp.asarray(x, dtype))
    is_lost = lambda code: jnp.isnan(arithmetic.decode(code))
    assert is_lost(arithmetic.add(encode(-0.9), jnp.asarray(1.05, dtype)))
    assert is_lost(arithmetic.subtract(encode(0.9), jnp.asarray(1.05, dtype)))
    apart = encode(0.75), encode(-0.75)
    assert all(map(is_lost, arithmetic.halve_gap(*apart, 1)))
    apart = encode(0.3), encode(-0.3)
    bits = lambda: jnp.zeros((), jnp.uint32)
    assert all(map(is_lost, arithmetic.double_gap(*apart, 1, bits)))
    assert all(map(is_lost, arithmetic.double_gap(*apart, 2, bits)))
    assert all(map(is_lost, arithmetic.double_gap(*apart, 30, bits)))


def test_one_parameter_covers_other_ranges():
    x = jnp.float32(3e8)
    assert jnp.isnan(FIXED.decode(FIXED.encode(x)))
    assert FIXED.exponent(np.float32) == 21
    wide = rvx.FixedPoint(largest=1e9)
    assert wide.exponent(np.float32) == 30
    assert wide.decode(wide.encode(x)) == x
    fine, tiny = rvx.FixedPoint(largest=1e-12), jnp.float32(3.3e-20)
    assert abs(fine.decode(fine.encode(tiny)) - tiny) < 1e-6 * tiny


@pytest.mark.parametrize("largest", [0, -1.0, math.inf, math.nan, "1", True], ids=repr)
def test_a_range_that_is_none_is_refused(largest):
    with pytest.raises(ValueError, match=r"Pass.*positive.*FixedPoint\(largest=.*not"):
        rvx.FixedPoint(largest=largest)


def test_a_range_that_the_dtype_cannot_scale_is_refused():
    with pytest.raises(ValueError, match=r"FixedPoint\(largest=1e\+30\).*float32"):
        rvx.FixedPoint(largest=1e30).encode(jnp.float32(1.0))


@pytest.mark.parametrize("halvings", [1, 4])
def test_differentiation_goes_straight_through(halvings):
    def of(x, d):
        y = FIXED.add(FIXED.encode(x), jnp.sin(d))
        y, z = FIXED.halve_gap(y, FIXED.subtract(FIXED.encode(2 * x), d * x), halvings)
        return FIXED.decode(y) + 3 * FIXED.decode(z)

    def plain(x, d):
        y, z = x + jnp.sin(d), 2 * x - d * x
        c = (y - z) * (1 - 0.5**halvings) / 2
        return (y - c) + 3 * (z + c)

    at = (jnp.float64(0.7), jnp.float64(0.3))
    for differentiate in (jax.grad, jax.jacfwd):
        ours = differentiate(of, argnums=(0, 1))(*at)
        exact = differentiate(plain, argnums=(0, 1))(*at)
        assert jnp.allclose(jnp.stack(ours), jnp.stack(exact), rtol=1e-15)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
def test_half_precision_states_are_added_up_in_single(dtype):
    code = FIXED.encode(jnp.ones(3, dtype))
    assert code.low.dtype == jnp.uint32 and FIXED.decode(code).dtype == dtype
    again = FIXED.subtract(FIXED.add(code, dtype(1e-4)), dtype(1e-4))
    assert jnp.array_equal(again.low, code.low)
    # Units are smaller than any number of half precision, but not nothing.
    other = rvx.FixedPoint.add(FIXED, code, dtype(0))
    other = type(code)(other.high, other.low + 1, other.carrier)
    assert jnp.all(FIXED.difference(other, code) != 0)


@pytest.mark.parametrize(
    "value", [0, -1, 2.0, 0.3, 31, math.inf, math.nan, "4", True, None], ids=repr
)
def test_a_number_of_halvings_that_is_none_is_refused(value):
    with pytest.raises(
        ValueError, match=r"Pass \"auto\".*1/4, as.*halvings_per_step=.*not"
    ):
        rvx.Symmetric(halvings_per_step=value)


def test_a_fraction_of_a_halving_is_taken_however_it_is_written():
    fractions = 1 / 3, Fraction(1, 3), np.float64(1 / 3)
    assert all(rvx.Symmetric(x) == rvx.Symmetric(1 / 3) for x in fractions)
    assert rvx.Symmetric(1.0) == rvx.Symmetric(1)


def test_fixed_point_with_the_published_coupling_is_refused_with_the_reason():
    message = r"Use.*Symmetric.*McCallumFoster.*fraction of a bit"
    with pytest.raises(ValueError, match=message):
        rvx.Reversible(dfx.Euler(), rvx.McCallumFoster(), rvx.FixedPoint())
