"""What a gradient costs at equal numbers of steps: by method, and by size of network.

- evaluations: of the vector field per step, of the solve and of its gradient; the
               temporary bytes and how long tracing and compiling take. All methods, a
               small neural ODE, 100 steps, single precision.
- networks:    the time and the bytes of a gradient through a neural ODE of width 64,
               256 and 1024, of a batch of 1, 64 and 1024 initial states, either
               "batched" inside the field or by a "vmap" of the solve; single precision.
               The wider the network and the larger the batch, the fewer the steps,
               such that all can be measured, but never fewer than ten. Without `--full`
               not 1024 states at width 1024, and `vmap` at width 64 only.

Compare methods of the same order: `Reversible(Euler)` has Heun's, and that of
`Reversible(Tsit5)` is higher than Tsit5's. accuracy.py compares at equal accuracy.

    python benchmarks/matrix.py               # both, some minutes
    python benchmarks/matrix.py evaluations   # one of them
    python benchmarks/matrix.py --full        # all sizes of networks in both ways
    python benchmarks/matrix.py --quick       # to see that it runs

It needs the extra `examples`, and `peers` for Heun's method in torchdiffeq.
"""

import argparse
import dataclasses
import functools as ft
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peers
from matplotlib.figure import Figure
from measuring import (
    add_parts,
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
    Method,
    count_calls,
    make_gradient,
    make_loss,
    methods_for,
)
from peers import Peer, Run, peers_for
from problems import Problem, neural_ode
from rich.console import Console
from rich.progress import track

WIDTHS, BATCHES = (64, 256, 1024), (1, 64, 1024)
LEAST_STEPS, MOST_STEPS = 10, 100
WORK = 1e9  # Multiplications of a solve by Euler's method, of which the steps follow.
SECONDS = 1.5  # Of repeats of one method.
BASELINES = {"Reversible(Euler)": "Heun", "Reversible(Tsit5)": "Tsit5"}
NETWORK_METHODS: list[Method | Peer] = [
    Method("reversax", "Reversible(Euler)", "reversed", REVERSED),
    Method("Diffrax", "Heun", "checkpoints", CHECKPOINTED),
    Method("plain JAX", "Heun", "stored"),
    Method("reversax", "Reversible(Tsit5)", "reversed", REVERSED),
    Method("Diffrax", "Tsit5", "checkpoints", CHECKPOINTED),
    Method("plain JAX", "Tsit5", "stored"),
    Peer("torchdiffeq", "heun2", adjoint=False),
    Peer("torchdiffeq", "heun2", adjoint=True),
]


def evaluations_row(problem: Problem, method: Method, steps: int) -> dict[str, Any]:
    dt = jnp.asarray(problem.t1 / steps, jnp.float32)

    def forward(problem):
        loss = make_loss(problem, method, steps)
        return lambda inputs: loss(inputs, dt)[0]

    def gradient(problem):
        return jax.value_and_grad(forward(problem))

    inputs = jax.tree.map(jnp.asarray, problem.inputs)
    program = compile_program(gradient(problem), inputs)
    return {
        "steps": steps,
        "forward": count_calls(problem, forward) / steps,
        "gradient": count_calls(problem, gradient) / steps,
        "bytes": program.temporary_bytes,
        "trace (s)": program.trace_seconds,
        "compile (s)": program.compile_seconds,
    }


def peer_row(problem: Problem, peer: Peer, steps: int) -> dict[str, Any]:
    run = Run(problem, peer, steps, seed=0)
    _, kept, gradient = run.count()
    run.evaluations = 0
    run.solve()
    return {
        "steps": steps,
        "forward": run.evaluations / steps,
        "gradient": gradient / steps,
        "bytes": kept,
        "trace (s)": None,
        "compile (s)": None,
    }


def evaluations(options: argparse.Namespace, console: Console) -> list[dict]:
    problem = neural_ode(options.seed, width=8, batch=2).cast(np.float32)
    steps = 10 if options.quick else 100
    methods: list[Any] = [*methods_for("ODE"), *peers_for("ODE")]
    methods = [method for method in methods if not method.adaptive]
    if options.quick:
        methods = [m for m in methods if m.solver in ("Heun", "Reversible(Euler)")]
    rows = []
    for method in track(methods, "evaluations", console=console, transient=True):
        measure: Callable = peer_row if isinstance(method, Peer) else evaluations_row
        row = dict(library=method.library, method=method.name)
        rows.append(row | measure(problem, method, steps))
    rows.sort(key=lambda row: row["library"])
    caption = (
        "Evaluations of the vector field per step: of the solve; of solve and gradient "
        "together, where a pull-back is not counted. Bytes: see accuracy.py."
    )
    print_table(console, "By method", rows, caption)
    return rows


def steps_of(width: int, batch: int) -> int:
    steps = WORK / (batch * width * (width + 16))
    return int(min(MOST_STEPS, max(LEAST_STEPS, steps)))


