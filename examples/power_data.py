"""Italy's demand for electric power by days, and autoregressions that generate days.

For power_demand.py, which says what they are.
"""

from typing import NamedTuple

import numpy as np
from aeon.datasets import load_italy_power_demand
from jaxtyping import Float
from statsmodels.api import OLS

LONGEST = 12  # The highest order that is tried.


class Days(NamedTuple):
    seen: Float[np.ndarray, "seen 24"]
    held_out: Float[np.ndarray, "held_out 24"]


def load_days() -> Days:
    """Every day of the record, divided at random into halves."""
    parts = [load_italy_power_demand(split=split)[0] for split in ("train", "test")]
    days = np.concatenate(parts)[:, 0].astype(np.float32)
    days = days[np.random.default_rng(0).permutation(len(days))]
    return Days(*np.split(days, [len(days) // 2]))


class Deviations(NamedTuple):
    """Of days from each hour's mean, in units of each hour's standard deviation."""

    mean: np.ndarray
    scale: np.ndarray
    values: Float[np.ndarray, "days 24"]


def deviations_of(days: Float[np.ndarray, "days 24"]) -> Deviations:
    mean, scale = days.mean(0), days.std(0)
    return Deviations(mean, scale, (days - mean) / scale)


def fit_autoregression(values: Float[np.ndarray, "days 24"], order: int, first: int):
    """By least squares; the hours from `first` on are the targets."""
    hours = values.shape[1]
    lags = [values[:, first - k : hours - k].ravel() for k in range(1, order + 1)]
    return OLS(values[:, first:].ravel(), np.column_stack(lags)).fit()


def make_autoregressive(
    days: Float[np.ndarray, "days 24"], order: int | None, count: int
) -> tuple[int, Float[np.ndarray, "count 24"]]:
    """The order, Akaike's if `None`, and days that the autoregression generates."""
    deviations = deviations_of(days)
    if order is None:
        # Of the same hours for each order, so that like is compared with like.
        criterion = lambda p: fit_autoregression(deviations.values, p, LONGEST).aic
        order = min(range(1, LONGEST + 1), key=criterion)
    fitted = fit_autoregression(deviations.values, order, first=order)
    noise = np.random.default_rng(0)
    first = np.cov(deviations.values[:, :order].T).reshape(order, order)
    made = noise.multivariate_normal(np.zeros(order), first, count)
    for _ in range(days.shape[1] - order):
        recent = made[:, : -order - 1 : -1]
        shock = np.sqrt(fitted.mse_resid) * noise.standard_normal(count)
        made = np.column_stack([made, recent @ fitted.params + shock])
    return order, deviations.mean + deviations.scale * made
