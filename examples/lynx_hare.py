"""Trains a neural differential equation on the lynx and hare pelts of 1900-1920.

The model is the Lotka-Volterra equation in the logarithms of the two populations, with
a small neural network added to it, and a third, hidden state. A trajectory of two
populations alone is a curve in the plane that cannot cross itself, which these data
would need to do; the hidden state (what the hares feed on, say) gives it room.

Every gradient of the training comes from `reversax.ReversibleAdjoint`. Afterwards the
script shows what that adjoint is for:

- its gradient is that of `diffrax.RecursiveCheckpointAdjoint` for the same solver, up
  to round-off;
- the memory of its compiled gradient hardly grows as the same twenty years are cut
  into more and more steps. It is compared with the published scheme, and with the plain
  base solver, checkpointed and storing every step. (A step of the base is half the work
  of a reversible one.)

It shows how to train, not how lynx live: there are more parameters than observations.

    python examples/lynx_hare.py            # about two minutes on two cores
    python examples/lynx_hare.py --quick    # hardly trained, to see that it runs

The packages it needs come with the extra `examples`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    Measured,
    check_gradient,
    label,
    measure,
    parse_arguments,
    show_measured,
    temporary_bytes,
    train,
)
from jaxtyping import Array, Float, PRNGKeyArray
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import reversax

DATA = Path(__file__).parent / "data" / "lynx_hare.csv"
SPECIES = ("hare", "lynx")

TRAINING_NUM_STEPS = 160  # Of an eighth of a year, which is exact in binary.
LEARNING_RATE = 2e-2
PENALTY = 2e-3  # On the squared weights of the network: keeps the curves smooth.
# Two programs sum up the same numbers in another order, over thousands of steps.
GRADIENT_BOUND = 1e-10
NUM_STEPS = (64, 256, 1024, 4096, 16384)

BASE = diffrax.Bosh3()  # Third order is ample for such steps, and quick to compile.
REVERSIBLE = reversax.Reversible(BASE)
REVERSED = reversax.ReversibleAdjoint()
# The published scheme multiplies round-off by coupling_parameter**-n in undoing n
# steps: at its usual 0.999 the longest solve below could not be undone.
PUBLISHED = reversax.Reversible(
    BASE, coupling=reversax.McCallumFoster(coupling_parameter=0.99999)
)


def same_by_any_adjoint(num_steps: int) -> reversax.Reversible:
    """The default solver with as many halvings as it makes in so many steps, which
    Diffrax's adjoints are not told."""
    halvings = max(1 / 4, min(4, 256 / num_steps))
    return reversax.Reversible(BASE, reversax.Symmetric(halvings))


class Pelts(NamedTuple):
    years: Float[np.ndarray, " years"]
    mean: Float[np.ndarray, " species"]
    """In thousands a year."""
    log: Float[np.ndarray, "years species"]
    """As the model sees them: logarithms of multiples of the mean."""

    def thousands(self, log) -> np.ndarray:
        return self.mean * np.exp(log)


def load_pelts(path: Path = DATA) -> Pelts:
    year, *pelts = np.loadtxt(path, delimiter=",", skiprows=3, unpack=True)
    thousands = np.stack(pelts, axis=1)
    mean = thousands.mean(axis=0)
    return Pelts(year, mean, np.log(thousands / mean))


# --8<-- [start:model]
class PredatorPrey(eqx.Module):
    """`dy/dt` of `y = (log hare, log lynx, hidden)`; logarithms keep them positive."""

    y0: Float[Array, "3"]
    log_rates: Float[Array, "4"]
    network: eqx.nn.MLP

    def __init__(self, log_pelts0: Float[np.ndarray, "2"], *, key: PRNGKeyArray):
        self.y0 = jnp.append(jnp.asarray(log_pelts0), 0.0)
        # Over a cycle of Lotka and Volterra's equation the mean of each population is
        # its equilibrium. So in multiples of the mean, growth balances predation and
        # death balances conversion at 1. The rates are textbook values, a year.
        self.log_rates = jnp.log(jnp.array([0.5, 0.5, 0.8, 0.8]))
        network = eqx.nn.MLP(3, 3, 8, depth=1, activation=jnp.tanh, key=key)
        # The network starts at zero, that is, the model at Lotka and Volterra's.
        last = lambda mlp: (mlp.layers[-1].weight, mlp.layers[-1].bias)
        self.network = eqx.tree_at(last, network, replace_fn=jnp.zeros_like)

    def __call__(self, t, y: Float[Array, "3"], args) -> Float[Array, "3"]:
        growth, predation, death, conversion = jnp.exp(self.log_rates)
        hare, lynx = jnp.exp(y[:2])
        lotka_volterra = growth - predation * lynx, conversion * hare - death
        return jnp.stack([*lotka_volterra, 0.0]) + self.network(y)


