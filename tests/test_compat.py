"""Canaries: what the package relies on of upstream that upstream does not promise."""

import inspect
from collections.abc import Callable

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import reversax as rvx
from reversax._xla import compat, guard


class _Spy(dfx.AbstractAdjoint):
    """Hands on what `diffeqsolve` calls an adjoint with."""

    report: Callable = eqx.field(static=True)

    def loop(self, **kwargs):
        self.report(kwargs)
        return dfx.RecursiveCheckpointAdjoint().loop(**kwargs)


@pytest.fixture
def call():
    seen = []
    dfx.diffeqsolve(
        dfx.ODETerm(lambda t, y, args: -y),
        dfx.Euler(),
        0.0,
        1.0,
        0.25,
        jnp.array(1.0),
        adjoint=_Spy(lambda kwargs: seen.append(kwargs)),
    )
    return seen[0]


def test_equations_of_jax_checkpoint_are_known_by_this_name():
    program = jax.make_jaxpr(jax.checkpoint(jnp.sin))(1.0)
    assert [x.primitive.name for x in program.eqns] == [compat.CHECKPOINT]


def test_an_adjoint_is_called_with_these_arguments(call):
    assert set(call) == {
        "args", "terms", "solver", "stepsize_controller", "event", "saveat", "t0", "t1",
        "dt0", "max_steps", "throw", "init_state", "passed_solver_state",
        "passed_controller_state", "progress_meter",
    }  # fmt: skip


def test_the_loops_state_has_these_fields(call):
    fields = {
        "y", "tprev", "tnext", "solver_state", "controller_state", "save_state",
        "num_accepted_steps", "dense_ts", "dense_infos", "event_tprev", "event_tnext",
        "event_dense_info", "event_values",
    }  # fmt: skip
    assert fields <= set(vars(call["init_state"]))
    assert {"ys", "saveat_ts_index"} <= set(vars(call["init_state"].save_state))


def test_the_integration_loop_takes_these_arguments():
    assert set(inspect.signature(compat.integration_loop).parameters) == {
        "solver", "stepsize_controller", "event", "saveat", "t0", "t1", "dt0",
        "max_steps", "terms", "args", "init_state", "inner_while_loop",
        "outer_while_loop", "progress_meter",
    }  # fmt: skip
    # An event is located by calling it once more, with a loop that makes no step.
    # Imported because it cannot be had otherwise without an adjoint at hand.
    assert dfx.DirectAdjoint()._loop is inspect.unwrap(compat.integration_loop)


def test_the_hundred_numbers_below_t1_share_one_trace():
    """Else all would be right, but tracing takes a quarter longer."""
    term, solver = dfx.ODETerm(lambda t, y, args: -y), rvx.Reversible(dfx.Euler())
    solve = lambda y0: dfx.diffeqsolve(
        *(term, solver, 0.0, 1.0, 0.25, y0), adjoint=rvx.ReversibleAdjoint()
    )
    program = jax.jit(lambda y0: solve(y0).ys).lower(jnp.array(1.0)).as_text()
    assert program.count("call @prevbefore(") == 100
    assert program.count("func.func private @prevbefore(") == 1


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_constant_steps_are_replayed_to_the_bit(num_steps):
    controller, t0, t1 = dfx.ConstantStepSize(), jnp.array(0.1), jnp.array(1.3)
    dt0 = (t1 - t0) / num_steps
    end, state = controller.init(None, t0, t1, None, dt0, None, None, None)
    first_state = state
    for index in range(1, num_steps):
        *_, end, _, state, _ = controller.adapt_step_size(
            t0, end, None, None, None, None, None, state
        )
        multiply = lambda a, b: a * b
        index = jnp.array(index)
        again = compat.replayed_end(controller, first_state, index, multiply)
        assert end == again


def test_prescribed_times_are_replayed_to_the_bit():
    ts = jnp.array([0.0, 0.3, 0.35, 1.0])
    controller = dfx.StepTo(ts)
    _, first_state = controller.init(None, ts[0], ts[-1], None, None, None, None, None)
    for index in range(1, 3):
        index = jnp.array(index)
        again = compat.replayed_end(controller, first_state, index, None)
        assert again == ts[index + 1]


def test_prevbefore_is_the_next_number_below():
    for x in (1.0, 0.0, -3.5, 1e-300):
        assert compat.prevbefore(jnp.array(x)) < x or x == 1e-300
    below = compat.prevbefore(jnp.array(1.0))
    assert below == jnp.nextafter(jnp.array(1.0), jnp.array(0.0))


