"""What may be done with a solve: every case against direct differentiation."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import pytest
from helpers import (
    finite_sum_of_squares,
    relative_difference,
)
from programs import ARGS, CONTROLLED, OURS, Y0, agree, solve

import reversax as rvx


@pytest.mark.parametrize("controlled", CONTROLLED)
@pytest.mark.parametrize(
    "saveat",
    [
        dfx.SaveAt(ts=jnp.array([1.0, 0.71, 0.7, 0.31, 0.0])),
        dfx.SaveAt(steps=True, t0=True),
        dfx.SaveAt(t0=True, t1=True, fn=lambda t, y, args: y * t),
    ],
    ids=["ts", "steps", "ends-with-fn"],
)
def test_backwards_in_time(saveat, controlled):
    kwargs = dict(t0=1.0, t1=0.0, dt0=-0.02) | CONTROLLED[controlled]
    loss = lambda adjoint, p: finite_sum_of_squares(
        solve(adjoint, p[1], p[0], saveat=saveat, **kwargs).ys
    )
    agree(loss, (ARGS, Y0))


@pytest.mark.parametrize("controlled", CONTROLLED)
def test_no_time_at_all(controlled):
    """With t0 == t1 every saved value is y0, and nothing depends on the field."""
    subs = [
        dfx.SubSaveAt(t0=True, t1=True, ts=jnp.array([0.5, 0.5])),
        dfx.SubSaveAt(t1=True, steps=2, fn=lambda t, y, args: args[1] * jnp.sum(y)),
        dfx.SubSaveAt(steps=True),
    ]
    kwargs = dict(t0=0.5, t1=0.5, saveat=dfx.SaveAt(subs=subs)) | CONTROLLED[controlled]
    loss = lambda adjoint, p: finite_sum_of_squares(
        solve(adjoint, p[1], p[0], **kwargs).ys
    )
    agree(loss, (ARGS, Y0))


BY_SCHEME = {
    "fixed-point": rvx.Reversible(dfx.Heun()),
    "floating-point": rvx.Reversible(dfx.Bosh3(), arithmetic=rvx.FloatingPoint()),
    "published": rvx.Reversible(dfx.Heun(), rvx.McCallumFoster()),
}
HESSIAN_SAVES = {
    "t1": dfx.SaveAt(t1=True),
    "ts": dfx.SaveAt(ts=jnp.array([0.33, 0.7])),
    "steps": dfx.SaveAt(steps=3),
}


@pytest.mark.parametrize(
    "saves, scheme",
    [
        ("t1", "fixed-point"),
        ("ts", "fixed-point"),
        ("steps", "published"),
        *(
            pytest.param(saves, scheme, marks=pytest.mark.heavy)
            for saves in HESSIAN_SAVES
            for scheme in BY_SCHEME
        ),
    ],
)
def test_the_hessian_by_forward_over_reverse_is_the_direct_one(saves, scheme):
    """With respect to state, parameter and final time."""
    field = lambda t, y, a: jnp.sin(a * y) * jnp.cos(t) - 0.3 * y**2

    def loss(p, adjoint):
        kwargs = dict(solver=BY_SCHEME[scheme], t1=p[3], dt0=0.05, max_steps=32)
        kwargs["saveat"] = HESSIAN_SAVES[saves]
        return finite_sum_of_squares(solve(adjoint, p[:2], p[2], field, **kwargs).ys)

    point = jnp.array([0.3, 0.8, 1.1, 1.0])
    of = lambda adjoint: jax.jit(jax.hessian(lambda p: loss(p, adjoint)))(point)
    # 1.5e-13 measured for `ts`, 1e-15 for the others.
    assert relative_difference(of(OURS), of(dfx.DirectAdjoint())) <= 1e-12


@pytest.mark.heavy
def test_hessian_by_forward_over_reverse_of_adaptive_steps():
    def hessian(adjoint):
        loss = lambda args: jnp.sum(
            solve(adjoint, Y0[:1], args, **CONTROLLED["pid"]).ys ** 2
        )
        return jax.hessian(loss)(ARGS)

    assert relative_difference(hessian(OURS), hessian(dfx.DirectAdjoint())) <= 1e-13
