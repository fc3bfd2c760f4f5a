"""What is dear is evaluated once, and by the pass alone that needs it."""

import re

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import program_of, run

import reversax as rvx
from reversax._xla import isolation, written
from reversax._xla.programs import plain
from reversax._xla.written import written_out

BASES = {"euler": (dfx.Euler, 1), "heun": (dfx.Heun, 2), "tsit5": (dfx.Tsit5, 6)}


def gradient_of(field, y0, base=dfx.Heun, args=0.5):
    def loss(args, y0):
        solution = dfx.diffeqsolve(
            dfx.ODETerm(field),
            rvx.Reversible(base()),
            **dict(t0=0.0, t1=1.0, dt0=0.1, y0=y0, args=args, max_steps=16),
            adjoint=rvx.ReversibleAdjoint(),
        )
        return jnp.sum(solution.ys**2)

    return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(args, y0)


def number_of(operation, lowered):
    return len(re.findall(rf" {operation}\(", lowered.compile().as_text()))


@pytest.mark.parametrize("size", [8, 4096], ids=["in-a-kernel", "large"])
@pytest.mark.parametrize("base", BASES)
def test_a_field_with_a_sine_takes_one_of_them_an_evaluation(base, size):
    """Both twins in a loop or, if one evaluation is a step of the base, written out; in
    two passes. A cosine is needed in one of them."""
    solver, stages = BASES[base]
    lowered = gradient_of(lambda t, y, a: -a * jnp.sin(y), jnp.ones(size), solver)
    evaluations = 2 * stages * (2 if stages == 1 else 1)
    assert number_of("sine", lowered) == evaluations
    assert number_of("cosine", lowered) == evaluations / 2


def test_what_is_dear_is_evaluated_for_each_that_reads_it_unless_it_is_written(
    monkeypatch,
):
    field = lambda t, y, a: -a * jnp.sin(y)
    monkeypatch.setattr(isolation, "with_dear_written", lambda *_: None)
    jax.clear_caches()
    assert number_of("sine", gradient_of(field, jnp.ones(4096), dfx.Tsit5)) > 24


DEAR = {
    "sine": lambda t, y, a: -a * jnp.sin(y),
    "product": lambda t, y, a: jnp.sin(y) * jnp.exp(-a * y),
    "power": lambda t, y, a: -a * jnp.abs(y) ** 1.5,
    "softplus": lambda t, y, a: jax.nn.softplus(a - y),
    "gelu": lambda t, y, a: -jax.nn.gelu(a * y),
    "angles": lambda t, y, a: jnp.arctan2(y, a) - y,
    "read-elsewhere": lambda t, y, a: a * jnp.cos(jnp.roll(y, 1) - y),
    "matrix": lambda t, y, a: jax.nn.gelu(a * (y.reshape(4, 2) @ M)).ravel() - y,
    "own-rule": lambda t, y, a: -a * squashed(y),
}
DAILY = "sine", "matrix", "own-rule"
M = jnp.array([[0.3, -0.4], [0.6, 0.2]])


@jax.custom_vjp
def squashed(x):
    return jnp.tanh(x) + jnp.sin(x)


squashed.defvjp(
    lambda x: (squashed(x), (jnp.cos(x), jnp.tanh(x))),
    lambda kept, ct: (ct * (kept[0] + 1 - kept[1] ** 2),),
)


@pytest.mark.parametrize("lanes", [False, pytest.param(True, marks=pytest.mark.heavy)])
@pytest.mark.parametrize(
    "base", [dfx.Tsit5, pytest.param(dfx.Euler, marks=pytest.mark.heavy)]
)
@pytest.mark.parametrize(
    "name",
    [
        name if name in DAILY else pytest.param(name, marks=pytest.mark.heavy)
        for name in DEAR
    ],
)
def test_the_gradient_of_what_is_dear_is_that_of_direct_differentiation(
    name, base, lanes
):
    def loss(args, y0, adjoint):
        solution = dfx.diffeqsolve(
            dfx.ODETerm(DEAR[name]),
            rvx.Reversible(base()),
            **dict(t0=0.0, t1=1.0, dt0=0.1, y0=y0, args=args, max_steps=16),
            adjoint=adjoint,
        )
        return jnp.sum(solution.ys**2)

    def value_and_gradient(adjoint):
        fn = lambda a, y: jax.value_and_grad(loss, argnums=(0, 1))(a, y, adjoint)
        return jax.jit(jax.vmap(fn, (None, 0)) if lanes else fn)(0.5, y0)

    y0 = jnp.linspace(0.2, 1, 8)
    y0 = jnp.stack([y0, 2 * y0, -y0]) if lanes else y0
    ours = value_and_gradient(rvx.ReversibleAdjoint())
    direct = value_and_gradient(dfx.DirectAdjoint())
    # The round-off of some hundred operations.
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(direct), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-13, atol=1e-13)


X = jnp.linspace(0.1, 1, 5)


def test_rounding_to_the_precision_of_an_array_is_nothing_and_to_another_is_not():
    def fn(x):
        same = jax.lax.reduce_precision(jnp.sin(x), exponent_bits=11, mantissa_bits=52)
        return same, jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=23)

    program = plain(program_of(jax.jit(fn), X))
    names = [equation.primitive.name for equation in program.jaxpr.eqns]
    assert names == ["sin", "reduce_precision"]
    for x, y in zip(run(program, X), fn(X), strict=True):
        np.testing.assert_array_equal(x, y)


def test_calls_are_written_out_unless_they_say_how_arrays_are_laid_out():
    mesh = jax.make_mesh((1,), ("all",))
    layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("all"))
    laid_out = jax.jit(jnp.cos, out_shardings=layout)
    fn = lambda x: laid_out(jax.jit(lambda x: jax.jit(jnp.sin)(x) * 2)(x))
    program = plain(program_of(fn, X))
    names = [equation.primitive.name for equation in program.jaxpr.eqns]
    assert names == ["sin", "mul", "jit"]
    np.testing.assert_array_equal(run(program, X)[0], fn(X))


def sines_of(x, zero):
    s = written_out(jnp.sin(x), zero)
    return s * 2 + 1, s**2, s - x


@pytest.mark.parametrize("known", [True, False], ids=["call", "conditional"])
def test_what_is_written_is_computed_once(monkeypatch, known):
    """By a call; where XLA is not known to leave it one, by a conditional."""
    monkeypatch.setattr(written, "compiles_small_calls", lambda: known)
    compiled = jax.jit(lambda x, zero: sines_of(x, zero)).lower(X, jnp.float32(0))
    text = compiled.compile().as_text()
    assert len(re.findall(r" sine\(", text)) == 1
    assert (" conditional(" in text) != known
    ours, plainly = compiled.compile()(X, jnp.float32(0)), sines_of(X, 0.0)
    for x, y in zip(ours, plainly, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-15)


def test_what_is_written_has_the_derivatives_and_the_lanes_that_it_has():
    zero = jnp.float32(0)
    fn = lambda x: jnp.sum(sum(sines_of(x, zero)))
    same = lambda x: jnp.sum(jnp.sin(x) * 2 + 1 + jnp.sin(x) ** 2 + jnp.sin(x) - x)
    xs = jnp.stack([X, 2 * X])
    for derivative in (jax.grad, jax.hessian, jax.jacfwd):
        ours = jax.jit(jax.vmap(derivative(fn)))(xs)
        np.testing.assert_allclose(ours, jax.vmap(derivative(same))(xs), rtol=1e-14)
