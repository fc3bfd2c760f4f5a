"""How often the vector field is evaluated, traced and compiled."""

import functools as ft
import itertools

import diffrax as dfx
import jax
import jax.monitoring
import jax.numpy as jnp
import pytest
from helpers import TABLEAU_BASES, in_cells, network_arguments, network_field
from test_increment import STAGES_FOR_THE_SUM

import reversax as rvx
from reversax._schemes.increment import TableauIncrement, make_increment

ARGS, Y0 = network_arguments(), jnp.array([[0.3, -0.2, 0.5]])
NUM_STEPS = 20


def count_evaluations(base, adjoint, num_steps=NUM_STEPS, y0=Y0, **kwargs):
    """Evaluations of the field at run time, each of which calls back once: in the
    forward pass and in the backward pass; and the accepted and the rejected steps."""
    evaluations = []

    def field(t, y, args):
        jax.debug.callback(lambda: evaluations.append(1))
        return network_field(t, y, args)

    def loss(args):
        solution = dfx.diffeqsolve(
            dfx.ODETerm(field),
            rvx.Reversible(base),
            0.0,
            1.0,
            1 / num_steps,
            y0,
            args,
            adjoint=adjoint,
            max_steps=64,
            **kwargs,
        )
        return jnp.sum(solution.ys**2), solution.stats

    vjp = jax.jit(ft.partial(jax.vjp, loss, has_aux=True))
    _, pull_back, stats = jax.block_until_ready(vjp(ARGS))
    jax.effects_barrier()
    forward = len(evaluations)
    jax.block_until_ready(jax.jit(lambda pull, ct: pull(ct))(pull_back, 1.0))
    jax.effects_barrier()
    accepted, rejected = stats["num_accepted_steps"], stats["num_rejected_steps"]
    return forward, len(evaluations) - forward, int(accepted), int(rejected)


DAILY = ("Tsit5",)


@pytest.mark.parametrize(
    "name",
    [
        x if x in DAILY else pytest.param(x, marks=pytest.mark.heavy)
        for x in TABLEAU_BASES
    ],
)
def test_each_pass_takes_two_evaluations_a_stage_and_step(name):
    base, adjoint = TABLEAU_BASES[name], rvx.ReversibleAdjoint()
    forward, backward, steps, _ = count_evaluations(base, adjoint)
    assert steps == NUM_STEPS
    assert forward == backward == 2 * STAGES_FOR_THE_SUM[name] * NUM_STEPS


@pytest.mark.parametrize(
    ("base", "forward", "backward"),
    [
        (dfx.LeapfrogMidpoint(), NUM_STEPS, NUM_STEPS),
        # One more at the very start, and going back at the very end.
        (dfx.ReversibleHeun(), NUM_STEPS + 1, NUM_STEPS + 1),
    ],
    ids=["LeapfrogMidpoint", "ReversibleHeun"],
)
def test_a_solver_that_undoes_itself_takes_one_evaluation_a_step(
    base, forward, backward
):
    counted = count_evaluations(base, rvx.ReversibleAdjoint())
    assert counted[:3] == (forward, backward, NUM_STEPS)


@pytest.mark.parametrize("arithmetic", [rvx.FixedPoint(), rvx.FloatingPoint()])
def test_a_kick_that_two_steps_share_is_evaluated_once_and_pulled_back_once(arithmetic):
    """Even where all its numbers are needed again: they are handed on."""
    evaluations = []

    def force(t, q, args):
        jax.debug.callback(lambda: evaluations.append(1))
        return -args * jnp.sin(q)

    def loss(args):
        terms = dfx.ODETerm(force), dfx.ODETerm(lambda t, p, args: p)
        solver = rvx.Reversible(rvx.Verlet(), arithmetic=arithmetic)
        adjoint, times = rvx.ReversibleAdjoint(), (0.0, 1.0, 1 / NUM_STEPS)
        solution = dfx.diffeqsolve(
            terms, solver, *times, (Y0, Y0), args, adjoint=adjoint
        )
        return jnp.sum(solution.ys[0] ** 2)

    _, pull_back = jax.block_until_ready(jax.jit(ft.partial(jax.vjp, loss))(1.3))
    jax.effects_barrier()
    assert len(evaluations) == NUM_STEPS + 1
    jax.block_until_ready(jax.jit(lambda pull, ct: pull(ct))(pull_back, 1.0))
    jax.effects_barrier()
    assert len(evaluations) == 2 * (NUM_STEPS + 1)


