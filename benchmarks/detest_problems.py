"""The 25 problems of DETEST, a test of solvers of equations that are not stiff.

T. E. Hull, W. H. Enright, B. M. Fellen & A. E. Sedgwick, "Comparing numerical methods
for ordinary differential equations", SIAM J. Numer. Anal. 9 (1972), as corrected by
W. H. Enright & J. D. Pryce, "Two FORTRAN packages for assessing initial value methods",
ACM Trans. Math. Softw. 13 (1987). All are solved from t = 0 to t = 20.

- A: one equation; B: small systems; C: moderate systems, of which C1 to C4 are damped
  and C5 is the motion of the five outer planets; D: orbits of eccentricity 0.1 to 0.9;
  E: equations of higher order.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

T1 = 20.0


class Problem(NamedTuple):
    field: Callable[[Any, Any], Any]
    """Of `t` and `y`."""
    y0: np.ndarray


def _curve(t, y):
    """B4: an integral surface of a torus."""
    a, b, c = y
    r = jnp.hypot(a, b)
    return jnp.stack([-b - a * c / r, a - b * c / r, a / r])


def _chain(rates: np.ndarray) -> Callable:
    """C1, C2: a chain of radioactive decays, the last element being stable."""

    def field(t, y):
        decays = rates * y[:-1]
        none = jnp.zeros_like(y[:1])
        return jnp.concatenate([none, decays]) - jnp.concatenate([decays, none])

    return field


def _heat(t, y):
    """C3, C4: the heat equation by the method of lines, cold at both ends."""
    cold = jnp.zeros_like(y[:1])
    return jnp.concatenate([y[1:], cold]) - 2 * y + jnp.concatenate([cold, y[:-1]])


# C5: masses relative to the sun's and the inner planets'; units of length and time
# are 1 AU and 100 days.
_GRAVITY, _SUN = 2.95912208286, 1.00000597682
_MASSES = np.array(
    [
        0.000954786104043,
        0.000285583733151,
        0.0000437273164546,
        0.0000517759138449,
        0.00000277777777778,
    ]
)
_PLACES = [
    [3.42947415189, 3.35386959711, 1.35494901715],
    [6.64145542550, 5.97156957878, 2.18231499728],
    [11.2630437207, 14.6952576794, 6.27960525067],
    [-30.1552268759, 1.65699966404, 1.43785752721],
    [-21.1238353380, 28.4465098142, 15.3882659679],
]
_SPEEDS = [
    [-0.557160570446, 0.505696783289, 0.230578543901],
    [-0.415570776342, 0.365682722812, 0.169143213293],
    [-0.325325669158, 0.189706021964, 0.0877265322780],
    [-0.0240476254170, -0.287659532608, -0.117219543175],
    [-0.176860753121, -0.216393453025, -0.0148647893090],
]


def _planets(t, y):
    place, speed = y
    cubed = jnp.sum(place**2, axis=1, keepdims=True) ** 1.5
    towards = place[None] - place[:, None]
    apart = jnp.sum(towards**2, axis=2, keepdims=True) ** 1.5 + jnp.eye(5)[..., None]
    # Each attracts the others, and the sun, which is at rest here.
    others = towards / apart - (1 - jnp.eye(5)[..., None]) * (place / cubed)[None]
    pull = jnp.sum(_MASSES[None, :, None] * others, axis=1)
    sun = -(_SUN + _MASSES[:, None]) * place / cubed
    return jnp.stack([speed, _GRAVITY * (sun + pull)])


def _orbit(t, y):
    place, speed = y
    return jnp.stack([speed, -place / jnp.sum(place**2) ** 1.5])


def _orbit_from(eccentricity: float) -> np.ndarray:
    fastest = math.sqrt((1 + eccentricity) / (1 - eccentricity))
    return np.array([[1 - eccentricity, 0.0], [0.0, fastest]])


def _second_order(acceleration: Callable) -> Callable:
    def field(t, y):
        place, speed = y
        return jnp.stack([speed, acceleration(t, place, speed)])

    return field


def _first_of(size: int) -> np.ndarray:
    return np.eye(size)[0]


def _problem(field: Callable, *y0: float) -> Problem:
    return Problem(field, np.array(y0))


# E1: the Bessel function of order a half, whose value and slope at 1 these are.
_SINE, _COSINE = math.sin(1.0), math.cos(1.0)
_AT_ONE = math.sqrt(2 / math.pi) * np.array([_SINE, _COSINE - _SINE / 2])

PROBLEMS = {
    "A1": _problem(lambda t, y: -y, 1.0),
    "A2": _problem(lambda t, y: -(y**3) / 2, 1.0),
    "A3": _problem(lambda t, y: y * jnp.cos(t), 1.0),
    "A4": _problem(lambda t, y: y / 4 * (1 - y / 20), 1.0),
    "A5": _problem(lambda t, y: (y - t) / (y + t), 4.0),
    "B1": _problem(
        lambda t, y: jnp.stack([2 * (y[0] - y[0] * y[1]), y[0] * y[1] - y[1]]), 1.0, 3.0
    ),
    "B2": _problem(
        lambda t, y: jnp.stack([y[1] - y[0], y[0] - 2 * y[1] + y[2], y[1] - y[2]]),
        *(2.0, 0.0, 1.0),
    ),
    "B3": _problem(
        lambda t, y: jnp.stack([-y[0], y[0] - y[1] ** 2, y[1] ** 2]), 1.0, 0.0, 0.0
    ),
    "B4": _problem(_curve, 3.0, 0.0, 0.0),
    "B5": _problem(
        lambda t, y: jnp.stack([y[1] * y[2], -y[0] * y[2], -0.51 * y[0] * y[1]]),
        *(0.0, 1.0, 1.0),
    ),
    "C1": Problem(_chain(np.ones(9)), _first_of(10)),
    "C2": Problem(_chain(np.arange(1.0, 10.0)), _first_of(10)),
    "C3": Problem(_heat, _first_of(10)),
    "C4": Problem(_heat, _first_of(51)),
    "C5": Problem(_planets, np.array([_PLACES, _SPEEDS])),
    **{f"D{k}": Problem(_orbit, _orbit_from((2 * k - 1) / 10)) for k in range(1, 6)},
    "E1": _problem(
        _second_order(
            lambda t, y, v: -v / (t + 1) - (1 - 0.25 / (t + 1) ** 2) * y
        ),
        *_AT_ONE,
    ),
    "E2": _problem(_second_order(lambda t, y, v: (1 - y**2) * v - y), 2.0, 0.0),
    "E3": _problem(
        _second_order(lambda t, y, v: y**3 / 6 - y + 2 * jnp.sin(2.78535 * t)), 0.0, 0.0
    ),
    "E4": _problem(_second_order(lambda t, y, v: 0.032 - 0.4 * v**2), 30.0, 0.0),
    "E5": _problem(
        _second_order(lambda t, y, v: jnp.sqrt(1 + v**2) / (25 - t)), 0.0, 0.0
    ),
}  # fmt: skip
