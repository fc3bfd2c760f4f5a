"""Draws time against memory."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from ._measure import Measurement
from ._recommend import Recommendation, Wish, bytes_of, seconds_of, verdict

# Okabe and Ito's colours, which all can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "os^DvP*Xh<>"
_MARGIN = 1.7  # A factor: so wide that at least one of 1, 2 and 5 is within.
_USABLE = ("take it", "efficient", "beaten")


def _label(measurement: Measurement, mark: str) -> str:
    return f"{measurement.candidate}: {measurement.gradient_error:.0e}, {mark}"


def _draw(
    axes: Axes, shown: list[Measurement], recommendation: Recommendation, wish: Wish
) -> None:
    points = {x.candidate: (seconds_of(x), bytes_of(x)) for x in shown}
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
        point = points[recommendation.chosen]
        axes.plot(*point, "o", markersize=20, markerfacecolor="none", color="0.3")


def _around(values: Sequence[float]) -> tuple[float, float]:
    return min(values) / _MARGIN, max(values) * _MARGIN


def _few_ticks(axis: Axis, unit: str) -> None:
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(EngFormatter(unit))


def write_plot(
    path: Path,
    title: str,
    measurements: list[Measurement],
    recommendation: Recommendation,
    wish: Wish,
) -> None:
    """Time against memory, of the candidates that did not fail."""
    shown = [x for x in measurements if x.failure is None]
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_yscale("log")
    _draw(axes, shown, recommendation, wish)
    if shown:
        axes.set_xlim(*_around([seconds_of(x) for x in shown]))
        axes.set_ylim(*_around([bytes_of(x) for x in shown]))
    _few_ticks(axes.xaxis, "s")
    _few_ticks(axes.yaxis, "B")
    axes.set_xlabel("time of one gradient", fontsize=12)
    axes.set_ylabel("temporary memory", fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(color="0.92", which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=12)
    figure.legend(
        loc="outside lower center",
        ncols=2,
        fontsize=10,
        frameon=False,
        title="gradient error and verdict (ring: take it; hollow: do not)",
        title_fontsize=10,
    )
    figure.savefig(path, dpi=150)
