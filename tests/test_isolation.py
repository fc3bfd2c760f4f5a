"""Isolated evaluations: what they keep for their pull-back, and that they are."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import pytest

import reversax as rvx
from reversax._xla.isolation import evaluate_isolated

WIDE = 64
WEIGHTS = jnp.full((4, WIDE), 0.3), jnp.full((WIDE, 4), 0.2)


def layers(weights, y):
    for _ in range(3):
        y = jnp.tanh(jnp.tanh(y @ weights[0]) @ weights[1])
    return y


def kept_and_pulled(field):
    """How many wide arrays are kept, and the cotangents."""
    fn = lambda x, _: (field(*x), None)
    y, run_time = jnp.linspace(0.1, 0.4, 4), jnp.asarray(0.5)

    def both(weights, y):
        evaluation = evaluate_isolated(fn, (weights, y), None, run_time)
        assert evaluation.residuals is not None
        kept = [x for x in evaluation.residuals if x.shape == (WIDE,)]
        return len(kept), evaluation.pull(jnp.ones(4))[0]

    numbers = []

    def pulled(weights, y):
        number, ct = both(weights, y)
        numbers.append(number)
        return ct

    return jax.jit(pulled)(WEIGHTS, y), numbers[0]


def test_of_a_field_that_is_checkpointed_nothing_inside_is_kept():
    ct, number = kept_and_pulled(layers)
    ct_checkpointed, none = kept_and_pulled(jax.checkpoint(layers))
    assert number == 3 and none == 0
    for a, b in zip(jax.tree.leaves(ct), jax.tree.leaves(ct_checkpointed), strict=True):
        assert jnp.allclose(a, b, rtol=1e-14, atol=0)  # Round-off alone.


@pytest.mark.usefixtures("optimised")
def test_an_evaluation_is_isolated_where_time_is_a_number_known_beforehand():
    """Then the compiler knows the predicate too, unless that is kept from it."""

    def value(y):
        return evaluate_isolated(
            lambda y, _: (layers(WEIGHTS, y), None), y, None, jnp.asarray(0.5)
        ).value

    compiled = jax.jit(value).lower(jnp.linspace(0.1, 0.4, 4)).compile()
    assert "conditional(" in compiled.as_text()


@pytest.mark.usefixtures("optimised")
def test_the_first_evaluation_has_its_bits_where_times_are_numbers_known_beforehand():
    """It stands before the loop, where all but the state may be constants; a sum that
    is fused with what comes before it has other bits."""

    def gravity(t, q, masses):
        apart = q[:, None] - q[None]
        cubes = ((apart**2).sum(-1) + 0.1)[..., None] ** 1.5
        return -(masses[None, :, None] * apart / cubes).sum(1)

    y0 = jax.random.normal(jax.random.key(0), (2, 5, 3))
    terms = dfx.ODETerm(gravity), dfx.ODETerm(lambda t, p, args: p)

    def loss(masses):
        solver, times = rvx.Reversible(rvx.Verlet()), (0.0, 1.0, 0.05)
        solution = dfx.diffeqsolve(
            terms, solver, *times, tuple(y0), masses, adjoint=rvx.ReversibleAdjoint()
        )
        return jnp.sum(solution.ys[0] ** 2)

    ct = jax.block_until_ready(jax.jit(jax.grad(loss))(jnp.ones(5)))
    assert jnp.isfinite(ct).all()  # The certificate raises if a bit was off.


def test_of_a_stencil_what_it_gives_is_kept_and_not_what_it_reads():
    """Four arrays and the state, of which a fifth follows by additions alone."""

    def field(x, _):
        strength, y = x
        around = [jnp.roll(y, by, axis) for by in (1, -1) for axis in (0, 1)]
        return strength * (sum(around) - 4 * y), None

    y = jnp.ones((64, 64), jnp.float32)
    evaluation = evaluate_isolated(field, (jnp.ones(()), y), None, jnp.zeros(()))
    assert evaluation.residuals is not None
    assert [x.shape for x in evaluation.residuals] == [y.shape]


def test_a_random_key_that_is_made_in_a_field_may_be_a_residual():
    """Of a part that is evaluated again, which is given the key."""
    drop = lambda y, key: jnp.sin(y) * jax.random.bernoulli(key, 0.5, y.shape)

    def field(t, y, rate):
        key = jax.random.fold_in(jax.random.key(3), 1)
        return rate * jax.checkpoint(drop)(y, key)

    def loss(rate, adjoint):
        solver, y0 = rvx.Reversible(dfx.Euler()), jnp.linspace(-1.0, 1.0, 5)
        term = dfx.ODETerm(field)
        solution = dfx.diffeqsolve(
            term, solver, 0.0, 1.0, 0.25, y0, rate, adjoint=adjoint, max_steps=4
        )
        return jnp.sum(solution.ys**2)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    ours, direct = (
        gradient(0.7, x) for x in (rvx.ReversibleAdjoint(), dfx.DirectAdjoint())
    )
    assert abs(ours - direct) <= 1e-14 * abs(direct) > 0
