"""The experiments of the paper, with its method as wrapped here and with the default.

McCallum & Foster, "Efficient, Accurate and Stable Gradients for Neural ODEs", arXiv
2410.11648. What of a setting is published and what is ours is in docs/paper.md. Of the
second version, in double precision:

- white_dwarf: Chandrasekhar's equation, learned in 1,000 steps
- oscillators: two masses and three springs, 500 steps, simulated, with noise
- pendulum:    a double pendulum, steps that adapt, simulated, with noise

Of the first version:

- cubic:       the error of gradients of a network that learns `x**3 + x`
- moons:       a continuous normalising flow on two moons
- cde:         a neural controlled differential equation, on simulated handwriting

Compared are, over the same base solver:

- published:   `Reversible(base, McCallumFoster(0.999))`, `ReversibleAdjoint()`
- default:     `Reversible(base)`, `ReversibleAdjoint()`
- checkpoints: the base under `RecursiveCheckpointAdjoint`. Its stages are unrolled, as
               they are in the paper's own solvers; "in a loop" is Diffrax's own way.

A speed-up is the time of the base under checkpoints divided by that of the method:
medians of runs in turn. "States" are states of doubles kept of the path. Bytes are the
temporary ones of the compiled program: "no path" is of a gradient of the final state
alone, else the program holds the whole path too, for the loss.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
from measuring import add_parts, begin, parser_of, print_table, run_parts
from paper_common import DEFAULT, PUBLISHED
from paper_dynamics import OSCILLATORS, PENDULUM, WHITE_DWARF, dynamics
from paper_figures import draw_cubic, draw_curves
from paper_flow_cde import cde, moons
from paper_models import cubic
from rich.console import Console


def white_dwarf(options: argparse.Namespace, console: Console) -> dict:
    return dynamics(WHITE_DWARF, options, console)


def oscillators(options: argparse.Namespace, console: Console) -> dict:
    return dynamics(OSCILLATORS, options, console)


def pendulum(options: argparse.Namespace, console: Console) -> dict:
    return dynamics(PENDULUM, options, console)


# The mean times to train with checkpoints (44, 31 and 32 of them) over those of the
# published method, from the runs that its authors have logged in
# github.com/sammccallum/reversible-solvers, experiments/white_dwarf/data,
# experiments/odes/data, experiments/realdata/data, experiments/physical_systems/data.
LOGGED_SPEED_UP = {
    "white_dwarf": {"Euler": 3.4, "Midpoint": 3.1, "Ralston": 2.7, "RK4": 2.6},
    "oscillators": {"Euler": 3.0, "Midpoint": 2.6, "Ralston": 2.3, "RK4": 2.0},
    "pendulum": {"Bosh3": 2.8},
}
# The mean memory in use when everything is stored over that of the published method,
# likewise, in github.com/sammccallum/reversible, experiments/cnf/results,
# experiments/neural_cde/results; and of regression to a time of 5.
LOGGED_MEMORY = {
    "moons": {"Midpoint": 7.0, "RK4": 11.6, "Dopri5": 18.1},
    "cde": {"Midpoint": 2.5, "RK4": 4.0, "Dopri5": 5.8},
}

PARTS = (white_dwarf, oscillators, pendulum, cubic, moons, cde)


def beside_published(part: str, results: dict[str, Any]) -> list[dict]:
    """What was logged, and the same ratio of the published method and of the default
    here."""
    speed = part in LOGGED_SPEED_UP
    logged = LOGGED_SPEED_UP.get(part) or LOGGED_MEMORY.get(part, {})
    rows = results["equal steps" if speed else "published size"] if logged else []
    ratio = "speed-up" if speed else "stored / it"
    of = {(row["base"], row["method"]): row[ratio] for row in rows}
    return [
        {"base": base, "ratio": ratio, "logged": published}
        | {"published method": of[base, PUBLISHED], "default": of[base, DEFAULT]}
        for base, published in logged.items()
        if (base, PUBLISHED) in of
    ]


def draw(part: str, results: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    xlabel = "tolerance" if part == "pendulum" else "steps"
    draw_curves(results["curves"], xlabel, folder / f"paper_{part}.png")
    if part == "cubic":
        draw_cubic(results["gradient errors"], folder / "paper_cubic_errors.png")


def show(console: Console, part: str, results: dict[str, Any]) -> None:
    """A table of each list of rows, without what is not a number or a name."""
    for title, rows in results.items():
        if isinstance(rows, list):
            shown = lambda x: not isinstance(x, list)
            cells = [{k: v for k, v in row.items() if shown(v)} for row in rows]
            print_table(console, f"{part}: {title}", cells)


def parse_options() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_parts(parser, PARTS)
    parser.add_argument(
        "--figure", type=Path, metavar="DIR", help="where to draw the figures"
    )
    parser.set_defaults(repeats=31)
    if parser.parse_args().quick:
        parser.set_defaults(repeats=1)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    jax.config.update("jax_enable_x64", True)
    console, about = begin(options)
    results = {}
    for part, measured in run_parts(PARTS, options, console):
        beside = beside_published(part, measured)
        results[part] = measured
        if beside:
            measured["beside what was logged"] = beside
        if options.figure is not None:
            draw(part, results[part], options.figure)
        show(console, part, results[part])
    if options.json is not None:
        text = json.dumps(about | results, indent=1, default=str)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
