"""How often the vector field is evaluated, traced and compiled."""

import diffrax as dfx
import jax
import jax.monitoring
import jax.numpy as jnp
import pytest
from helpers import TABLEAU_BASES, network_arguments, network_field
from test_increment import STAGES_FOR_THE_SUM

import reversax as rvx

ARGS, Y0 = network_arguments(), jnp.array([[0.3, -0.2, 0.5]])
NUM_STEPS = 20


def count_evaluations(base, adjoint, differentiate, **kwargs):
    """Evaluations of the field at run time, each of which calls back once."""
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
            1 / NUM_STEPS,
            Y0,
            args,
            adjoint=adjoint,
            max_steps=64,
            **kwargs,
        )
        return jnp.sum(solution.ys**2), solution.stats

    if differentiate:
        _, stats = jax.jit(jax.grad(loss, has_aux=True))(ARGS)
    else:
        _, stats = jax.jit(loss)(ARGS)
    jax.effects_barrier()
    accepted, rejected = stats["num_accepted_steps"], stats["num_rejected_steps"]
    return len(evaluations), int(accepted), int(rejected)


@pytest.mark.parametrize("name", TABLEAU_BASES)
def test_each_pass_takes_two_evaluations_a_stage_and_step(name):
    stages = STAGES_FOR_THE_SUM[name]
    base, adjoint = TABLEAU_BASES[name], rvx.ReversibleAdjoint()
    forward, steps, _ = count_evaluations(base, adjoint, differentiate=False)
    assert (forward, steps) == (2 * stages * NUM_STEPS, NUM_STEPS)
    both, _, _ = count_evaluations(base, adjoint, differentiate=True)
    assert both == 4 * stages * NUM_STEPS


def test_an_error_estimate_costs_its_own_stage_forward_and_nothing_backward():
    controller = dfx.PIDController(rtol=1e-7, atol=1e-7)
    base, adjoint = dfx.Tsit5(), rvx.ReversibleAdjoint()
    kwargs = dict(stepsize_controller=controller)
    both, accepted, rejected = count_evaluations(base, adjoint, True, **kwargs)
    forward, _, _ = count_evaluations(base, adjoint, False, **kwargs)
    assert forward == 13 * (accepted + rejected)
    assert both - forward == 12 * accepted


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


@pytest.mark.parametrize("jitted", [True, False], ids=["jit", "no-jit"])
@pytest.mark.parametrize(
    "controller",
    [dfx.ConstantStepSize(), dfx.PIDController(rtol=1e-4, atol=1e-4)],
    ids=["constant", "pid"],
)
def test_a_second_call_with_the_same_shapes_compiles_nothing(controller, jitted):
    def loss(args, y0):
        return jnp.sum(
            dfx.diffeqsolve(
                dfx.ODETerm(network_field),
                rvx.Reversible(dfx.Bosh3()),
                0.0,
                1.0,
                0.1,
                y0,
                args,
                saveat=dfx.SaveAt(ts=jnp.array([0.3, 1.0])),
                stepsize_controller=controller,
                adjoint=rvx.ReversibleAdjoint(),
                max_steps=64,
            ).ys
        )

    gradient = jax.grad(loss)
    if jitted:
        gradient = jax.jit(gradient)
    assert events_during(lambda: gradient(ARGS, Y0))  # the probe sees compilation
    again = jax.tree.map(lambda x: x * 1.01, (ARGS, Y0))
    compiled = [e for e in events_during(lambda: gradient(*again)) if "backend" in e]
    assert compiled == []
    if jitted:
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
