"""What a user's program may look like: every case against direct differentiation."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    finite_sum_of_squares,
    initial_states,
    network_arguments,
    network_field,
    relative_difference,
)

import reversax as rvx

OURS, DIRECT = rvx.ReversibleAdjoint(), dfx.RecursiveCheckpointAdjoint()
SOLVER = rvx.Reversible(dfx.Bosh3())
ARGS, Y0 = network_arguments(), initial_states()
PID = dfx.PIDController(rtol=1e-5, atol=1e-5)


def solve(adjoint, y0=Y0, args=ARGS, field=network_field, **kwargs):
    defaults = dict(
        terms=dfx.ODETerm(field), solver=SOLVER, t0=0.0, t1=1.0, dt0=0.02, max_steps=64
    )
    return dfx.diffeqsolve(**(defaults | kwargs), y0=y0, args=args, adjoint=adjoint)


def agree(loss, at, bound=1e-13):
    """`loss(adjoint, x)` has the same value and gradient under both adjoints."""
    of = lambda adjoint: jax.jit(jax.value_and_grad(lambda x: loss(adjoint, x)))(at)
    (value, ours), (expected, direct) = of(OURS), of(DIRECT)
    assert abs(value - expected) <= bound * max(1.0, abs(expected))
    difference = relative_difference(ours, direct)
    assert difference <= bound, difference


CONTROLLED = {
    "constant": dict(),
    "pid": dict(stepsize_controller=PID, dt0=None),
}


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


def test_parameters_that_the_field_and_the_saved_function_close_over():
    def loss(adjoint, p):
        args, y0 = p
        scale = jnp.sum(args[1])  # computed inside the differentiated function
        field = lambda t, y, _: network_field(t, y, args) * scale
        saveat = dfx.SaveAt(
            ts=jnp.array([0.3, 0.9]), fn=lambda t, y, _: y * args[1][0] + scale
        )
        return jnp.sum(solve(adjoint, y0, None, field, saveat=saveat).ys ** 2)

    agree(loss, (ARGS, Y0))
    inside = lambda adjoint, p: jax.jit(lambda p: loss(adjoint, p))(p)
    agree(inside, (ARGS, Y0))


def test_parameters_inside_the_term_and_inside_args():
    class Field(eqx.Module):
        network: eqx.nn.MLP
        rate: float = 0.3

        def __call__(self, t, y, args):
            return jax.vmap(self.network)(y) * args["gain"] - self.rate * y

    field = Field(eqx.nn.MLP(3, 3, 4, 1, activation=jnp.tanh, key=jax.random.key(2)))
    diff, static = eqx.partition(field, eqx.is_inexact_array)

    def loss(adjoint, p):
        diff, gain = p
        args = dict(gain=gain, name="not an array", seed=jax.random.key(1), n=3)
        return jnp.sum(solve(adjoint, Y0, args, eqx.combine(diff, static)).ys ** 2)

    agree(loss, (diff, jnp.array(0.7)))


def test_any_tree_of_floating_point_arrays_as_state():
    y0 = {
        "a": jnp.array(0.3),
        "b": (jnp.ones((2, 1, 3)), None, jnp.zeros((0, 4))),
        "c": [jnp.linspace(0, 1, 5)],
    }

    def field(t, y, args):
        a, (b, _, empty), (c,) = y["a"], y["b"], y["c"]
        return {
            "a": jnp.sin(c).sum() * args,
            "b": (jnp.cos(b) * a, None, empty),
            "c": [-c * b[0, 0, 1] + t],
        }

    saveat = dfx.SaveAt(ts=jnp.array([0.11, 0.5]), steps=9, t1=True)
    loss = lambda adjoint, p: finite_sum_of_squares(
        solve(adjoint, *p, field, saveat=saveat).ys
    )
    agree(loss, (y0, jnp.array(0.4)))


def test_leaves_of_different_precision_in_one_state():
    y0 = (jnp.array([0.3], jnp.float32), jnp.array([0.4], jnp.float64))
    field = lambda t, y, args: (-y[0] * args, jnp.sin(y[1]) + y[0])
    float32 = lambda x: jnp.asarray(x, jnp.float32)
    kwargs = dict(t0=float32(0), t1=float32(1), dt0=float32(0.02))
    loss = lambda adjoint, p: finite_sum_of_squares(
        solve(adjoint, *p, field, **kwargs).ys
    )
    # The single-precision leaf limits both gradients.
    agree(loss, (y0, float32(0.4)), bound=2e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
def test_half_precision_parameters_inside_the_field(dtype):
    """Their cotangents are summed in single precision. The oracle is the same program
    with double-precision parameters of the same values, cast inside the field: the
    field computes the same numbers, and the gradient differs by one final rounding."""
    args = jax.tree.map(lambda x: x.astype(dtype), ARGS)
    float32 = lambda x: jnp.asarray(x, jnp.float32)
    kwargs = dict(t0=float32(0), t1=float32(1), dt0=float32(0.02))

    def field(t, y, args):
        w1, b1, w2 = (x.astype(dtype) for x in args)
        hidden = jnp.tanh(y.astype(dtype) @ w1 + b1)
        return (hidden @ w2).astype(y.dtype) - 0.1 * jnp.sin(y)

    def gradient(args, adjoint):
        loss = lambda args: jnp.sum(
            solve(adjoint, Y0.astype(jnp.float32), args, field, **kwargs).ys ** 2
        )
        return jax.grad(loss)(args)

    ours = gradient(args, OURS)
    assert all(x.dtype == dtype for x in ours)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), args)
    direct = gradient(wide, DIRECT)
    # Half an ulp of the half-precision result, plus what each evaluation rounds: the
    # reversed states differ in the last bit, which half precision magnifies.
    assert relative_difference(ours, direct) <= 4 * float(jnp.finfo(dtype).eps)


def test_single_precision_to_its_own_round_off():
    """1,000 steps in single precision against the same program in double.

    Direct differentiation in single precision is itself off by about 1e-6 (measured
    9e-7 beside our 1.0e-6); the bound is ten times that, 1e-5."""

    def gradient(dtype, adjoint):
        cast = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)
        times = (jnp.asarray(x, dtype) for x in (0.0, 1.0, 1e-3))
        t0, t1, dt0 = times

        def loss(p):
            args, y0 = p
            saveat = dfx.SaveAt(ts=jnp.array([0.25, 1.0], dtype))
            return jnp.sum(
                solve(
                    adjoint, y0, args, t0=t0, t1=t1, dt0=dt0, max_steps=1001,
                    saveat=saveat,
                ).ys ** 2
            )  # fmt: skip

        return jax.grad(loss)(cast((ARGS, Y0)))

    ours = gradient(jnp.float32, OURS)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(ours))
    assert relative_difference(ours, gradient(jnp.float64, DIRECT)) <= 1e-5


@pytest.mark.parametrize("controlled", CONTROLLED)
def test_gradients_of_each_lane_and_of_their_sum(controlled):
    kwargs = CONTROLLED[controlled]
    # Lanes of very different stiffness take very different numbers of steps.
    speeds = jnp.array([0.1, 1.0, 6.0])

    def loss(adjoint, args, y0, speed):
        field = lambda t, y, a: speed * network_field(t, y, a)
        saveat = dfx.SaveAt(ts=jnp.array([0.4, 1.0]), steps=5)
        return finite_sum_of_squares(
            solve(adjoint, y0, args, field, saveat=saveat, **kwargs).ys
        )

    states = jnp.stack([Y0, 2 * Y0, -Y0])
    lanes = lambda adjoint: jax.vmap(
        jax.grad(lambda *x: loss(adjoint, *x), (0, 1, 2)), (None, 0, 0)
    )(ARGS, states, speeds)
    # The fastest lane contracts, which magnifies round-off: 3e-12 was measured.
    assert relative_difference(lanes(OURS), lanes(DIRECT)) <= 1e-10
    one_by_one = [
        jax.grad(lambda *x: loss(DIRECT, *x), (0, 1, 2))(ARGS, y0, speed)
        for y0, speed in zip(states, speeds, strict=True)
    ]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *one_by_one)
    assert relative_difference(lanes(OURS), stacked) <= 1e-10

    total = lambda adjoint, args: jnp.sum(
        jax.vmap(lambda y0, s: loss(adjoint, args, y0, s))(states, speeds)
    )
    agree(total, ARGS, bound=1e-10)


@pytest.mark.parametrize("controlled", CONTROLLED)
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


def test_lanes_that_end_at_different_times():
    ends = jnp.array([0.05, 0.4, 1.0])
    total = lambda adjoint, p: jnp.sum(
        jax.vmap(lambda t1: solve(adjoint, p[1], p[0], t1=t1).ys)(ends) ** 2
    )
    agree(total, (ARGS, Y0))


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


def test_constant_steps_need_no_bound_on_their_number():
    loss = lambda p: jnp.sum(solve(OURS, p[1], p[0], max_steps=None).ys ** 2)
    direct = lambda p: jnp.sum(solve(DIRECT, p[1], p[0]).ys ** 2)
    ours, expected = (jax.grad(f)((ARGS, Y0)) for f in (loss, direct))
    assert relative_difference(ours, expected) <= 1e-13


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
    agree(lambda adjoint, args: jnp.sum(solve(adjoint, Y0, args).ys ** 2), ARGS)
    agree(lambda adjoint, y0: jnp.sum(solve(adjoint, y0, ARGS).ys ** 2), Y0)
    one = lambda adjoint, b: jnp.sum(solve(adjoint, Y0, (ARGS[0], b, ARGS[2])).ys ** 2)
    agree(one, ARGS[1])


def test_states_saved_beside_no_outputs_or_empty_ones():
    for saveat in (
        dfx.SaveAt(solver_state=True),
        dfx.SaveAt(subs=[None, dfx.SubSaveAt(t1=True)], solver_state=True),
    ):
        loss = lambda adjoint, p, saveat=saveat: jnp.sum(
            solve(adjoint, p[1], p[0], saveat=saveat).solver_state.z ** 2
        )
        agree(loss, (ARGS, Y0))


def test_a_users_own_tree_as_state():
    @jax.tree_util.register_pytree_node_class
    class Point:  # no __eq__
        def __init__(self, x, v):
            self.x, self.v = x, v

        def tree_flatten(self):
            return (self.x, self.v), None

        @classmethod
        def tree_unflatten(cls, _, children):
            return cls(*children)

    field = lambda t, y, k: Point(y.v, -k * y.x)
    loss = lambda adjoint, p: finite_sum_of_squares(solve(adjoint, *p, field).ys)
    agree(loss, (Point(jnp.array(1.0), jnp.array(0.0)), jnp.array(3.0)))


def test_jacobian_of_many_outputs():
    of = lambda adjoint: jax.jacrev(lambda y0: solve(adjoint, y0).ys)(Y0)
    assert relative_difference(of(OURS), of(DIRECT)) <= 1e-13


@pytest.mark.parametrize("controlled", CONTROLLED)
def test_hessian_by_forward_over_reverse(controlled):
    def hessian(adjoint):
        loss = lambda args: jnp.sum(
            solve(adjoint, Y0[:1], args, **CONTROLLED[controlled]).ys ** 2
        )
        return jax.hessian(loss)(ARGS)

    assert relative_difference(hessian(OURS), hessian(dfx.DirectAdjoint())) <= 1e-13


@pytest.mark.parametrize("controlled", CONTROLLED)
def test_controlled_equations(controlled):
    """A control with derivatives in its values, and in a term of several parts."""
    times = jnp.linspace(0, 1, 6)

    def loss(adjoint, p):
        args, values = p
        path = dfx.CubicInterpolation(
            times, dfx.backward_hermite_coefficients(times, values)
        )
        control = dfx.ControlTerm(
            lambda t, y, a: jnp.tanh(y)[..., None] * jnp.ones(2), path
        )
        terms = dfx.MultiTerm(dfx.ODETerm(network_field), control)
        return jnp.sum(
            solve(adjoint, Y0, args, terms=terms, **CONTROLLED[controlled]).ys
        )

    agree(loss, (ARGS, jnp.sin(jnp.arange(12.0)).reshape(6, 2)))


def test_a_stratonovich_equation_on_a_fixed_path():
    path = dfx.VirtualBrownianTree(0.0, 1.0, 1e-3, (3,), jax.random.key(5))
    noise = dfx.ControlTerm(lambda t, y, args: jnp.diag(jnp.cos(y) * args[1][0]), path)
    terms = dfx.MultiTerm(dfx.ODETerm(network_field), noise)
    solver = rvx.Reversible(dfx.Heun())
    loss = lambda adjoint, p: jnp.sum(
        solve(adjoint, p[1], p[0], terms=terms, solver=solver).ys
    )
    agree(loss, (ARGS, Y0[0]))


def test_fields_with_control_flow_and_rules_of_their_own():
    @jax.custom_vjp
    def doubled_backwards(x):
        return x

    doubled_backwards.defvjp(lambda x: (x, None), lambda _, ct: (2 * ct,))

    @jax.custom_jvp
    def cube(x):
        return x**3

    cube.defjvp(lambda x, dx: (cube(x[0]), 3 * x[0] ** 2 * dx[0]))

    @jax.checkpoint
    def field(t, y, args):
        y = jax.lax.cond(t > 0.5, jnp.sin, jnp.cos, y)
        y, _ = jax.lax.scan(lambda c, w: (jnp.tanh(c * w), None), y, args)
        return doubled_backwards(y) + 0.1 * cube(y)

    loss = lambda adjoint, p: jnp.sum(solve(adjoint, *p, field).ys)
    agree(loss, (Y0, jnp.array([0.5, 1.5])))


def test_gradient_agrees_with_finite_differences():
    """An oracle that shares nothing with automatic differentiation."""
    y0 = np.asarray(Y0)
    direction = np.asarray(initial_states()[::-1])
    loss = lambda y0: jnp.sum(jnp.sin(solve(OURS, jnp.asarray(y0)).ys))
    along = jnp.sum(jax.grad(loss)(Y0) * direction)
    h = 1e-5  # central differences: error h**2 ~ 1e-10 and round-off 1e-16/h ~ 1e-11
    difference = (loss(y0 + h * direction) - loss(y0 - h * direction)) / (2 * h)
    assert abs(along - difference) <= 1e-8 * abs(along)
