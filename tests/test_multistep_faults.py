"""Symmetric multistep methods: what goes wrong is noticed, or refused."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    network_field,
)
from multistep_method import (
    ARGS,
    OURS,
    T1,
    Y0,
    differentiated,
    method,
    solve,
)

import reversax as rvx
from reversax._schemes import multistep
from reversax._schemes.multistep_moves import Correct

pytestmark = pytest.mark.usefixtures("ring_of_any_size")


def test_damping_that_is_too_large_is_seen():
    field = lambda t, y, args: -20 * y
    with pytest.raises(eqx.EquinoxRuntimeError, match=r"Take smaller steps, or `rever"):
        dfx.diffeqsolve(
            *(dfx.ODETerm(field), method(4, every=16), 0.0, 5.0, 0.05, Y0),
            adjoint=OURS,
        )
    healthy = dfx.diffeqsolve(
        *(dfx.ODETerm(field), method(4, every=4), 0.0, 1.0, 1 / 256, Y0), adjoint=OURS
    )
    assert jnp.max(jnp.abs(healthy.ys)) < 1e-6


FAULTS = ["the last correction", "its sign", "the bits of a correction"]


@pytest.mark.parametrize(
    "fault",
    [FAULTS[1], *[pytest.param(x, marks=pytest.mark.heavy) for x in FAULTS[::2]]],
)
def test_a_fault_of_the_way_back_is_noticed(fault, monkeypatch):
    """A single one, each in what only the way back reads."""
    if fault == "its sign":
        extend = multistep.Extend
        flipped = lambda **x: extend(**{**x, "born": -x["born"]})
        monkeypatch.setattr(multistep, "Extend", flipped)
    else:
        before = Correct._before

        def wrong(self, context):
            found = before(self, context)
            if fault == "the last correction":
                return jax.tree.map(jnp.zeros_like, found)
            return jax.tree.map(lambda x: x * 1.01, found)

        monkeypatch.setattr(Correct, "_before", wrong)
    with pytest.raises(eqx.EquinoxRuntimeError, match="did not find the initial state"):
        differentiated(method(4), 41, OURS)


@pytest.mark.heavy
def test_a_field_that_changes_between_the_passes_is_noticed():
    def moody(t, y, args):
        return -y + jax.pure_callback(
            lambda: np.asarray(np.random.default_rng().normal()),
            jax.ShapeDtypeStruct((), jnp.float64),
        )

    def loss(y0):
        known = dict(adjoint=OURS)
        times = 0.0, 1.0, 1 / 8
        return jnp.sum(
            dfx.diffeqsolve(dfx.ODETerm(moody), method(4), *times, y0, **known).ys
        )

    with pytest.raises(eqx.EquinoxRuntimeError, match="did not find the initial state"):
        eqx.filter_jit(jax.grad(loss))(Y0)


@pytest.mark.filterwarnings("ignore:.*is not marked as converging")
def test_what_it_cannot_have_is_refused():
    for wrong, match in (
        (dict(order=5), "Pass `order=4` or `order=6`"),
        (dict(correct_every=5), "at least 6"),
        (dict(starter=dfx.HalfSolver(dfx.Heun())), "explicit Runge-Kutta solver"),
    ):
        with pytest.raises(ValueError, match=match):
            rvx.SymmetricMultistep(**wrong)
    with pytest.raises(ValueError, match=r"Leave out `coupling`: `SymmetricMulti"):
        rvx.Reversible(rvx.SymmetricMultistep(), rvx.Symmetric(1))
    for controller in (dfx.PIDController(1e-3, 1e-3), dfx.StepTo(jnp.array([0.0, T1]))):
        dt0 = None if isinstance(controller, dfx.StepTo) else 0.1
        with pytest.raises((TypeError, RuntimeError), match=r"ConstantStep|adaptive"):
            dfx.diffeqsolve(
                *(dfx.ODETerm(network_field), method(4), 0.0, T1, dt0, Y0, ARGS),
                stepsize_controller=controller,
                adjoint=OURS,
            )
    with pytest.raises(ValueError, match="a correction of 32 bits"):
        jax.grad(lambda y0: jnp.sum(solve(method(4), 9, y0, max_steps=None).ys))(Y0)
    path = dfx.VirtualBrownianTree(0.0, T1, 1e-3, (), jax.random.key(0))
    noise = dfx.ControlTerm(lambda t, y, args: y, path)
    for terms in (dfx.MultiTerm(dfx.ODETerm(network_field), noise), noise):
        with pytest.raises(TypeError, match=r"a single `diffrax\.ODETerm`"):
            dfx.diffeqsolve(terms, method(4), 0.0, T1, 0.1, Y0, ARGS, adjoint=OURS)
    # Diffrax's first step is of `dt0`, and the others are not.
    with pytest.raises(eqx.EquinoxRuntimeError, match="a `dt0` that divides"):
        dfx.diffeqsolve(dfx.ODETerm(network_field), method(4), 0.0, T1, 0.3, Y0, ARGS)
