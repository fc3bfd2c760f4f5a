"""Solves to differentiate under both adjoints, for the tests of gradients."""

import diffrax as dfx
import helpers
import jax
import jax.numpy as jnp
import pytest
from helpers import (
    SameScheme,
    flat,
    initial_states,
    network_arguments,
    network_field,
    quick,
    relative_difference,
)

import reversax as rvx

# (Of Diffrax's two ways to differentiate a solve directly the one that compiles in
# half the time; `test_gradient.py` and `test_properties.py` take the other.)
OURS, DIRECT = rvx.ReversibleAdjoint(), SameScheme(dfx.DirectAdjoint())
SOLVER = rvx.Reversible(dfx.Heun(), *helpers.SCHEMES[helpers.FEATURES_IN])
ARGS, Y0 = network_arguments(), initial_states()
PID = dfx.PIDController(rtol=1e-3, atol=1e-3)


def solve(adjoint, y0=Y0, args=ARGS, field=network_field, **kwargs):
    defaults = dict(
        terms=dfx.ODETerm(field), solver=SOLVER, t0=0.0, t1=1.0, dt0=0.02, max_steps=128
    )
    return dfx.diffeqsolve(**(defaults | kwargs), y0=y0, args=args, adjoint=adjoint)


def agree(loss, at, bound=1e-13, arithmetic=SOLVER.arithmetic):
    """`loss(adjoint, x)` has the same value and gradient under both adjoints. Returns
    the direct gradient."""

    def value_and_gradient(adjoint):
        of = jax.value_and_grad(lambda x: loss(adjoint, x))
        return jax.jit(of, **quick(adjoint, arithmetic))(at)

    (value, ours), (expected, direct) = map(value_and_gradient, (OURS, DIRECT))
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
