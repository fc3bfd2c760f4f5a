"""What a field and a state may be: every case against direct differentiation."""

from collections.abc import Callable

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    finite_sum_of_squares,
    initial_states,
    network_field,
    quick,
    relative_difference,
)
from programs import (
    ARGS,
    BY_CONTROL,
    CONTROLLED,
    DIRECT,
    OURS,
    SOLVER,
    Y0,
    agree,
    solve,
)

import reversax as rvx


def test_parameters_that_the_field_and_the_saved_function_close_over():
    def loss(adjoint, p):
        args, y0 = p
        scale = jnp.sum(args[1])  # computed inside the differentiated function
        field = lambda t, y, _: network_field(t, y, args) * scale
        saveat = dfx.SaveAt(
            ts=jnp.array([0.3, 0.9]), fn=lambda t, y, _: y * args[1][0] + scale
        )
        return jnp.sum(solve(adjoint, y0, None, field, saveat=saveat).ys ** 2)

    direct = agree(loss, (ARGS, Y0))
    inside = jax.grad(jax.jit(lambda p: loss(OURS, p)))((ARGS, Y0))
    assert relative_difference(inside, direct) <= 1e-13


@pytest.mark.heavy
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


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(jnp.bfloat16, id="bf16"),
        pytest.param(jnp.float16, id="f16", marks=pytest.mark.heavy),
    ],
)
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
        return jax.jit(jax.grad(loss), **quick(adjoint))(args)

    ours = gradient(args, OURS)
    assert all(x.dtype == dtype for x in ours)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), args)
    direct = gradient(wide, DIRECT)
    # Half an ulp of the half-precision result, plus what each evaluation rounds: the
    # reversed states differ in the last bit, which half precision magnifies.
    assert relative_difference(ours, direct) <= 4 * float(jnp.finfo(dtype).eps)


@pytest.mark.heavy
def test_single_precision_to_its_own_round_off():
    """1,000 steps in single precision against the same program in double.

    Measured: 1.08e-5, beside 1.11e-5 of direct differentiation in single precision. It
    is the forward solve that rounds; undoing it adds no error to speak of."""

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

        return jax.jit(jax.grad(loss), **quick(adjoint))(cast((ARGS, Y0)))

    ours = gradient(jnp.float32, OURS)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(ours))
    exact, direct = gradient(jnp.float64, DIRECT), gradient(jnp.float32, DIRECT)
    error = relative_difference(ours, exact)
    assert error <= 3e-5
    assert error <= 1.5 * relative_difference(direct, exact)


@pytest.mark.heavy  # Daily: the state handed over in `test_resuming.py`.
@pytest.mark.parametrize(
    "saveat",
    [
        pytest.param(dfx.SaveAt(solver_state=True), id="none"),
        pytest.param(
            dfx.SaveAt(subs=[None, dfx.SubSaveAt(t1=True)], solver_state=True),
            id="empty",
        ),
    ],
)
def test_states_saved_beside_no_outputs_or_empty_ones(saveat):
    twin = lambda solution: SOLVER.scheme.decode(solution.solver_state.codes)[1]
    loss = lambda adjoint, p: jnp.sum(
        twin(solve(adjoint, p[1], p[0], saveat=saveat)) ** 2
    )
    agree(loss, (ARGS, Y0))


@pytest.mark.heavy
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


@pytest.mark.heavy
@pytest.mark.parametrize("controlled", BY_CONTROL)
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


@pytest.mark.heavy
def test_a_stratonovich_equation_on_a_fixed_path():
    path = dfx.VirtualBrownianTree(0.0, 1.0, 1e-3, (3,), jax.random.key(5))
    noise = dfx.ControlTerm(lambda t, y, args: jnp.diag(jnp.cos(y) * args[1][0]), path)
    terms = dfx.MultiTerm(dfx.ODETerm(network_field), noise)
    loss = lambda adjoint, p: jnp.sum(solve(adjoint, p[1], p[0], terms=terms).ys)
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


@pytest.mark.heavy  # Daily: the stencil of `test_devices.py`, in the same scheme.
@pytest.mark.parametrize("batching", ["batched", "vmap"])
def test_a_stencil_whose_stages_are_written_to_memory(batching):
    """In the default scheme, in which a single bit that differs raises."""
    solver = rvx.Reversible(dfx.Bosh3())

    def field(t, y, rate):
        return rate * (jnp.roll(y, 1) - 2 * y + jnp.roll(y, -1)) + jnp.sin(y)

    def loss(adjoint, p):
        of_one = lambda y0: solve(adjoint, y0, p[1], field, solver=solver).ys
        return jnp.sum((jax.vmap(of_one) if batching == "vmap" else of_one)(p[0]) ** 2)

    y0 = jnp.sin(jnp.arange(1024.0)).reshape(2, 512)
    agree(loss, (y0, jnp.array(0.3)), 1e-12, solver.arithmetic)


class Geometric(dfx.AbstractStepSizeController):
    """A user's own: each step longer than the last by a factor out of `args`."""

    longest: Callable  # closes over arrays

    def wrap(self, direction):
        return self

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        return t0 + dt0, 0.05

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        dt = jnp.minimum(controller_state * args["growth"], self.longest())
        return True, t1, t1 + dt, False, dt, dfx.RESULTS.successful


@pytest.mark.parametrize(
    "growths",
    [
        pytest.param(1.3, id="one"),
        pytest.param(jnp.array([1.2, 1.5]), id="vmap", marks=pytest.mark.heavy),
    ],
)
def test_a_controller_may_read_args_and_close_over_what_is_differentiated(growths):
    field = lambda t, y, args: jnp.sin(t - args["rate"] * y)

    def loss(adjoint, p):
        y0, rate, growths, longest = p
        controller = Geometric(lambda: longest)
        run = lambda growth: (
            solve(
                *(adjoint, y0, dict(rate=rate, growth=growth), field),
                stepsize_controller=controller,
            ).ys
        )
        return jnp.sum((jax.vmap(run)(growths) if growths.ndim else run(growths)) ** 2)

    agree(
        loss, (jnp.array([0.4]), jnp.array(2.0), jnp.asarray(growths), jnp.array(0.2))
    )


def test_gradient_agrees_with_finite_differences():
    """An oracle that shares nothing with automatic differentiation."""
    y0 = np.asarray(Y0)
    direction = np.asarray(initial_states()[::-1])
    loss = lambda y0: jnp.sum(jnp.sin(solve(OURS, jnp.asarray(y0)).ys))
    along = jnp.sum(jax.jit(jax.grad(loss), **quick())(Y0) * direction)
    loss = jax.jit(loss, **quick())
    h = 1e-5  # central differences: error h**2 ~ 1e-10 and round-off 1e-16/h ~ 1e-11
    difference = (loss(y0 + h * direction) - loss(y0 - h * direction)) / (2 * h)
    assert abs(along - difference) <= 1e-8 * abs(along)
