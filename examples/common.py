"""What the examples share: arguments, a progress bar, measurements, looks."""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.stages import Compiled
from matplotlib.axes import Axes
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

# Okabe and Ito's palette, which colour-blind readers can tell apart.
ORANGE, BLUE, GREEN, GREY = "#D55E00", "#0072B2", "#009E73", "#777777"


def parse_arguments(
    description: str, steps: int, quick: str, **more: Mapping[str, Any]
) -> argparse.Namespace:
    """`--steps`, `--out` and `--quick`; `quick` says what the last one does. Each of
    `more` is an option too, and what `argparse` is to know of it."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=steps, help="steps of training")
    parser.add_argument(
        "--out", type=Path, default=Path("figures"), help="folder for the figures"
    )
    parser.add_argument("--quick", action="store_true", help=quick)
    for name, options in more.items():
        parser.add_argument(f"--{name}", **options)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    return arguments


def train(
    update: Callable[[Any, jax.Array], tuple[Any, jax.Array]],
    state: Any,
    steps: int,
    console: Console,
    description: str = "Training",
) -> tuple[Any, float]:
    """Calls `state, loss = update(state, step)` `steps` times, showing the loss.

    Returns the last state, and the loss before the last update.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}  loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
    )
    loss = math.nan
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=steps, loss=loss)
        for step in range(steps):
            state, loss = update(state, jnp.asarray(step))
            progress.update(task, advance=1, loss=float(loss))
    if not math.isfinite(loss):
        raise RuntimeError(f"{description} ended with a loss of {float(loss)}.")
    return state, float(loss)


def temporary_bytes(program: Compiled) -> int:
    """What a compiled program needs besides its inputs and outputs."""
    memory = program.memory_analysis()
    if memory is None:
        raise RuntimeError("This backend of JAX does not say how much memory it uses.")
    return memory.temp_size_in_bytes


class Measured(NamedTuple):
    loss: float
    gradient: Any
    seconds: float
    """The median over the repeats, without compiling."""
    bytes: int


def measure(
    ways: Mapping[str, Callable[..., Any]], *inputs: Any, repeats: int = 5
) -> dict[str, Measured]:
    """Measures each way of computing `(loss, gradient)` from trees of arrays.

    The repeats are interleaved, for a machine whose speed drifts.
    """
    programs = {
        name: jax.jit(function).lower(*inputs).compile()
        for name, function in ways.items()
    }
    results = {
        name: jax.block_until_ready(run(*inputs)) for name, run in programs.items()
    }
    seconds = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*inputs))
            seconds[name].append(time.perf_counter() - start)
    return {
        name: Measured(
            float(results[name][0]),
            results[name][1],
            statistics.median(seconds[name]),
            temporary_bytes(programs[name]),
        )
        for name in ways
    }


def check_gradient(
    ours: Measured, same: Measured, num_steps: int, bound: float
) -> None:
    """Prints how far two gradients of one solver are apart; raises beyond `bound`."""
    one, other = (ravel_pytree(each.gradient)[0] for each in (ours, same))
    difference = float(jnp.linalg.norm(one - other) / jnp.linalg.norm(other))
    print(
        f"Gradient check at {num_steps} steps: relative difference "
        f"{difference:.1e} (bound {bound:.0e})"
    )
    if not difference <= bound:
        raise RuntimeError("The two gradients of the same solver differ.")


def show_measured(
    title: str, measured: Mapping[str, Measured], console: Console, **columns
) -> None:
    """Prints loss, time and bytes of a gradient; `columns`: name to text, by way."""
    table = Table(title=title)
    table.add_column("gradient")
    for name in (*columns, "loss", "seconds", "bytes"):
        table.add_column(name.replace("_", " "), justify="right")
    for name, row in measured.items():
        more = (column[name] for column in columns.values())
        table.add_row(
            name, *more, f"{row.loss:.5f}", f"{row.seconds:.3f}", f"{row.bytes:,}"
        )
    console.print(table)


def label(axes: Axes, x: str, y: str, legend: bool = True) -> None:
    axes.set_xlabel(x, fontsize=12)
    axes.set_ylabel(y, fontsize=12)
    axes.tick_params(labelsize=11)
    if legend:
        axes.legend(fontsize=10, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
