"""The tables and the figure of accuracy.py: time and memory at equal accuracy.

    python benchmarks/pareto.py docs/images/pareto.png benchmarks/results/accuracy*.json

draws the figure of what several runs of accuracy.py wrote.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

COLORS = {
    "reversax": "C0",
    "Diffrax": "C1",
    "plain JAX": "0.35",
    "gradsolve": "C2",
    "torchdiffeq": "C3",
    "torchsde": "C3",
    "torchcde": "C3",
}
MARKERS = "os^vDP*Xp<>hd8"


@dataclasses.dataclass
class Row:
    """What was measured of a method at one target."""

    problem: str
    target: float
    precision: str
    library: str
    method: str
    exact: bool
    steps: int | None = None
    tolerance: float | None = None
    error: float | None = None
    bytes: int | None = None
    trace_seconds: float | None = None
    compile_seconds: float | None = None
    evaluations: int | None = None
    seconds: float | None = None
    times: list[float] = dataclasses.field(default_factory=list)
    failed: str | None = None


def cost(row: Row) -> tuple[float, int]:
    """Seconds and bytes, of a method that met its target."""
    assert row.seconds is not None and row.bytes is not None
    return row.seconds, row.bytes


def front(rows: list[Row]) -> list[Row]:
    """Those than which no other is both faster and smaller, the fastest first."""
    best: list[Row] = []
    for row in sorted(rows, key=cost):
        if not best or cost(row)[1] < cost(best[-1])[1]:
            best.append(row)
    return best


def draw_panel(axes: Axes, rows: list[Row], styles: dict[str, dict]) -> None:
    for row in rows:
        seconds, size = cost(row)
        axes.loglog(size, seconds, **styles[row.method])
    # The bytes of PyTorch are another measure.
    best = front([row for row in rows if not row.library.startswith("torch")])
    seconds, sizes = zip(*map(cost, best), strict=True) if best else ((), ())
    style: dict[str, Any] = dict(color="0.75", linewidth=1, drawstyle="steps-pre")
    axes.plot(sizes, seconds, zorder=0, **style)
    axes.grid(color="0.93")
    axes.set_axisbelow(True)
    for axis, unit in ((axes.xaxis, "B"), (axes.yaxis, "s")):
        axis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axis.set_major_formatter(EngFormatter(unit))
        axis.set_minor_formatter(NullFormatter())


def styles_of(rows: list[Row]) -> dict[str, dict]:
    """One color for each library, one marker for each of its methods."""
    styles: dict[str, dict] = {}
    used = dict.fromkeys(COLORS.values(), 0)
    for row in rows:
        if row.method in styles or row.seconds is None:
            continue
        color = COLORS[row.library]
        marker = MARKERS[used[color] % len(MARKERS)]
        used[color] += 1
        hollow = row.library.startswith("torch")
        styles[row.method] = dict(
            color=color,
            marker=marker,
            markerfacecolor="none" if hollow else color,
            linestyle="none",
            markersize=7,
            label=f"{row.library}: {row.method}",
        )
    return styles


def draw(rows: list[Row], path: Path) -> None:
    """A column for each problem, a row for each of its two targets."""
    problems = list(dict.fromkeys(row.problem for row in rows))
    styles = styles_of(rows)
    per_row = len(problems) if len(problems) < 5 else 3
    bands = -(-len(problems) // per_row)
    targets = 2 if len({(r.problem, r.target) for r in rows}) > len(problems) else 1
    size = (4.0 * per_row, 3.1 * bands * targets + 1.6)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(bands * targets, per_row, squeeze=False)
    for axes in grid.flat:
        axes.set_visible(False)
    for i, problem in enumerate(problems):
        here = [row for row in rows if row.problem == problem]
        for j, target in enumerate(dict.fromkeys(row.target for row in here)):
            axes = grid[i // per_row * targets + j, i % per_row]
            axes.set_visible(True)
            met = [r for r in here if r.target == target and r.seconds and r.bytes]
            draw_panel(axes, met, styles)
            axes.set_title(f"{problem}, error {target:g}", fontsize=10)
            axes.set_xlabel("memory")
            axes.set_ylabel("time")
    handles = {}
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    labels = sorted(handles, key=lambda label: list(COLORS).index(label.split(":")[0]))
    figure.legend(
        [handles[label] for label in labels],
        labels,
        loc="outside lower center",
        ncols=3,
        fontsize=8,
    )
    figure.savefig(path, dpi=130)


def tables(rows: list[Row]) -> Iterator[tuple[str, list[dict]]]:
    """One for each problem and target, by time."""
    for problem, target in dict.fromkeys((row.problem, row.target) for row in rows):
        here = [r for r in rows if (r.problem, r.target) == (problem, target)]
        precision = here[0].precision  # Of all but gradsolve, which comes last.
        here.sort(key=lambda r: r.seconds if r.seconds is not None else float("inf"))
        title = f"{problem}: within {target:g}, in {precision} precision"
        yield title, [as_cells(row) for row in here]


def as_cells(row: Row) -> dict[str, Any]:
    ms = None if row.seconds is None else row.seconds * 1e3
    preparation = None
    if row.trace_seconds is not None and row.compile_seconds is not None:
        preparation = row.trace_seconds + row.compile_seconds
    cells: dict[str, Any] = {"library": row.library, "method": row.method}
    cells |= {"time (ms)": ms, "bytes": row.bytes, "steps": row.steps}
    cells |= {"tolerance": row.tolerance, "error": row.error}
    return cells | {"compile (s)": preparation, "not met": row.failed}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("figure", type=Path)
    parser.add_argument("results", type=Path, nargs="+")
    options = parser.parse_args()
    found = [json.loads(path.read_text())["results"] for path in options.results]
    draw([Row(**row) for rows in found for row in rows], options.figure)


if __name__ == "__main__":
    main()
