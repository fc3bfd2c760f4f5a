"""Small loops are compiled into one kernel, and nothing is lost by it."""

import functools as ft
import re
from collections import Counter

import diffrax as dfx
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
import pytest

import reversax as rvx
from reversax._schemes import moves, rows
from reversax._xla.one_kernel import in_one_kernel
from reversax._xla.rounding import with_rounded_products

pytestmark = pytest.mark.usefixtures("optimised")


def pendulum(t, y, friction):
    return jnp.stack([y[1], -jnp.sin(y[0]) - friction * y[1]])


def gradient_of(field, y0, solver=None, **options):
    solver = rvx.Reversible(dfx.Heun()) if solver is None else solver

    def loss(args, y0):
        adjoint = rvx.ReversibleAdjoint()
        known = dict(dt0=0.1, y0=y0, args=args, adjoint=adjoint, max_steps=16)
        term = dfx.ODETerm(field)
        solution = dfx.diffeqsolve(term, solver, 0.0, 1.0, **(known | options))
        return jnp.sum(solution.ys**2)

    return jax.jit(jax.grad(loss)).lower(jnp.asarray(0.1), y0)


def number_of_kernels(lowered):
    """How many loops are asked to be one kernel."""
    return lowered.as_text().count("xla_cpu_small_call")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="constant"),
        pytest.param(
            dict(
                stepsize_controller=dfx.PIDController(1e-3, 1e-3),
                saveat=dfx.SaveAt(ts=jnp.array([0.2, 0.7])),
            ),
            id="adaptive-saved",
        ),
        pytest.param(
            dict(solver=rvx.Reversible(dfx.Euler(), rvx.McCallumFoster())),
            id="published",
        ),
    ],
)
def test_a_small_solve_is_one_kernel_forward_and_one_back(options):
    assert number_of_kernels(gradient_of(pendulum, jnp.ones(2), **options)) == 2


def test_a_kernel_returns_its_single_numbers_in_one_array_of_each_type():
    """An array takes 64 bytes, and an address."""
    text = gradient_of(pendulum, jnp.ones(2)).as_text()
    kernels = re.findall(r"func private @one_kernel\w*\([^\n]*-> tuple<(.*)> {", text)
    assert len(kernels) == 2
    for returned in kernels:
        numbers = Counter(re.findall(r"tensor<([a-z]+\d+)>", returned))
        assert max(numbers.values(), default=0) <= 1
        assert re.search(r"tensor<\d+xi64>.*tensor<\d+xf64>", returned)


def test_the_environment_switches_kernels_off(monkeypatch):
    monkeypatch.setenv("REVERSAX_ONE_KERNEL", "0")
    assert number_of_kernels(gradient_of(pendulum, jnp.ones(2))) == 0


def test_an_exported_program_has_no_kernels():
    # It may be run by another version of XLA, of which nothing is known.
    halved = lambda x: lax.while_loop(lambda x: x[0] > 1, lambda x: x / 2, x)
    loop = jax.jit(lambda x: in_one_kernel(halved, x))
    x = jnp.array([5.0, 1.0])
    exported = jax.export.export(loop)(x)
    assert "small_call" in loop.lower(x).as_text()
    assert "small_call" not in exported.mlir_module()
    np.testing.assert_array_equal(exported.call(x), loop(x))


@pytest.mark.parametrize(
    ("field", "shape"),
    [
        pytest.param(lambda t, y, a: a * y @ jnp.ones((8, 8)), (8, 8), id="matmul"),
        pytest.param(lambda t, y, a: a * jnp.sort(y), (4,), id="sort"),
        # Which has other bits in arrays of another length.
        pytest.param(lambda t, y, a: a * jnp.arctan(y), (4,), id="arctan"),
        pytest.param(lambda t, y, a: a * jnp.fft.fft(y).real, (4,), id="fft"),
        pytest.param(
            lambda t, y, a: jnp.linalg.solve(a + jnp.eye(4), y), (4,), id="solve"
        ),
        pytest.param(
            lambda t, y, a: y.at[jnp.array([0, 2])].add(a), (4,), id="scatter"
        ),
        pytest.param(lambda t, y, a: a * y - y.mean(), (4096,), id="a-large-sum"),
        pytest.param(lambda t, y, a: a * y, (50_000,), id="a-large-state"),
        # Together they have other bits in one pass than in the other.
        pytest.param(
            lambda t, y, a: jnp.full((4, 4), a) @ y - y[jnp.array([1, 0, 3, 2])] * y,
            (4,),
            id="product-and-gather",
        ),
    ],
)
def test_what_a_kernel_cannot_have_or_is_better_elsewhere_is_compiled_as_ever(
    field, shape
):
    assert number_of_kernels(gradient_of(field, jnp.ones(shape))) == 0


