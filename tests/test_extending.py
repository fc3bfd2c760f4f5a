"""The scheme that docs/extending.md shows, under every adjoint and output."""

import runpy
from pathlib import Path

import diffrax as dfx
import jax
import jax.numpy as jnp
import pytest
from helpers import in_cells, quick, relative_difference

import reversax as rvx

EXAMPLE = Path(__file__).parents[1] / "examples" / "position_verlet.py"
PositionVerlet = runpy.run_path(str(EXAMPLE))["PositionVerlet"]
ADJOINTS = {
    "reversible": rvx.ReversibleAdjoint(),
    "checkpointed": dfx.RecursiveCheckpointAdjoint(checkpoints=16),
}
SAVED = {
    "end": dfx.SaveAt(t1=True),
    "ts": dfx.SaveAt(ts=jnp.array([0.13, 0.5, 0.91])),
    "steps": dfx.SaveAt(steps=True),
    "fn": dfx.SaveAt(t0=True, steps=2, fn=lambda t, y, args: t * y[0] * args),
}
TERMS = (
    dfx.ODETerm(lambda t, q, args: -args * jnp.sin(q)),
    dfx.ODETerm(lambda t, p, args: p),
)
Y0 = jnp.array([0.3, -0.2]), jnp.array([1.0, 0.5])


def gradient(solver, adjoint, saveat):
    def loss(y0, args):
        solution = dfx.diffeqsolve(
            *(TERMS, solver, 0.0, 1.0, 1 / 16, y0, args),
            saveat=SAVED[saveat],
            adjoint=adjoint,
            max_steps=16,
        )
        leaves = jax.tree.leaves(solution.ys)
        return sum(jnp.sum(jnp.where(jnp.isfinite(x), x, 0) ** 2) for x in leaves)

    options = quick(adjoint, rvx.FixedPoint())
    return jax.jit(jax.grad(loss, argnums=(0, 1)), **options)(Y0, jnp.array(1.3))


CELLS = [(a, s) for a in ADJOINTS for s in SAVED]


@pytest.mark.parametrize("adjoint, saveat", in_cells(CELLS, {("reversible", "fn")}))
def test_the_gradient_is_that_of_the_plain_solver(adjoint, saveat):
    solver = rvx.Reversible(PositionVerlet())
    found = gradient(solver, ADJOINTS[adjoint], saveat)
    direct = gradient(PositionVerlet(), dfx.DirectAdjoint(), saveat)
    assert relative_difference(found, direct) < 1e-13


def test_it_is_as_short_as_the_page_says():
    assert EXAMPLE.read_text().count("\n") <= 60
