"""A reversible step, undone, gives back the pair it began with."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from helpers import BASES, heavy, initial_states, network_arguments, network_field
from hypothesis import given, settings, strategies as st

import reversax as rvx
from reversax import Pair
from reversax._schemes import moves
from reversax._schemes.fields import Fields
from reversax._schemes.increment import make_increment
from reversax._schemes.scheme import Lost, Span
from reversax._schemes.twins import Twins
from reversax._schemes.watch import begin
from reversax._solver import ReversibleState

DTYPES = {"float32": jnp.float32, "float64": jnp.float64}
ONE_STEP = 0.05
# Daily a tableau of two stages and of more, and either kind without a tableau.
DAILY = ("Heun", "Tsit5", "HalfSolver-Heun", "own-midpoint")
SOME_BASES = [
    x if x in DAILY else pytest.param(x, marks=pytest.mark.heavy) for x in BASES
]


def scheme_of(coupling_parameter):
    return Twins(rvx.McCallumFoster(coupling_parameter), rvx.FloatingPoint(), None)


class Shed:
    """What a lane is asked for: the bits that a step lost."""

    def __init__(self, bits):
        self.shed = lambda lost: bits


def there_and_back(scheme, base, pair, dtype, halvings=1, h=ONE_STEP):
    args = network_arguments(dtype)
    increment = make_increment(base, dfx.ODETerm(network_field), args)
    t0, t1 = jnp.asarray(0.3, dtype), jnp.asarray(0.3 + h, dtype)
    start = tuple(scheme.arithmetic.encode(pair))
    diff, nondiff = eqx.partition(increment, False)
    fields = Fields(diff, nondiff, None, None, False, False, False, False)
    lane = Shed(scheme.shed(start, start, halvings))
    context = moves.Context(
        scheme.arithmetic, fields, each=lambda fn, *args: fn(lane, *args)
    )
    steps = scheme.moves(Span(t0, t1), increment.contr(t0, t1), Lost(halvings, 0))
    end, _ = moves.take(steps, context, start)
    return start, moves.undo(steps, context, end).codes[0]


def worst_ulps(a, b, scale):
    dtype = jax.tree.leaves(b)[0].dtype
    largest = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(scale))
    off = max(
        float(jnp.max(jnp.abs(x - y)))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
    return off / (float(jnp.finfo(dtype).eps) * largest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "coupling_parameter",
    [0.5, *heavy(1.0, 0.999, 0.9)],
)
@pytest.mark.parametrize("name", SOME_BASES)
def test_one_step_round_trip_is_within_ulps(name, coupling_parameter, dtype):
    # Six roundings of half an ulp each, amplified by 1/coupling_parameter <= 2; the
    # increments, evaluated at states that differ by as much, add little.
    dtype = DTYPES[dtype]
    y0 = initial_states(dtype=dtype)
    pair = rvx.Pair(y0, y0 + dtype(1e-3))
    scheme = scheme_of(coupling_parameter)
    _, again = there_and_back(scheme, BASES[name], pair, dtype)
    assert worst_ulps(again, tuple(pair), pair) <= 3 / coupling_parameter + 1


@settings(max_examples=60, deadline=None)
@given(
    y=st.floats(-1e6, 1e6),
    z=st.floats(-1e6, 1e6),
    coupling_parameter=st.floats(0.1, 1.0),
)
def test_unmix_undoes_mix(y, z, coupling_parameter):
    coupling = rvx.McCallumFoster(coupling_parameter)
    pair = rvx.Pair(jnp.asarray(y), jnp.asarray(z))
    mixed = coupling.mix(rvx.FloatingPoint(), pair, 0)
    again = coupling.unmix(rvx.FloatingPoint(), mixed, 0, lambda: None)
    # Numbers below 2.3e-308 may be flushed to zero.
    scale = max(abs(y), abs(z), 1e-291) / coupling_parameter
    assert abs(float(again.y) - y) <= 4 * 2.3e-16 * scale
    assert float(again.z) == z


def test_the_step_is_the_published_one():
    """McCallum & Foster, arXiv 2410.11648, equation (4), written out for Euler."""
    lam, h = 0.99, 0.1
    field = lambda t, y: jnp.sin(y) + t
    y0, z0 = jnp.asarray(0.7), jnp.asarray(0.6)
    t0 = jnp.asarray(0.2)
    y1 = lam * y0 + (1 - lam) * z0 + h * field(t0, z0)
    z1 = z0 - (-h) * field(t0 + h, y1)

    solver = rvx.Reversible(dfx.Euler(), rvx.McCallumFoster(lam))
    term = dfx.ODETerm(lambda t, y, args: field(t, y))
    state = ReversibleState((y0, z0), jnp.array(0), begin(y0, t0))
    out, _, _, state, _ = solver.step(
        term, t0, t0 + h, y0, None, state, made_jump=False
    )
    y, z = state.codes
    assert abs(float(out - y1)) < 1e-15
    assert abs(float(y - y1)) < 1e-15
    assert abs(float(z - z1)) < 1e-15


@pytest.mark.parametrize(
    "halvings",
    [4, *heavy(0, 1, 30)],
    ids="{}-halvings".format,
)
@pytest.mark.parametrize(
    "known",
    [pytest.param(True, marks=pytest.mark.heavy), False],
    ids=["known", "at-run-time"],
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SOME_BASES)
def test_one_step_in_fixed_point_is_undone_to_the_bit(name, dtype, known, halvings):
    dtype = DTYPES[dtype]
    if not known:
        halvings = jnp.uint32(halvings)
    y0 = initial_states(dtype=dtype)
    scheme = Twins(rvx.Symmetric(), rvx.FixedPoint(), None)
    pair = Pair(y0, y0 + dtype(1e-3) * jnp.cos(9 * y0))
    start, again = there_and_back(scheme, BASES[name], pair, dtype, halvings)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(start), strict=True):
        assert jnp.array_equal(a, b)


@pytest.mark.parametrize(
    ("per_step", "index", "halvings"),
    [(1 / 4, 2, 0), (1 / 4, 3, 1), (3, 2, 3), ("auto", 0, 4)],
)
def test_the_symmetric_step_is_that_of_its_definition(per_step, index, halvings):
    """Contract the gap about the mean by `lam`, a power of a half; then (F1), (F2)."""
    h, lam = 0.1, 0.5**halvings
    field = lambda t, y: jnp.sin(y) + t
    y0, z0, t0 = jnp.asarray(0.7), jnp.asarray(0.6), jnp.asarray(0.2)
    mean, gap = (y0 + z0) / 2, y0 - z0
    mixed_y, mixed_z = mean + lam * gap / 2, mean - lam * gap / 2
    y1 = mixed_y + h * field(t0, mixed_z)
    z1 = mixed_z + h * field(t0 + h, y1)

    solver = rvx.Reversible(dfx.Euler(), rvx.Symmetric(per_step), rvx.FloatingPoint())
    term = dfx.ODETerm(lambda t, y, args: field(t, y))
    state = ReversibleState((y0, z0), jnp.array(index), begin(y0, t0))
    out, error, _, state, _ = solver.step(
        term, t0, t0 + h, (y0 + z0) / 2, None, state, made_jump=False
    )
    y, z = state.codes
    assert abs(y - y1) < 1e-15 and abs(z - z1) < 1e-15
    assert abs(out - (y1 + z1) / 2) < 1e-15
    assert state.num_steps == index + 1
    # (E): by what the step widens the gap.
    assert abs(error - abs((y1 - z1) - (mixed_y - mixed_z))) < 1e-15


def test_the_twins_move_along_when_the_driver_moves_the_state():
    scheme = scheme_of(0.999)
    pair = rvx.Pair(jnp.array([1.0, 2.0]), jnp.array([1.125, 2.25]))
    y, z = scheme.rebase(pair, pair.y)
    assert jnp.array_equal(y, pair.y) and jnp.array_equal(z, pair.z)
    y, z = scheme.rebase(pair, pair.y + 1.0)
    assert jnp.array_equal(y, pair.y + 1) and jnp.array_equal(z, pair.z + 1)
