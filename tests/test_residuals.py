"""What an evaluation keeps for its pull-back: as few bytes as can be."""

import itertools
import math

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import program_of, run
from hypothesis import given, settings, strategies as st

import reversax as rvx
from reversax._schemes import fields
from reversax._xla import isolation
from reversax._xla.isolation import evaluate_isolated
from reversax._xla.residuals import halves_of

X = jnp.linspace(0.1, 1, 5)


def assert_halves_make_the_whole(program, halves, number, *args):
    whole = run(program, *args)
    out = run(halves.first, *args)
    results, kept = out[:number], out[number:]
    made = [*results, *run(halves.second, *args, *kept)]
    for x, y in zip(made, whole, strict=True):
        np.testing.assert_array_equal(x, y)


def test_two_halves_of_a_program_make_what_it_makes():
    def fn(a, x):
        s = jnp.sin(x)
        return a * s, a, s, jnp.cos(x) * s, jnp.cos(a) * x

    program = program_of(fn, 0.3, X)
    halves = halves_of(program, 1)
    assert [x.shape for x in halves.first.out_avals] == [(5,), (5,)]
    assert_halves_make_the_whole(program, halves, 1, 0.3, X)


def prints(x):
    jax.debug.print("{}", x)
    return jnp.sin(x), jnp.cos(x)


def needs_a_key(x):
    key = jax.random.fold_in(jax.random.key(0), x[0].astype(int))
    return jax.random.normal(key, (5,)), x + jax.random.normal(key, (5,))


@pytest.mark.parametrize(
    "fn",
    [
        pytest.param(lambda x: (jnp.sin(x), x), id="nothing-but-the-result"),
        prints,
        needs_a_key,
    ],
)
def test_some_programs_have_no_halves(fn):
    assert halves_of(program_of(fn, X), 1) is None


OPERATIONS = {
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "sin": lambda a, b: jnp.sin(a),
    "exp": lambda a, b: jnp.exp(a),
    "sum": lambda a, b: jnp.broadcast_to(a.sum(), a.shape),
}
NUMBERS = jnp.linspace(0.1, 0.2, 20)


def assert_nothing_smaller_would_do(operations, asked):
    """Of all sets of arrays that could be kept. `operations` are names, each with two
    numbers of what was made before, or -1 for the argument."""

    def fn(x):
        made = {-1: x}
        for i, (name, *reads) in enumerate(operations):
            made[i] = OPERATIONS[name](*(made[j] for j in reads))
        return [made[i] for i in (len(operations) - 1, *asked)]

    program = program_of(fn, NUMBERS)
    halves = halves_of(program, 1)
    least = least_bytes(program.jaxpr)
    if halves is None:
        # All that is asked for is the argument, or is kept.
        kept = {x for x in program.jaxpr.outvars[1:] if x not in program.jaxpr.invars}
        assert sum(bytes_with_address(x.aval) for x in kept) == least
        return
    assert_halves_make_the_whole(program, halves, 1, NUMBERS)
    kept = halves.first.out_avals[1:]
    arrays = [x for x in kept if x.size == NUMBERS.size]
    # The others are single numbers in one array, each of which counts as one.
    numbers = sum(x.size for x in kept) - len(arrays) * NUMBERS.size
    assert sum(map(bytes_with_address, arrays)) + 128 * numbers == least


def bytes_with_address(aval):
    """In whole steps of 64, and 64 more."""
    return 64 * (1 + math.ceil(aval.size * aval.dtype.itemsize / 64))


