"""What a step costs: by number of steps, size of the state, batch; on a Brownian path.

- `length`: the time and the temporary bytes of a gradient, per step, of a small system
  from a hundred to a million steps. Both should hardly grow: what does, a bit of each
  element of the state at every fourth step beyond 1,024, is what the default keeps.
- `size`: the same for a chain of pendulums, from 2 numbers to 65,536, in 200 steps.
- `batch`: the same for a network of width 32 and a batch of 1 to 4,096 states, either
  "batched" inside the field or by a "vmap" of the solve, in 100 steps.
- `path`: how much of a stochastic solve goes into evaluating its Brownian tree: the
  same solve is timed on a path that costs next to nothing. Reversible solvers evaluate
  the tree once a step in each pass, for both halves of the step.

    python benchmarks/scaling.py           # all, some minutes
    python benchmarks/scaling.py length    # one of them
    python benchmarks/scaling.py --quick   # to see that it runs

Compared are a reversible solver, the plain one of its order with checkpoints, and the
plain one in a `jax.lax.scan` that stores what it needs, but not on the path. Times are
medians of runs in turn. The packages it needs come with the extra `examples`.
"""

import argparse
import functools as ft
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from measuring import (
    Program,
    add_parts,
    begin,
    compile_gradient,
    compile_program,
    interleaved_times,
    medians,
    parser_of,
    print_table,
    run_parts,
    write_json,
)
from methods import (
    CHECKPOINTED,
    REVERSED,
    SOLVERS,
    Method,
    make_gradient,
    make_loss,
)
from problems import Problem, mlp, normal_weights
from rich.console import Console
from rich.progress import track

METHODS = (
    Method("reversax", "Reversible(Euler)", "reversed", REVERSED),
    Method("Diffrax", "Heun", "checkpoints", CHECKPOINTED),
    Method("plain JAX", "Heun", "stored"),
)
STOCHASTIC = METHODS[:2]
SECONDS = 2.0  # Of repeats of one program.


def measure_each(
    problems: list[tuple[dict, Problem, int, bool]],
    options: argparse.Namespace,
    console: Console,
) -> list[dict]:
    """A row for each problem, with what is to be said of it, how many steps it takes
    and whether by `vmap`; and each method."""
    rows, cases = [], [(case, method) for case in problems for method in METHODS]
    runs: dict[int, Callable] = {}
    for case, method in track(cases, "compiling", console=console, transient=True):
        about, problem, steps, vmap = case
        problem = problem.cast(np.float32)
        loss = make_loss(problem, method, steps, vmap)
        inputs = jax.tree.map(jnp.asarray, problem.inputs)
        dt = jnp.asarray(problem.t1 / steps, jnp.float32)
        program = compile_program(make_gradient(loss), inputs, dt)
        row = about | {"steps": steps, "gradient": f"{method.library}: {method.name}"}
        runs[len(rows)] = ft.partial(program.run, inputs, dt)
        rows.append(row | {"bytes": program.temporary_bytes})
    times = medians(interleaved_times(runs, options.repeats, SECONDS))
    for i, row in enumerate(rows):
        row["microseconds a step"] = times[i] / row["steps"] * 1e6
    return rows


def pendulums(number: int) -> Problem:
    """A chain of them, each of which feels the next; a ring if there are more than
    one."""

    def field(xp, t, y, parameters):
        (stiffness,) = parameters
        angle, speed = y[0], y[1]
        pull = stiffness * (xp.roll(angle, 1, 0) - angle)
        return xp.stack([speed, pull - xp.sin(angle)])

    rng = np.random.default_rng(0)
    y0 = rng.standard_normal((2, number))
    return Problem("pendulums", field, (np.array(0.5),), y0, 10.0)


def small_network(batch: int) -> Problem:
    rng = np.random.default_rng(1)
    field = lambda xp, t, y, parameters: mlp(xp, y, parameters)
    y0 = rng.standard_normal((batch, 8))
    return Problem("network", field, normal_weights(rng, 8, 32, 8), y0, 1.0)


def length(options: argparse.Namespace, console: Console) -> list[dict]:
    lengths = (100, 1_000, 10_000, 100_000, 1_000_000)[: 2 if options.quick else 5]
    problems = [({}, pendulums(1), steps, False) for steps in lengths]
    rows = measure_each(problems, options, console)
    caption = f"Medians of at most {options.repeats} runs in turn, single precision."
    print_table(console, "Ever longer solves", rows, caption)
    return rows


