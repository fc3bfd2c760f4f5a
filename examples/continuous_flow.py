"""Learns two densities from samples by continuous normalising flows.

A flow is a network whose differential equation carries data to a standard normal
distribution; flow.py says how, and holds what one would copy. It is trained by maximum
likelihood on

- two interleaved spirals in the plane, by the exact trace, which takes two products
  with the Jacobian of the network there;
- scikit-learn's handwritten digits in their first eight principal components (found on
  the training digits alone), by Hutchinson's estimate, which takes one product and not
  eight.

Few data make a flow remember rather than learn. So training adds a little noise to
them, decays the weights, averages them over the last updates, and keeps the flow that
gave the validation rows the highest likelihood. The mixtures of Gaussians to compare
with are chosen by the same rows, of all shapes and up to forty components. Test rows
are only scored, by the exact trace and with four times the steps of training: a solve
that is too coarse is a density that does not sum to one.

At the end a gradient through many steps is measured under
`reversax.ReversibleAdjoint` and under checkpointing.

    python examples/continuous_flow.py            # eight minutes on two cores
    python examples/continuous_flow.py --quick    # hardly trained, to see that it runs

The packages it needs come with the extra `examples`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import flow_figures
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import (
    Measured,
    check_gradient,
    measure,
    parse_arguments,
    show_measured,
    temporary_bytes,
    train,
)
from flow import (
    REVERSED,
    REVERSIBLE,
    Flow,
    Rows,
    log_likelihood,
    log_normal,
    sample,
    sample_probe,
    solve,
)
from flow_data import Split, choose_mixture, load_reduced_digits, load_spirals
from flow_figures import MEMORY_STYLES, OURS, PLAIN, STORED
from jaxtyping import Array, Float
from rich.console import Console
from rich.table import Table
from scipy.special import logsumexp
from sklearn.mixture import GaussianMixture

GRADIENT_BOUND = 1e-4  # In single precision, of sums over a thousand steps.
SAME = "reversible, checkpointed"
HEUN, CHECKPOINTED = diffrax.Heun(), diffrax.RecursiveCheckpointAdjoint()


class Setting(NamedTuple):
    """How to train a flow."""

    name: str
    num_steps: int
    """Of a solve in training."""
    hutchinson: bool
    noise: float
    """What is added to each coordinate of the data, in training."""
    decay: float
    learning_rate: float
    seeds: int
    width: int = 64
    depth: int = 2
    batch: int = 256
    finer: int = 4
    """For so many steps in evaluation there is one in training."""

    @property
    def evaluation_steps(self) -> int:
        return self.finer * self.num_steps


SPIRALS = Setting("spirals", 16, False, 0.02, 0.03, 1e-2, 2)
DIGITS = Setting("digits", 10, True, 0.15, 0.1, 3e-3, 3)
AVERAGE = 0.99  # How much of the averaged weights each update keeps.
CHECK_EVERY = 50  # Updates between looks at the validation rows.
CHUNK = 500  # Rows that are scored at once.
MEASURED_ROWS = 256
MEMORY_STEPS = (16, 64, 256, 1024)
COMPONENTS = (1, 2, 4, 6, 8, 10, 12, 15, 20, 25, 30, 35, 40)
QUICK = dict(num_steps=2, seeds=1, width=8, depth=1, batch=16, finer=1)


class Training(NamedTuple):
    flow: Flow
    average: Flow
    optimiser: Any


def negative_log_likelihood(flow: Flow, y, probe, num_steps: int, *how):
    return -jnp.mean(log_likelihood(flow, y, probe, num_steps, *how))


def mean_of_updates(average: Any, new: Any) -> Any:
    """Moves an average a little towards what is new; for one leaf of a tree."""
    return AVERAGE * average + (1 - AVERAGE) * new if eqx.is_array(new) else new


@eqx.filter_jit
def score_chunk(flow: Flow, y: Rows, num_steps: int) -> Float[Array, " rows"]:
    return log_likelihood(flow, y, None, num_steps)


def scores(flow: Flow, y: np.ndarray, num_steps: int) -> Float[np.ndarray, " rows"]:
    """Log-likelihoods by the exact trace, so many rows at a time that one program
    serves for any number of them."""
    padded = np.pad(y, ((0, -len(y) % CHUNK), (0, 0)))
    chunks = padded.reshape(-1, CHUNK, y.shape[1])
    parts = [score_chunk(flow, jnp.asarray(chunk), num_steps) for chunk in chunks]
    return np.concatenate(parts)[: len(y)]


def train_flow(
    setting: Setting, data: Split, seed: int, steps: int, console: Console
) -> Flow:
    """The flow of highest likelihood for the validation rows on the way."""
    key = jax.random.key(seed)
    rows = jnp.asarray(data.training)
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            optax.cosine_decay_schedule(setting.learning_rate, steps),
            weight_decay=setting.decay,
        ),
    )

    @eqx.filter_jit
    def update(state: Training, step):
        row_key, noise_key, probe_key = jax.random.split(
            jax.random.fold_in(key, step), 3
        )
        y = jax.random.choice(row_key, rows, (setting.batch,))
        y += setting.noise * jax.random.normal(noise_key, y.shape)
        probe = sample_probe(y, key=probe_key) if setting.hutchinson else None
        loss, grads = eqx.filter_value_and_grad(negative_log_likelihood)(
            state.flow, y, probe, setting.num_steps
        )
        arrays = eqx.filter(state.flow, eqx.is_array)
        updates, inner = optimiser.update(grads, state.optimiser, arrays)
        flow = eqx.apply_updates(state.flow, updates)
        average = jax.tree.map(mean_of_updates, state.average, flow)
        return Training(flow, average, inner), loss

    flow = Flow(rows.shape[1], setting.width, setting.depth, key=key)
    best = -np.inf, flow

    def update_and_check(state: Training, step):
        nonlocal best
        state, loss = update(state, step)
        if (step + 1) % CHECK_EVERY == 0 or step + 1 == steps:
            finer = setting.evaluation_steps
            score = scores(state.average, data.validation, finer).mean()
            best = max(best, (score, state.average), key=lambda pair: pair[0])
        return state, loss

    state = Training(flow, flow, optimiser.init(eqx.filter(flow, eqx.is_array)))
    title = f"{setting.name}, seed {seed}"
    train(update_and_check, state, steps, console, title)
    return best[1]


class Result(NamedTuple):
    flows: list[Flow]
    mixture: GaussianMixture
    each: list[float]
    """The held-out log-likelihood of each flow."""
    together: float
    """That of the mean of the flows' densities."""
    mixture_score: float