def test_a_field_with_complex_numbers_is_compiled_as_ever():
    """The products inside a complex one could be contracted in one pass alone."""
    field = lambda t, y, args: -args * jnp.abs(jnp.exp(1j * y)) * y
    assert number_of_kernels(gradient_of(field, jnp.ones(2))) == 0


def test_what_calls_back_is_compiled_as_ever():
    def field(t, y, args):
        jax.debug.callback(lambda t: None, t)
        return -args * y

    assert number_of_kernels(gradient_of(field, jnp.ones(2))) == 0


OPERATIONS = {
    "one-place": lambda x: x.at[1].set(2.0 * x[0]),
    "gather": lambda x: x[jnp.array([0, 3, 3])][:1] + x,
    "argmax": lambda x: x + jnp.argmax(x).astype(x.dtype),
    "softmax": jax.nn.softmax,
    "gelu": jax.nn.gelu,
    "outer": lambda x: (jnp.outer(x, x) * 0.1).sum(0),
    "matvec": lambda x: jnp.ones((x.size, x.size), x.dtype) @ x * 0.1,
    "vecmat": lambda x: x @ jnp.ones((x.size, x.size), x.dtype) * 0.1,
    "dot": lambda x: x + jnp.dot(x, x) * 0.01,
    "random": lambda x: x + jax.random.normal(jax.random.key(0), x.shape, x.dtype),
    "power": lambda x: jnp.abs(x) ** 0.7 + x**3 * 0.1,
    "special": lambda x: (
        jax.scipy.special.erf(x)
        + 0.1 * lax.lgamma(jnp.abs(x) + 1)
        + lax.erf_inv(jnp.tanh(x) * 0.5)
    ),
    "exponential": lambda x: (
        jnp.exp(-x) + jnp.expm1(x) + jnp.log(2 + x) + jnp.log1p(x**2) + jnp.exp2(x)
    ),
    "hyperbolic": lambda x: (
        jnp.cosh(x) + jnp.sinh(x) + jnp.arcsinh(x) + jnp.arccosh(1 + x * x)
    ),
    "waves": lambda x: jnp.sin(x) + jnp.cos(x) + jax.nn.sigmoid(x),
    "roots": lambda x: jnp.sqrt(jnp.abs(x)) + lax.rsqrt(jnp.abs(x) + 1),
    "rounding": lambda x: (
        jnp.sign(x) + jnp.round(x) + jnp.floor(x) + jnp.fmod(x, 0.3) + jnp.clip(x, 0)
    ),
    "integers": lambda x: (x * 1000).astype(jnp.int32).astype(x.dtype) / 1000,
    "half": lambda x: (x.astype(jnp.bfloat16) * jnp.bfloat16(0.5)).astype(x.dtype),
    "reversed": lambda x: x[::-1] + jnp.pad(x, 1)[:-2],
    "branches": lambda x: lax.switch(
        (x[0] > 0).astype(jnp.int32) + (x[1] > 0), [jnp.cos, jnp.sin, jnp.tanh], x
    ),
    "scan": lambda x: lax.scan(
        lambda c, i: (c * 0.5 + i, c), x, jnp.stack([x] * 3)
    )[1].sum(0),
    "while": lambda x: lax.while_loop(
        lambda c: (c**2).sum() > 1, lambda c: c * 0.5, x
    ),
    "any": lambda x: jnp.where(jnp.any(x > 1) | jnp.all(x < 0), x * 0.5, x * 1.01),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_all_operations_of_a_kernel_do_there_as_elsewhere(dtype):
    # In one program, to compile once.
    def loop(f, x):
        body = lambda carry: (carry[0] + 1, f(carry[1]))
        return lax.while_loop(lambda carry: carry[0] < 3, body, (0, x))[1]

    each = lambda run: [run(ft.partial(loop, f)) for f in OPERATIONS.values()]
    x = jnp.linspace(-0.5, 1.7, 5).astype(dtype)
    lowered = jax.jit(lambda x: each(lambda f: in_one_kernel(f, x))).lower(x)
    assert number_of_kernels(lowered) == len(OPERATIONS)
    compiled = lowered.compile()
    # XLA left them calls, and knows what they are.
    calls = [x for x in compiled.as_text().splitlines() if " call(" in x]
    mark = 'inlineable="false",xla_cpu_small_call="true"'
    assert sum(mark in x for x in calls) == len(OPERATIONS)
    here, elsewhere = compiled(x), jax.jit(lambda x: each(lambda f: f(x)))(x)
    # Some ulps of the special functions, which are computed in another order.
    tolerance = 32 * jnp.finfo(dtype).eps
    for name, a, b in zip(OPERATIONS, here, elsewhere, strict=True):
        np.testing.assert_allclose(a, b, tolerance, tolerance, err_msg=name)


ELEMENTWISE = ("power", "special", "exponential", "hyperbolic", "waves", "roots")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_functions_of_a_kernel_have_the_same_bits_in_arrays_of_any_length(dtype):
    # Which elements are taken together may differ in the two passes.
    x = jax.random.normal(jax.random.key(0), (33,), dtype)
    each = lambda x: [in_one_kernel(OPERATIONS[name], x) for name in ELEMENTWISE]
    whole = jax.jit(each)(x)
    for length in (1, 2, 5, 8, 16):
        for a, b in zip(whole, jax.jit(each)(x[:length]), strict=True):
            np.testing.assert_array_equal(a[:length], b)


MATRIX = np.random.default_rng(0).standard_normal((4, 4)) / 2
FIELDS = {
    "lorenz": lambda t, y, a: jnp.stack(
        [10 * (y[1] - y[0]), y[0] * (28 - y[2]) - y[1], y[0] * y[1] - a * y[2]]
    ),
    "kepler": lambda t, y, a: jnp.concatenate(
        [y[2:], -a * y[:2] / (y[0] ** 2 + y[1] ** 2) ** 1.5]
    ),
    "powers": lambda t, y, a: a * jnp.arcsinh(y) - 0.5 * y**2 - 0.1 * y**3,
    "exp-log": lambda t, y, a: jnp.log1p(y * y) * 0.3 - a * y + jnp.exp(-y * y),
    "waves": lambda t, y, a: (
        jnp.tanh(y) * jnp.cos(t * a) + 0.1 * y * jnp.roll(y, 1) - y / (1 + y * y)
    ),
    "permuted": lambda t, y, a: (
        jnp.tanh(MATRIX @ y + t) * a - y[jnp.array([1, 0, 3, 2])] * jnp.cos(y)
    ),
    "network": lambda t, y, a: (
        jnp.tanh(jnp.tanh(y @ jnp.full((4, 8), 0.3) * a + y[0]) @ jnp.full((8, 4), 0.2))
        - y
    ),
}
SIZES = {"lorenz": 3}


DAILY = {
    ("lorenz", False, "Dopri8"),
    ("waves", True, "Heun"),
    ("permuted", False, "Heun"),
}
BITS = [
    pytest.param(
        *(name, lanes, solver),
        id=f"{name}-{'lanes-' * lanes}{type(solver).__name__}",
        marks=()
        if (name, lanes, type(solver).__name__) in DAILY
        else pytest.mark.heavy,
    )
    for name in FIELDS
    for lanes in (False, True)
    for solver in (dfx.Heun(), dfx.Tsit5(), dfx.Dopri8())
]


@pytest.mark.parametrize(("name", "lanes", "solver"), BITS)
def test_a_kernel_has_the_same_bits_in_both_passes(name, lanes, solver):
    # Lorenz with Dopri8 has not without (P): a product that one pass contracts with a
    # sum is needed elsewhere in the other.
    y0 = jnp.linspace(0.3, 0.9, SIZES.get(name, 4))
    y0 = jnp.stack([y0, 1.01 * y0, 1.02 * y0]) if lanes else y0
    solve = lambda y0, a: (
        dfx.diffeqsolve(
            *(dfx.ODETerm(FIELDS[name]), rvx.Reversible(solver), 0.0, 2.0, 0.01, y0, a),
            adjoint=rvx.ReversibleAdjoint(),
        ).ys
    )
    solve = jax.vmap(solve, (0, None)) if lanes else solve
    loss = lambda a, y0: jnp.sum(solve(y0, a) ** 2)
    gradient = eqx.filter_jit(jax.grad(loss, (0, 1)))
    assert np.isfinite(
        gradient(jnp.asarray(1.1), y0)[0]
    )  # Else the certificate raises.


def test_products_are_rounded_by_themselves_in_loops_and_branches_too():
    a, b = jax.random.normal(jax.random.key(0), (2, 64), jnp.float32)

    def by_itself(a, b, c):
        return a * b + c

    def in_scan(a, b, c):
        step = lambda carry, xs: (xs[0] * xs[1] + carry, None)
        return lax.scan(step, c, (a[None], b[None]))[0]

    def in_while(a, b, c):
        body = lambda carry: (carry[0] + 1, a * b + carry[1])
        return lax.while_loop(lambda carry: carry[0] < 1, body, (0, c))[1]

    def in_branch(a, b, c):
        return lax.cond(a[0] < b[0], jnp.add, lambda x, y: y + x, a * b, c)

    def in_jit(a, b, c):
        return jax.jit(by_itself)(a, b, c)

    # Each sum is exact, and zero: contracted, it would be the product's round-off.
    c = jnp.asarray(-(np.asarray(a) * np.asarray(b)))
    for fn in (by_itself, in_scan, in_while, in_branch, in_jit):
        program = jax.make_jaxpr(fn)(a, b, c)
        rounded = jax.jit(ft.partial(with_rounded_products, program))
        np.testing.assert_array_equal(rounded(jnp.zeros(()), (a, b, c))[0], 0)


def number_of_loops(field, solver, args):
    def loss(args):
        known = dict(adjoint=rvx.ReversibleAdjoint(), max_steps=16)
        term = dfx.ODETerm(field)
        y0 = jnp.ones(8)
        return jnp.sum(dfx.diffeqsolve(term, solver, 0, 1, 0.1, y0, args, **known).ys)

    return jax.jit(jax.grad(loss)).lower(args).as_text().count("stablehlo.while")


def test_halves_of_one_evaluation_and_few_parameters_are_no_loop():
    """But two copies: one loop less forward, and one back."""
    decay = lambda t, y, a: -a * y
    dense = lambda t, y, a: jnp.tanh(a @ y)
    euler, heun = rvx.Reversible(dfx.Euler()), rvx.Reversible(dfx.Heun())
    loops = number_of_loops(decay, heun, jnp.asarray(0.1))
    assert number_of_loops(decay, euler, jnp.asarray(0.1)) == loops - 2
    few, many = jnp.ones((8, 8)) / 8, jnp.ones((8, 64)) / 64
    wide = lambda t, y, a: dense(t, jnp.tanh(a.T @ y), a)
    assert number_of_loops(dense, euler, few) == number_of_loops(dense, heun, few) - 2
    assert number_of_loops(wide, euler, many) == number_of_loops(wide, heun, many)


def takes_numbers_from_a_stack(program):
    """The computations of whole arrays in which a single number is read at an index
    that is not known before run time."""
    bodies = re.findall(r"^%[^\n]*\{\n(.*?)^\}", program.as_text(), re.M | re.S)
    single = re.compile(r"= f64\[1,\d+\]\{1,0\} dynamic-slice\(")
    whole = re.compile(r"= f64\[16,3\]")
    fused = [body for body in bodies if " fusion(" not in body]
    return [body for body in fused if single.search(body) and whole.search(body)]


def test_no_operation_on_a_state_takes_its_numbers_from_a_stack(monkeypatch):
    """Of those of the two halves, of which none on vectors would be made."""

    def field(t, y, a):
        x, u, z = y[..., 0], y[..., 1], y[..., 2]
        return jnp.stack([u - x, x * (a - z) - u, x * u - z], -1)

    compiled = lambda: gradient_of(field, jnp.ones((16, 3))).compile()
    assert not takes_numbers_from_a_stack(compiled())

    def through(fn, carry, xs, *, reverse=False, unroll=False, in_lanes=False):
        """Each row taken from the stack by the step that it is of."""
        arrays, static = eqx.partition(xs, rows.is_array)
        arrays, apart = rows._numbers_together(arrays, in_lanes)
        body = lambda carry, row: fn(carry, eqx.combine(apart(row), static))
        return lax.scan(body, carry, arrays, reverse=reverse, unroll=1 + unroll)

    monkeypatch.setattr(moves, "through", through)
    jax.clear_caches()
    assert takes_numbers_from_a_stack(compiled())
