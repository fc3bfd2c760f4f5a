"""Bad use is refused at the entry: what was called, what came, what to do instead."""

import math

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reversax as rvx

Y0 = jnp.array([1.0, -0.5])


def field(t, y, args):
    return -jnp.sin(y) * (1.0 if args is None else args)


TERM = dfx.ODETerm(field)


def solve(
    solver=None,
    terms=TERM,
    t0=0.0,
    t1=1.0,
    dt0=0.1,
    y0=Y0,
    args=None,
    adjoint=None,
    **kwargs,
):
    if solver is None:
        solver = rvx.Reversible(dfx.Tsit5())
    adjoint = rvx.ReversibleAdjoint() if adjoint is None else adjoint
    return dfx.diffeqsolve(
        terms, solver, t0, t1, dt0, y0, args, adjoint=adjoint, **kwargs
    )


def test_a_solver_that_is_not_reversible_is_refused():
    message = r"Wrap.*Reversible\(Tsit5.*ReversibleAdjoint.*needs.*got `Tsit5`"
    with pytest.raises(TypeError, match=message):
        solve(dfx.Tsit5())


@pytest.mark.parametrize(
    "base",
    [
        dfx.ImplicitEuler(),
        dfx.Kvaerno5(),
        dfx.KenCarp4(),
        dfx.Sil3(),
        dfx.HalfSolver(dfx.Kvaerno3()),
    ],
    ids=lambda base: type(base).__name__,
)
def test_an_implicit_base_is_refused(base):
    message = r"Use an explicit solver.*the implicit `\w+`.*reversax\.Reversible\("
    with pytest.raises(ValueError, match=message):
        rvx.Reversible(base)


@pytest.mark.parametrize(
    "base",
    [
        dfx.HalfSolver(dfx.ReversibleHeun()),
        rvx.Reversible(dfx.Heun()),
        dfx.HalfSolver(rvx.Reversible(dfx.Heun())),
    ],
    ids=lambda base: type(base).__name__,
)
def test_what_already_advances_several_states_is_no_base_of_a_wrapper(base):
    message = (
        r"Use a Runge-Kutta solver.*`\w+` advances several.*reversax\.Reversible\("
    )
    with pytest.raises(ValueError, match=message):
        rvx.Reversible(base)


@pytest.mark.parametrize("not_a_solver", [dfx.Tsit5, "Tsit5", None], ids=repr)
def test_what_is_no_solver_is_refused(not_a_solver):
    with pytest.raises(TypeError, match=r"Pass a Diffrax solver, such as.*not"):
        rvx.Reversible(not_a_solver)


def test_what_is_no_coupling_or_arithmetic_is_refused():
    with pytest.raises(TypeError, match=r"Symmetric\(\).*coupling=.*0\.9 is no"):
        rvx.Reversible(dfx.Tsit5(), 0.9)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"FixedPoint\(\).*arithmetic=.*'float' is no"):
        rvx.Reversible(dfx.Tsit5(), arithmetic="float")  # pyright: ignore


@pytest.mark.parametrize("value", [0.0, -0.5, 1.0000001, 2, math.nan, math.inf])
def test_a_coupling_parameter_outside_its_interval_is_refused(value):
    with pytest.raises(ValueError, match=r"in \(0, 1\] as.*coupling_parameter=.*not"):
        rvx.McCallumFoster(value)


def test_a_coupling_parameter_that_is_no_number_is_refused():
    with pytest.raises(TypeError, match=r"Pass a number.*coupling_parameter=.*not"):
        rvx.McCallumFoster("0.9")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"float.*coupling_parameter=.*traced value"):
        jax.jit(lambda x: rvx.McCallumFoster(x).coupling_parameter)(0.9)


def test_an_integer_state_is_refused_where_diffrax_has_not_made_it_float():
    """`diffeqsolve` turns integers into floats before any solver sees them."""
    message = r"Convert the state to floating-point.*int.*reversax\.Reversible"
    with pytest.raises(TypeError, match=message):
        rvx.Reversible(dfx.Tsit5()).init(TERM, 0.0, 0.1, jnp.array([1, 2]), None)
    assert solve(y0=jnp.array([1, 2])).ys.dtype == jnp.float64


UNBOUNDED = {
    "adaptive": (
        dict(stepsize_controller=dfx.PIDController(1e-3, 1e-3)),
        r"times that `PIDController` chooses.*ConstantStepSize",
    ),
    "event": (
        dict(event=dfx.Event(lambda t, y, args, **kwargs: t > 0.5)),
        r"before an event",
    ),
    "fixed point": ({}, r"FixedPoint` records at least 1/4 bits.*FloatingPoint"),
    "restarts": (
        dict(
            solver=rvx.Reversible(dfx.Heun(), arithmetic=rvx.FloatingPoint()),
            adjoint=rvx.ReversibleAdjoint(restart_every=16),
        ),
        r"at every 16 steps",
    ),
}


@pytest.mark.parametrize(
    "what",
    [
        x if x == "fixed point" else pytest.param(x, marks=pytest.mark.heavy)
        for x in UNBOUNDED
    ],
)
def test_an_unbounded_number_of_steps_is_refused_only_if_it_is_differentiated(what):
    options, why = UNBOUNDED[what]
    options = dict(solver=rvx.Reversible(dfx.Heun())) | options
    run = lambda y0, **more: solve(y0=y0, **options, **more).ys
    unbounded = jax.jit(lambda y0: run(y0, max_steps=None))
    np.testing.assert_array_equal(unbounded(Y0), jax.jit(run)(Y0))
    with pytest.raises(ValueError, match=rf"Pass `max_steps=\.\.\.`.*{why}"):
        jax.eval_shape(jax.grad(lambda y0: jnp.sum(run(y0, max_steps=None))), Y0)


