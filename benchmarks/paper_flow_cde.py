"""The flow and the neural CDE of the paper's first version.

For paper.py, which says what is compared.
"""

import argparse
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from paper_common import Training, checkpointed
from paper_models import Model, measure_model
from rich.console import Console
from sklearn.datasets import make_moons

LEARNING_RATE, STEPS = 1e-3, 100


class ConcatSquash(eqx.Module):
    """A linear layer, scaled and shifted by time."""

    linear: eqx.nn.Linear
    gate: eqx.nn.Linear
    shift: eqx.nn.Linear

    def __init__(self, in_size: int, out_size: int, key):
        keys = jax.random.split(key, 3)
        self.linear = eqx.nn.Linear(in_size, out_size, key=keys[0])
        self.gate = eqx.nn.Linear("scalar", out_size, key=keys[1])
        self.shift = eqx.nn.Linear("scalar", out_size, use_bias=False, key=keys[2])

    def __call__(self, t, y):
        return self.linear(y) * jax.nn.sigmoid(self.gate(t)) + self.shift(t)


class Flow(eqx.Module):
    """Of points in the plane, each with the logarithm of a density behind it."""

    layers: list[ConcatSquash]

    def __init__(self, width: int, key):
        sizes = (2, width), (width, width), (width, width), (width, 2)
        keys = jax.random.split(key, len(sizes))
        pairs = zip(sizes, keys, strict=True)
        self.layers = [ConcatSquash(*size, key) for size, key in pairs]

    def velocity(self, t, y):
        for layer in self.layers[:-1]:
            y = jnp.tanh(layer(t, y))
        return self.layers[-1](t, y)

    def __call__(self, t, state: Float[Array, "3"]) -> Float[Array, "3"]:
        velocity, pull = jax.vjp(lambda y: self.velocity(t, y), state[:2])
        (jacobian,) = jax.vmap(pull)(jnp.eye(2, dtype=state.dtype))
        return jnp.append(velocity, -jnp.trace(jacobian))


def flow_loss(method, steps, max_steps: int):
    """The negative log-likelihood, solved from the data back to a normal density."""

    def log_density(network: Flow, point):
        field = lambda t, y, network: network(t, y)
        times = 1.0, 0.0, -1 / steps
        state = jnp.append(point, 0.0)
        ys = method.solve(field, *times, state, network, max_steps=max_steps).ys
        normal = -jnp.log(2 * jnp.pi) - jnp.sum(ys[0, :2] ** 2) / 2
        return normal - ys[0, 2]

    def loss(network: Flow, points):
        of_point = lambda point: log_density(network, point)
        return -jnp.mean(jax.vmap(of_point)(points))

    return loss


def moons_model(seed: int, quick: bool) -> Model:
    points = np.asarray(make_moons(1000, noise=0.05, random_state=0)[0])
    points = jnp.asarray((points - points.mean()) / points.std())
    network, small = (Flow(n, jax.random.key(seed)) for n in (128, 32))
    batch, size = points, 128
    if quick:
        network, batch, size = small, points[:4], 4

    def batches(i: int) -> tuple:
        chosen = np.random.default_rng((seed, i)).choice(len(points), size)
        return (points[chosen],)

    return Model(
        loss=flow_loss,
        network=network,
        batch=(batch,),
        training=Training(small, batches, optax.adamw(LEARNING_RATE)),
        training_steps=200,
        steps=4 if quick else STEPS,
        score=lambda network: {},
    )


CLASSES, CHANNELS, LENGTH, HIDDEN = 20, 3, 182, 32


def handwriting(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Simulated pen strokes: each class has a closed curve of its own in each channel,
    each sample its own size, speed and noise. With time as the first channel."""
    shapes = np.random.default_rng(0).normal(size=(CLASSES, CHANNELS, 2, 4))
    labels = rng.integers(CLASSES, size=count)
    t = np.linspace(0, 1, LENGTH)
    paths = np.empty((count, LENGTH, 1 + CHANNELS))
    for path, label in zip(paths, labels, strict=True):
        phase = 2 * np.pi * t ** rng.uniform(0.8, 1.25) * np.arange(1, 5)[:, None]
        waves = np.stack([np.sin(phase), np.cos(phase)]) / np.arange(1, 5)[:, None]
        curves = np.einsum("ckf,kft->tc", shapes[label], waves)
        curves *= rng.uniform(0.7, 1.3)
        path[:] = np.column_stack([t, curves])
        path[:, 1:] += 0.1 * rng.normal(size=curves.shape)
    return paths, labels


class CDE(eqx.Module):
    """`dy = field(y) dX`, begun and read out by linear maps."""

    initial: eqx.nn.Linear
    mlp: eqx.nn.MLP
    final: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        sizes = HIDDEN, HIDDEN * (1 + CHANNELS), HIDDEN, 4
        self.initial = eqx.nn.Linear(1 + CHANNELS, HIDDEN, key=keys[0])
        self.mlp = eqx.nn.MLP(*sizes, final_activation=jnp.tanh, key=keys[1])
        self.final = eqx.nn.Linear(HIDDEN, CLASSES, key=keys[2])

    def __call__(self, t, y, control: diffrax.CubicInterpolation):
        field = self.mlp(y).reshape(HIDDEN, 1 + CHANNELS)
        return field @ control.derivative(t)


def probabilities(method, steps, max_steps: int):
    """Of the classes, as functions of a network and a path."""

    def field(t, y, args):
        network, ts, coefficients = args
        return network(t, y, diffrax.CubicInterpolation(ts, coefficients))

    def of(network: CDE, path):
        ts = path[:, 0]
        coefficients = diffrax.backward_hermite_coefficients(ts, path)
        args, y0 = (network, ts, coefficients), network.initial(path[0])
        times = 0.0, 1.0, 1 / steps
        ys = method.solve(field, *times, y0, args, max_steps=max_steps).ys
        return jax.nn.softmax(network.final(ys[0]))

    return of


def cde_loss(method, steps, max_steps: int):
    """Minus the mean probability of the true class, as published."""
    of = probabilities(method, steps, max_steps)

    def loss(network: CDE, paths, labels):
        predicted = jax.vmap(lambda path: of(network, path))(paths)
        return -jnp.mean(jnp.take_along_axis(predicted, labels[:, None], axis=1))

    return loss


def cde_model(seed: int, quick: bool) -> Model:
    rng = np.random.default_rng(1 + seed)
    paths, labels = map(jnp.asarray, handwriting(20 if quick else 2240, rng))
    held_out, truth = map(jnp.asarray, handwriting(20 if quick else 618, rng))
    size, steps = (4 if quick else 32), (4 if quick else STEPS)
    network = CDE(jax.random.key(seed))

    def batches(i: int) -> tuple:
        chosen = np.random.default_rng((seed, i)).choice(len(paths), size)
        return paths[chosen], labels[chosen]

    def score(network: CDE) -> dict[str, float]:
        of = probabilities(checkpointed("Midpoint"), steps, steps)
        run = eqx.filter_jit(lambda network, x: jax.vmap(lambda p: of(network, p))(x))
        right = run(network, held_out).argmax(axis=1) == truth
        return {"test accuracy": float(right.mean())}

    return Model(
        loss=cde_loss,
        network=network,
        batch=(paths, labels),
        training=Training(network, batches, optax.adamw(LEARNING_RATE)),
        training_steps=400,
        steps=steps,
        score=score,
    )


def moons(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    return measure_model(moons_model(options.seed, options.quick), options, console)


def cde(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    return measure_model(cde_model(options.seed, options.quick), options, console)
