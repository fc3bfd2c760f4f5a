"""What may be done with a solve: every case against direct differentiation."""

import functools as ft
import math

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from helpers import (
    SameScheme,
    finite_sum_of_squares,
    network_field,
    published,
    quick,
    relative_difference,
)
from programs import (
    ARGS,
    BY_CONTROL,
    CONTROLLED,
    DIRECT,
    OURS,
    PID,
    Y0,
    agree,
    solve,
)

import reversax as rvx

BACKWARDS = {
    "ts": dfx.SubSaveAt(ts=jnp.array([1.0, 0.71, 0.7, 0.31, 0.0])),
    "steps": dfx.SubSaveAt(steps=True, t0=True),
    "ends-with-fn-and-constant": dfx.SubSaveAt(
        t0=True, t1=True, fn=lambda t, y, args: (y * t, jnp.asarray(2.0))
    ),
}


@pytest.mark.heavy  # Daily backwards: `test_times.py`, with a controller and outputs.
@pytest.mark.parametrize("controlled", CONTROLLED)
@pytest.mark.parametrize("saves", ["all", *BACKWARDS])
def test_backwards_in_time(saves, controlled):
    saveat = dfx.SaveAt(subs=BACKWARDS if saves == "all" else BACKWARDS[saves])
    kwargs = dict(t0=1.0, t1=0.0, dt0=-0.02) | CONTROLLED[controlled]
    loss = lambda adjoint, p: finite_sum_of_squares(
        solve(adjoint, p[1], p[0], saveat=saveat, **kwargs).ys
    )
    agree(loss, (ARGS, Y0))


@pytest.mark.heavy
@pytest.mark.parametrize("controlled", BY_CONTROL)
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


@pytest.mark.parametrize(
    "controlled", ["constant", pytest.param("pid", marks=pytest.mark.heavy)]
)
def test_gradients_of_each_lane_and_of_their_sum(controlled):
    kwargs = CONTROLLED[controlled]
    # Lanes of very different stiffness take very different numbers of steps.
    speeds = jnp.array([0.1, 1.0, 3.0])

    def loss(adjoint, args, y0, speed):
        field = lambda t, y, a: speed * network_field(t, y, a)
        saveat = dfx.SaveAt(ts=jnp.array([0.4, 1.0]), steps=5)
        return finite_sum_of_squares(
            solve(adjoint, y0, args, field, saveat=saveat, **kwargs).ys
        )

    states = jnp.stack([Y0, 2 * Y0, -Y0])
    of = lambda adjoint: jax.value_and_grad(lambda *x: loss(adjoint, *x), (0, 1, 2))
    lanes = jax.jit(jax.vmap(of(OURS), (None, 0, 0)), **quick(OURS))
    _, ours = lanes(ARGS, states, speeds)
    alone = jax.jit(of(DIRECT), **quick(DIRECT))
    one_by_one = [
        alone(ARGS, y0, speed) for y0, speed in zip(states, speeds, strict=True)
    ]
    values, direct = jax.tree.map(lambda *x: jnp.stack(x), *one_by_one)
    # The fastest lane contracts, which magnifies round-off: 3e-12 was measured.
    assert relative_difference(ours, direct) <= 1e-10

    total = lambda args: jnp.sum(
        jax.vmap(lambda y0, s: loss(OURS, args, y0, s))(states, speeds)
    )
    value, ours = jax.jit(jax.value_and_grad(total), **quick(OURS))(ARGS)
    assert abs(value - jnp.sum(values)) <= 1e-10 * value
    direct = jax.tree.map(lambda x: jnp.sum(x, axis=0), direct[0])
    assert relative_difference(ours, direct) <= 1e-10


@pytest.mark.parametrize("controlled", BY_CONTROL)
def test_lanes_that_are_done_stay_where_the_field_is_defined(controlled):
    """A lane of few steps idles while others go on undoing theirs. It must do so at
    times and states that were visited: here others raise."""

    def field(t, y, args):
        y = eqx.error_if(y, (t < 0.2) | (t > 1.2), "field called outside of its times")
        y = eqx.error_if(y, jnp.any(y < 0.25), "field called outside of its states")
        return args * (y - 0.2)

    kwargs = dict(t0=0.2) | CONTROLLED[controlled]
    y0 = jnp.full((2,), 0.26)

    def total(adjoint, args):
        ends = jnp.array([0.2, 0.23, 1.2])
        one = lambda t1: solve(adjoint, y0, args, field, t1=t1, **kwargs).ys
        return jnp.sum(jax.vmap(one)(ends) ** 2)

    agree(total, jnp.array([2.0, 3.0]), bound=1e-12)