@pytest.mark.parametrize(
    ("states", "back", "at_the_end"),
    [
        pytest.param(1, 2, 0, id="one"),
        pytest.param(256, 1, 4, id="256", marks=pytest.mark.heavy),
    ],
)
def test_a_multistep_method_takes_one_evaluation_a_step_and_one_going_back(
    states, back, at_the_end
):
    """But for those by which its window is begun, and of its last window. (Two back, if
    an evaluation costs less than to keep what its pull-back reads.)"""
    base = rvx.SymmetricMultistep(4, starter=dfx.Euler())
    known = base, rvx.ReversibleAdjoint()
    few, many = [
        count_evaluations(*known, num_steps=n, y0=jnp.tile(Y0, (states, 1)))
        for n in (NUM_STEPS, 2 * NUM_STEPS)
    ]
    assert many[0] - few[0] == NUM_STEPS
    assert many[1] - few[1] == back * NUM_STEPS
    # Four derivatives, of which three are steps of Euler: each is pulled back.
    assert few[1] == 4 + back * (NUM_STEPS - 3) + at_the_end


def test_a_solve_that_is_not_differentiated_takes_as_many():
    evaluations = []

    def field(t, y, args):
        jax.debug.callback(lambda: evaluations.append(1))
        return -y

    solver, adjoint = rvx.Reversible(dfx.Bosh3()), rvx.ReversibleAdjoint()
    times = 0.0, 1.0, 1 / NUM_STEPS
    dfx.diffeqsolve(dfx.ODETerm(field), solver, *times, Y0, adjoint=adjoint)
    jax.effects_barrier()
    assert len(evaluations) == 2 * 3 * NUM_STEPS


def test_an_error_estimate_costs_its_own_stage_forward_and_nothing_backward():
    controller = dfx.PIDController(rtol=1e-7, atol=1e-7)
    base, adjoint = dfx.Tsit5(), rvx.ReversibleAdjoint()
    kwargs = dict(stepsize_controller=controller)
    counted = count_evaluations(base, adjoint, **kwargs)
    forward, backward, accepted, rejected = counted
    assert forward == 13 * (accepted + rejected)
    assert backward == 12 * accepted


def events_during(call):
    """The names of what JAX reports of itself: tracing, lowering, compiling."""
    seen = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: seen.append(name)
    )
    try:
        jax.block_until_ready(call())
    finally:
        jax.monitoring.clear_event_listeners()
    return [name for name in seen if "compile" in name or "trace" in name]


CONTROLLERS = {
    "constant": dfx.ConstantStepSize(),
    "pid": dfx.PIDController(rtol=1e-4, atol=1e-4),
}


@pytest.mark.parametrize(
    ("controller", "called"),
    in_cells(
        list(itertools.product(CONTROLLERS, ("jit", "no-jit"))),
        [("pid", "jit")],
    ),
)
def test_a_second_call_with_the_same_shapes_compiles_nothing(controller, called):
    def loss(args, y0):
        return jnp.sum(
            dfx.diffeqsolve(
                dfx.ODETerm(network_field),
                rvx.Reversible(dfx.Heun()),
                0.0,
                1.0,
                0.1,
                y0,
                args,
                saveat=dfx.SaveAt(ts=jnp.array([0.3, 1.0])),
                stepsize_controller=CONTROLLERS[controller],
                adjoint=rvx.ReversibleAdjoint(),
                max_steps=128,
            ).ys
        )

    gradient = jax.grad(loss)
    if called == "jit":
        gradient = jax.jit(gradient)
    assert events_during(lambda: gradient(ARGS, Y0))  # the probe sees compilation
    again = jax.tree.map(lambda x: x * 1.01, (ARGS, Y0))
    compiled = [e for e in events_during(lambda: gradient(*again)) if "backend" in e]
    assert compiled == []
    if called == "jit":
        assert events_during(lambda: gradient(*again)) == []


def test_the_field_is_traced_once_for_all_its_evaluations():
    """Twelve evaluations a step forward, twelve backward, in loops traced repeatedly:
    one trace of the Python function serves them. Diffrax itself traces it to check the
    terms, so the count is that of the adjoint's own part."""
    traced = []

    def field(t, y, args):
        traced.append(1)
        return network_field(t, y, args)

    def loss(args, adjoint):
        return jnp.sum(
            dfx.diffeqsolve(
                dfx.ODETerm(field),
                rvx.Reversible(dfx.Tsit5()),
                0.0,
                1.0,
                0.1,
                Y0,
                args,
                adjoint=adjoint,
            ).ys
        )

    jax.jit(jax.grad(lambda args: loss(args, rvx.ReversibleAdjoint()))).lower(ARGS)
    assert len(traced) <= 2


