"""The problems of accuracy.py and matrix.py, each written once for JAX and PyTorch.

A field takes `xp`, which is `jax.numpy` or `torch`, so that both differentiate the same
expressions, of the same weights. The loss is the mean of the squares of the state at
`t1`; its gradient is with respect to the parameters and to `y0` together.

- Kepler:           an orbit of eccentricity 0.4
- Lotka-Volterra:   predators and prey
- van der Pol:      an oscillator, hardly stiff
- Lorenz:           chaos, for as long as it can be followed
- damped MLP:       `y' = MLP(y) - 5 y`, which contracts
- neural ODE:       `y' = MLP(y)`, a state of 8 numbers in a batch, for a time of 10
- reaction-diffusion: Gray and Scott's equation by the method of lines, 32 by 32 points
- SDE:              a small network as drift, diagonal noise that depends on the state,
                    in the Stratonovich sense
- CDE:              a small network driven by a cubic Hermite path through random data
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

Arrays = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """The initial value problem, in double precision; `cast` it to another."""

    name: str
    field: Callable[..., Any]
    """Of `xp, t, y, parameters`; of a CDE, the matrix that multiplies its control."""
    parameters: Arrays
    y0: np.ndarray
    t1: float
    noise: Callable[..., Any] | None = None
    """The diagonal of the diffusion of an SDE, of the same arguments."""
    control: np.ndarray | None = None
    """What drives a CDE: values at equally spaced times, (times, channels)."""
    targets: tuple[float, float] = (1e-3, 1e-6)
    """The relative errors of the gradient to be reached in single and in double
    precision. An SDE's are larger: its solvers are of first order."""

    @property
    def kind(self) -> str:
        if self.noise is not None:
            return "SDE"
        return "ODE" if self.control is None else "CDE"

    @property
    def divisor(self) -> int:
        """Of numbers of steps: steps of a CDE end at the kinks of its control."""
        return 1 if self.control is None else len(self.control) - 1

    @property
    def inputs(self) -> tuple[Arrays, np.ndarray]:
        return self.parameters, self.y0

    def cast(self, dtype: Any) -> "Problem":
        parameters = tuple(p.astype(dtype) for p in self.parameters)
        control = None if self.control is None else self.control.astype(dtype)
        y0 = self.y0.astype(dtype)
        return dataclasses.replace(self, parameters=parameters, y0=y0, control=control)


def normal_weights(rng: np.random.Generator, *sizes: int) -> Arrays:
    """Weights and biases of a network of these sizes."""
    arrays: list[np.ndarray] = []
    for rows, columns in itertools.pairwise(sizes):
        arrays.append(rng.standard_normal((rows, columns)) / math.sqrt(rows))
        arrays.append(0.1 * rng.standard_normal(columns))
    return tuple(arrays)


def mlp(xp: Any, y: Any, weights: Any) -> Any:
    """With tanh between the layers."""
    *hidden, matrix, bias = weights
    for w, b in zip(hidden[::2], hidden[1::2], strict=True):
        y = xp.tanh(y @ w + b)
    return y @ matrix + bias


def kepler() -> Problem:
    def field(xp, t, y, parameters):
        (attraction,) = parameters
        position, velocity = y[:2], y[2:]
        distance = xp.linalg.norm(position)
        return xp.concatenate([velocity, -attraction * position / distance**3])

    y0 = np.array([0.6, 0.0, 0.0, math.sqrt(1.4 / 0.6)])
    return Problem("Kepler", field, (np.array(1.0),), y0, 10.0)


def lotka_volterra() -> Problem:
    def field(xp, t, y, parameters):
        growth, hunting, feeding, death = parameters
        prey, predators = y[0], y[1]
        rise = prey * (growth - hunting * predators)
        return xp.stack([rise, predators * (feeding * prey - death)])

    parameters = tuple(map(np.array, (1.5, 1.0, 1.0, 3.0)))
    return Problem("Lotka-Volterra", field, parameters, np.array([1.0, 1.0]), 10.0)


def van_der_pol() -> Problem:
    def field(xp, t, y, parameters):
        (damping,) = parameters
        return xp.stack([y[1], damping * (1 - y[0] ** 2) * y[1] - y[0]])

    return Problem("van der Pol", field, (np.array(2.0),), np.array([2.0, 0.0]), 10.0)


