"""Learns to make days: a neural SDE that generates Italy's demand for electric power.

The record (ItalyPowerDemand of the UCR archive, which `aeon` ships) has 1,096 days of
hourly demand from summers and winters, each day scaled to mean zero and variance one.
A neural Stratonovich equation (neural_sde.py) learns their distribution from half of
the days by the energy distance between what it generates and what it has seen; there is
no adversary and no likelihood. It is scored by the same distance on the other half,
beside

- autoregressions (AR) of the deviations from each hour's mean, in units of each hour's
  standard deviation, of the order up to twelve that Akaike's criterion takes;
- the Ornstein-Uhlenbeck process of the same deviations, which is an AR of order one;
- the normal distribution with the 24 means and the covariance matrix of the days, the
  most general of Gaussian processes.

A score of zero is what another sample of real days has on average. The equation was
trained by this score, and the others were not. So a second one is printed, which none
was trained by: how often a forest of trees can tell generated days from real ones. It
tells those of every model here in more than nine cases of ten, so the equation is
nearer than the others to the distribution, but none passes for real.

    python examples/power_demand.py            # eight and a half minutes on two cores
    python examples/power_demand.py --quick    # hardly trained

The packages it needs come with the extra `examples`.
"""

from collections.abc import Callable
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
    check_gradient,
    label,
    measure,
    parse_arguments,
    show_measured,
    temporary_bytes,
    train,
)
from jaxtyping import Float
from matplotlib.figure import Figure
from neural_sde import (
    CHECKPOINTED,
    REVERSED,
    REVERSIBLE,
    Curves,
    Generator,
    Solver,
    energy_distance,
    generate,
)
from power_data import Days, load_days, make_autoregressive
from rich.console import Console
from rich.table import Table
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import StratifiedKFold, cross_val_score

HOURS = 24
# In single precision, of sums over many steps.
GRADIENT_BOUND = 1e-4
LEARNING_RATE = 6e-3
STEPS_PER_HOUR = 2
TRAINING = Solver((HOURS - 1) * STEPS_PER_HOUR)


class Setting(NamedTuple):
    size: int
    """Of the state, most of it hidden."""
    width: int
    batch: int
    """How many days are generated, and looked at, in a step of training."""
    generated: int
    """How many a score is computed from."""
    trees: int
    """Of the forest that is to tell them from real ones."""
    seeds: int
    num_steps: tuple[int, ...]
    """Where the memory is measured; time at the last."""


FULL = Setting(8, 64, 256, 2048, 300, 2, (64, 256, 1024))
QUICK = Setting(3, 8, 16, 64, 5, 1, (32,))


def fit(
    seen: Float[np.ndarray, "seen 24"],
    setting: Setting,
    steps: int,
    seed: int,
    console: Console,
) -> Generator:
    days_seen = jnp.asarray(seen)
    generator = Generator(setting.size, setting.width, jax.random.key(seed))
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, steps)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def loss_fn(generator, key):
        noise_key, day_key = jax.random.split(key)
        days = jax.random.choice(day_key, days_seen, (setting.batch,), replace=False)
        made = generate(generator, setting.batch, HOURS, noise_key, TRAINING)
        return energy_distance(made, days)

    @eqx.filter_jit
    def update(state, step):
        generator, optimiser_state = state
        key = jax.random.fold_in(jax.random.key(1000 + seed), step)
        loss, grads = eqx.filter_value_and_grad(loss_fn)(generator, key)
        updates, optimiser_state = optimiser.update(grads, optimiser_state)
        return (eqx.apply_updates(generator, updates), optimiser_state), loss

    state = generator, optimiser.init(eqx.filter(generator, eqx.is_array))
    (generator, _), _ = train(update, state, steps, console, f"Training, seed {seed}")
    return generator


