"""Solves to differentiate under both adjoints, for the tests of gradients."""

import functools as ft

import diffrax as dfx
import helpers
import jax
import jax.numpy as jnp
import pytest
from helpers import (
    flat,
    initial_states,
    network_arguments,
    network_field,
    relative_difference,
)

import reversax as rvx

# (Of Diffrax's two ways to differentiate a solve directly the one that compiles in
# half the time; `test_gradient.py` and `test_properties.py` take the other.)
OURS, DIRECT = rvx.ReversibleAdjoint(), dfx.DirectAdjoint()
SOLVER = rvx.Reversible(dfx.Heun(), *helpers.SCHEMES[helpers.FEATURES_IN])
ARGS, Y0 = network_arguments(), initial_states()
PID = dfx.PIDController(rtol=1e-3, atol=1e-3)


def solve(adjoint, y0=Y0, args=ARGS, field=network_field, **kwargs):
    defaults = dict(
        terms=dfx.ODETerm(field), solver=SOLVER, t0=0.0, t1=1.0, dt0=0.02, max_steps=128
    )
    return dfx.diffeqsolve(**(defaults | kwargs), y0=y0, args=args, adjoint=adjoint)


# Compiles in less time: 0.4 s against 1.3 s for a gradient of ours, 0.7 s against 1.5 s
# for a direct one, beside a second of tracing. Not for ours in fixed point: without its
# fusion emitters XLA gives a field other bits in the two passes, and the certificate
# raises.
quick_jit = jax.jit
if jax.config.read("jax_disable_most_optimizations"):  # Unless --optimise was given.
    without = {"xla_cpu_use_fusion_emitters": False}
    quick_jit = ft.partial(jax.jit, compiler_options=without)


def agree(loss, at, bound=1e-13, fixed_point=helpers.FEATURES_IN == "fixed-point"):
    """`loss(adjoint, x)` has the same value and gradient under both adjoints. Returns
    the direct gradient."""
    of = lambda adjoint: jax.value_and_grad(lambda x: loss(adjoint, x))
    value, ours = (jax.jit if fixed_point else quick_jit)(of(OURS))(at)
    expected, direct = quick_jit(of(DIRECT))(at)
    assert abs(value - expected) <= bound * max(1.0, abs(expected))
    difference = relative_difference(ours, direct)
    assert difference <= bound, difference
    return direct


def agree_in_each_entry(ours, direct, bound):
    """Two dictionaries of gradients are the same, entry by entry. One that is small
    beside the others is what remains of terms of their size."""
    whole = jnp.linalg.norm(flat(direct))
    assert ours.keys() == direct.keys()
    for name in direct:
        difference = jnp.linalg.norm(flat(ours[name]) - flat(direct[name]))
        size = jnp.linalg.norm(flat(direct[name])) + 0.01 * whole
        assert difference <= bound * size, (name, difference / size)


CONTROLLED = {
    "constant": dict(),
    "pid": dict(stepsize_controller=PID, dt0=None),
}
# Each cell takes ten seconds to compile: daily the one that records its times.
BY_CONTROL = ["pid", pytest.param("constant", marks=pytest.mark.heavy)]