def size(options: argparse.Namespace, console: Console) -> list[dict]:
    sizes = (2, 16) if options.quick else (2, 32, 512, 8_192, 65_536)
    steps = 20 if options.quick else 200
    problems = [({"state": n}, pendulums(n // 2), steps, False) for n in sizes]
    rows = measure_each(problems, options, console)
    caption = f"Medians of at most {options.repeats} runs in turn, single precision."
    print_table(console, "Ever larger states", rows, caption)
    return rows


def batch(options: argparse.Namespace, console: Console) -> list[dict]:
    batches = (1, 4) if options.quick else (1, 16, 256, 4_096)
    steps = 20 if options.quick else 100
    problems = [
        ({"batching": kind, "batch": n}, small_network(n), steps, kind == "vmap")
        for kind in ("batched", "vmap")
        for n in batches
    ]
    rows = measure_each(problems, options, console)
    caption = f"Medians of at most {options.repeats} runs in turn, single precision."
    print_table(console, "Ever larger batches", rows, caption)
    return rows


class Wave(diffrax.AbstractPath):
    """A path that costs next to nothing to evaluate, of the size of a Brownian one."""

    t0 = 0.0
    t1 = 1.0
    frequencies: jax.Array

    def evaluate(self, t0, t1=None, left=True):
        at = lambda t: jnp.sin(self.frequencies * t)
        return at(t0) if t1 is None else at(t1) - at(t0)


def path_loss(solver, adjoint, path, steps: int) -> Callable:
    """A network of width 64 drives 64 dimensions with diagonal noise."""

    def loss(weights, y0):
        first, second = weights
        drift = lambda t, y, args: jnp.tanh(y @ first) @ second
        noise = lambda t, y, args: jnp.diag(0.1 * jnp.cos(y))
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(drift), diffrax.ControlTerm(noise, path)
        )
        solution = diffrax.diffeqsolve(
            terms, solver, 0.0, 1.0, 1 / steps, y0, adjoint=adjoint, max_steps=steps + 1
        )
        assert solution.ys is not None
        return jnp.sum(solution.ys**2)

    return loss


def path(options: argparse.Namespace, console: Console) -> list[dict]:
    steps, width = (20 if options.quick else options.steps), 64
    keys = jax.random.split(jax.random.key(options.seed), 4)
    weights = [jax.random.normal(key, (width, width)) / 8 for key in keys[:2]]
    y0 = jax.random.normal(keys[2], (width,))
    tree = diffrax.VirtualBrownianTree(0.0, 1.0, 0.5 / steps, (width,), keys[3])
    paths = {"tree": tree, "wave": Wave(jnp.linspace(1.0, 9.0, width))}
    programs: dict[Any, Program] = {}
    for method in STOCHASTIC:
        assert method.adjoint is not None
        solver, adjoint = SOLVERS[method.solver], method.adjoint(steps)
        name = f"{method.library}: {method.name}"
        for kind, driver in paths.items():
            loss = path_loss(solver, adjoint, driver, steps)
            programs[name, kind, "forward"] = compile_program(loss, weights, y0)
            programs[name, kind, "gradient"] = compile_gradient(loss, weights, y0)
    runs = {key: ft.partial(p.run, weights, y0) for key, p in programs.items()}
    times = medians(interleaved_times(runs, options.repeats))
    rows = []
    for name in dict.fromkeys(name for name, _, _ in programs):
        for what in ("forward", "gradient"):
            tree_s, wave_s = (times[name, kind, what] / steps for kind in paths)
            row = {"solver": name, "of": what, "microseconds a step": tree_s * 1e6}
            rows.append(row | {"share of the tree": 1 - wave_s / tree_s})
    caption = f"{steps} steps, medians of {options.repeats} runs in turn."
    print_table(console, "The share of the Brownian tree", rows, caption)
    return rows


PANELS = {"length": "steps", "size": "state", "batch": "batch"}
COLORS = {"reversax": "C0", "Diffrax": "C1", "plain JAX": "0.4"}


def draw(results: dict[str, list[dict]], path: Path) -> None:
    """Time and bytes against what grows, of each part that was measured."""
    parts = [part for part in PANELS if part in results]
    figure = Figure(figsize=(5.0 * len(parts), 6.0), layout="constrained")
    grid = figure.subplots(2, len(parts), squeeze=False)
    for j, part in enumerate(parts):
        rows = results[part]
        for i, key in enumerate(("microseconds a step", "bytes")):
            axes = grid[i, j]
            lines = dict.fromkeys((r["gradient"], r.get("batching")) for r in rows)
            for gradient, batching in lines:
                mine = [r for r in rows if r["gradient"] == gradient]
                mine = [r for r in mine if r.get("batching") == batching]
                color = COLORS[gradient.split(":")[0]]
                style = "o:" if batching == "vmap" else "o-"
                label = None if batching == "vmap" else gradient
                xs = [r[PANELS[part]] for r in mine]
                ys = [r[key] for r in mine]
                axes.loglog(xs, ys, style, color=color, markersize=4, label=label)
            axes.grid(color="0.93")
            axes.set_ylabel(key)
        names = {"length": "steps", "size": "numbers in the state"}
        dotted = "states in the batch (dotted: by vmap)"
        grid[1, j].set_xlabel(names.get(part, dotted))
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    figure.savefig(path, dpi=130)


PARTS = (length, size, batch, path)


def parse_options() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_parts(parser, PARTS)
    add = parser.add_argument
    add("--steps", type=int, default=1000, help="of the path part")
    add("--figure", type=Path, metavar="PATH", help="where to draw the first three")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    console, about = begin(options)
    results = dict(run_parts(PARTS, options, console))
    if options.figure is not None and options.part != "path":
        draw(results, options.figure)
    write_json(options.json, about, results)


if __name__ == "__main__":
    main()