def heat(size):
    """On a ring, with a source: a stencil of three."""
    laplacian = lambda y: jnp.roll(y, 1) - 2 * y + jnp.roll(y, -1)
    field = lambda t, y, rate: rate * laplacian(y) + jnp.sin(y)
    return field, jnp.sin(jnp.arange(float(size)))


def layer(t, y, rate):
    """Linear in the state, but for what a product of matrices makes of it."""
    return jnp.tanh(y @ jnp.ones((4, 4))) - rate * y


def gated(t, y, rate):
    return rate * y * jnp.tanh(y @ jnp.ones((4, 4)))


def driven(t, y, rate):
    """By values of a path that its time picks, next to each other."""
    path = jnp.sin(jnp.arange(4096.0))
    return rate * y + jax.lax.dynamic_slice(path, [jnp.int32(t)], y.shape)


def heat_by_turns(number):
    """Each of which reads what the one before it gave."""
    mixed = lambda i, pair: (jnp.roll(pair[0], 1) + 1, pair[1] + pair[0])[::-1]

    def field(t, y, rate):
        turns = number(t), mixed, (jnp.ones_like(y), y)
        return rate * jax.lax.fori_loop(0, *turns)[0]

    return field


@pytest.mark.heavy  # Daily: that such stages are written to memory, below.
def test_stages_of_a_stencil_are_not_evaluated_anew_for_each_that_reads_them():
    """A step of Tsit5 takes no more operations than six of its first stage alone.

    Measured: 2.3 times as many as a step of Euler; 8.4 if the stages were fused. Of a
    loop, the compiler counts one trip.
    """
    field, y0 = heat(512)

    def operations(base):
        def loss(rate):
            return jnp.sum(
                dfx.diffeqsolve(
                    dfx.ODETerm(field),
                    rvx.Reversible(base),
                    0.0,
                    1.0,
                    0.05,
                    y0,
                    rate,
                    adjoint=rvx.ReversibleAdjoint(),
                    max_steps=64,
                ).ys
            )

        return jax.jit(jax.grad(loss)).lower(0.3).compile().cost_analysis()["flops"]

    assert operations(dfx.Tsit5()) <= 6 * operations(dfx.Euler())


@pytest.mark.parametrize(
    ("field", "y0", "lanes", "written"),
    [
        pytest.param(*heat(512), 1, True, id="a-stencil"),
        pytest.param(*heat(4), 1, False, id="a-small-one"),
        pytest.param(*heat(4), 256, True, id="many-small-ones"),
        pytest.param(
            lambda t, y, rate: y * rate - y / 3, heat(512)[1], 1, False, id="linear"
        ),
        pytest.param(
            lambda t, y, rate: y * jnp.cos(y), heat(512)[1], 1, True, id="elementwise"
        ),
        pytest.param(
            jax.jit(lambda t, y, rate: rate / (1 + y)),
            *(heat(512)[1], 1, True),
            id="a-jitted-quotient",
        ),
        pytest.param(gated, jnp.ones((128, 4)), 1, True, id="a-gate"),
        pytest.param(jax.jit(heat(0)[0]), heat(512)[1], 1, True, id="a-jitted-one"),
        pytest.param(
            heat_by_turns(lambda t: 3), heat(512)[1], 1, True, id="one-in-a-scan"
        ),
        pytest.param(heat_by_turns(jnp.int32), heat(512)[1], 1, True, id="in-a-loop"),
        pytest.param(driven, heat(512)[1], 1, False, id="a-path-elsewhere"),
        pytest.param(jax.jit(driven), heat(512)[1], 1, False, id="a-jitted-path"),
        pytest.param(layer, jnp.ones((128, 4)), 1, False, id="a-network"),
        pytest.param(
            jax.jit(layer), jnp.ones((128, 4)), 1, False, id="a-jitted-network"
        ),
    ],
)
def test_stages_are_written_to_memory_where_they_would_be_evaluated_anew(
    field, y0, lanes, written
):
    increment = make_increment(dfx.Tsit5(), dfx.ODETerm(field), 0.3)
    closed = increment.close(jnp.asarray(0.0), y0)
    assert isinstance(closed, TableauIncrement)
    assert closed.writes_stages(y0, lanes) is written