@pytest.mark.heavy
def test_lanes_that_end_at_different_times():
    ends = jnp.array([0.05, 0.4, 1.0])
    total = lambda adjoint, p: jnp.sum(
        jax.vmap(lambda t1: solve(adjoint, p[1], p[0], t1=t1).ys)(ends) ** 2
    )
    agree(total, (ARGS, Y0))


@pytest.mark.heavy
def test_a_solve_that_ran_out_of_steps_has_the_gradient_of_what_it_did():
    saveat = dfx.SaveAt(ts=jnp.array([0.1, 0.2, 0.9]), steps=True)
    loss = lambda adjoint, p: finite_sum_of_squares(
        solve(adjoint, p[1], p[0], saveat=saveat, max_steps=17, throw=False).ys
    )
    agree(loss, (ARGS, Y0))
    solution = solve(OURS, saveat=saveat, max_steps=17, throw=False)
    assert solution.result == dfx.RESULTS.max_steps_reached
    with pytest.raises(eqx.EquinoxRuntimeError, match="maximum number of solver steps"):
        solve(OURS, max_steps=17)


@pytest.mark.heavy
def test_constant_steps_need_no_bound_on_their_number():
    solver = published(dfx.Heun())
    of = lambda adjoint, p, n: solve(adjoint, p[1], p[0], solver=solver, max_steps=n).ys
    loss = lambda p: jnp.sum(of(OURS, p, None) ** 2)
    direct = lambda p: jnp.sum(of(DIRECT, p, 128) ** 2)
    ours, expected = (jax.grad(f)((ARGS, Y0)) for f in (loss, direct))
    assert relative_difference(ours, expected) <= 1e-13


@pytest.mark.heavy
def test_a_loss_that_reads_the_times_of_the_steps():
    """Times do not depend on the parameters: Diffrax stops the gradient there too."""

    def loss(adjoint, p):
        args, y0 = p
        solution = solve(
            adjoint, y0, args, saveat=dfx.SaveAt(steps=True), **CONTROLLED["pid"]
        )
        done = jnp.isfinite(solution.ts)
        weights = jnp.where(done, jnp.sin(jnp.where(done, solution.ts, 0.0)), 0.0)
        ys = jnp.where(done[:, None, None], solution.ys, 0.0)
        return jnp.sum(weights[:, None, None] * ys)

    agree(loss, (ARGS, Y0))


def test_only_what_is_asked_for_is_differentiated():
    """A state that is not differentiated, and parameters that are not."""
    loss = lambda adjoint, args, y0: jnp.sum(solve(adjoint, y0, args).ys ** 2)
    of_both = jax.value_and_grad(ft.partial(loss, DIRECT), argnums=(0, 1))
    expected, (in_args, in_y0) = jax.jit(of_both, **quick(DIRECT))(ARGS, Y0)
    w1, b1, w2 = ARGS
    for of, at, direct in (
        (lambda y0: loss(OURS, ARGS, y0), Y0, in_y0),
        (lambda b: loss(OURS, (w1, b, w2), Y0), b1, in_args[1]),
    ):
        value, ours = jax.jit(jax.value_and_grad(of), **quick(OURS))(at)
        assert abs(value - expected) <= 1e-13 * max(1.0, expected)
        assert relative_difference(ours, direct) <= 1e-13


@pytest.mark.heavy
def test_jacobian_of_many_outputs():
    of = lambda adjoint: jax.jacrev(lambda y0: solve(adjoint, y0).ys)(Y0)
    assert relative_difference(of(OURS), of(DIRECT)) <= 1e-13


FORWARD = SameScheme(dfx.ForwardMode())
BY_SCHEME = {
    # By default the tangents of 20 steps are lost to 80 halvings, and withheld (below).
    "fixed-point": rvx.Reversible(dfx.Heun(), rvx.Symmetric(halvings_per_step=1 / 4)),
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
        ("ts", "published"),
        *(
            pytest.param(saves, scheme, marks=pytest.mark.heavy)
            for saves in HESSIAN_SAVES
            for scheme in BY_SCHEME
            if (saves, scheme) != ("ts", "published")
        ),
    ],
)
def test_the_hessian_by_forward_over_reverse_is_the_direct_one(saves, scheme):
    """With respect to state, parameter and final time."""
    field = lambda t, y, a: jnp.sin(a * y) * jnp.cos(t) - 0.3 * y**2

    def loss(p, adjoint):
        kwargs = dict(solver=solver, t1=p[3], dt0=0.05, max_steps=32)
        kwargs["saveat"] = HESSIAN_SAVES[saves]
        return finite_sum_of_squares(solve(adjoint, p[:2], p[2], field, **kwargs).ys)

    point = jnp.array([0.3, 0.8, 1.1, 1.0])
    solver = BY_SCHEME[scheme]

    def of(adjoint, outer, inner):
        hessian = outer(inner(lambda p: loss(p, adjoint)))
        return jax.jit(hessian, **quick(adjoint, solver.arithmetic))(point)

    ours = of(OURS, jax.jacfwd, jax.jacrev)
    # Twice forward, which compiles in the least time.
    direct = of(FORWARD, jax.jacfwd, jax.jacfwd)
    # 1.5e-13 measured for `ts`, 1e-15 for the others.
    assert relative_difference(ours, direct) <= 1e-12


