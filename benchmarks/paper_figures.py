"""The figures of paper.py."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

# Okabe and Ito's palette, which colour-blind readers can tell apart.
STYLES = {
    "published": ("#D55E00", "^"),
    "published, 0.999": ("#E69F00", "v"),
    "default": ("#0072B2", "o"),
    "checkpoints": ("#BBBBBB", "s"),
    "optimise-then-discretise": ("#009E73", "D"),
}


def line(axes, x, y, method: str) -> None:
    color, marker = STYLES[method]
    # Where lines meet, what is drawn below shows around what is drawn above.
    large = method == "checkpoints"
    width, size, order = (5, 9, 1) if large else (1.5, 5, 2)
    style = dict(color=color, marker=marker, linewidth=width, markersize=size)
    axes.loglog(x, y, **style, zorder=order, label=method)


def legend_above(figure: Figure, axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    kwargs = dict(ncols=len(labels), frameon=False)
    figure.legend(handles, labels, loc="outside upper center", **kwargs)


def draw_curves(curves: dict[str, dict[str, Any]], xlabel: str, path: Path) -> None:
    """A panel for each base: errors of the gradient by how fine the solve is."""
    size = 1.2 + 3.0 * len(curves), 3.6
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for axes, (base, curve) in zip(panels, curves.items(), strict=True):
        for method, errors in curve["errors"].items():
            line(axes, curve["rungs"], errors, method)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(base)
        axes.set_xlabel(xlabel)
        axes.grid(color="0.9")
        if xlabel == "tolerance":
            axes.invert_xaxis()
    panels[0].set_ylabel("relative error of the gradient")
    legend_above(figure, panels[0])
    figure.savefig(path, dpi=150)


def draw_cubic(rows: list[dict[str, Any]], path: Path) -> None:
    """The differences of gradients by the time of integration, as published; and their
    errors."""
    figure = Figure(figsize=(9.5, 4.0), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    titles = {
        "to the base's": "to the gradient of the base's solve",
        "to the exact": "to the exact gradient",
    }
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for method in STYLES:
            of = [row for row in rows if row["method"] == method]
            if not (method == "checkpoints" and key == "to the base's"):
                line(axes, [row["T"] for row in of], [row[key] for row in of], method)
        axes.set_xscale("linear")
        axes.set_title(f"Difference {title}")
        axes.set_xlabel("time of integration")
        axes.grid(color="0.9")
    panels[0].set_ylabel("sum of absolute differences")
    legend_above(figure, panels[1])
    figure.savefig(path, dpi=150)