@dataclasses.dataclass(frozen=True)
class Cell:
    width: int
    batch: int
    batching: str

    @property
    def steps(self) -> int:
        return steps_of(self.width, self.batch)

    def rows(self, options: argparse.Namespace) -> Iterator[dict]:
        problem = neural_ode(options.seed, self.width, self.batch).cast(np.float32)
        vmap = self.batching == "vmap"
        about = dataclasses.asdict(self) | dict(steps=self.steps)
        rows, runs = {}, {}
        for method in NETWORK_METHODS:
            if isinstance(method, Peer):
                if peers.MISSING or vmap:
                    continue
                runs[method] = run = Run(problem, method, self.steps, options.seed)
                size, seconds = run.count()[1], None
            else:
                loss = make_loss(problem, method, self.steps, vmap)
                inputs = jax.tree.map(jnp.asarray, problem.inputs)
                dt = jnp.asarray(problem.t1 / self.steps, jnp.float32)
                program = compile_program(make_gradient(loss), inputs, dt)
                runs[method] = ft.partial(program.run, inputs, dt)
                size, seconds = program.temporary_bytes, program.preparation_seconds
            row = about | dict(library=method.library, method=method.name)
            rows[method] = row | dict(bytes=size, compile_seconds=seconds)
        times = interleaved_times(runs, options.repeats, SECONDS)
        for method, median in medians(times).items():
            measured = dict(seconds=median, times=times[method])
            yield rows[method] | measured


def cells(options: argparse.Namespace) -> list[Cell]:
    if options.quick:
        return [Cell(8, 2, "batched"), Cell(8, 2, "vmap")]
    return [
        Cell(width, batch, batching)
        for batching in ("batched", "vmap")
        for width in WIDTHS
        for batch in BATCHES
        if options.full
        or (width * batch < 1024**2 and (batching == "batched" or width == 64))
    ]


def networks(options: argparse.Namespace, console: Console) -> list[dict]:
    rows = []
    for cell in track(cells(options), "networks", console=console, transient=True):
        rows += cell.rows(options)
    caption = (
        "A gradient; ratios are to Diffrax's checkpoints, of Heun for the methods of "
        f"second order. Medians of at most {options.repeats} runs in turn."
    )
    for batching in dict.fromkeys(row["batching"] for row in rows):
        shown = [as_cells(r, rows) for r in rows if r["batching"] == batching]
        print_table(console, f"Networks, {batching}", shown, caption)
    if options.figure is not None:
        draw(rows, options.figure)
    return rows


def baseline_of(row: dict, rows: list[dict]) -> dict:
    """Diffrax's checkpoints in the same cell, of Tsit5 or of Heun."""
    solver = "Tsit5" if "Tsit5" in row["method"] else "Heun"
    keys = ("width", "batch", "batching")
    same = [r for r in rows if all(r[key] == row[key] for key in keys)]
    return next(r for r in same if r["method"] == f"{solver}, checkpoints")


def as_cells(row: dict, rows: list[dict]) -> dict[str, Any]:
    baseline = baseline_of(row, rows)
    return {
        "width, batch": f"{row['width']}, {row['batch']}",
        "steps": row["steps"],
        "library": row["library"],
        "method": row["method"],
        "ms a step": row["seconds"] / row["steps"] * 1e3,
        "ratio": row["seconds"] / baseline["seconds"],
        "bytes": row["bytes"],
        "bytes, ratio": row["bytes"] / baseline["bytes"],
        "compile (s)": row["compile_seconds"],
    }


STYLES = {
    "Reversible(Euler), reversed": "C0 o",
    "Heun, stored": "0.4 o",
    "heun2, odeint": "C3 o",
    "heun2, odeint_adjoint": "C3 x",
    "Reversible(Tsit5), reversed": "C0 s",
    "Tsit5, stored": "0.4 s",
}


def draw(rows: list[dict], path: Path) -> None:
    kinds = list(dict.fromkeys(row["batching"] for row in rows))
    figure = Figure(figsize=(5.2 * len(kinds), 6.4), layout="constrained")
    grid = figure.subplots(2, len(kinds), sharey="row", squeeze=False)
    for j, kind in enumerate(kinds):
        here = [row for row in rows if row["batching"] == kind]
        columns = list(dict.fromkeys((row["width"], row["batch"]) for row in here))
        for i, key in enumerate(("seconds", "bytes")):
            axes = grid[i, j]
            for method, style in STYLES.items():
                chosen = [row for row in here if row["method"] == method]
                if not chosen:
                    continue
                xs = [columns.index((r["width"], r["batch"])) for r in chosen]
                ys = [r[key] / baseline_of(r, here)[key] for r in chosen]
                color, marker = style.split()
                label = f"{chosen[0]['library']}: {method}"
                kwargs = dict(color=color, marker=marker, linestyle="none", label=label)
                axes.semilogy(xs, ys, markersize=6, **kwargs)
            axes.axhline(1.0, color="C1", zorder=1)
            axes.grid(color="0.93", axis="y")
            axes.set_axisbelow(True)
            labels = [f"{width}\n{batch}" for width, batch in columns]
            axes.set_xticks(range(len(columns)), labels)
            axes.set_title(f"{kind}: {'time' if key == 'seconds' else 'bytes'}")
        grid[1, j].set_xlabel("width of the network, over size of the batch")
        grid[0, j].set_xlabel("")
    for axes in grid[:, 0]:
        axes.set_ylabel("ratio to Diffrax's checkpoints")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=130)


PARTS = (networks, evaluations)


def parse_options() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_parts(parser, PARTS)
    add = parser.add_argument
    add("--full", action="store_true", help="all sizes of networks in both ways")
    add("--figure", type=Path, metavar="PATH", help="where to draw the networks")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    console, about = peers.begin(options)
    results = {}
    for part, measured in run_parts(PARTS, options, console):
        results[part] = measured
        write_json(options.json, about, results)


if __name__ == "__main__":
    main()