def make_baselines(days: Days, count: int) -> dict[str, Float[np.ndarray, "count 24"]]:
    """The days that other models of the same days generate, and real ones."""
    order, autoregressive = make_autoregressive(days.seen, None, count)
    _, ornstein_uhlenbeck = make_autoregressive(days.seen, 1, count)
    normal = np.random.default_rng(0).multivariate_normal(
        days.seen.mean(0), np.cov(days.seen.T), count
    )
    return {
        "Ornstein-Uhlenbeck": ornstein_uhlenbeck,
        f"AR({order})": autoregressive,
        "normal, full covariance": normal,
        "real days, seen": days.seen,
    }


score_compiled = jax.jit(energy_distance)


def score(made, held_out) -> float:
    return float(score_compiled(jnp.asarray(made, jnp.float32), held_out))


def told_apart(made, held_out, trees: int) -> float:
    """How often a forest of trees tells generated days from as many held out, of the
    ones it was not shown: a half, if it can only guess."""
    count = min(len(made), len(held_out))
    rows = np.concatenate([np.asarray(made)[:count], held_out[:count]])
    is_real = np.repeat([False, True], count)
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    forest = RandomForestClassifier(trees, random_state=0)
    return float(cross_val_score(forest, rows, is_real, cv=folds).mean())


def show_scores(
    scores: dict[str, float], apart: dict[str, float], console: Console
) -> None:
    table = Table(title="Generated days beside those held out; less is better")
    table.add_column("model")
    for column in ("energy distance", "told apart by a forest"):
        table.add_column(column, justify="right")
    for name in scores:
        table.add_row(name, f"{scores[name]:.4f}", f"{100 * apart[name]:.0f} %")
    console.print(table)


SDE = "neural SDE, mean of seeds"
SAME, PLAIN = "reversible, checkpointed", "Heun, checkpointed"
OURS = "reversible, reversed"
WAYS: dict[str, Callable[[int], Solver]] = {
    OURS: lambda n: Solver(n, REVERSIBLE, REVERSED),
    SAME: lambda n: Solver(n, REVERSIBLE, CHECKPOINTED),
    PLAIN: lambda n: Solver(n, diffrax.Heun(), CHECKPOINTED),
}
MEMORY_STYLES = {OURS: ("o-", ORANGE), PLAIN: ("^--", BLUE)}


def gradient_by(how: Solver, static, count: int):
    """Of the energy distance, with respect to the generator's arrays."""

    def loss(arrays, days):
        generator = eqx.combine(arrays, static)
        made = generate(generator, count, HOURS, jax.random.key(0), how)
        return energy_distance(made, days)

    return jax.value_and_grad(loss)


def compare_ways(
    generator: Generator, days: Days, setting: Setting, console: Console
) -> dict[str, list[int]]:
    """Prints the measurements, checks our gradient; bytes by number of steps."""
    arrays, static = eqx.partition(generator, eqx.is_array)
    seen = jnp.asarray(days.seen[: setting.batch])
    most = setting.num_steps[-1]
    with console.status("Measuring gradients"):
        ways = {
            name: gradient_by(way(most), static, setting.batch)
            for name, way in WAYS.items()
        }
        measured = measure(ways, arrays, seen, repeats=1)
    check_gradient(measured[OURS], measured[SAME], most, GRADIENT_BOUND)
    show_measured(f"A gradient through {most} steps", measured, console)
    columns = {}
    with console.status("Compiling gradients"):
        for name in MEMORY_STYLES:
            columns[name] = [
                temporary_bytes(
                    jax.jit(gradient_by(WAYS[name](n), static, setting.batch))
                    .lower(arrays, seen)
                    .compile()
                )
                for n in setting.num_steps[:-1]
            ]
            columns[name].append(measured[name].bytes)
    return columns


