"""The figure of accuracy.py: time against memory, of methods at equal accuracy."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = {
    "reversax": "C0",
    "Diffrax": "C1",
    "plain JAX": "0.35",
    "torchdiffeq": "C3",
    "torchsde": "C3",
    "torchcde": "C3",
}
MARKERS = "os^vDP*Xp<>hd8"


def front(rows: list[Any]) -> list[Any]:
    """Those than which no other is both faster and smaller."""
    best = []
    for row in sorted(rows, key=lambda row: (row.seconds, row.bytes)):
        if not best or row.bytes < best[-1].bytes:
            best.append(row)
    return best


def draw_panel(axes: Axes, rows: list[Any], styles: dict[str, dict]) -> None:
    for row in rows:
        axes.loglog(row.bytes, row.seconds * 1e3, **styles[row.method])
    # The bytes of PyTorch are another measure.
    best = front([row for row in rows if not row.library.startswith("torch")])
    xs = [row.bytes for row in reversed(best)]
    ys = [row.seconds * 1e3 for row in reversed(best)]
    axes.plot(xs, ys, color="0.75", zorder=0, linewidth=1, drawstyle="steps-post")
    axes.grid(color="0.93")
    axes.set_axisbelow(True)


def styles_of(rows: list[Any]) -> dict[str, dict]:
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


def draw(rows: list[Any], path: Path) -> None:
    """A column for each problem, a row for each of its two targets."""
    problems = list(dict.fromkeys(row.problem for row in rows))
    styles = styles_of(rows)
    per_row = min(3, len(problems))
    bands = -(-len(problems) // per_row)
    targets = 2 if len({(r.problem, r.target) for r in rows}) > len(problems) else 1
    size = (4.2 * per_row, 3.1 * bands * targets + 2.2)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(bands * targets, per_row, squeeze=False)
    for axes in grid.flat:
        axes.set_visible(False)
    for i, problem in enumerate(problems):
        here = [row for row in rows if row.problem == problem]
        for j, target in enumerate(dict.fromkeys(row.target for row in here)):
            axes = grid[i // per_row * targets + j, i % per_row]
            axes.set_visible(True)
            met = [r for r in here if r.target == target and r.seconds is not None]
            draw_panel(axes, met, styles)
            axes.set_title(f"{problem}, error {target:g}", fontsize=10)
            axes.set_xlabel("bytes")
            axes.set_ylabel("milliseconds")
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