def test_measuring_a_round_trip_of_an_unbounded_number_of_steps_is_refused():
    with pytest.raises(ValueError, match=r"Pass `max_steps=\.\.\.`"):
        solver = rvx.Reversible(dfx.Tsit5())
        rvx.round_trip_error(TERM, solver, 0.0, 1.0, 0.1, Y0, max_steps=None)


def test_an_adjoint_without_brackets_is_refused():
    with pytest.raises(TypeError, match=r"ReversibleAdjoint\(\)` with the brackets"):
        solve(adjoint=rvx.ReversibleAdjoint)


def test_an_infinite_t1_is_refused():
    with pytest.raises(eqx.EquinoxRuntimeError, match=r"a finite `t1`.*infinity"):
        solve(t1=jnp.inf, throw=False, max_steps=10)


@pytest.mark.parametrize("adjoint", [None, dfx.DirectAdjoint()], ids=repr)
def test_an_unsafe_brownian_path_is_refused(adjoint):
    path = dfx.UnsafeBrownianPath(shape=(2,), key=jax.random.key(0))
    noise = dfx.ControlTerm(lambda t, y, args: jnp.eye(2), path)
    message = r"Use.*VirtualBrownianTree.*UnsafeBrownianPath.*reversax\.Reversible"
    with pytest.raises(ValueError, match=message):
        solve(rvx.Reversible(dfx.Heun()), dfx.MultiTerm(TERM, noise), adjoint=adjoint)


FORWARD_MODE = r"Use `jax\.grad`.*ReversibleAdjoint.*forward mode.*ForwardMode"


def summed(args):
    return jnp.sum(solve(args=args).ys)


@pytest.mark.parametrize(
    "differentiate",
    [
        lambda: jax.jvp(summed, (2.0,), (1.0,)),
        lambda: jax.jit(lambda: jax.jvp(summed, (2.0,), (1.0,)))(),
        lambda: jax.jacfwd(summed)(2.0),
    ],
    ids=["jvp", "jit-of-jvp", "jacfwd"],
)
def test_forward_mode_is_refused(differentiate):
    with pytest.raises(NotImplementedError, match=FORWARD_MODE):
        differentiate()


@pytest.mark.heavy
def test_reverse_mode_of_a_reverse_mode_derivative_is_refused():
    message = r"forward mode.*jax\.hessian.*ReversibleAdjoint.*in reverse mode"
    with pytest.raises(NotImplementedError, match=message):
        jax.grad(jax.grad(summed))(2.0)
    with pytest.raises(NotImplementedError, match=message):
        jax.jacrev(jax.jacrev(summed))(2.0)


def outputs(solution):
    return jnp.sum(solution.ys)


def test_a_derivative_by_times_through_the_controllers_state_is_refused_not_zero():
    saveat = dfx.SaveAt(t1=True, controller_state=True)

    def loss(t1):
        state = solve(t1=t1, saveat=saveat).controller_state
        return sum(
            jnp.sum(x) for x in jax.tree.leaves(state) if eqx.is_inexact_array(x)
        )

    message = r"controller_state.*stop_gradient.*with respect to times"
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(jax.grad(loss)(1.0))


class CourantLimit(dfx.AbstractStepSizeController):
    """Steps that follow the state, by a derivative or not."""

    as_constant: bool

    def wrap(self, direction):
        return self

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        return t0 + dt0, None

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        dt = 0.1 / (1 + jnp.sum(y1_candidate**2))
        if self.as_constant:
            dt = jax.lax.stop_gradient(dt)
        return True, t1, t1 + dt, False, controller_state, dfx.RESULTS.successful


def test_a_controller_whose_steps_have_a_derivative_by_the_state_is_refused():
    loss = lambda y0, as_constant: outputs(
        solve(y0=y0, stepsize_controller=CourantLimit(as_constant))
    )
    shape_of = lambda as_constant: jax.eval_shape(
        jax.grad(lambda y0: loss(y0, as_constant)), Y0
    )
    message = r"stop_gradient.*stepsize_controller.*derivative with respect to the"
    with pytest.raises(NotImplementedError, match=message):
        shape_of(False)
    assert shape_of(True).shape == Y0.shape
    # There is nothing to refuse where nothing is differentiated.
    assert jax.eval_shape(lambda y0: loss(y0, False), Y0).shape == ()


@pytest.mark.parametrize("value", [None, dfx.TextProgressMeter], ids=["None", "class"])
def test_a_progress_meter_that_is_none_is_refused(value):
    with pytest.raises(TypeError, match=r"ReversibleAdjoint\(progress_meter=.*not"):
        rvx.ReversibleAdjoint(progress_meter=value)


@pytest.mark.parametrize("value", [-1.0, math.nan, "tight", True], ids=repr)
def test_a_tolerance_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match=r"round_trip_tolerance=.*not"):
        rvx.ReversibleAdjoint(round_trip_tolerance=value)


def test_round_trip_error_refuses_what_the_adjoint_refuses():
    message = r"Wrap.*round_trip_error.*needs `solver=reversax\.Reversible"
    with pytest.raises(TypeError, match=message):
        rvx.round_trip_error(TERM, dfx.Tsit5(), 0.0, 1.0, 0.1, Y0)


def test_a_state_laid_out_over_an_explicit_mesh_axis_is_refused():
    mesh = jax.make_mesh((1,), ("devices",))  # One device says as much as many.
    sharding = jax.sharding.NamedSharding(mesh, jax.P("devices"))
    message = r"AxisType\.Auto.*axes \['devices'\] of explicit type.*Reversible"
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda y0: solve(y0=y0).ys)(jax.device_put(Y0, sharding))
