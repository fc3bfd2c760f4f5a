"""Learns the pulse that turns a two-level quantum system over: a complex state.

An atom with the levels 0 and 1, of transition frequency W, is driven at resonance by a
pulse of envelope `d(t) = sum_k c_k sin(k pi t/T)`. In the laboratory frame

    i dy/dt = (W/2 sigma_z + d(t) cos(W t) sigma_x) y,        y(0) = (1, 0),

so that the carrier has hundreds of periods, which take more than ten thousand steps,
and each gradient walks back over all of them. The loss is the probability not to end
in 1.

The answer is known. Averaged over a period of the carrier (the rotating wave) the state
turns by the area A of the envelope, and ends in 1 with the probability sin(A/2)**2: the
learned pulse must have the area pi. The equation keeps the norm of the state, of which
nothing here is told. Afterwards the script prints

- the area of the learned pulse, and how far its probability is from sin(A/2)**2;
- how far the norm is from one, at any step;
- how far the gradient is from that of `diffrax.RecursiveCheckpointAdjoint` for the same
  solver, and the memory of both.

    python examples/rabi.py            # a few minutes on two cores
    python examples/rabi.py --quick    # hardly trained, to see that it runs

The packages it needs come with the extra `examples`.
"""

import math
import warnings
from pathlib import Path
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import (
    BLUE,
    GREEN,
    ORANGE,
    check_gradient,
    label,
    measure,
    parse_arguments,
    show_measured,
    train,
)
from jaxtyping import Array, Complex, Float
from matplotlib.figure import Figure
from rich.console import Console

import reversax

CARRIER = 60.0  # W, 191 periods over the time of the pulse.
DURATION = 20.0  # T
NUM_STEPS = 12_288  # A tenth of a radian of the carrier each.
HARMONICS = 6
LEARNING_RATE = 2e-2
# Two programs sum up the same numbers in another order, over all steps.
GRADIENT_BOUND = 1e-9

# --8<-- [start:solve]
# As many halvings as the default makes in so many steps, which Diffrax's adjoints, with
# which it is compared, are not told.
SOLVER = reversax.Reversible(diffrax.Tsit5(), reversax.Symmetric(1 / 4))
REVERSED = reversax.ReversibleAdjoint()


def envelope(t, coefficients: Float[Array, " harmonics"]) -> Float[Array, ""]:
    waves = jnp.arange(1, len(coefficients) + 1) * (jnp.pi / DURATION)
    return coefficients @ jnp.sin(waves * t)


def field(t, y: Complex[Array, "2"], coefficients) -> Complex[Array, "2"]:
    drive = envelope(t, coefficients) * jnp.cos(CARRIER * t)
    return -1j * (CARRIER / 2 * jnp.array([1, -1]) * y + drive * y[::-1])


def solve(coefficients, num_steps: int, saveat, adjoint=REVERSED) -> diffrax.Solution:
    return diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        SOLVER,
        t0=0.0,
        t1=DURATION,
        dt0=DURATION / num_steps,
        y0=jnp.array([1.0 + 0.0j, 0.0]),
        args=coefficients,
        saveat=saveat,
        adjoint=adjoint,
        max_steps=num_steps,
    )


def loss_fn(coefficients, num_steps: int, adjoint=REVERSED) -> Float[Array, ""]:
    ys = solve(coefficients, num_steps, diffrax.SaveAt(t1=True), adjoint).ys
    assert ys is not None
    return jnp.abs(ys[-1, 0]) ** 2


# --8<-- [end:solve]
def area(coefficients) -> float:
    """The integral of the envelope: of odd harmonics alone."""
    odd = np.arange(1, len(coefficients) + 1, 2)
    return float(np.sum(np.asarray(coefficients)[::2] * 2 * DURATION / (odd * math.pi)))


class Populations(NamedTuple):
    times: np.ndarray
    levels: np.ndarray
    """The probabilities of both levels, at each time."""


def populations(coefficients, num_steps: int) -> Populations:
    run = jax.jit(lambda c: solve(c, num_steps, diffrax.SaveAt(t0=True, steps=True)))
    solution = run(coefficients)
    assert solution.ts is not None and solution.ys is not None
    return Populations(np.asarray(solution.ts), np.abs(np.asarray(solution.ys)) ** 2)


def plot(coefficients, seen: Populations, path: Path) -> None:
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    pulse = np.asarray(jax.vmap(envelope, (0, None))(seen.times, coefficients))
    above.plot(seen.times, pulse, color=GREEN, label="envelope d(t)")
    label(above, "", "drive")
    above.set_title(f"A learned pulse of area {area(coefficients) / math.pi:.4f} pi")
    for level, colour in enumerate((BLUE, ORANGE)):
        curve = seen.levels[:, level]
        below.plot(seen.times, curve, color=colour, label=f"level {level}")
    label(below, "time", "probability")
    figure.savefig(path, dpi=150)


def main() -> None:
    arguments = parse_arguments(
        "Learn the pulse that turns a two-level system over.",
        steps=60,
        quick="three steps of training of a tenth of the steps of the solver",
    )
    jax.config.update("jax_enable_x64", True)
    # Diffrax's, of solvers that are none of these.
    warnings.filterwarnings("ignore", "Complex dtype support in Diffrax")
    console = Console()
    steps, num_steps = arguments.steps, NUM_STEPS
    if arguments.quick:
        steps, num_steps = 3, NUM_STEPS // 8
    optimiser = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))

    @jax.jit
    def update(state, step):
        coefficients, optimiser_state = state
        loss, gradient = jax.value_and_grad(loss_fn)(coefficients, num_steps)
        updates, optimiser_state = optimiser.update(gradient, optimiser_state)
        return (optax.apply_updates(coefficients, updates), optimiser_state), loss

    start = jnp.zeros(HARMONICS).at[0].set(0.05)
    (learned, _), loss = train(update, (start, optimiser.init(start)), steps, console)

    seen = populations(learned, num_steps)
    turned = math.sin(area(learned) / 2) ** 2
    print(
        f"Area {area(learned) / math.pi:.5f} pi; level 1 with probability "
        f"{seen.levels[-1, 1]:.6f}, by the rotating wave {turned:.6f}; "
        f"norm within {np.abs(seen.levels.sum(axis=1) - 1).max():.1e} of one"
    )
    adjoints = {
        "reversed": REVERSED,
        "checkpointed": diffrax.RecursiveCheckpointAdjoint(),
    }
    ways = {
        name: jax.value_and_grad(lambda c, a=adjoint: loss_fn(c, num_steps, a))
        for name, adjoint in adjoints.items()
    }
    measured = measure(ways, start, repeats=1 if arguments.quick else 3)
    check_gradient(*measured.values(), num_steps=num_steps, bound=GRADIENT_BOUND)
    show_measured(f"A gradient of {num_steps} steps", measured, console)
    plot(learned, seen, arguments.out / "rabi.png")
    print(f"Loss {loss:.2e}; the figure is in {arguments.out}")


if __name__ == "__main__":
    main()
