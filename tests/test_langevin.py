"""Underdamped Langevin diffusions, whose state is a position and a velocity."""

import functools as ft

import diffrax as dfx
import jax
import jax.numpy as jnp
import pytest
from helpers import in_cells, quick, relative_difference

import reversax as rvx

SPACE, SPACE_TIME = dfx.SpaceTimeLevyArea, dfx.SpaceTimeTimeLevyArea
COUPLINGS = {"symmetric": rvx.Symmetric(), "published": rvx.McCallumFoster(0.999)}
OURS, DIRECT = rvx.ReversibleAdjoint(), dfx.RecursiveCheckpointAdjoint()
LANGEVIN = {
    "ALIGN": (dfx.ALIGN(), SPACE),
    "ShOULD": (dfx.ShOULD(), SPACE_TIME),
    "QUICSORT": (dfx.QUICSORT(), SPACE_TIME),
}


def langevin_terms(levy, key, gamma, tol=1e-3, dtype="float64"):
    shape = jax.ShapeDtypeStruct((2,), dtype)
    path = dfx.VirtualBrownianTree(0.0, 1.0, tol, shape, key, levy_area=levy)
    potential_gradient = lambda x, args: x + 0.3 * jnp.sin(3 * x)
    mass = jnp.ones((), dtype)
    return dfx.MultiTerm(
        dfx.UnderdampedLangevinDriftTerm(gamma, mass, potential_gradient),
        dfx.UnderdampedLangevinDiffusionTerm(gamma, mass, path),
    )


def langevin(base, coupling, key, y0, gamma, num_steps=64, tol=1e-3, adjoint=OURS):
    solver, levy = LANGEVIN[base]
    terms = langevin_terms(levy, key, gamma, tol)
    if coupling is not None:
        solver = rvx.Reversible(solver, COUPLINGS[coupling])
    return dfx.diffeqsolve(
        terms,
        solver,
        0.0,
        1.0,
        1 / num_steps,
        y0,
        max_steps=None if coupling is None else 4096,
        adjoint=adjoint,
    ).ys


@pytest.mark.parametrize(
    ("base", "coupling"),
    in_cells([(b, c) for b in LANGEVIN for c in COUPLINGS], []),
)
def test_underdamped_langevin_diffusion(base, coupling):
    """The ends approach those of a fine solve, at order 1.8 at least, and the gradient
    is the direct one."""
    y0 = (jnp.array([1.0, -0.5]), jnp.array([0.2, 0.1]))
    gamma, key = jnp.asarray(0.7), jax.random.key(7)

    def loss(adjoint, y0):
        return sum(
            jnp.sum(x**2)
            for x in jax.tree.leaves(
                langevin(base, coupling, key, y0, gamma, adjoint=adjoint)
            )
        )

    def gradient(adjoint):
        of = jax.grad(ft.partial(loss, adjoint))
        return jax.jit(of, **quick(adjoint, rvx.FixedPoint()))(y0)

    assert relative_difference(gradient(OURS), gradient(DIRECT)) <= 1e-12

    fine = langevin(base, None, key, y0, gamma, 1024, 2.0**-12, DIRECT)
    off = []
    for n in (8, 32):
        ends = langevin(base, coupling, key, y0, gamma, n, 2.0**-12)
        off.append(relative_difference(ends, fine))
    assert off[1] <= off[0] / 4**1.8, off


@pytest.mark.parametrize(
    ("base", "dtype"),
    in_cells(
        [(base, dtype) for base in LANGEVIN for dtype in ("float32", "float64")],
        [("ALIGN", "float32")],
    ),
)
def test_not_one_bit_of_a_langevin_solve_is_lost(base, dtype, optimised):
    solver, levy = LANGEVIN[base]
    cast = lambda *numbers: jnp.asarray(numbers, dtype)

    @jax.jit
    def undo(key, y0, gamma):
        terms = langevin_terms(levy, key, gamma, dtype=dtype)
        times = cast(0, 1, 1 / 200)
        return rvx.round_trip_error(terms, rvx.Reversible(solver), *times, y0)

    y0 = cast(1.0, -0.5), cast(0.2, 0.1)
    out = undo(jax.random.key(7), y0, cast(0.7)[0])
    assert out.num_steps == 200
    for x in jax.tree.leaves(out.error):
        assert not jnp.any(x)
