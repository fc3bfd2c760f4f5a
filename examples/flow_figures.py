"""The figures of continuous_flow.py."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from common import BLUE, GREEN, GREY, ORANGE, label
from jaxtyping import Float
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

Rows = Float[np.ndarray, "rows dim"]
LogDensity = Callable[[Rows], Float[np.ndarray, " rows"]]

OURS = "reversible, reversed"
PLAIN = "Heun, checkpointed"
STORED = "Heun, every step stored"
MEMORY_STYLES = {
    OURS: ("o-", ORANGE),
    PLAIN: ("^--", BLUE),
    STORED: ("s:", GREEN),
}
EXTENT = 2.6
PIXELS = 160


def plot_density(
    test: Rows,
    samples: Rows,
    densities: Mapping[str, LogDensity],
    path: Path,
) -> None:
    """Data, samples, and densities on one scale of colour."""
    side = (np.arange(PIXELS) + 0.5) / PIXELS * 2 * EXTENT - EXTENT
    grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    images = {
        name: np.exp(log_density(grid.astype(np.float32))).reshape(PIXELS, PIXELS)
        for name, log_density in densities.items()
    }
    largest = max(float(np.quantile(image, 0.998)) for image in images.values())

    figure = Figure(figsize=(9, 8.6), layout="constrained")
    all_axes = figure.subplots(2, 2, sharex=True, sharey=True)
    clouds = {"held-out data": test, "samples of the flow": samples}
    for axes, (name, rows) in zip(all_axes[0], clouds.items(), strict=True):
        axes.plot(*rows[: len(samples)].T, ".", color=GREY, markersize=1.5)
        axes.set_title(name, fontsize=12)
    for axes, (name, image) in zip(all_axes[1], images.items(), strict=True):
        limits = (-EXTENT, EXTENT, -EXTENT, EXTENT)
        axes.imshow(
            image, origin="lower", extent=limits, vmin=0, vmax=largest, cmap="viridis"
        )
        axes.set_title(name, fontsize=12)
    figure.colorbar(
        all_axes[1, 0].images[0],
        ax=all_axes[1],
        shrink=0.8,
        label="probability density",
    )
    for axes in all_axes.flat:
        axes.set_aspect("equal")
        axes.set_xlim(-EXTENT, EXTENT)
        axes.set_ylim(-EXTENT, EXTENT)
        axes.set_xlabel("first coordinate", fontsize=11)
        axes.set_ylabel("second coordinate", fontsize=11)
    figure.savefig(path, dpi=130)


def plot_digits(
    test: Rows,
    samples: Rows,
    reduction: PCA,
    scores: Mapping[str, float],
    path: Path,
) -> None:
    """Images of both, from the same few components, and held-out log-likelihoods."""
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 0.9))
    for axes, rows, name in (
        (left, test, "held-out digits"),
        (middle, samples, "samples"),
    ):
        images = reduction.inverse_transform(rows[:64]).reshape(8, 8, 8, 8)
        tiles = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
        axes.imshow(tiles.transpose(0, 2, 1, 3).reshape(80, 80), cmap="gray_r", vmin=0)
        axes.set_title(f"{name}, {test.shape[1]} components", fontsize=12)
        axes.set_axis_off()
    hatches = ("", "//", "..", "xx")
    for i, (name, score) in enumerate(scores.items()):
        colour = ORANGE if "flow" in name else BLUE
        right.bar(
            i, score, color=colour, hatch=hatches[i], edgecolor="white", width=0.6
        )
        right.annotate(f"{score:.2f}", (i, score), va="top", ha="center", fontsize=11)
    right.set_xticks(range(len(scores)), list(scores), fontsize=10)
    label(right, "", "held-out log-likelihood (nats per digit)", legend=False)
    right.set_ylim(1.12 * min(scores.values()), 0)
    figure.savefig(path, dpi=130)


def plot_memory(
    num_steps: Sequence[int], columns: Mapping[str, Sequence[int]], path: Path
) -> None:
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    for name, (style, colour) in MEMORY_STYLES.items():
        megabytes = np.array(columns[name]) / 1e6
        axes.plot(num_steps, megabytes, style, color=colour, label=name)
        axes.annotate(
            f"{megabytes[-1]:.1f} MB",
            (num_steps[-1], megabytes[-1]),
            xytext=(8, -4),
            textcoords="offset points",
            color=colour,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(num_steps, [f"{n:,}" for n in num_steps])
    axes.margins(x=0.14)
    label(axes, "number of steps", "temporary memory (MB)")
    axes.set_title("Memory of the compiled gradient of a flow's likelihood")
    figure.savefig(path, dpi=150)
