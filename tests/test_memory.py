"""Memory does not grow with the number of steps; a record grows by two times a step."""

import itertools

import diffrax as dfx
import jax
import jax.numpy as jnp
import pytest
from helpers import in_cells, initial_states, network_arguments, network_field

import reversax as rvx
from reversax._walk.beginning import Beginning
from reversax._xla import isolation

pytestmark = pytest.mark.usefixtures("optimised")
ARGS, Y0 = network_arguments(), initial_states(batch=64)
FLOATING = rvx.FloatingPoint()
KEEPS_NOTHING = rvx.ReversibleAdjoint(restart_every=None)


def temporary_bytes(
    adjoint, max_steps, batching="batched", arithmetic=FLOATING, **kwargs
):
    def loss(args, y0, dt0):
        solve = lambda y0: dfx.diffeqsolve(
            dfx.ODETerm(network_field),
            rvx.Reversible(dfx.Euler(), arithmetic=arithmetic),
            0.0,
            1.0,
            dt0,
            y0,
            args,
            adjoint=adjoint,
            max_steps=max_steps,
            **kwargs,
        )
        run = solve if batching == "batched" else jax.vmap(solve)
        return jnp.sum(run(y0).ys ** 2)

    return _temporary_bytes(loss, jnp.asarray(1 / max_steps))


def _temporary_bytes(loss, dt0, y0=Y0):
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    compiled = gradient.lower(ARGS, y0, dt0).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("batching", "counts"),
    [
        pytest.param("batched", (64, 16_384, 1_000_000), id="batched"),
        pytest.param("vmap", (64, 16_384), id="vmap", marks=pytest.mark.heavy),
    ],
)
def test_memory_is_the_same_for_few_constant_steps_and_many(batching, counts):
    few, *more = (temporary_bytes(KEEPS_NOTHING, n, batching) for n in counts)
    assert all(abs(many - few) <= 0.02 * few for many in more), (few, more)


@pytest.mark.heavy
def test_memory_is_the_same_for_many_saved_times_but_for_their_cotangents():
    ts = jnp.linspace(0, 1, 5)
    few, many = (
        temporary_bytes(KEEPS_NOTHING, n, saveat=dfx.SaveAt(ts=ts))
        for n in (64, 16_384)
    )
    assert abs(many - few) <= 0.02 * few, (few, many)


def test_a_recording_controller_keeps_two_times_a_step_and_nothing_else():
    controller = dfx.PIDController(rtol=1e-5, atol=1e-5)
    few, many = (
        temporary_bytes(KEEPS_NOTHING, n, stepsize_controller=controller)
        for n in (64, 16_384)
    )
    two_times = 2 * (16_384 - 64) * 8
    assert many - few <= 1.02 * two_times, (few, many, two_times)