def least_bytes(jaxpr):
    again = {"add", "mul", "broadcast_in_dim"}
    result, *asked = jaxpr.outvars
    needed, first = {id(result)}, []
    for equation in reversed(jaxpr.eqns):
        if any(id(x) in needed for x in equation.outvars):
            needed.update(map(id, equation.invars))
            first.append(equation)
    rest = [x for x in jaxpr.eqns if x not in first]

    def is_enough(kept):
        known = {id(x) for x in [*jaxpr.invars, *kept]}
        for equation in jaxpr.eqns:
            may_be_made = equation.primitive.name in again or equation in rest
            if may_be_made and all(id(x) in known for x in equation.invars):
                known.update(map(id, equation.outvars))
        return all(id(x) in known for x in asked)

    candidates = [x for equation in first for x in equation.outvars]
    subsets = itertools.chain.from_iterable(
        itertools.combinations(candidates, n) for n in range(len(candidates) + 1)
    )
    of = lambda kept: sum(bytes_with_address(x.aval) for x in kept)
    return min(of(kept) for kept in subsets if is_enough(kept))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_nothing_smaller_would_do_of_any_program(data):
    reads = lambda i: st.integers(-1, i - 1)
    names = data.draw(st.lists(st.sampled_from(sorted(OPERATIONS)), min_size=2))[:7]
    operations = [
        (name, data.draw(reads(i)), data.draw(reads(i))) for i, name in enumerate(names)
    ]
    places = st.integers(-1, len(names) - 1)
    asked = data.draw(st.lists(places, min_size=1, unique=True))
    assert_nothing_smaller_would_do(operations, asked)


@pytest.mark.parametrize(
    "operations, asked",
    [
        pytest.param(
            [("sin", -1, -1), ("exp", -1, -1), ("mul", 0, 1), ("mul", 2, 2)],
            [2],
            id="a-product-and-not-what-it-is-of",
        ),
        pytest.param(
            [("sin", -1, -1), ("add", 0, -1), ("mul", 0, 1), ("mul", 2, 1)],
            [1, 2, 3],
            id="one-of-which-three-follow",
        ),
        pytest.param(
            [("sin", -1, -1), ("sum", 0, 0), ("mul", 1, 0), ("exp", 2, 2)],
            [1],
            id="a-number-and-not-the-array-that-it-is-all-over",
        ),
    ],
)
def test_nothing_smaller_would_do(operations, asked):
    assert_nothing_smaller_would_do(operations, asked)


def test_a_slice_of_few_numbers_costs_nothing_and_one_of_many_does():
    """One takes numbers apart, and of the other each is read in several places."""

    def fn(x):
        s = jnp.exp(x)
        later = s[1:]
        product = s[:-1] * later
        return product.sum(), s, later, product

    def kept(x):
        return [x.size for x in halves_of(program_of(fn, x), 1).first.out_avals[1:]]

    assert kept(jnp.ones(3)) == [3]
    assert sorted(kept(jnp.ones(30))) == [29, 29, 30]


def test_of_what_is_small_there_is_one_array_of_each_dtype():
    def fn(x):
        s, number = jnp.exp(x), jnp.exp(x[0])
        several = jnp.exp(x[:3].astype(jnp.float32))
        one, two = jnp.argmax(x), jnp.cumsum(x > 0.5)[:2]
        sine = jnp.sin(number)
        kept = s, number, several, sine, one, two
        return s.sum() + sine + several.sum() + one + two[0], *kept

    program = program_of(fn, jnp.linspace(0.1, 1, 20))
    halves = halves_of(program, 1)
    kinds = [(str(x.dtype), x.size) for x in halves.first.out_avals[1:]]
    assert sorted(kinds) == [
        ("float32", 3),
        ("float64", 2),
        ("float64", 20),
        ("int64", 3),
    ]
    assert_halves_make_the_whole(program, halves, 1, jnp.linspace(0.1, 1, 20))


def largest(a, y):
    return jnp.max(a * y + 0.3) * jnp.ones_like(y) - y


def of_the_largest(a, y):
    return jnp.tanh(jnp.min(a * y - 0.1 * y**2) / jnp.max(a / (2 + y))) * y


@jax.custom_vjp
def gated(x):
    return jnp.max(x) * jnp.ones_like(x)


def gated_fwd(x):
    return gated(x), (x, jnp.max(x))


def gated_bwd(kept, ct):
    x, largest = kept
    return (jnp.where(x == largest, ct.sum(), 0),)  # Zero if a bit is off.


