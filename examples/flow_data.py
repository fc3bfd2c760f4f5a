"""Two densities to learn from samples, and the mixture of Gaussians to beat.

For continuous_flow.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture

Rows = Float[np.ndarray, "rows dim"]

SPIRAL_NOISE = 0.05
SPIRAL_ROWS = (1000, 1000, 4000)  # Of training, validation and test.
DIGITS_DIM = 8
DIGITS_ROWS = (1197, 300, 300)
COVARIANCES = ("full", "tied", "diag", "spherical")


class Split(NamedTuple):
    training: Rows
    validation: Rows
    """Chooses among mixtures, and when a flow has been trained for long enough."""
    test: Rows
    """Only ever scored."""


def load_spirals() -> Split:
    """Two interleaved arms, each of a whole turn, with noise across and along."""
    random = np.random.default_rng(0)
    rows = sum(SPIRAL_ROWS)
    radius = 0.1 + 0.9 * np.sqrt(random.uniform(size=rows))
    angle = 2 * np.pi * radius
    arm = random.choice([-2.0, 2.0], rows)
    curve = (arm * radius)[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    y = curve + SPIRAL_NOISE * random.standard_normal(curve.shape)
    return Split(*np.split(y.astype(np.float32), np.cumsum(SPIRAL_ROWS)[:-1]))


def load_reduced_digits() -> tuple[Split, PCA]:
    """Scikit-learn's handwritten digits in their first principal components, each
    scaled to a variance of one; also the map to those, made from training rows alone.
    """
    images, _ = load_digits(return_X_y=True)
    images = np.asarray(images)
    images = images[np.random.default_rng(0).permutation(len(images))]
    assert len(images) == sum(DIGITS_ROWS)
    parts = np.split(images, np.cumsum(DIGITS_ROWS)[:-1])
    reduction = PCA(DIGITS_DIM, whiten=True, random_state=0).fit(parts[0])
    rows = (reduction.transform(part).astype(np.float32) for part in parts)
    return Split(*rows), reduction


def choose_mixture(
    split: Split, most_components: Sequence[int], restarts: int
) -> GaussianMixture:
    """The mixture of Gaussians, fitted to the training rows, that gives the validation
    rows the highest likelihood, of all numbers of components and shapes."""
    fitted = (
        GaussianMixture(
            components, covariance_type=shape, n_init=restarts, random_state=0
        ).fit(split.training)
        for shape in COVARIANCES
        for components in most_components
    )
    return max(fitted, key=lambda mixture: mixture.score(split.validation))