# --8<-- [end:model]
# --8<-- [start:solve]
def solve(
    model: PredatorPrey,
    ts: Float[np.ndarray, " times"],
    num_steps: int,
    solver: diffrax.AbstractSolver = REVERSIBLE,
    adjoint: diffrax.AbstractAdjoint = REVERSED,
) -> Float[Array, "times species"]:
    """The logarithms of both populations at the times `ts`, in years."""
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(model),
        solver,
        t0=ts[0],
        t1=ts[-1],
        dt0=(ts[-1] - ts[0]) / num_steps,
        y0=model.y0,
        saveat=diffrax.SaveAt(ts=jnp.asarray(ts)),
        stepsize_controller=diffrax.ConstantStepSize(),
        adjoint=adjoint,
        max_steps=num_steps,
    )
    assert solution.ys is not None
    return solution.ys[:, :2]


# --8<-- [end:solve]
def loss_fn(
    model: PredatorPrey, pelts: Pelts, num_steps: int, *how
) -> Float[Array, ""]:
    """The mean squared error of the logarithms, and the penalty; `how`: see `solve`."""
    error = solve(model, pelts.years, num_steps, *how) - pelts.log
    weights = jax.tree.leaves(eqx.filter(model.network, eqx.is_array))
    return jnp.mean(error**2) + PENALTY * sum(jnp.sum(w**2) for w in weights)


def fit(
    model: PredatorPrey, pelts: Pelts, steps: int, console: Console
) -> tuple[PredatorPrey, float]:
    """Returns the trained model, and the loss before the last update."""
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, steps)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    @eqx.filter_jit
    def update(state, step):
        model, optimiser_state = state
        value_and_grad = eqx.filter_value_and_grad(loss_fn)
        loss, grads = value_and_grad(model, pelts, TRAINING_NUM_STEPS)
        updates, optimiser_state = optimiser.update(grads, optimiser_state)
        return (eqx.apply_updates(model, updates), optimiser_state), loss

    state = model, optimiser.init(eqx.filter(model, eqx.is_array))
    (model, _), loss = train(update, state, steps, console)
    return model, loss


class Way(NamedTuple):
    """A way to the gradient."""

    solver: diffrax.AbstractSolver
    adjoint: diffrax.AbstractAdjoint


CHECKPOINTED = diffrax.RecursiveCheckpointAdjoint()
OURS = "reversible, reversed"
SAME = "reversible, checkpointed"
OLD = "published scheme, reversed"
PLAIN = "Bosh3, checkpointed"
STORED = "Bosh3, every step stored"
MEMORY_STYLES = {
    OURS: ("o-", ORANGE),
    OLD: ("v-.", GREY),
    PLAIN: ("^--", BLUE),
    STORED: ("s:", GREEN),
}


def ways_of(num_steps: int) -> dict[str, Way]:
    return {
        OURS: Way(REVERSIBLE, REVERSED),
        SAME: Way(same_by_any_adjoint(num_steps), CHECKPOINTED),
        OLD: Way(PUBLISHED, REVERSED),
        PLAIN: Way(BASE, CHECKPOINTED),
    }


def gradient_by(model: PredatorPrey, pelts: Pelts, num_steps: int, way: Way):
    """The loss and its gradient, as a function of the model's arrays."""
    _, static = eqx.partition(model, eqx.is_array)
    loss = lambda arrays: loss_fn(eqx.combine(arrays, static), pelts, num_steps, *way)
    return jax.value_and_grad(loss)


def compare_ways(
    model: PredatorPrey,
    pelts: Pelts,
    num_steps: int,
    names: Sequence[str],
    console: Console,
) -> dict[str, Measured]:
    """Measures gradients, checks ours, and prints the table."""
    ways = {
        name: gradient_by(model, pelts, num_steps, way)
        for name, way in ways_of(num_steps).items()
        if name in names
    }
    with console.status("Measuring gradients of many steps"):
        measured = measure(ways, eqx.filter(model, eqx.is_array))
    check_gradient(measured[OURS], measured[SAME], num_steps, GRADIENT_BOUND)
    show_measured(f"A gradient of {num_steps} steps", measured, console)
    return measured


