"""A neural controlled differential equation that classifies series of unequal length.

For japanese_vowels.py, which says what it is.
"""

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
HIDDEN = 24
WIDTH = 48

REVERSIBLE = reversax.Reversible(diffrax.Euler())
REVERSED = reversax.ReversibleAdjoint()
CHECKPOINTED = diffrax.RecursiveCheckpointAdjoint()


class Utterances(NamedTuple):
    values: Float[np.ndarray, "series times channels"]
    """Time, and the twelve coefficients."""
    speakers: Int[np.ndarray, " series"]
    """From zero."""
    lengths: Int[np.ndarray, " series"]
    """How many of the times were observed. After them the last values repeat."""

    def pick(self, which: np.ndarray) -> "Utterances":
        return Utterances(*(x[which] for x in self))


def load_utterances() -> tuple[Utterances, Utterances]:
    """Those to train with and those to test with, in the same units."""
    raw, test_raw = (load_japanese_vowels(split=s)[:2] for s in ("train", "test"))
    frames = np.concatenate(raw[0], axis=1)
    mean, deviation = frames.mean(axis=1), frames.std(axis=1)
    num_times = max(x.shape[1] for x in (*raw[0], *test_raw[0]))

    def prepare(series, speakers) -> Utterances:
        rows = []
        for x in series:
            # Where nothing changes any more, time included, the model stands still.
            frame = np.minimum(np.arange(num_times), x.shape[1] - 1)
            values = (x.T[frame] - mean) / deviation
            rows.append(np.column_stack([frame / num_times, values]))
        return Utterances(
            np.stack(rows).astype(np.float32),
            np.array([int(s) - 1 for s in speakers]),
            np.array([x.shape[1] for x in series]),
        )

    return prepare(*raw), prepare(*test_raw)


class NeuralCDE(eqx.Module):
    """`dy = field(y) dX`, begun and read out by linear maps."""

    initial: eqx.nn.Linear
    network: eqx.nn.MLP
    readout: eqx.nn.Linear
    scale: float = eqx.field(static=True)

    def __init__(self, channels: int, *, key: PRNGKeyArray, hidden=HIDDEN, width=WIDTH, scale=0.1):
        keys = jax.random.split(key, 3)
        self.initial = eqx.nn.Linear(channels, hidden, key=keys[0])
        self.network = eqx.nn.MLP(
            hidden,
            hidden * channels,
            width,
            depth=1,
            activation=jnp.tanh,
            final_activation=jnp.tanh,
            key=keys[1],
        )
        self.readout = eqx.nn.Linear(hidden, NUM_SPEAKERS, key=keys[2])
        self.scale = scale

    def field(self, t, y: Float[Array, "series hidden"], args):
        """What the increments of the control are multiplied by, a matrix for each
        series."""
        channels = self.initial.in_features
        matrices = self.scale * jax.vmap(self.network)(y)
        matrices = matrices.reshape(*y.shape, channels)
        product = lambda dx: jnp.einsum("shc,sc->sh", matrices, dx)
        like = jax.ShapeDtypeStruct((len(y), channels), y.dtype)
        return lineax.FunctionLinearOperator(product, like)


def solve(model, values, steps_each=1, solver=REVERSIBLE, adjoint=REVERSED, saveat=diffrax.SaveAt(t1=True)):
    by_time = jnp.swapaxes(jnp.asarray(values), 0, 1)
    num_intervals = len(by_time) - 1
    ts = jnp.arange(num_intervals + 1, dtype=by_time.dtype)
    control = diffrax.LinearInterpolation(ts, by_time)
    solution = diffrax.diffeqsolve(
        diffrax.ControlTerm(model.field, control),
        solver,
        t0=0.0,
        t1=float(num_intervals),
        dt0=1 / steps_each,
        y0=jax.vmap(model.initial)(by_time[0]),
        saveat=saveat,
        adjoint=adjoint,
        max_steps=num_intervals * steps_each,
    )
    assert solution.ys is not None
    return jax.vmap(jax.vmap(model.readout))(solution.ys)

def solve_vmap(model, values, steps_each=1, solver=REVERSIBLE, adjoint=REVERSED):
    def one(x):
        n = len(x) - 1
        ts = jnp.arange(n + 1, dtype=x.dtype)
        control = diffrax.LinearInterpolation(ts, x)
        f = lambda t, y, args: model.scale*model.network(y).reshape(y.shape[0], -1)
        sol = diffrax.diffeqsolve(diffrax.ControlTerm(f, control), solver, 0.0, float(n), 1/steps_each,
            model.initial(x[0]), adjoint=adjoint, max_steps=n*steps_each)
        return model.readout(sol.ys[0])
    return jax.vmap(one)(jnp.asarray(values))[None]

def loss_fn(model, values, speakers, *how, run=solve):
    scores = run(model, values, *how)[-1]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, speakers))
