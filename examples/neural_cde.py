"""A neural controlled differential equation that classifies series of unequal length.

For japanese_vowels.py, which says what it is.
"""

from collections.abc import Sequence
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optax
from aeon.datasets import load_japanese_vowels
from jaxtyping import Array, Float, Int, PRNGKeyArray

import reversax

NUM_SPEAKERS = 9
HIDDEN, WIDTH = 32, 64
SCALE = 0.1  # Of the field: keeps steps from one frame to the next short enough.
NOISE = 0.8  # Added to every coefficient in training, in standard deviations of it.

REVERSIBLE = reversax.Reversible(diffrax.Euler())  # Of second order.
REVERSED = reversax.ReversibleAdjoint()
CHECKPOINTED = diffrax.RecursiveCheckpointAdjoint()
AT_THE_END = diffrax.SaveAt(t1=True)


class Utterances(NamedTuple):
    values: Float[np.ndarray, "series frames channels"]
    """Time, and the twelve coefficients."""
    speakers: Int[np.ndarray, " series"]
    """From zero."""
    lengths: Int[np.ndarray, " series"]
    """How many frames were observed. After them the last one repeats."""


def prepare(
    series: Sequence[np.ndarray], speakers: np.ndarray, units: tuple, num_frames: int
) -> Utterances:
    """`units`: what to subtract from time and coefficients, and to divide them by."""
    rows = []
    for coefficients in series:
        # Where nothing changes any more, time included, the model stands still.
        frame = np.minimum(np.arange(num_frames), coefficients.shape[1] - 1)
        values = np.column_stack([frame, coefficients.T[frame]])
        rows.append((values - units[0]) / units[1])
    return Utterances(
        np.stack(rows).astype(np.float32),
        np.array([int(s) - 1 for s in speakers]),
        np.array([coefficients.shape[1] for coefficients in series]),
    )


def load_utterances() -> tuple[Utterances, Utterances]:
    """Those to train with and those to test with, in units of the former."""
    (series, speakers), (test_series, test_speakers) = (
        load_japanese_vowels(split=s)[:2] for s in ("train", "test")
    )
    frames = np.concatenate(series, axis=1)
    longest = max(x.shape[1] for x in series)
    units = np.append(0, frames.mean(axis=1)), np.append(longest, frames.std(axis=1))
    num_frames = max(longest, *(x.shape[1] for x in test_series))
    return (
        prepare(list(series), speakers, units, num_frames),
        prepare(list(test_series), test_speakers, units, num_frames),
    )


# --8<-- [start:field]
class NeuralCDE(eqx.Module):
    """`dy = field(y) dX`, begun and read out by linear maps."""

    initial: eqx.nn.Linear
    network: eqx.nn.MLP
    readout: eqx.nn.Linear

    def __init__(self, channels: int, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 3)
        self.initial = eqx.nn.Linear(channels, HIDDEN, key=keys[0])
        self.network = eqx.nn.MLP(
            HIDDEN,
            HIDDEN * channels,
            WIDTH,
            depth=1,
            activation=jnp.tanh,
            final_activation=jnp.tanh,
            key=keys[1],
        )
        self.readout = eqx.nn.Linear(HIDDEN, NUM_SPEAKERS, key=keys[2])

    def field(
        self, t, y: Float[Array, "series hidden"], args
    ) -> lineax.FunctionLinearOperator:
        """A matrix for each series, which increments of its control are multiplied by.

        With `jax.vmap` over whole solves instead, one could return the matrix itself.
        """
        channels = self.initial.in_features
        matrices = SCALE * jax.vmap(self.network)(y).reshape(*y.shape, channels)
        product = lambda dx: jnp.einsum("shc,sc->sh", matrices, dx)
        increment = jax.ShapeDtypeStruct((len(y), channels), y.dtype)
        return lineax.FunctionLinearOperator(product, increment)


# --8<-- [end:field]
# --8<-- [start:solve]
def solve(
    model: NeuralCDE,
    values: Float[Array, "series frames channels"],
    steps_a_frame: int = 1,
    solver: diffrax.AbstractSolver = REVERSIBLE,
    adjoint: diffrax.AbstractAdjoint = REVERSED,
    saveat: diffrax.SaveAt = AT_THE_END,
) -> Float[Array, "times series speakers"]:
    """The scores of the speakers: logarithms of probabilities, up to a constant."""
    by_frame = jnp.swapaxes(jnp.asarray(values), 0, 1)
    last = len(by_frame) - 1
    ts = jnp.arange(last + 1, dtype=by_frame.dtype)
    # Over each step `ControlTerm` takes the exact increment of the control. Steps end
    # at its kinks, where that of a straight line is all there is to know.
    control = diffrax.LinearInterpolation(ts, by_frame)
    solution = diffrax.diffeqsolve(
        diffrax.ControlTerm(model.field, control),
        solver,
        t0=0.0,
        t1=float(last),
        dt0=1 / steps_a_frame,
        y0=jax.vmap(model.initial)(by_frame[0]),
        saveat=saveat,
        adjoint=adjoint,
        max_steps=last * steps_a_frame,
    )
    assert solution.ys is not None
    return jax.vmap(jax.vmap(model.readout))(solution.ys)


# --8<-- [end:solve]
def with_noise(
    values: Float[Array, "series frames channels"],
    lengths: Int[Array, " series"],
    key: PRNGKeyArray,
) -> Float[Array, "series frames channels"]:
    """Training data with noise on each observed coefficient, repeated with it."""
    num_series, num_frames, channels = values.shape
    shape = num_series, num_frames, channels - 1
    frame = jnp.minimum(jnp.arange(num_frames), lengths[:, None] - 1)
    noise = NOISE * jax.random.normal(key, shape)
    noise = jnp.take_along_axis(noise, frame[..., None], axis=1)
    return values.at[..., 1:].add(noise)


def loss_fn(
    model: NeuralCDE,
    values: Float[Array, "series frames channels"],
    speakers: Int[Array, " series"],
    *how,
) -> Float[Array, ""]:
    """The mean cross-entropy; `how`: see `solve`."""
    scores = solve(model, values, *how)[-1]
    entropy = optax.softmax_cross_entropy_with_integer_labels(scores, speakers)
    return jnp.mean(entropy)