def plot_days(
    panels: dict[str, Curves | np.ndarray], scores: dict[str, float], path: Path
) -> None:
    """Some days of each panel, the hours' spread, and the scores as bars."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    grid = figure.add_gridspec(2, len(panels), height_ratios=(1.4, 1))
    colours = (GREY, ORANGE, BLUE)
    first = None
    for column, (title, curves) in enumerate(panels.items()):
        axes = figure.add_subplot(grid[0, column], sharex=first, sharey=first)
        first = first or axes
        hours = np.arange(HOURS)
        axes.plot(hours, np.asarray(curves[:40]).T, color=colours[column], lw=0.7)
        for quantile in (0.05, 0.5, 0.95):
            line = np.quantile(curves, quantile, axis=0)
            axes.plot(hours, line, "k-" if quantile == 0.5 else "k--", lw=1.6)
        axes.set_title(title)
        axes.set_xticks(range(0, HOURS, 6))
        label(axes, "hour of the day", "scaled demand", legend=False)
        if column == 0:
            axes.plot([], [], "k-", label="median of all")
            axes.plot([], [], "k--", label="5 % and 95 %")
            axes.legend(fontsize=10, frameon=False, loc="upper left")
    axes = figure.add_subplot(grid[1, :])
    names = list(scores)
    bars = axes.barh(names, [scores[name] for name in names], color=GREEN)
    axes.bar_label(bars, fmt="%.3f", padding=4, fontsize=11)
    axes.axvline(0, color="black", lw=0.8)
    axes.margins(x=0.1)
    axes.invert_yaxis()
    label(axes, "energy distance to the days held out (less is better)", "", False)
    figure.savefig(path, dpi=150)


def plot_memory(
    num_steps: tuple[int, ...], columns: dict[str, list[int]], path: Path
) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, (style, colour) in MEMORY_STYLES.items():
        megabytes = np.asarray(columns[name]) / 1e6
        axes.semilogx(num_steps, megabytes, style, color=colour, label=name)
    axes.set_xticks(num_steps, [f"{n:,}" for n in num_steps])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    label(axes, "number of steps", "temporary memory (MB)")
    axes.set_title("Memory of the compiled gradient of a neural SDE")
    figure.savefig(path, dpi=150)


def main() -> None:
    arguments = parse_arguments(
        "Generate days of demand for electric power.",
        steps=1500,
        quick="two steps of training of a tiny model instead",
    )
    console = Console()
    setting, steps = FULL, arguments.steps
    if arguments.quick:
        setting, steps = QUICK, 2
    days = load_days()
    baselines = make_baselines(days, setting.generated)
    make = eqx.filter_jit(generate)
    generators, ours = [], []
    for seed in range(setting.seeds):
        generators.append(fit(days.seen, setting, steps, seed, console))
        key = jax.random.key(seed)
        ours.append(make(generators[-1], setting.generated, HOURS, key, TRAINING))
    # That the equation was learned, and not the steps it was trained with.
    finer = Solver(4 * TRAINING.num_steps)
    generated = make(generators[0], setting.generated, HOURS, jax.random.key(0), finer)

    of_each = [score(made, days.held_out) for made in ours]
    scores, apart = {}, {}
    of_models = {SDE: ours} | {name: [made] for name, made in baselines.items()}
    for name, all_made in of_models.items():
        scores[name] = np.mean([score(made, days.held_out) for made in all_made])
        apart[name] = np.mean(
            [told_apart(made, days.held_out, setting.trees) for made in all_made]
        )
    show_scores(scores, apart, console)
    columns = compare_ways(generators[0], days, setting, console)
    panels = {
        "real days, held out": days.held_out,
        "neural SDE": generated,
        "autoregression": next(v for k, v in baselines.items() if k.startswith("AR")),
    }
    out = arguments.out
    plot_days(panels, scores, out / "power_demand_days.png")
    plot_memory(setting.num_steps, columns, out / "power_demand_memory.png")
    listed = ", ".join(f"{one:.4f}" for one in of_each)
    print(
        f"Neural SDE's seeds: {listed}; by four times the steps, the first has "
        f"{score(generated, days.held_out):.4f}; figures in {out}"
    )
    print(
        "Held-out energy distance: "
        + ", ".join(f"{k} {v:.4f}" for k, v in scores.items())
    )


if __name__ == "__main__":
    main()