gated.defvjp(gated_fwd, gated_bwd)


def of_own_rule(a, y):
    return gated(a * y + 0.3 * y**3) - y


DAILY = {(300, jnp.float32, False)}
COMPARED = [
    pytest.param(
        *case,
        id=f"{case[0]}-{case[1].__name__}-{'one-kernel' if case[2] else 'none'}",
        marks=() if case in DAILY else pytest.mark.heavy,
    )
    for case in itertools.product((5, 300), (jnp.float32, jnp.float64), (True, False))
]


@pytest.mark.parametrize(("size", "dtype", "kernels"), COMPARED)
@pytest.mark.parametrize(
    "field",
    [largest, pytest.param(of_the_largest, marks=pytest.mark.heavy), of_own_rule],
)
@pytest.mark.usefixtures("optimised")
def test_numbers_that_are_compared_with_those_kept_have_their_bits(
    field, size, dtype, kernels, monkeypatch
):
    """The slope of a maximum is where a number equals it: of one that is made again
    and is off by a bit, nowhere."""
    monkeypatch.setenv("REVERSAX_ONE_KERNEL", str(int(kernels)))
    draw = lambda i: jax.random.uniform(jax.random.key(i), (size,), dtype, -1, 1)
    y0, a = draw(0), draw(1)

    def loss(a, y0, adjoint):
        term = dfx.ODETerm(lambda t, y, a: field(a, y))
        known = dict(adjoint=adjoint, max_steps=8)
        solver = rvx.Reversible(dfx.Bosh3())
        return dfx.diffeqsolve(term, solver, 0.0, 0.5, 0.1, y0, a, **known).ys.sum()

    gradient = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
    ours = gradient(a, y0, rvx.ReversibleAdjoint())
    direct = gradient(a, y0, dfx.DirectAdjoint())
    tolerance = 1e-12 if dtype == jnp.float64 else 3e-4  # Round-off.
    for x, z in zip(ours, direct, strict=True):
        np.testing.assert_allclose(x, z, rtol=tolerance, atol=tolerance)


def attraction(t, y, args):
    q, p = y[:2], y[2:]
    square = q[0] ** 2 + q[1] ** 2
    return jnp.concatenate([p, -args * q / (square * jnp.sqrt(square))])


def layers(weights, y):
    through = lambda y, w: (jnp.tanh(w @ y) + y, None)
    return jax.lax.scan(through, y, weights)[0]


def test_of_a_loop_no_more_is_kept_of_each_turn_than_is_worth_it():
    """Of each its `tanh`, from which all else follows, and not three arrays."""
    fn, y, weights = lambda x, _: (layers(*x), None), jnp.ones(4), jnp.ones((3, 4, 4))
    evaluation = evaluate_isolated(fn, (weights, y), None, jnp.zeros(()))
    assert evaluation.residuals is not None
    assert [x.shape for x in evaluation.residuals] == [(3, 4)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=["f32", "f64"])
def test_of_arithmetic_on_few_numbers_only_the_stages_are_kept(dtype, monkeypatch):
    kept, evaluate = [], isolation.evaluate_isolated

    def noted(*args):
        evaluation = evaluate(*args)
        assert evaluation.residuals is not None
        kept.append([x.shape for x in evaluation.residuals])
        return evaluation

    monkeypatch.setattr(fields, "evaluate_isolated", noted)

    def loss(args, y0):
        solver, times = rvx.Reversible(dfx.Tsit5()), (0.0, 1.0, 0.1)
        known = dict(max_steps=16, adjoint=rvx.ReversibleAdjoint())
        term = dfx.ODETerm(attraction)
        solution = dfx.diffeqsolve(term, solver, *times, y0, args, **known)
        return jnp.sum(solution.ys**2)

    jax.make_jaxpr(jax.grad(loss))(dtype(1), jnp.array([1.0, 0, 0, 1], dtype))
    # The first is the state, of the six of Tsit5.
    assert [(4 * 5,)] in kept
