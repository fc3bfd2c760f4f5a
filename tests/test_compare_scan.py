"""The control of `reversax compare`: the same solve as Diffrax's, written by hand."""

import math

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reversax.compare._scan import RematerialisedScan, make_plan

T0, T1 = 0.0, 1.5
KEYS = jax.random.split(jax.random.key(0), 2)
WEIGHT = 0.5 * jax.random.normal(KEYS[0], (3, 3))
Y0 = {"a": jax.random.normal(KEYS[1], (3,)), "b": jnp.array(0.3)}
MIDDLE = jnp.array([0.0, 0.2, 0.21, 0.22, 1.1, 1.5])


def field(t, y, weight):
    return {"a": jnp.tanh(weight @ y["a"]) * y["b"], "b": -y["b"] * jnp.sin(3 * t)}


def controlled_field(t, y, weight):
    return jnp.tanh(weight @ y) - t * y


PATH = dfx.CubicInterpolation(
    ts := jnp.linspace(T0, T1, 5),
    dfx.backward_hermite_coefficients(ts, jnp.sin(3 * ts)),
)
ODE = dfx.ODETerm(field)
CDE = dfx.ControlTerm(controlled_field, PATH)
SUBS = {
    "all": dfx.SubSaveAt(t0=True, ts=MIDDLE, t1=True),
    "part": dfx.SubSaveAt(
        ts=MIDDLE[1:3], fn=lambda t, y, args: t * y["b"] + args[0, 0]
    ),
}
CASES = {
    "functions": (ODE, Y0, dfx.SaveAt(subs=SUBS), 11, False),
    "backwards, many in a step": (ODE, Y0, dfx.SaveAt(ts=MIDDLE[::-1]), 2, True),
    "the last state": (ODE, Y0, dfx.SaveAt(t1=True), 4, False),
    "controlled": (CDE, Y0["a"], dfx.SaveAt(ts=MIDDLE), 4, False),
}
MARKED = [
    pytest.param(x, marks=[pytest.mark.heavy] if i else []) for i, x in enumerate(CASES)
]


@pytest.mark.parametrize("name", MARKED)
def test_it_saves_and_differentiates_what_diffrax_does(name):
    terms, y0, saveat, steps, backwards = CASES[name]
    t0, t1 = (T1, T0) if backwards else (T0, T1)
    scan = RematerialisedScan(make_plan(saveat, t0, t1, steps))

    def by_hand(y0, weight):
        return scan.solve(terms, dfx.Tsit5(), y0, weight, saveat)

    def by_diffrax(y0, weight):
        solution = dfx.diffeqsolve(
            *(terms, dfx.Tsit5(), t0, t1, (t1 - t0) / steps, y0, weight),
            saveat=saveat,
            adjoint=dfx.RecursiveCheckpointAdjoint(),
            max_steps=steps,
        )
        return solution.ys

    def of(solve):
        def loss(y0, weight):
            ys = solve(y0, weight)
            return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(ys)), ys

        run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
        (_, ys), gradient = run(y0, WEIGHT)
        return ys, gradient

    got, expected = of(by_hand), of(by_diffrax)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        # Round-off in double precision, of a dozen steps.
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-13)


def test_a_state_in_single_precision_stays_so_and_keeps_one_state_a_step():
    """What a scan stacks are the inputs of its steps: the time and the state, and the
    times and rows that it saves."""
    steps = 8
    y0 = jnp.ones(3, jnp.float32)
    term = dfx.ODETerm(lambda t, y, args: -y * args)
    saveat = dfx.SaveAt(t1=True)
    scan = RematerialisedScan(make_plan(saveat, T0, T1, steps))

    def solve(y0, args):
        return scan.solve(term, dfx.Tsit5(), y0, args, saveat)[-1]

    y1, pullback = jax.vjp(solve, y0, jnp.float32(2.0))
    assert y1.dtype == jnp.float32
    shapes = [x.shape for x in jax.tree.leaves(pullback) if eqx.is_array(x)]
    assert (steps, 3) in shapes
    assert sum(map(math.prod, shapes)) < 2 * steps * 3  # No second one is kept.
