"""In floating point the backward pass may restart from pairs that were kept."""

import itertools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from helpers import quick
from programs import ARGS, CONTROLLED, DIRECT, Y0, agree, solve

import reversax as rvx
from reversax._walk import tape

FLOATING = rvx.Reversible(dfx.Heun(), rvx.Symmetric(1 / 4), rvx.FloatingPoint())
BY_BITS = rvx.Reversible(dfx.Heun(), arithmetic=rvx.FloatingPoint())
HEAVY = pytest.mark.heavy
HOPELESS = dict(solver=FLOATING, dt0=0.002, max_steps=512)


def loss(adjoint, args, **kwargs):
    return jnp.sum(solve(adjoint, args=args, **(HOPELESS | kwargs)).ys ** 2)


def differentiated(loss, args=ARGS):
    """In floating point a program may be compiled quickly."""
    return eqx.filter_jit(jax.grad(loss), **quick(None, rvx.FloatingPoint()))(args)


# (A number of steps is daily in the test below, in constant steps of a batch.)
DAILY = [("auto", "pid", "vmap")]


def test_restarts_make_exact_what_would_be_lost():
    """500 steps of the symmetric coupling magnify round-off by 2**125."""
    never = rvx.ReversibleAdjoint(restart_every=None)
    of = lambda adjoint: differentiated(lambda a: loss(adjoint, a))
    with pytest.raises(eqx.EquinoxRuntimeError, match="did not find the initial state"):
        of(never)
    often = rvx.ReversibleAdjoint(restart_every=8)
    ours, direct = of(often), of(DIRECT)
    for a, b in zip(ours, direct, strict=True):
        # 2**(8/4) ulps, of increments and cotangents.
        assert jnp.max(jnp.abs(a - b)) <= 1e-13 * jnp.max(jnp.abs(b))


@pytest.mark.parametrize(
    ("restart_every", "controlled", "batching"),
    [
        pytest.param(*cell, marks=() if cell in DAILY else HEAVY)
        for cell in itertools.product(["auto", 7], CONTROLLED, ["batched", "vmap"])
    ],
)
def test_every_way_of_stepping_and_batching(restart_every, controlled, batching):
    def total(adjoint, args):
        if adjoint is not DIRECT:
            adjoint = rvx.ReversibleAdjoint(restart_every=restart_every)
        kwargs = CONTROLLED[controlled]
        run = lambda y0: solve(adjoint, y0, args, solver=FLOATING, **kwargs).ys
        ys = run(Y0) if batching == "batched" else jax.vmap(run)(Y0)
        return jnp.sum(ys**2)

    agree(total, ARGS, bound=1e-13 if restart_every != "auto" else 1e-7)


@pytest.mark.parametrize(
    ("coupling", "dtype"),
    [
        pytest.param(rvx.Symmetric(1 / 4), jnp.float64, id="seldom-f64"),
        *(
            pytest.param(*cell, id=f"{name}-{cell[1].__name__}", marks=HEAVY)
            for name, *cell in [
                ("seldom", rvx.Symmetric(1 / 4), jnp.float32),
                ("always", rvx.Symmetric(1), jnp.float32),
                ("always", rvx.Symmetric(1), jnp.float64),
                ("published", rvx.McCallumFoster(0.9), jnp.float32),
                ("published", rvx.McCallumFoster(0.9), jnp.float64),
            ]
        ),
    ],
)
def test_the_number_chosen_keeps_the_tolerance_and_is_no_waste(coupling, dtype):
    """At the number chosen the check passes; at three times as many it does not."""
    cast = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)
    solver = rvx.Reversible(dfx.Heun(), coupling, rvx.FloatingPoint())

    def gradient(restart_every):
        adjoint = rvx.ReversibleAdjoint(restart_every=restart_every)
        times = dict(t0=dtype(0), t1=dtype(1), dt0=dtype(0.002))
        run = lambda args: solve(
            adjoint, cast(Y0), args, solver=solver, max_steps=512, **times
        )
        return differentiated(lambda args: jnp.sum(run(args).ys), cast(ARGS))

    gradient("auto")
    amplification, eps = coupling.amplification, float(jnp.finfo(dtype).eps)
    chosen = jnp.log(eps**-0.5 / 4 * (2 * amplification) ** 0.5) / amplification
    with pytest.raises(eqx.EquinoxRuntimeError, match="kept to restart from"):
        gradient(int(3 * chosen))


@pytest.mark.parametrize(
    ("batching", "controlled"),
    [
        ("batched", "constant"),
        ("batched", "pid"),
        pytest.param("vmap", "pid", marks=HEAVY),
        pytest.param("vmap", "constant", marks=HEAVY),
    ],
)
def test_the_way_back_restarts_by_halvings_where_these_follow_from_the_solve(
    controlled, batching
):
    """256 halvings magnify round-off by 1e77, between restarts by 2**23 at most."""
    kwargs = dict(dt0=1 / 200, max_steps=256) | CONTROLLED[controlled]

    def total(adjoint, args):
        run = lambda y0: solve(adjoint, y0, args, solver=BY_BITS, **kwargs).ys
        ys = run(Y0) if batching == "batched" else jax.vmap(run)(Y0)
        return jnp.sum(ys**2)

    agree(total, ARGS, 1e-7, BY_BITS.arithmetic)
    never = rvx.ReversibleAdjoint(restart_every=None)
    if controlled == "constant":
        with pytest.raises(eqx.EquinoxRuntimeError, match="did not find the initial"):
            differentiated(lambda a: total(never, a))


def test_the_check_at_a_restart_is_that_at_t0(monkeypatch):
    """A kept state that was spoilt is noticed, however short the way from it to t0."""
    read = tape.Tape.kept

    def spoilt(self, index, shed, otherwise):
        at, kept = read(self, index, shed, otherwise)
        return at, jax.tree.map(lambda x: jnp.where(at, x + 1e-6, x), kept)

    jax.clear_caches()
    monkeypatch.setattr(tape.Tape, "kept", spoilt)
    adjoint = rvx.ReversibleAdjoint(restart_every=16)
    with pytest.raises(eqx.EquinoxRuntimeError, match="kept to restart from"):
        differentiated(lambda a: loss(adjoint, a))
    jax.clear_caches()


@pytest.mark.parametrize("value", [0, -3, 2.5, "often", True], ids=repr)
def test_a_number_of_steps_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match=r"at least 1.*restart_every="):
        loss(rvx.ReversibleAdjoint(restart_every=value), ARGS)


def test_a_solve_of_fewer_steps_than_there_are_to_a_restart_keeps_no_pair():
    def gradient(adjoint):
        def loss(y0):
            return jnp.sum(
                dfx.diffeqsolve(
                    dfx.ODETerm(lambda t, y, args: jnp.sin(y)),
                    rvx.Reversible(dfx.Heun(), rvx.McCallumFoster()),
                    *(0.0, 1.0, 0.1, y0),
                    adjoint=adjoint,
                    max_steps=16,
                ).ys
            )

        return jax.grad(loss)(jnp.array([0.3, 1.0]))

    seldom = gradient(rvx.ReversibleAdjoint(restart_every=100))
    assert jnp.array_equal(seldom, gradient(rvx.ReversibleAdjoint(restart_every=None)))
