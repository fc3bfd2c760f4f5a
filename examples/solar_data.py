"""The Sun and its planets, as read by `solar_system.py`."""

import pathlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

DATA = pathlib.Path(__file__).parent / "data" / "outer_planets.csv"
PLANETS = ("Jupiter", "Saturn", "Uranus", "Neptune")
# The Sun's mass over that of each planet with its moons, as accepted by the
# International Astronomical Union; and what the inner planets add to the Sun's.
SUN_OVER_PLANET = np.array([1047.3486, 3497.898, 22902.98, 19412.24])
INNER = 1 / 6_023_600 + 1 / 408_523.71 + 1 / 328_900.56 + 1 / 3_098_708
GRAVITY = 0.01720209895**2  # Gauss's: astronomical units cubed a day squared.
ARC_SECONDS = 180 * 3600 / np.pi  # In a radian.


class Seen(NamedTuple):
    """The planets from the Sun, in astronomical units and days."""

    days: Float[np.ndarray, " times"]
    positions: Float[np.ndarray, "times planets 3"]
    velocities: Float[np.ndarray, "times planets 3"]

    def until(self, num: int) -> "Seen":
        return Seen(*(of_all[: num + 1] for of_all in self))


def load_seen(path: pathlib.Path = DATA) -> Seen:
    table = np.loadtxt(path, delimiter=",", skiprows=5, usecols=range(1, 8))
    table = table.reshape(len(PLANETS), -1, 7).swapaxes(0, 1)
    return Seen(table[:, 0, 0], table[..., 1:4], table[..., 4:])
