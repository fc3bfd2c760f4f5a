"""Under fixed point not one bit differs when a solve is undone.

Every gradient here is of a solve whose certificate demands just that, so a wrong bit
raises; that it does is tested in test_certificate. Compiled as users do, since it is
optimisation that would compile one field differently in the two passes.
"""

import itertools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TABLEAU_BASES, OwnMidpoint
from hypothesis import given, settings, strategies as st

import reversax as rvx

pytestmark = pytest.mark.usefixtures("optimised")
DTYPES = {"float32": jnp.float32, "float64": jnp.float64}


def mlp(activation):
    def make(size, width, key):
        net = eqx.nn.MLP(size, size, width, 2, activation=activation, key=key)
        return net, lambda t, y, net: net(y) - 2 * y

    return make


def layer_norm(size, width, key):
    keys = jax.random.split(key)
    first = eqx.nn.MLP(size, width, width, 1, activation=jax.nn.softplus, key=keys[0])
    nets = first, eqx.nn.LayerNorm(width), eqx.nn.Linear(width, size, key=keys[1])

    def field(t, y, nets):
        first, norm, last = nets
        return last(norm(first(y))) * jnp.sin(3 * t) - y

    return nets, field


def convolution(size, width, key):
    keys = jax.random.split(key)
    nets = tuple(
        eqx.nn.Conv1d(*channels, 5, padding=2, key=k)
        for channels, k in zip(((1, 8), (8, 1)), keys, strict=True)
    )
    return nets, lambda t, y, nets: nets[1](jnp.tanh(nets[0](y[None])))[0] - y


def gru(size, width, key):
    cell = eqx.nn.GRUCell(size, size, key=key)
    return cell, lambda t, y, cell: cell(jnp.cos(t * jnp.ones_like(y)), y) - y


def attention(size, width, key):
    heads = eqx.nn.MultiheadAttention(1, size, key=key)

    def field(t, y, heads):
        tokens = jnp.stack([y, jnp.tanh(y), jnp.sin(y + t), y * y])
        return heads(tokens, tokens, tokens).mean(axis=0) - y

    return heads, field


def exp_log(size, width, key):
    weights = jax.random.normal(key, (size, size)) / size

    def field(t, y, weights):
        return jnp.log1p(jnp.exp(weights @ y)) - jnp.exp(-t) * y * jnp.log(2 + y**2)

    return weights, field