@pytest.mark.heavy
@pytest.mark.parametrize("scheme", ["fixed-point", "published"])
def test_the_hessian_of_a_batch_is_the_direct_one(scheme):
    """Of lanes that share the times of their steps, and so the control."""
    solver = BY_SCHEME[scheme]
    field = lambda t, y, a: jnp.sin(a * y) * jnp.cos(t)

    def of(adjoint):
        def loss(a):
            kwargs = dict(solver=solver, dt0=0.25, max_steps=4)
            of_one = lambda y0: solve(adjoint, y0, a, field, **kwargs).ys
            return jnp.sum(jax.vmap(of_one)(Y0) ** 2)

        hessian = jax.jit(jax.hessian(loss), **quick(adjoint, solver.arithmetic))
        return hessian(jnp.array(1.1))

    assert relative_difference(of(OURS), of(DIRECT)) <= 1e-12


@pytest.mark.heavy
def test_lanes_whose_controller_counts_the_steps_that_it_rejected():
    """Its first count is a constant of the program that `vmap` is applied to."""
    clip = dfx.ClipStepSizeController(PID, store_rejected_steps=16)

    def loss(adjoint, t1):
        kwargs = dict(t1=t1, dt0=0.5, stepsize_controller=clip)
        run = lambda y0: solve(adjoint, y0[None], **kwargs).ys
        return jnp.sum(jax.vmap(run)(Y0) ** 2)

    agree(loss, jnp.array(1.0))


def second_derivative(adjoint, num_steps=200, inner=jax.jacrev):
    def loss(rate):
        solver = rvx.Reversible(dfx.Euler(), rvx.Symmetric(1 / 4))
        kwargs = dict(solver=solver, dt0=1 / num_steps)
        kwargs["field"] = lambda t, y, rate: rate * jnp.sin(y)
        return solve(adjoint, jnp.array(0.7), rate, max_steps=num_steps, **kwargs).ys[0]

    of = jax.jacfwd(inner(loss))
    return jax.jit(of, **quick(adjoint, rvx.FixedPoint()))(0.5)


def exact_second_derivative():
    return second_derivative(FORWARD, inner=jax.jacfwd)


def test_a_hessian_whose_tangents_were_lost_is_withheld():
    """The states are undone to the bit, their tangents are not: 2**50 times a round-off
    of 1e-16."""
    with pytest.raises(Exception, match=r"tangents.*restart_every.*backward pass lost"):
        jax.block_until_ready(second_derivative(OURS))
    unchecked = rvx.ReversibleAdjoint(round_trip_tolerance=math.inf)
    exact = exact_second_derivative()
    assert abs(second_derivative(unchecked) / exact - 1) > 1e-5, "nothing was lost"


@pytest.mark.heavy
def test_a_hessian_of_a_long_solve_is_the_direct_one_if_the_way_back_restarts():
    restarting = rvx.ReversibleAdjoint(restart_every=50)
    exact = exact_second_derivative()
    # In 50 steps a round-off of 1e-16 becomes 6e-13. Measured: 3e-13.
    assert abs(second_derivative(restarting) / exact - 1) <= 1e-11


@pytest.mark.heavy
def test_hessian_by_forward_over_reverse_of_adaptive_steps():
    def hessian(adjoint):
        loss = lambda args: jnp.sum(
            solve(adjoint, Y0[:1], args, **CONTROLLED["pid"]).ys ** 2
        )
        return jax.hessian(loss)(ARGS)

    assert relative_difference(hessian(OURS), hessian(DIRECT)) <= 1e-13


@pytest.mark.heavy
def test_a_batch_without_jit_has_the_gradient_of_one_with_it():
    def loss(args):
        of_one = lambda y0: solve(OURS, y0, args, max_steps=4, dt0=0.25).ys
        return jnp.sum(jax.vmap(of_one)(Y0) ** 2)

    with jax.disable_jit():
        found = jax.grad(loss)(ARGS)
    assert relative_difference(found, jax.grad(loss)(ARGS)) <= 1e-13