@pytest.mark.heavy
def test_recorded_times_that_are_differentiated_keep_their_derivatives_beside():
    def of(max_steps):
        def loss(t1):
            pid = dfx.PIDController(rtol=1e-5, atol=1e-5)
            solver = rvx.Reversible(dfx.Euler(), arithmetic=FLOATING)
            times = 0.0, t1, 1 / max_steps
            return jnp.sum(
                dfx.diffeqsolve(
                    dfx.ODETerm(network_field),
                    solver,
                    *times,
                    Y0,
                    ARGS,
                    stepsize_controller=pid,
                    adjoint=KEEPS_NOTHING,
                    max_steps=max_steps,
                ).ys
            )

        compiled = jax.jit(jax.grad(loss)).lower(jnp.asarray(1.0)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Both times, and their derivatives by two numbers: `t1`, and the end of the first
    # step, which it bounds.
    six_numbers = (2 + 2 * 2) * (16_384 - 64) * 8
    assert of(16_384) - of(64) <= 1.02 * six_numbers


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("batching", "controlled"),
    in_cells(
        list(itertools.product(["batched", "vmap"], ["constant", "pid"])),
        [("batched", "pid")],
    ),
)
def test_fixed_point_keeps_a_bit_per_element_and_halving_beside(batching, controlled):
    """And nothing else but the recorded times: (bits, times) are allocated once, and
    neither copied nor widened under `vmap`."""
    kwargs, times = {}, 0
    steps = 64, 16_384
    if controlled == "pid":
        pid = dfx.PIDController(rtol=1e-5, atol=1e-5)
        kwargs = dict(stepsize_controller=pid)
        lanes = 1 if batching == "batched" else len(Y0)
        times = 2 * 8 * (steps[1] - steps[0]) * lanes
    few, many = (
        temporary_bytes(
            rvx.ReversibleAdjoint(), n, batching, rvx.FixedPoint(), **kwargs
        )
        for n in steps
    )
    allowed = (
        (lambda n: max(256, n // 4))
        if controlled == "constant"
        else (lambda n: min(4 * n, 320 + n // 4 + 1))
    )
    words = lambda n: -(-allowed(n) // 32)
    bits = 4 * (words(steps[1]) - words(steps[0])) * Y0.size
    assert many - few <= 1.02 * (bits + times), (few, many, bits, times)


@pytest.mark.parametrize(
    "batching", [pytest.param("batched", marks=pytest.mark.heavy), "vmap"]
)
def test_fixed_point_takes_the_very_same_memory_for_16_constant_steps_and_1024(
    batching,
):
    """256 bits for each element, however many steps they are spread over."""
    adjoint, fixed = rvx.ReversibleAdjoint(), rvx.FixedPoint()
    few, many = (temporary_bytes(adjoint, n, batching, fixed) for n in (16, 1024))
    assert few == many
    # So that it shows something: from there on a quarter of a bit a step.
    assert temporary_bytes(adjoint, 2048, batching, fixed) > many


def test_at_the_default_of_max_steps_16_constant_steps_take_the_memory_of_1024():
    many = jnp.tile(Y0, (4, 1))

    def of(num):
        def loss(args, y0, _):
            solution = dfx.diffeqsolve(
                *(dfx.ODETerm(network_field), rvx.Reversible(dfx.Euler())),
                **dict(t0=0.0, t1=1.0, dt0=1 / num, y0=y0, args=args),
                adjoint=rvx.ReversibleAdjoint(),
            )
            return jnp.sum(solution.ys**2)

        return _temporary_bytes(loss, None, many)

    # Some constants are folded for one and not for the other; a word of bits for each
    # element would be more.
    assert abs(of(16) - of(1024)) < 4 * many.size


SINE = lambda t, y, rate: -rate * jnp.sin(y), dfx.Tsit5()
DIFFUSION = (
    lambda t, y, rate: rate * (jnp.roll(y, 1) - 2 * y + jnp.roll(y, -1)) + y**2,
    dfx.Heun(),
)


def bytes_with(size, field, solver):
    def loss(rate, y0, _):
        solution = dfx.diffeqsolve(
            dfx.ODETerm(field),
            rvx.Reversible(solver),
            **dict(t0=0.0, t1=1.0, dt0=0.1, y0=y0, args=rate, max_steps=16),
            adjoint=rvx.ReversibleAdjoint(),
        )
        return jnp.sum(solution.ys**2)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    compiled = gradient.lower(0.3, jnp.ones(size), None).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("problem", "of", "name", "without"),
    [
        pytest.param(
            SINE, isolation, "_pull_after", lambda pull, zeros, ct: pull(ct),
            id="pull-back",
        ),
        pytest.param(
            DIFFUSION, Beginning, "encoded_again",
            lambda self, scheme, _: self.encoded(scheme), id="beginning",
            marks=pytest.mark.heavy,
        ),
    ],
)  # fmt: skip
def test_what_is_done_later_spares_an_array_of_the_size_of_the_state(
    monkeypatch, problem, of, name, without
):
    """A pull-back that would lie in memory beside its evaluation; the words of the
    initial state, which would lie there through both loops."""
    size, scalars = 4096, 1024
    later = bytes_with(size, *problem)
    monkeypatch.setattr(of, name, without)
    jax.clear_caches()
    assert bytes_with(size, *problem) - later >= 8 * size - scalars


@pytest.mark.heavy
def test_checkpointing_grows_so_that_the_figures_above_mean_something():
    few, many = (
        temporary_bytes(dfx.RecursiveCheckpointAdjoint(checkpoints=n), n)
        for n in (64, 1024)
    )
    assert many > 4 * few