def spectral(size, width, key):
    """Complex numbers inside, and as parameters."""
    weights = jax.random.normal(key, (2, size // 2 + 1))

    def field(t, y, weights):
        factor = jax.lax.complex(weights[0], weights[1])
        return jnp.tanh(jnp.fft.irfft(jnp.fft.rfft(y) * factor, n=len(y))) - y

    return weights, field


FIELDS = {
    "tanh": mlp(jnp.tanh),
    "softplus": mlp(jax.nn.softplus),
    "relu": mlp(jax.nn.relu),
    "gelu": mlp(jax.nn.gelu),
    "layer-norm": layer_norm,
    "convolution": convolution,
    "gru": gru,
    "attention": attention,
    "exp-log": exp_log,
    "spectral": spectral,
}
PID = dfx.PIDController(rtol=1e-4, atol=1e-4)
# name -> (controller, dt0, whether by `vmap`, whether each lane ends at its own time)
MODES = {
    "plain": (dfx.ConstantStepSize(), 0.02, False, False),
    "inside": (dfx.ConstantStepSize(), 0.02, False, False),
    "vmap": (dfx.ConstantStepSize(), 0.02, True, False),
    "vmap-lanes": (dfx.ConstantStepSize(), 0.02, True, True),
    "adaptive": (PID, None, False, False),
    "adaptive-lanes": (PID, None, True, True),
}
BASES = {k: v for k, v in TABLEAU_BASES.items() if k not in ("Midpoint", "Ralston")}


def check(field, base, mode, dtype, batch=7, size=5, width=17, t1=3.0):
    """Differentiates a solve; a bit that differs raises."""
    controller, dt0, by_vmap, own_times = MODES[mode]
    cast = lambda tree: jax.tree.map(
        lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, tree
    )
    net, of_one = FIELDS[field](size, width, jax.random.key(1))
    weights, rest = eqx.partition(cast(net), eqx.is_inexact_array)
    y0 = jax.random.normal(jax.random.key(2), (batch, size), dtype)
    ends = jnp.linspace(0.3, t1, batch).astype(dtype) if own_times else dtype(t1)

    def loss(weights, y0, ends):
        net = eqx.combine(weights, rest)
        batched = lambda t, y, a: jax.vmap(lambda y: of_one(t, y, net))(y)
        alone = lambda t, y, a: of_one(t, y, net)

        def solve(y0, t1):
            return dfx.diffeqsolve(
                dfx.ODETerm(alone if by_vmap else batched),
                rvx.Reversible(base),
                dtype(0.1),
                t1,
                None if dt0 is None else dtype(dt0),
                y0,
                stepsize_controller=controller,
                adjoint=rvx.ReversibleAdjoint(),
                max_steps=4096,
            ).ys[0]

        if mode == "inside":
            # Something for XLA to fuse the solve with, before and after it.
            y0 = jnp.tanh(y0 * 2 + 0.1)
        run = jax.vmap(solve, (0, 0 if own_times else None)) if by_vmap else solve
        y1 = run(y0, ends)
        return jnp.sum((jax.nn.softmax(y1) if mode == "inside" else y1) ** 2)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(weights, y0, ends)
    gradient = [np.asarray(g) for g in jax.tree.leaves(gradient)]
    assert all(np.isfinite(g).all() for g in gradient)
    assert any(np.abs(g).max() > 0 for g in gradient)


GRID = list(itertools.product(FIELDS, BASES))
DAILY = {("tanh", "Tsit5")}


def cells():
    """Every pair of field and base, field and mode, base and mode, with either dtype
    in turn. `MODES` and `DTYPES` have no common factor with the strides."""
    for (i, field), (j, base) in itertools.product(enumerate(FIELDS), enumerate(BASES)):
        mode = list(MODES)[(i + j) % len(MODES)]
        dtype = list(DTYPES)[(i + i * j + j // 2) % 2]
        marks = [] if (field, base) in DAILY else [pytest.mark.heavy]
        cell = (field, base, mode, dtype)
        yield pytest.param(*cell, id="-".join(cell), marks=marks)


@pytest.mark.parametrize(("field", "base", "mode", "dtype"), list(cells()))
def test_not_one_bit_differs(field, base, mode, dtype):
    check(field, BASES[base], mode, DTYPES[dtype])


@pytest.mark.heavy
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("field", FIELDS)
def test_not_one_bit_differs_in_any_mode_of_any_field(field, mode):
    """Bosh3 in single precision, where a field's own compilation matters most."""
    check(field, BASES["Bosh3"], mode, jnp.float32)


@pytest.mark.heavy
@settings(max_examples=12, deadline=None)
@given(
    field=st.sampled_from(["tanh", "softplus", "gru", "layer-norm"]),
    base=st.sampled_from(["Euler", "Bosh3"]),
    batch=st.integers(1, 67),
    size=st.integers(1, 33),
    width=st.integers(1, 131),
)
def test_not_one_bit_differs_at_odd_widths(field, base, batch, size, width):
    check(field, BASES[base], "plain", jnp.float32, batch, size, width, t1=1.0)


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_one_bit_differs_after_100_000_steps(dtype):
    cast = DTYPES[dtype]
    error, num_steps = rvx.round_trip_error(
        dfx.ODETerm(lambda t, y, a: jnp.tanh(a @ y) - 0.3 * y + jnp.sin(t)),
        rvx.Reversible(dfx.Bosh3()),
        cast(0.0),
        cast(1000.0),
        cast(0.01),
        jnp.array([0.3, -0.2, 0.5], cast),
        jax.random.normal(jax.random.key(0), (3, 3), cast),
        max_steps=100_001,
    )
    assert num_steps >= 100_000
    assert jnp.all(error.y == 0) and jnp.all(error.z == 0)


def test_a_users_own_solver_is_undone_to_the_bit():
    """In lanes with times of their own: what is the same in all must remain so."""
    check("tanh", OwnMidpoint(), "adaptive-lanes", jnp.float32)


def test_single_precision_needs_no_64_bit_mode():
    """Codes of single-precision states are made of 32-bit words, in either mode."""
    with jax.enable_x64(False):
        check("tanh", dfx.Heun(), "vmap", jnp.float32)
