"""Bad use is refused at the entry: what was called, what came, what to do instead."""

import math

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
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
    message = (
        r"ReversibleAdjoint.*needs `solver=reversax\.Reversible.*got `Tsit5`.*Wrap"
    )
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
    message = r"reversax\.Reversible\(.*explicit solver, but `\w+` is implicit.*Use an"
    with pytest.raises(ValueError, match=message):
        rvx.Reversible(base)


@pytest.mark.parametrize(
    "base",
    [
        dfx.ReversibleHeun(),
        dfx.LeapfrogMidpoint(),
        dfx.SemiImplicitEuler(),
        dfx.HalfSolver(dfx.ReversibleHeun()),
        rvx.Reversible(dfx.Heun()),
        dfx.HalfSolver(rvx.Reversible(dfx.Heun())),
    ],
    ids=lambda base: type(base).__name__,
)
def test_a_base_that_already_advances_two_states_is_refused(base):
    message = r"reversax\.Reversible\(.*one-step solver, but `\w+` advances two.*Use a"
    with pytest.raises(ValueError, match=message):
        rvx.Reversible(base)


@pytest.mark.parametrize("not_a_solver", [dfx.Tsit5, "Tsit5", None], ids=repr)
def test_what_is_no_solver_is_refused(not_a_solver):
    with pytest.raises(TypeError, match=r"needs a Diffrax solver, such as.*got"):
        rvx.Reversible(not_a_solver)


def test_what_is_no_coupling_or_arithmetic_is_refused():
    with pytest.raises(TypeError, match=r"coupling=.*got 0\.9.*Symmetric\(\)"):
        rvx.Reversible(dfx.Tsit5(), 0.9)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"arithmetic=.*got 'float'.*FixedPoint\(\)"):
        rvx.Reversible(dfx.Tsit5(), arithmetic="float")  # pyright: ignore


@pytest.mark.parametrize("value", [0.0, -0.5, 1.0000001, 2, math.nan, math.inf])
def test_a_coupling_parameter_outside_its_interval_is_refused(value):
    with pytest.raises(ValueError, match=r"coupling_parameter=.*in \(0, 1\], got"):
        rvx.McCallumFoster(value)


def test_a_coupling_parameter_that_is_no_number_is_refused():
    with pytest.raises(TypeError, match=r"coupling_parameter=.*needs a number.*got"):
        rvx.McCallumFoster("0.9")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"coupling_parameter=.*traced value.*float"):
        jax.jit(lambda x: rvx.McCallumFoster(x).coupling_parameter)(0.9)


@pytest.mark.parametrize("adjoint", [None, dfx.RecursiveCheckpointAdjoint()], ids=repr)
def test_a_complex_state_is_refused_under_every_adjoint(adjoint):
    message = r"reversax\.Reversible.*real floating-point.*complex128.*split"
    with (
        pytest.warns(UserWarning, match="Complex dtype support"),
        pytest.raises(TypeError, match=message),
    ):
        solve(y0=Y0 + 1j, adjoint=adjoint)


def test_an_integer_state_is_refused_where_diffrax_has_not_made_it_float():
    """`diffeqsolve` turns integers into floats before any solver sees them."""
    message = r"reversax\.Reversible.*real floating-point.*int.*Convert"
    with pytest.raises(TypeError, match=message):
        rvx.Reversible(dfx.Tsit5()).init(TERM, 0.0, 0.1, jnp.array([1, 2]), None)
    assert solve(y0=jnp.array([1, 2])).ys.dtype == jnp.float64


@pytest.mark.parametrize(
    "controller",
    [
        dfx.PIDController(rtol=1e-3, atol=1e-3),
        dfx.ClipStepSizeController(
            dfx.PIDController(rtol=1e-3, atol=1e-3), step_ts=[0.5]
        ),
    ],
    ids=lambda c: type(c).__name__,
)
def test_an_unbounded_number_of_recorded_steps_is_refused(controller):
    message = r"ReversibleAdjoint.*max_steps=None.*Controller.*pass `max_steps=\.\.\.`"
    with pytest.raises(ValueError, match=message):
        solve(stepsize_controller=controller, max_steps=None)


def test_an_event_needs_a_bound_on_the_number_of_steps():
    event = dfx.Event(lambda t, y, args, **kwargs: t > 0.5)
    message = r"ReversibleAdjoint.*max_steps=None.*`event=.*pass `max_steps=\.\.\.`"
    with pytest.raises(ValueError, match=message):
        solve(event=event, max_steps=None)


def test_an_infinite_t1_is_refused():
    with pytest.raises(eqx.EquinoxRuntimeError, match=r"got an infinite `t1`.*finite"):
        solve(t1=jnp.inf, throw=False, max_steps=10)


@pytest.mark.parametrize("adjoint", [None, dfx.DirectAdjoint()], ids=repr)
def test_an_unsafe_brownian_path_is_refused(adjoint):
    path = dfx.UnsafeBrownianPath(shape=(2,), key=jax.random.key(0))
    noise = dfx.ControlTerm(lambda t, y, args: jnp.eye(2), path)
    message = r"reversax\.Reversible.*UnsafeBrownianPath.*Use.*VirtualBrownianTree"
    with pytest.raises(ValueError, match=message):
        solve(rvx.Reversible(dfx.Heun()), dfx.MultiTerm(TERM, noise), adjoint=adjoint)


FORWARD_MODE = r"ReversibleAdjoint.*forward mode.*only has a reverse-mode.*ForwardMode"


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


def test_reverse_mode_of_a_reverse_mode_derivative_is_refused():
    message = r"gradient of.*ReversibleAdjoint.*reverse mode once more.*jax\.hessian"
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

    message = r"differentiated with respect to times.*controller_state.*stop_gradient"
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(jax.grad(loss)(1.0))


@pytest.mark.parametrize("value", [None, dfx.TextProgressMeter], ids=["None", "class"])
def test_a_progress_meter_that_is_none_is_refused(value):
    with pytest.raises(TypeError, match=r"ReversibleAdjoint\(progress_meter=.*got"):
        rvx.ReversibleAdjoint(progress_meter=value)


@pytest.mark.parametrize("value", [-1.0, math.nan, "tight", True], ids=repr)
def test_a_tolerance_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match=r"round_trip_tolerance=.*got"):
        rvx.ReversibleAdjoint(round_trip_tolerance=value)


def test_round_trip_error_refuses_what_the_adjoint_refuses():
    message = r"round_trip_error.*needs `solver=reversax\.Reversible"
    with pytest.raises(TypeError, match=message):
        rvx.round_trip_error(TERM, dfx.Tsit5(), 0.0, 1.0, 0.1, Y0)


def test_a_state_laid_out_over_an_explicit_mesh_axis_is_refused():
    mesh = jax.make_mesh((1,), ("devices",))  # One device says as much as many.
    sharding = jax.sharding.NamedSharding(mesh, jax.P("devices"))
    message = r"Reversible.*axes \['devices'\] of explicit type.*AxisType\.Auto"
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda y0: solve(y0=y0).ys)(jax.device_put(Y0, sharding))