def measure_memory(
    model: PredatorPrey,
    pelts: Pelts,
    all_num_steps: Sequence[int],
    names: Sequence[str],
    measured: dict[str, Measured],
    console: Console,
) -> dict[str, list[int]]:
    """Compiled temporary bytes for each number of steps, of which the last has been
    measured; nothing is run."""
    arrays = eqx.filter(model, eqx.is_array)
    table = Table(title="Temporary memory of the compiled gradient, bytes")
    table.add_column("steps", justify="right")
    columns = {name: [] for name in MEMORY_STYLES if name in names}
    for name in columns:
        table.add_column(name, justify="right")
    with console.status("Compiling gradients"):
        for n in all_num_steps:
            store = diffrax.RecursiveCheckpointAdjoint(checkpoints=n)
            ways = ways_of(n) | {STORED: Way(BASE, store)}
            for name, column in columns.items():
                if n == all_num_steps[-1] and name in measured:
                    column.append(measured[name].bytes)
                else:
                    gradient = jax.jit(gradient_by(model, pelts, n, ways[name]))
                    column.append(temporary_bytes(gradient.lower(arrays).compile()))
            row = [column[-1] for column in columns.values()]
            table.add_row(f"{n:,}", *(f"{entry:,}" for entry in row))
    console.print(table)
    return columns


def plot_fit(pelts: Pelts, ts: np.ndarray, fit: np.ndarray, path: Path) -> None:
    points, curves = pelts.thousands(pelts.log), pelts.thousands(fit)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, (colour, marker) in enumerate(((BLUE, "o"), (ORANGE, "s"))):
        axes.plot(pelts.years, points[:, i], marker, color=colour, label=SPECIES[i])
        axes.plot(ts, curves[:, i], color=colour, label=f"{SPECIES[i]}, model")
    axes.set_ylim(0, 100)
    axes.set_xticks(pelts.years[::4], [f"{year:.0f}" for year in pelts.years[::4]])
    label(axes, "year", "pelts (thousands a year)")
    axes.set_title("Hudson's Bay Company pelts and a neural differential equation")
    figure.savefig(path, dpi=150)


def plot_memory(
    num_steps: Sequence[int], columns: dict[str, list[int]], path: Path
) -> None:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, column in columns.items():
        style, colour = MEMORY_STYLES[name]
        kilobytes = np.array(column) / 1e3
        axes.plot(num_steps, kilobytes, style, color=colour, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(num_steps, [f"{n:,}" for n in num_steps])
    label(axes, "number of steps over the twenty years", "temporary memory (kB)")
    axes.set_title("Memory of the compiled gradient of the loss")
    figure.savefig(path, dpi=150)


def main() -> None:
    arguments = parse_arguments(
        "Train a neural differential equation on lynx and hare pelts.",
        steps=5000,
        quick="five steps of training instead, and one measurement of our memory",
    )
    jax.config.update("jax_enable_x64", True)
    console = Console()
    pelts = load_pelts()
    steps, num_steps, names = arguments.steps, NUM_STEPS, (SAME, *MEMORY_STYLES)
    if arguments.quick:
        steps, num_steps, names = 5, NUM_STEPS[1:2], (SAME, OURS)

    model = PredatorPrey(pelts.log[0], key=jax.random.key(0))
    model, loss = fit(model, pelts, steps, console)

    measured = compare_ways(model, pelts, num_steps[-1], names, console)
    columns = measure_memory(model, pelts, num_steps, names, measured, console)

    ts = np.linspace(pelts.years[0], pelts.years[-1], 30 * (len(pelts.years) - 1) + 1)
    curves = np.asarray(solve(model, ts, TRAINING_NUM_STEPS))
    rmse = np.sqrt(np.mean((curves[::30] - pelts.log) ** 2, axis=0))
    plot_fit(pelts, ts, curves, arguments.out / "lynx_hare_fit.png")
    plot_memory(num_steps, columns, arguments.out / "lynx_hare_memory.png")
    print(
        f"Loss {loss:.4f}, RMSE in log pelts: hare {rmse[0]:.3f}, lynx {rmse[1]:.3f}; "
        f"figures in {arguments.out}"
    )


if __name__ == "__main__":
    main()
