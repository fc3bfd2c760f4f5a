"""The numbers of symmetric multistep methods: what they are to solve; and orders."""

import functools as ft
from fractions import Fraction

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reversax as rvx
from reversax._schemes.multistep_weights import (
    AHEAD,
    ALONE,
    BEHIND,
    dense_weights,
    weights_of_order,
)


def test_the_weights_are_what_the_header_says():
    for k in (4, 6):
        weights = weights_of_order(k)
        alphas, betas = (
            list(map(Fraction, x)) for x in (weights.alphas, weights.betas)
        )
        points = [Fraction(2 * j - k, 2) for j in range(k + 1)]
        assert all(a == -b for a, b in zip(alphas, alphas[::-1], strict=True))
        for q in range(k + 1):
            left = sum(a * s**q for a, s in zip(alphas, points, strict=True))
            right = sum(
                q * b * s ** max(q - 1, 0) for b, s in zip(betas, points, strict=True)
            )
            # Of numbers that were rounded once.
            assert abs(left - right) < 1e-13
        roots = np.roots(weights.alphas[::-1])
        assert np.allclose(np.abs(roots), 1, atol=1e-12)
        assert np.min(np.abs(np.subtract.outer(roots, roots)) + 9 * np.eye(k)) > 0.4


def test_what_is_taken_for_alternating_is_zero_on_polynomials():
    for k in (4, 6):
        weights = weights_of_order(k)
        j = np.arange(k)
        for q in range(k):
            slope = q * j ** max(q - 1, 0)
            d = weights.values @ j.astype(float) ** q + weights.slopes @ slope
            assert abs(d) < 1e-11
        assert abs(weights.values @ (-1.0) ** j - 1) < 1e-13
        for root in np.roots(weights.alphas[::-1]):
            if abs(root.imag) > 1e-6:
                assert abs(weights.values @ root**j) < 1e-12


def test_an_oscillation_of_many_steps_is_not_disturbed_by_corrections():
    field = lambda t, y, args: jnp.stack([y[1], -y[0]])
    solver = rvx.Reversible(rvx.SymmetricMultistep(6))

    def run():
        times = 0.0, 1e4, 0.1
        known = dict(max_steps=100_000, adjoint=rvx.ReversibleAdjoint())
        y0 = jnp.array([1.0, 0.0])
        return dfx.diffeqsolve(dfx.ODETerm(field), solver, *times, y0, **known).ys

    # The modes of (M) are neutral; corrections leave 6e-5.
    assert abs(jnp.linalg.norm(jax.jit(run)()[-1]) - 1) < 2e-4


@pytest.mark.parametrize("third", [AHEAD, BEHIND, ALONE])
def test_dense_output_is_exact_on_polynomials(third):
    degree = 3 if third == ALONE else 5
    polynomial = np.polynomial.Polynomial(np.arange(1.0, degree + 2))
    slope, at = polynomial.deriv(), {AHEAD: 2, BEHIND: -1, ALONE: 0}[third]
    data = [polynomial(at) - 1, polynomial(1.0) - 1, slope(at), slope(0.0), slope(1.0)]
    share = 0.37
    found = 1 + share ** np.arange(1, 6) @ dense_weights()[third] @ np.array(data)
    assert abs(found - polynomial(share)) < 1e-12


@pytest.mark.parametrize("order", [4, 6])
@pytest.mark.parametrize("every", [16, pytest.param(None, marks=pytest.mark.heavy)])
def test_the_order_is_what_it_should_be(order, every):
    """At the end and between the ends of steps, on a pendulum, against Dopri8."""
    field = lambda t, y, args: jnp.stack(
        [y[1], -jnp.sin(y[0]) * (1 + 0.3 * jnp.sin(t))]
    )
    ts = jnp.linspace(0.1, 5.9, 23)
    base = rvx.SymmetricMultistep(order, every)
    known = dict(max_steps=1024, saveat=dfx.SaveAt(ts=ts, t1=True))

    @ft.partial(jax.jit, static_argnums=0)
    def values(solver, dt0):
        y0 = jnp.array([1.0, 0.5])
        return dfx.diffeqsolve(
            dfx.ODETerm(field), solver, 0.0, 6.0, dt0, y0, **known
        ).ys

    exact = values(dfx.Dopri8(), 6 / 1000)
    few, more, many = [jnp.abs(values(base, 6 / n) - exact) for n in (96, 192, 384)]
    for coarse, fine in ((few, more), (more, many)):
        for saved in (slice(-1, None), slice(None, -1)):
            found = np.log2(coarse[saved].max() / fine[saved].max())
            # Dense output is better than that by half an order where it matters.
            assert order - 0.35 < found < order + 1.2
