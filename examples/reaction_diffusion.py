"""Learns the coefficients of a reaction-diffusion equation from noisy pictures of it.

Gray and Scott's equation, in which v feeds on u and makes worms and spots that grow,

    du/dt = D_u Δu - u v² + F (1 - u)
    dv/dt = D_v Δv + u v² - (F + k) v,

on a periodic square of 256 by 256 points of spacing `dx = 1`, with Δ by nine points.
From four noisy pictures until t = 32, that is 256 steps, the script learns all four
coefficients by L-BFGS. The model then predicts t = 512, which it has not seen, also
from another start. The data are made on the same grid by Tsit5, so the errors of the
coefficients come from the noise and the time steps, not from the grid.

A gradient through the 4,096 steps until t = 512 is measured at the end. A state has
half a megabyte, so storing each of them takes gigabytes; checkpointing and
`reversax.ReversibleAdjoint` take tens of megabytes. The program that stores them is
only compiled, not run.

**Is it stable?** Diffusion damps, and the symmetric coupling is stable only where the
step times the fastest damping is below `ln(2)` times the halvings of a step: by default
one in each of 256 steps, for 0.69, and a quarter of one from 1,024 steps on, for 0.173.
Waves of two points' length are damped fastest: at the rate `16/3 D/dx²` by nine points
(and `8 D/dx²` by the usual five, for which `h * 8 D_u/dx²` would be 0.160 at our `h =
1/8`, too near for the 4,096 steps). Here `h * 16/3 D_u/dx²` is 0.107. The reaction
adds to it most where v peaks: by an estimate with frozen coefficients, to 0.147 along
this solution, and to 0.163 with the largest D_u and D_v that the search may try (it
keeps each coefficient within a factor of 1.6 of its guess). The published coupling has
0.001 instead, and fails; the script shows it.

**Is it worth it?** The table has the errors of the solvers beside the gradients' time
and memory. Reversible Euler is of second order and has the cost and the error of Heun's
method. But Heun's alone is also stable at longer steps: where the last row's error is
small enough, checkpointing is the cheaper.

    python examples/reaction_diffusion.py            # six minutes on two cores
    python examples/reaction_diffusion.py --quick    # small, hardly trained

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
from gray_scott import (
    CHECKPOINTED,
    FULL,
    GUESS,
    NAMES,
    QUICK,
    REVERSED,
    REVERSIBLE,
    STEP,
    TRUE,
    Data,
    GrayScott,
    Setting,
    loss_fn,
    make_data,
    model_of,
    solve,
)
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

import reversax

# In single precision, of four sums over all points and thousands of steps.
GRADIENT_BOUND = 1e-5
HEUN = diffrax.Heun()
PUBLISHED = reversax.Reversible(
    diffrax.Euler(), reversax.McCallumFoster(), reversax.FloatingPoint()
)


def fit(
    data: Data, times: Sequence[float], steps: int, console: Console
) -> tuple[GrayScott, Float[np.ndarray, "steps+1 4"]]:
    """The model, and its coefficients before and after each step of L-BFGS."""
    search = optax.scale_by_zoom_linesearch(max_linesearch_steps=6)
    optimiser = optax.lbfgs(linesearch=search)
    loss_of = lambda model: loss_fn(model, data.y0, data.seen, times)
    value_and_grad = optax.value_and_grad_from_state(loss_of)

    @jax.jit
    def update(state):
        model, optimiser_state = state
        loss, grads = value_and_grad(model, state=optimiser_state)
        updates, optimiser_state = optimiser.update(
            grads, optimiser_state, model, value=loss, grad=grads, value_fn=loss_of
        )
        return (eqx.apply_updates(model, updates), optimiser_state), loss

    model = model_of(GUESS)
    path = [GUESS]

    def update_and_note(state, step):
        state, loss = update(state)
        path.append(np.asarray(state[0].coefficients))
        return state, loss

    state = model, optimiser.init(eqx.filter(model, eqx.is_array))
    # Some of its numbers are of weak type, and not after a step: without this the
    # second step would be compiled anew.
    state = jax.tree.map(lambda x: jnp.asarray(x, x.dtype), state)
    (model, _), _ = train(update_and_note, state, steps, console)
    return model, np.stack(path)


def relative_error(got: np.ndarray, exact: np.ndarray) -> float:
    """Of v, the second field, beside how much it varies."""
    difference = got[..., 1, :, :] - exact[..., 1, :, :]
    return float(np.sqrt(np.mean(difference**2)) / exact[..., 1, :, :].std())


class Way(NamedTuple):
    """A way to the gradient."""

    solver: diffrax.AbstractSolver
    adjoint: diffrax.AbstractAdjoint
    step: float = STEP


OURS = "reversible, reversed"
SAME = "reversible, checkpointed"
PLAIN = "Heun, checkpointed"
LONG = "Heun, longer steps"
WAYS = {
    OURS: Way(REVERSIBLE, REVERSED),
    SAME: Way(REVERSIBLE, CHECKPOINTED),
    PLAIN: Way(HEUN, CHECKPOINTED),
    LONG: Way(HEUN, CHECKPOINTED, 4 * STEP),
}


def predict(
    model: GrayScott, data: Data, setting: Setting, way: Way = WAYS[OURS]
) -> np.ndarray:
    run = eqx.filter_jit(solve)
    return np.asarray(run(model, data.y0, setting.held_out, *way))


def compare_ways(
    model: GrayScott, data: Data, setting: Setting, console: Console
) -> dict[str, Measured]:
    """Measures full gradients, checks ours, and prints the table.

    The errors of the solvers are those of the last v at the true coefficients, beside
    the solver that made the data.
    """

    def gradient_by(way: Way):
        loss = lambda model, y0, seen: loss_fn(model, y0, seen, setting.held_out, *way)
        return jax.value_and_grad(loss)

    ways = {name: gradient_by(way) for name, way in WAYS.items()}
    with console.status("Measuring gradients through the full time"):
        measured = measure(ways, model, data.y0, data.seen, repeats=1)
        true = model_of(TRUE)
        errors = {}
        for name, way in WAYS.items():
            # Which adjoint there is makes no difference to the solution.
            way = WAYS[OURS] if name == SAME else way
            last = predict(true, data, setting, way)[-1]
            errors[name] = f"{relative_error(last, data.exact[-1]):.1e}"
    check_gradient(
        measured[OURS], measured[SAME], setting.full_num_steps, GRADIENT_BOUND
    )
    show_measured(
        f"A gradient until t = {setting.held_out[-1]:.0f}",
        measured,
        console,
        step={name: f"{way.step:g}" for name, way in WAYS.items()},
        error=errors,
    )
    return measured


def try_published(data: Data, setting: Setting, console: Console) -> None:
    """Prints what the published coupling does here, and what the symmetric one."""
    term, few = diffrax.ODETerm(model_of(TRUE)), 32
    with console.status("Trying the published coupling"):
        missed = {}
        for solver in (PUBLISHED, REVERSIBLE):
            undone = reversax.round_trip_error(
                term, solver, 0.0, few * STEP, STEP, data.y0, max_steps=few
            )
            missed[solver] = np.abs([undone.error.y, undone.error.z]).max()
        solution = diffrax.diffeqsolve(
            term,
            PUBLISHED,
            0.0,
            setting.held_out[-1],
            STEP,
            data.y0,
            saveat=diffrax.SaveAt(steps=True, fn=lambda t, y, args: jnp.abs(y).max()),
            max_steps=setting.full_num_steps,
            throw=False,
        )
    # Concentrations are between 0 and 1 or so. A comparison with NaN is false.
    kept = np.asarray(solution.ys) < 10
    fate = (
        "stays bounded"
        if kept.all()
        else f"leaves all bounds at step {kept.argmin() + 1}"
    )
    print(
        f"Undoing {few} steps misses the start by {missed[PUBLISHED]:.1e} with the "
        f"published coupling, by {missed[REVERSIBLE]:.1e} with the symmetric one. Of "
        f"{setting.full_num_steps} steps, the published {fate}."
    )


def measure_memory(
    data: Data, setting: Setting, measured: dict[str, Measured], console: Console
) -> dict[str, list[int]]:
    """Compiled temporary bytes for each number of steps; nothing is run."""

    def compiled_bytes(way: Way, num_steps: int) -> int:
        times = [t * num_steps / setting.full_num_steps for t in setting.held_out]
        loss = lambda model, y0, seen: loss_fn(model, y0, seen, times, *way)
        program = jax.jit(jax.grad(loss)).lower(model_of(TRUE), data.y0, data.seen)
        return temporary_bytes(program.compile())

    table = Table(title="Temporary memory of the compiled gradient, bytes")
    table.add_column("steps", justify="right")
    for name in MEMORY_STYLES:
        table.add_column(name, justify="right")
    columns = {name: [] for name in MEMORY_STYLES}
    with console.status("Compiling gradients"):
        for n in setting.num_steps:
            if n == setting.full_num_steps:
                row = [measured[name].bytes for name in (OURS, PLAIN)]
            else:
                row = [compiled_bytes(WAYS[name], n) for name in (OURS, PLAIN)]
            store = diffrax.RecursiveCheckpointAdjoint(checkpoints=n)
            row.append(compiled_bytes(Way(HEUN, store), n))
            table.add_row(f"{n:,}", *(f"{entry:,}" for entry in row))
            for column, entry in zip(columns.values(), row, strict=True):
                column.append(entry)
    console.print(table)
    return columns


STORED = "Heun, every step stored"
MEMORY_STYLES = {
    OURS: ("o-", ORANGE),
    PLAIN: ("^--", BLUE),
    STORED: ("s:", GREEN),
}


def plot_fields(
    exact: np.ndarray,
    got: np.ndarray,
    path_of_fit: np.ndarray,
    setting: Setting,
    path: Path,
) -> None:
    figure = Figure(figsize=(11, 8), layout="constrained")
    time, seen_until = setting.held_out[-1], setting.training[-1]
    panels = figure.subplot_mosaic(
        [["true", "learned", "difference"], ["path"] * 3], height_ratios=(1.3, 1)
    )
    axes = panels["true"], panels["learned"], panels["difference"]
    titles = "true", "learned", "learned - true"
    fields = exact[1], got[1], got[1] - exact[1]
    largest = float(exact[1].max())
    for one, title, field in zip(axes, titles, fields, strict=True):
        signed = one is panels["difference"]
        limit = float(np.abs(field).max()) if signed else largest
        image = one.imshow(
            field,
            cmap="RdBu_r" if signed else "viridis",
            vmin=-limit if signed else 0,
            vmax=limit,
            origin="lower",
        )
        one.set_title(title, fontsize=12)
        one.set_xlabel("x / dx", fontsize=11)
        ticks = MaxNLocator(4)  # More would touch each other.
        figure.colorbar(image, ax=one, location="bottom", shrink=0.9, ticks=ticks)
    axes[0].set_ylabel("y / dx", fontsize=11)
    figure.suptitle(
        f"Concentration v at t = {time:.0f}; the model saw t ≤ {seen_until:.0f}",
        fontsize=13,
    )
    axes = panels["path"]
    for i, (name, colour) in enumerate(
        zip(NAMES, (BLUE, GREEN, ORANGE, GREY), strict=True)
    ):
        axes.plot(
            100 * (path_of_fit[:, i] / TRUE[i] - 1), color=colour, label=f"${name}$"
        )
    axes.set_yscale("symlog", linthresh=1)
    axes.set_yticks((-10, -1, 0, 1, 10), ("-10", "-1", "0", "1", "10"))
    axes.axhline(0, color="black", linewidth=0.8)
    label(axes, "step of training", "error of coefficient (%)")
    figure.savefig(path, dpi=130)


def plot_memory(
    num_steps: Sequence[int], columns: dict[str, list[int]], path: Path
) -> None:
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    for name, (style, colour) in MEMORY_STYLES.items():
        column = np.array(columns[name]) / 1e6
        axes.plot(num_steps, column, style, color=colour, label=name)
        for n, megabytes in list(zip(num_steps, column, strict=True))[-2:]:
            large = megabytes > 1e3
            axes.annotate(
                f"{megabytes / 1e3:.1f} GB" if large else f"{megabytes:.0f} MB",
                (n, megabytes),
                xytext=(8, -4),
                textcoords="offset points",
                va="top",
                color=colour,
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(num_steps, [f"{n:,}" for n in num_steps])
    axes.margins(x=0.14)
    label(axes, "number of steps", "temporary memory (MB)")
    axes.set_title("Memory of the compiled gradient of a reaction-diffusion equation")
    figure.savefig(path, dpi=150)


def main() -> None:
    arguments = parse_arguments(
        "Learn a reaction-diffusion equation's coefficients.",
        steps=45,
        quick="two steps of training on a small grid instead",
    )
    console = Console()
    setting, steps = FULL, arguments.steps
    if arguments.quick:
        setting, steps = QUICK, 2
    training, held_out = make_data(setting, seed=0)
    _, other = make_data(setting, seed=1)

    model, path = fit(training, setting.training, steps, console)
    later, elsewhere = (predict(model, data, setting) for data in (held_out, other))
    try_published(held_out, setting, console)
    measured = compare_ways(model, held_out, setting, console)
    columns = measure_memory(held_out, setting, measured, console)
    stored = columns[STORED]
    gigabytes = stored[setting.num_steps.index(setting.full_num_steps)] / 1e9

    exact = held_out.exact
    time = setting.held_out[-1]
    out = arguments.out
    plot_fields(
        exact[-1], later[-1], path, setting, out / "reaction_diffusion_fields.png"
    )
    plot_memory(setting.num_steps, columns, out / "reaction_diffusion_memory.png")
    errors = 100 * (path[-1] / TRUE - 1)
    listed = ", ".join(f"{n} {e:+.2f} %" for n, e in zip(NAMES, errors, strict=True))
    print(f"Errors of coefficients: {listed}; figures in {out}")
    print(
        f"Coefficients: worst error {np.abs(errors).max():.2f} %; held-out error "
        f"{relative_error(later[-1], exact[-1]):.4f} at t = {time:.0f}, "
        f"{relative_error(elsewhere[-1], other.exact[-1]):.4f} from another start; "
        f"full gradient of {setting.full_num_steps} steps: reversed "
        f"{measured[OURS].bytes / 1e6:.1f} MB, checkpointed "
        f"{measured[PLAIN].bytes / 1e6:.1f} MB, stored {gigabytes:.3f} GB"
    )


if __name__ == "__main__":
    main()
