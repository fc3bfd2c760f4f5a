"""The figures of `solar_system.py`."""

import pathlib

import numpy as np
from common import BLUE, GREEN, GREY, ORANGE, label
from matplotlib.figure import Figure
from solar_data import ARC_SECONDS, PLANETS, Seen

OURS, CHECKPOINTED, STORED = (
    "Verlet, reversed",
    "Verlet, checkpointed",
    "Verlet, every step stored",
)
MEMORY_STYLES = {
    OURS: ("o-", ORANGE),
    CHECKPOINTED: ("^--", BLUE),
    STORED: ("s:", GREEN),
}


def plot_orbits(
    seen: Seen, start: np.ndarray, found: np.ndarray, path: pathlib.Path
) -> None:
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, colour in enumerate((ORANGE, GREEN, BLUE, GREY)):
        x, y, _ = found[:, i].T
        left.plot(x, y, ".", color=colour, markersize=3)
        x, y, _ = seen.positions[0, i]
        left.plot(x, y, "o", color=colour, label=f"{PLANETS[i]}, 1900")
        for positions, style, when in ((start, "--", "start"), (found, "-", "found")):
            apart = np.linalg.norm(positions[:, i] - seen.positions[:, i], axis=-1)
            apart *= ARC_SECONDS / np.linalg.norm(seen.positions[:, i], axis=-1)
            name = f"{PLANETS[i]}, {when}" if i < 2 else None
            years = 1900 + seen.days[1:] / 365.25
            right.plot(years, apart[1:], style, color=colour, label=name)
    left.plot(0, 0, "*", color="black")
    left.set_aspect("equal")
    left.set_ylim(-36, 62)
    label(left, "x (astronomical units)", "y (astronomical units)")
    left.set_title("Every 400 days from 1900 to 2040")
    right.set_yscale("log")
    label(right, "year", "error seen from the Sun (arc seconds)")
    right.set_title("Masses 30 % off, and found")
    figure.savefig(path, dpi=150)


def plot_memory(
    num_steps: tuple[int, ...], columns: dict[str, list[int]], path: pathlib.Path
) -> None:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, (style, colour) in MEMORY_STYLES.items():
        megabytes = np.array(columns[name]) / 1e6
        axes.plot(num_steps, megabytes, style, color=colour, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(num_steps, [f"{n:,}" for n in num_steps])
    axes.minorticks_off()
    label(axes, "number of steps over the 140 years", "temporary memory (MB)")
    axes.set_title("Memory of the compiled gradient of the loss")
    figure.savefig(path, dpi=150)