def test_unvmap_any_is_one_value_for_all_lanes():
    def of(x):
        out = compat.unvmap_any(x > 1)
        return jax.lax.cond(out, lambda: x, lambda: -x)

    assert jnp.array_equal(jax.vmap(of)(jnp.array([0.0, 2.0])), jnp.array([0.0, 2.0]))
    assert jnp.array_equal(jax.vmap(of)(jnp.array([0.0, 1.0])), jnp.array([-0.0, -1.0]))


def test_nonfinite_is_one_of_diffraxs_results_and_says_so():
    assert "Nonfinite" in dfx.RESULTS[compat.NONFINITE]


def test_a_result_has_a_number_at_run_time_by_which_its_message_is_found():
    results = dfx.RESULTS.max_steps_reached, dfx.RESULTS.successful
    chosen = lambda x: dfx.RESULTS.where(x, *results)
    number = jax.jit(lambda x: compat.index_of(chosen(x)))(jnp.array(True))
    assert compat.message_of(int(number)) == dfx.RESULTS[results[0]]
    number = jax.jit(lambda x: compat.index_of(chosen(x)))(jnp.array(False))
    assert number == compat.index_of(results[1])


def test_nondifferentiable_refuses_a_derivative_with_our_message():
    with pytest.raises(Exception, match="our message"):
        jax.grad(lambda x: compat.nondifferentiable(x, msg="our message"))(1.0)


def test_buffers_are_written_where_the_predicate_holds():
    buffer = jnp.zeros(3)
    assert compat.buffer_at_set(buffer, 1, 5.0, pred=True)[1] == 5
    assert compat.buffer_at_set(buffer, 1, 5.0, pred=jnp.array(False))[1] == 0

    def body(carry):
        i, buffer = carry
        return i + 1, compat.buffer_at_set(buffer, i, i * 1.0, pred=i != 1)

    _, filled = compat.while_loop(
        lambda c: c[0] < 3,
        body,
        (jnp.array(0), buffer),
        max_steps=None,
        buffers=lambda c: c[1],
        kind="lax",
    )
    assert filled.tolist() == [0, 0, 2]


def test_the_guard_passes_reverse_mode_under_every_batching():
    f = lambda x: jnp.sum(guard.reverse_only(x) ** 2)
    x = jnp.array([1.0, 2.0])
    assert jnp.array_equal(jax.grad(f)(x), 2 * x)
    assert jnp.array_equal(jax.jit(jax.grad(jax.jit(f)))(x), 2 * x)
    rows = jnp.stack([x, 3 * x])
    total = lambda rows: jnp.sum(jax.vmap(f)(rows))
    assert jnp.array_equal(jax.grad(total)(rows), 2 * rows)
    assert jnp.array_equal(jax.vmap(jax.grad(f))(rows), 2 * rows)
    assert jnp.array_equal(jax.jacrev(guard.reverse_only)(x), jnp.eye(2))


def test_the_guard_detaches_integers_too():
    f = lambda x: guard.detached(x) * x
    assert jax.grad(f)(3.0) == 3.0
    assert guard.detached(jnp.array(3)).dtype == jnp.array(3).dtype
    assert jax.vmap(guard.detached)(jnp.arange(3)).tolist() == [0, 1, 2]


def test_errors_at_run_time_are_of_this_class():
    with pytest.raises(eqx.EquinoxRuntimeError, match="second"):
        eqx.filter_jit(
            lambda x: eqx.branched_error_if(x, x > 0, jnp.array(1), ["first", "second"])
        )(jnp.array(1.0))


def test_every_single_term_is_wrapped_with_its_direction():
    directions = []

    class Looking(dfx.Euler):
        def init(self, terms, t0, t1, y0, args):
            for x in terms.terms:
                assert type(x) is compat.WrapTerm and type(x.term) is dfx.ODETerm
                jax.debug.callback(lambda d: directions.append(int(d)), x.direction)
            return super().init(terms, t0, t1, y0, args)

    term = dfx.ODETerm(lambda t, y, args: -y)
    terms = dfx.MultiTerm(term, term)
    for t0, t1, dt0 in ((0.0, 1.0, 0.25), (1.0, 0.0, -0.25)):
        dfx.diffeqsolve(terms, Looking(), t0, t1, dt0, 1.0)
        jax.effects_barrier()
    assert directions == [1, 1, -1, -1]


def test_steps_of_this_diffrax_leave_the_space_time_area_as_it_is():
    """If not, the answer is what it should be all the same: `test_stochastic.py` has
    orders that only the right sign gives."""
    assert compat.flips_space_time_area() is False