def lorenz() -> Problem:
    def field(xp, t, y, parameters):
        sigma, rho, beta = parameters
        a, b, c = y[0], y[1], y[2]
        return xp.stack([sigma * (b - a), a * (rho - c) - b, a * b - beta * c])

    parameters = tuple(map(np.array, (10.0, 28.0, 8 / 3)))
    return Problem("Lorenz", field, parameters, np.array([1.0, 1.0, 20.0]), 3.0)


def damped_mlp(seed: int) -> Problem:
    rng = np.random.default_rng((seed, 1))

    def field(xp, t, y, parameters):
        return mlp(xp, y, parameters) - 5 * y

    weights = normal_weights(rng, 8, 64, 64, 8)
    y0 = rng.standard_normal((32, 8))
    return Problem("damped MLP", field, weights, y0, 2.0)


def neural_ode(seed: int, width: int = 64, batch: int = 64) -> Problem:
    rng = np.random.default_rng((seed, 2))

    def field(xp, t, y, parameters):
        return mlp(xp, y, parameters)

    weights = normal_weights(rng, 8, width, width, 8)
    y0 = rng.standard_normal((batch, 8))
    return Problem(f"neural ODE, width {width}", field, weights, y0, 10.0)


def reaction_diffusion(seed: int, size: int = 32) -> Problem:
    """With a Laplacian of nine points, on a torus."""

    def laplacian(xp, y):
        sides = xp.roll(y, 1, -1) + xp.roll(y, -1, -1)
        wide = sides + 4 * y
        across = xp.roll(wide, 1, -2) + xp.roll(wide, -1, -2)
        return (across + 4 * sides - 20 * y) / 6

    def field(xp, t, y, parameters):
        diffusion_u, diffusion_v, feed, kill = parameters
        u, v = y[0], y[1]
        spread = laplacian(xp, y)
        reaction = u * v**2
        du = diffusion_u * spread[0] - reaction + feed * (1 - u)
        dv = diffusion_v * spread[1] + reaction - (feed + kill) * v
        return xp.stack([du, dv])

    rng = np.random.default_rng((seed, 3))
    wave = 2 * np.pi * np.fft.fftfreq(size)
    blur = np.exp(-3 * (wave[:, None] ** 2 + wave**2))
    noise = np.fft.fft2(rng.standard_normal((2, size, size)))
    clouds = np.fft.ifft2(noise * blur).real
    u, v = 1 / (1 + np.exp(-2 * clouds / clouds.std()))
    parameters = tuple(map(np.array, (0.16, 0.08, 0.04, 0.06)))
    y0 = np.stack([0.3 + 0.4 * u, 0.3 * v])
    return Problem("reaction-diffusion", field, parameters, y0, 64.0)


def stochastic(seed: int) -> Problem:
    rng = np.random.default_rng((seed, 4))

    def field(xp, t, y, parameters):
        *weights, _ = parameters
        return mlp(xp, y, weights) - y

    def noise(xp, t, y, parameters):
        *_, size = parameters
        return size * xp.cos(y)

    parameters = *normal_weights(rng, 8, 32, 8), np.full(8, 0.2)
    y0, targets = rng.standard_normal(8), (1e-2, 1e-3)
    return Problem("SDE", field, parameters, y0, 1.0, noise, targets=targets)


def controlled(seed: int, intervals: int = 16, channels: int = 3) -> Problem:
    rng = np.random.default_rng((seed, 5))

    def field(xp, t, y, parameters):
        return xp.tanh(mlp(xp, y, parameters)).reshape(*y.shape, channels)

    weights = normal_weights(rng, 8, 32, 8 * channels)
    y0 = rng.standard_normal(8)
    walk = np.cumsum(rng.standard_normal((intervals + 1, channels)), axis=0)
    control = walk / math.sqrt(intervals)
    control[:, 0] = np.linspace(0.0, 1.0, intervals + 1)
    return Problem("CDE", field, weights, y0, float(intervals), control=control)


def all_problems(seed: int) -> dict[str, Problem]:
    problems = (
        kepler(),
        lotka_volterra(),
        van_der_pol(),
        lorenz(),
        damped_mlp(seed),
        neural_ode(seed),
        reaction_diffusion(seed),
        stochastic(seed),
        controlled(seed),
    )
    return {problem.name: problem for problem in problems}