def compare_with_mixture(
    setting: Setting,
    data: Split,
    steps: int,
    components: Sequence[int],
    restarts: int,
    console: Console,
) -> Result:
    with console.status(f"Choosing a mixture of Gaussians for the {setting.name}"):
        mixture = choose_mixture(data, components, restarts)
    seeds = range(setting.seeds)
    flows = [train_flow(setting, data, seed, steps, console) for seed in seeds]
    rows = np.stack([scores(f, data.test, setting.evaluation_steps) for f in flows])
    coarser = [scores(f, data.test, setting.num_steps).mean() for f in flows]
    of_mixture = mixture.score_samples(data.test)
    together = logsumexp(rows, axis=0) - np.log(len(rows))

    name, each = setting.name, rows.mean(axis=1)
    print(
        f"Held-out log-likelihood, {name}: flow {each.mean():.3f}, "
        f"Gaussian mixture {of_mixture.mean():.3f}"
    )
    ahead = rows.mean(axis=0) - of_mixture
    listed = ", ".join(f"{score:.3f}" for score in each)
    listed_coarser = ", ".join(f"{score:.3f}" for score in coarser)
    print(
        f"  {'The flow' if ahead.mean() > 0 else 'The mixture'} wins, by "
        f"{abs(ahead.mean()):.3f} +- {ahead.std() / len(ahead) ** 0.5:.3f} nats. Flows "
        f"of each seed {listed}; by the steps of training {listed_coarser}; the mean "
        f"of their densities {together.mean():.3f}. The mixture has "
        f"{mixture.n_components} components ({mixture.covariance_type})."
    )
    return Result(
        flows, mixture, list(each), float(together.mean()), float(of_mixture.mean())
    )


def likelihood_gradient(flow: Flow, num_steps: int, *how):
    """Of the arrays of a flow, rows and probe: the loss and its gradient."""
    _, static = eqx.partition(flow, eqx.is_array)
    loss = lambda arrays, y, probe: negative_log_likelihood(
        eqx.combine(arrays, static), y, probe, num_steps, *how
    )
    return jax.value_and_grad(loss)


def a_batch(flow: Flow, data: Split):
    """The arrays of a flow, rows of data and a probe for them."""
    y = jnp.asarray(data.training[:MEASURED_ROWS])
    return eqx.filter(flow, eqx.is_array), y, sample_probe(y, key=jax.random.key(0))


def compare_ways(
    flow: Flow, data: Split, num_steps: int, console: Console
) -> dict[str, Measured]:
    """Measures full gradients, checks ours, and prints the table."""
    ways = {
        OURS: likelihood_gradient(flow, num_steps, REVERSIBLE, REVERSED),
        SAME: likelihood_gradient(flow, num_steps, REVERSIBLE, CHECKPOINTED),
        PLAIN: likelihood_gradient(flow, num_steps, HEUN, CHECKPOINTED),
    }
    with console.status("Measuring gradients of many steps"):
        measured = measure(ways, *a_batch(flow, data), repeats=3)
    check_gradient(measured[OURS], measured[SAME], num_steps, GRADIENT_BOUND)
    title = f"A gradient of the digits' likelihood, {num_steps} steps"
    show_measured(title, measured, console)
    return measured


