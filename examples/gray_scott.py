"""Gray and Scott's equation by the method of lines, and data of it that are made up.

For reaction_diffusion.py, which says what it is.
"""

from collections.abc import Sequence
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import reversax

NAMES = ("D_u", "D_v", "F", "k")  # The four coefficients.
TRUE = np.array([0.16, 0.08, 0.04, 0.06])  # Of worms that grow.
GUESS = np.array([0.12, 0.1, 0.03, 0.07])
LOG_RANGE = np.log(1.6)  # How far from its guess a coefficient may be.
CLOUD = 2.5  # The radius of a cloud at the start, in dx.
NOISE = 0.02  # The standard deviation of an observation.
STEP = 1 / 8

REVERSIBLE = reversax.Reversible(diffrax.Euler())
REVERSED = reversax.ReversibleAdjoint()
CHECKPOINTED = diffrax.RecursiveCheckpointAdjoint()

Field = Float[Array, "2 n n"]
"""Both concentrations, u and v."""


class Setting(NamedTuple):
    size: int
    training: tuple[float, ...]
    """The times of the pictures that training uses."""
    held_out: tuple[float, ...]
    """Those that the full gradient uses; the prediction is scored at the last."""
    num_steps: tuple[int, ...]
    """Where the memory is measured."""

    @property
    def full_num_steps(self) -> int:
        return round(self.held_out[-1] / STEP)


FULL = Setting(
    256,
    (8.0, 16.0, 24.0, 32.0),
    (128.0, 256.0, 384.0, 512.0),
    (256, 1024, 4096, 16384),
)
QUICK = Setting(32, (1.0, 2.0), (4.0, 8.0), (64,))


# --8<-- [start:equation]
def laplacian(y: Field) -> Field:
    """By the compact nine points, whose error has no preferred direction."""
    wide = jnp.pad(y, ((0, 0), (1, 1), (1, 1)), mode="wrap")
    sides = wide[:, :, :-2] + wide[:, :, 2:]
    middle = wide[:, :, 1:-1]
    corners = sides[:, :-2] + sides[:, 2:]
    edges = sides[:, 1:-1] + middle[:, :-2] + middle[:, 2:]
    return (corners + 4 * edges - 20 * middle[:, 1:-1]) / 6


class GrayScott(eqx.Module):
    free: Float[Array, "4"]
    """The logarithms of coefficients over guesses, stretched from an interval to all
    numbers: so nowhere on its way may a search leave the interval, where the solver is
    stable."""

    @property
    def coefficients(self) -> Float[Array, "4"]:
        return jnp.asarray(GUESS) * jnp.exp(LOG_RANGE * jnp.tanh(self.free))

    def __call__(self, t, y: Field, args) -> Field:
        diffusion_u, diffusion_v, feed, kill = self.coefficients
        u, v = y
        spread_u, spread_v = laplacian(y)
        reaction = u * v**2
        du = diffusion_u * spread_u - reaction + feed * (1 - u)
        dv = diffusion_v * spread_v + reaction - (feed + kill) * v
        return jnp.stack([du, dv])


# --8<-- [end:equation]
def model_of(coefficients: np.ndarray) -> GrayScott:
    free = np.arctanh(np.log(coefficients / GUESS) / LOG_RANGE)
    return GrayScott(jnp.asarray(free, jnp.float32))


def initial_state(size: int, seed: int) -> Field:
    """Smooth random clouds of both, u between 0.3 and 0.7, v between 0 and 0.3."""
    noise = np.random.default_rng(seed).standard_normal((2, size, size))
    wave = 2 * np.pi * np.fft.fftfreq(size)
    blur = np.exp(-(CLOUD**2) / 2 * (wave[:, None] ** 2 + wave**2))
    clouds = np.fft.ifft2(np.fft.fft2(noise) * blur).real
    u, v = 1 / (1 + np.exp(-2 * clouds / clouds.std()))
    return jnp.asarray(np.stack([0.3 + 0.4 * u, 0.3 * v]), jnp.float32)


# --8<-- [start:solve]
def solve(
    model: GrayScott,
    y0: Field,
    times: Sequence[float],
    solver: diffrax.AbstractSolver = REVERSIBLE,
    adjoint: diffrax.AbstractAdjoint = REVERSED,
    step: float = STEP,
) -> Float[Array, "times 2 n n"]:
    """The states at `times`."""
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(model),
        solver,
        t0=0.0,
        t1=times[-1],
        dt0=step,
        y0=y0,
        saveat=diffrax.SaveAt(ts=jnp.asarray(times, jnp.float32)),
        adjoint=adjoint,
        max_steps=round(times[-1] / step),
    )
    assert solution.ys is not None
    return solution.ys


# --8<-- [end:solve]
class Data(NamedTuple):
    y0: Field
    exact: Float[np.ndarray, "times 2 n n"]
    seen: Float[np.ndarray, "times 2 n n"]
    """With noise."""


def make_data(setting: Setting, seed: int) -> tuple[Data, Data]:
    """By another solver: what training uses, and what is held out."""
    y0 = initial_state(setting.size, seed)
    times = setting.training + setting.held_out
    run = eqx.filter_jit(solve)
    ys = run(model_of(TRUE), y0, times, diffrax.Tsit5(), CHECKPOINTED, 0.25)
    exact = np.asarray(ys)
    camera = np.random.default_rng((seed, 1))
    noise = NOISE * camera.standard_normal(exact.shape)
    seen = (exact + noise).astype(np.float32)
    few = len(setting.training)
    return Data(y0, exact[:few], seen[:few]), Data(y0, exact[few:], seen[few:])


def loss_fn(model, y0, seen, times: Sequence[float], *how) -> Float[Array, ""]:
    """The mean squared error, in units of the noise; `how`: see `solve`."""
    error = solve(model, y0, times, *how) - seen
    return jnp.mean((error / NOISE) ** 2)
