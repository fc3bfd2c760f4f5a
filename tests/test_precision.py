"""Modes of JAX that change which numbers a program is made of."""

import subprocess
import sys

import diffrax as dfx
import jax
import jax.numpy as jnp
import pytest
from helpers import SCHEMES, SameScheme, quick, relative_difference

import reversax as rvx

OURS = rvx.ReversibleAdjoint()
CONTROLLERS = {
    "constant": dfx.ConstantStepSize(),
    "adaptive": dfx.PIDController(rtol=1e-4, atol=1e-4),
}


def gradient(adjoint, scheme, controller, saveat, dtype, event=None):
    real = lambda x: jnp.asarray(x, dtype)
    solver = rvx.Reversible(dfx.Heun(), *SCHEMES[scheme])
    term = dfx.ODETerm(lambda t, y, rate: jnp.stack([y[1], -jnp.sin(y[0])]) * rate)

    def loss(y0, rate):
        ys = dfx.diffeqsolve(
            *(term, solver, real(0.0), real(1.0), real(0.1), y0, rate),
            stepsize_controller=CONTROLLERS[controller],
            adjoint=adjoint,
            saveat=saveat,
            event=event,
            max_steps=256,
        ).ys
        return jnp.sum(jnp.where(jnp.isfinite(ys), ys, real(0)) ** real(2))

    run = jax.jit(jax.grad(loss, (0, 1)), **quick(adjoint, SCHEMES[scheme][1]))
    return run(jnp.array([1.0, 0.5], dtype), real(1.3))


STRICT = [
    ("fixed-point", "adaptive", jnp.float32, "ts"),
    *(
        pytest.param(*cell, marks=pytest.mark.heavy)
        for cell in (
            ("fixed-point", "constant", jnp.float64, "steps"),
            ("floating-point", "adaptive", jnp.float64, "ts"),
            ("published", "constant", jnp.float32, "ts"),
        )
    ),
]


@pytest.mark.parametrize("scheme, controller, dtype, output", STRICT)
def test_under_strict_promotion_the_gradient_is_the_same(
    scheme, controller, dtype, output
):
    """With 64-bit mode, in which Diffrax's own tests run."""
    times = jnp.linspace(0.05, 0.95, 3, dtype=dtype)
    saveat = {"steps": dfx.SaveAt(steps=True), "ts": dfx.SaveAt(ts=times)}[output]
    mixed = gradient(OURS, scheme, controller, saveat, dtype)
    with jax.numpy_dtype_promotion("strict"):
        strict = gradient(OURS, scheme, controller, saveat, dtype)
    assert [x.dtype for x in strict] == [dtype, dtype]
    # Another program may round otherwise.
    assert relative_difference(strict, mixed) < 64 * float(jnp.finfo(dtype).eps)


@pytest.mark.heavy
def test_under_strict_promotion_events_lanes_and_times_may_be_differentiated():
    event = dfx.Event(lambda t, y, args, **kwargs: y[0] < 0.6)
    double = jnp.float64

    def run(adjoint):
        def loss(t1, y0):
            term = dfx.ODETerm(lambda t, y, args: -jnp.sin(y))
            solver = rvx.Reversible(dfx.Heun(), *SCHEMES["published"])
            zero, step = jnp.asarray(0.0, double), jnp.asarray(0.1, double)
            solution = dfx.diffeqsolve(
                *(term, solver, zero, t1, step, y0),
                adjoint=adjoint,
                event=event,
                max_steps=64,
            )
            return jnp.sum(solution.ys) + jnp.sum(solution.ts)

        lanes = jnp.array([0.3, 2.0]), jnp.array([[1.0, 0.5], [0.9, 0.2]])
        return jax.jit(jax.vmap(jax.grad(loss, (0, 1))), **quick())(*lanes)

    with jax.numpy_dtype_promotion("strict"):
        strict = run(OURS)
    oracle = run(SameScheme(dfx.DirectAdjoint()))
    assert relative_difference(strict, oracle) < 1e-12


LOCAL = """
import contextlib, sys
import diffrax as dfx, jax, jax.numpy as jnp
import reversax as rvx

inside = sys.argv[1] == "inside"
mode = lambda here: jax.enable_x64() if here else contextlib.nullcontext()

def gradient(y0):
    with mode(inside):
        def loss(y):
            return jnp.sum(dfx.diffeqsolve(
                dfx.ODETerm(lambda t, y, args: -y), rvx.Reversible(dfx.Euler()),
                0.0, 1.0, 0.1, y, adjoint=rvx.ReversibleAdjoint(), max_steps=16,
            ).ys ** 2)
        return jax.grad(loss)(y0.astype(jnp.float64))

with mode(not inside):
    print(jax.jit(gradient)(jnp.ones(2, jnp.float32)))
"""


@pytest.mark.parametrize("where", ["inside", "around"])
def test_64_bit_mode_is_for_the_whole_program(where):
    run = subprocess.run(
        [sys.executable, "-c", LOCAL, where], capture_output=True, text=True
    )
    if where == "inside":
        assert "Enable 64-bit mode around `jax.jit`" in run.stderr
    else:
        assert run.returncode == 0, run.stderr
        assert "0.27" in run.stdout