def compare_traces(flow: Flow, data: Split, num_steps: int, console: Console) -> None:
    """Measures gradients without the log-density, and with it by either trace."""
    _, static = eqx.partition(flow, eqx.is_array)
    by_either = likelihood_gradient(flow, num_steps)

    def without(arrays, y, probe):
        field = jax.vmap(eqx.combine(arrays, static).velocity, in_axes=(None, 0))
        end = solve(lambda t, y, args: field(t, y), y, None, num_steps)
        return -jnp.mean(log_normal(end))

    ways = {
        "no log-density": jax.value_and_grad(without),
        "Hutchinson's trace": by_either,
        "exact trace": lambda arrays, y, probe: by_either(arrays, y, None),
    }
    with console.status("Measuring what the log-density costs"):
        measured = measure(ways, *a_batch(flow, data), repeats=9)
    title = f"What the log-density costs, {num_steps} steps"
    show_measured(title, measured, console)


def measure_memory(
    flow: Flow,
    data: Split,
    all_num_steps: Sequence[int],
    measured: dict[str, Measured],
    console: Console,
) -> dict[str, list[int]]:
    """Compiled temporary bytes for each number of steps, of which the last has been
    measured; nothing is run."""

    def compiled_bytes(*how):
        program = jax.jit(likelihood_gradient(flow, *how))
        return temporary_bytes(program.lower(*a_batch(flow, data)).compile())

    table = Table(title="Temporary memory of the compiled gradient, bytes")
    table.add_column("steps", justify="right")
    for name in MEMORY_STYLES:
        table.add_column(name, justify="right")
    columns = {name: [] for name in MEMORY_STYLES}
    with console.status("Compiling gradients"):
        for n in all_num_steps:
            store = diffrax.RecursiveCheckpointAdjoint(checkpoints=n)
            if n == all_num_steps[-1]:
                row = {name: measured[name].bytes for name in (OURS, PLAIN)}
            else:
                row = {
                    OURS: compiled_bytes(n, REVERSIBLE, REVERSED),
                    PLAIN: compiled_bytes(n, HEUN, CHECKPOINTED),
                }
            row[STORED] = compiled_bytes(n, HEUN, store)
            table.add_row(f"{n:,}", *(f"{entry:,}" for entry in row.values()))
            for name, entry in row.items():
                columns[name].append(entry)
    console.print(table)
    return columns


def main() -> None:
    arguments = parse_arguments(
        "Learn two densities by continuous normalising flows.",
        steps=2500,
        quick="two steps of training of one flow each instead",
    )
    console = Console()
    steps, memory_steps, components, restarts = (
        arguments.steps,
        MEMORY_STEPS,
        COMPONENTS,
        5,
    )
    of_spirals, of_digits = SPIRALS, DIGITS
    if arguments.quick:
        steps, memory_steps, components, restarts = 2, (8,), (1, 8), 1
        of_spirals, of_digits = (s._replace(**QUICK) for s in (SPIRALS, DIGITS))
    spirals = load_spirals()
    digits, reduction = load_reduced_digits()

    run = partial(
        compare_with_mixture,
        components=components,
        restarts=restarts,
        console=console,
    )
    on_digits = run(of_digits, digits, steps)
    on_spirals = run(of_spirals, spirals, steps)
    flow, many = on_digits.flows[0], memory_steps[-1]
    measured = compare_ways(flow, digits, many, console)
    compare_traces(flow, digits, max(many // 16, 2), console)
    columns = measure_memory(flow, digits, memory_steps, measured, console)

    out, key = arguments.out, jax.random.key(1)
    flow, mixture = on_spirals.flows[0], on_spirals.mixture
    densities = {
        "density of the flow": lambda y: scores(flow, y, of_spirals.evaluation_steps),
        f"density of {mixture.n_components} Gaussians": mixture.score_samples,
    }
    drawn = sample(flow, len(spirals.test), 2, of_spirals.num_steps, key=key).y
    path = out / "flow_density.png"
    flow_figures.plot_density(spirals.test, np.asarray(drawn), densities, path)
    dim = digits.test.shape[1]
    drawn = sample(on_digits.flows[0], 64, dim, of_digits.num_steps, key=key).y
    path = out / "flow_digits.png"
    bars = {
        "flow": float(np.mean(on_digits.each)),
        "mixture of\nGaussians": on_digits.mixture_score,
    }
    flow_figures.plot_digits(digits.test, np.asarray(drawn), reduction, bars, path)
    flow_figures.plot_memory(memory_steps, columns, out / "flow_memory.png")
    print(f"Figures in {out}")


if __name__ == "__main__":
    main()
