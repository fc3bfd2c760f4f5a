"""Draws time against memory."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ._measure import Measurement
from ._recommend import Recommendation, Wish, verdict

# Okabe and Ito's colours, which all can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "os^DvP*Xh<>"
_USABLE = ("take it", "efficient", "beaten")


def _label(measurement: Measurement, mark: str) -> str:
    return f"{measurement.candidate}: {measurement.gradient_error:.0e}, {mark}"


def _draw(
    axes: Axes, shown: list[Measurement], recommendation: Recommendation, wish: Wish
) -> None:
    points = {x.candidate: (x.median_seconds, x.temporary_bytes) for x in shown}
    front = [points[name] for name in recommendation.efficient]
    if len(front) > 1:
        axes.plot(*zip(*front, strict=True), color="0.75", zorder=1)
    for i, measurement in enumerate(shown):
        mark = verdict(measurement, recommendation, wish)
        colour = _COLOURS[i % len(_COLOURS)]
        axes.plot(
            *points[measurement.candidate],
            _MARKERS[i % len(_MARKERS)],
            color=colour,
            markerfacecolor=colour if mark in _USABLE else "white",
            markersize=9,
            label=_label(measurement, mark),
        )
    if recommendation.chosen is not None:
        ring = dict(markersize=20, markerfacecolor="none", color="0.3")
        axes.plot(*points[recommendation.chosen], "o", **ring)


def write_plot(
    path: Path,
    title: str,
    measurements: list[Measurement],
    recommendation: Recommendation,
    wish: Wish,
) -> None:
    """Time against memory, of the candidates that did not fail."""
    shown = [x for x in measurements if x.failure is None]
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_yscale("log")
    _draw(axes, shown, recommendation, wish)
    axes.margins(0.12)
    axes.set_xlabel("time of one gradient (s)", fontsize=12)
    axes.set_ylabel("temporary memory (bytes)", fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(color="0.92", which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=12)
    figure.legend(
        loc="outside right upper",
        fontsize=9,
        frameon=False,
        title="gradient error, verdict\n(ring: take it; hollow: do not)",
        title_fontsize=9,
        alignment="left",
    )
    figure.savefig(path, dpi=150)
