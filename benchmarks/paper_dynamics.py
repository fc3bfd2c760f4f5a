"""The experiments of the paper's second version: networks fitted to dynamics.

A network learns the field of a differential equation from one trajectory, by the mean
squared error at every step. For paper.py, which says what is compared.
"""

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from paper_common import (
    BASES,
    DEFAULT,
    PUBLISHED,
    Accuracy,
    Method,
    Training,
    checkpointed,
    compiled_gradient,
    default_checkpoints,
    median_times,
    reversible_methods,
    states_kept,
    temporary_bytes,
    tracker,
    unchecked,
)
from rich.console import Console

HIDDEN, LEARNING_RATE, WEIGHT_DECAY = 10, 1e-2, 1e-5
OBSERVED = 10  # Times at which solutions of any number of steps are compared.
MAX_STEPS = 4096  # Of steps that adapt. Published: 1,000, too few for other tolerances.
EXACT = Method(diffrax.Dopri8(), diffrax.RecursiveCheckpointAdjoint())


def white_dwarf(t, y, args):
    """Chandrasekhar's equation, begun at a radius of a half."""
    phi, slope = y
    pull = (phi**2 - 0.001) ** 1.5
    return jnp.stack([slope, -pull - 2 * slope / (t + 0.5)])


def oscillators(t, y, args):
    """Two masses between walls, by three springs, hardly damped. The constants are
    ours, chosen for the periods and amplitudes of the recording."""
    wall, between, damping = 4.4, 20.0, 0.1
    x, v = y[:2], y[2:]
    return jnp.concatenate([v, -wall * x - between * (x - x[::-1]) - damping * v])


def double_pendulum(t, y, args):
    """Two equal masses on two equal rods of 0.2 m, in tenths of radians (a second)."""
    a, b, u, v = 10 * y
    gravity, sin, cos = 9.81 / 0.2, jnp.sin(a - b), jnp.cos(a - b)
    divisor = 3 - jnp.cos(2 * (a - b))
    first = -gravity * (3 * jnp.sin(a) + jnp.sin(a - 2 * b))
    first = first - 2 * sin * (v**2 + u**2 * cos)
    second = 2 * sin * (2 * u**2 + 2 * gravity * jnp.cos(a) + v**2 * cos)
    return jnp.stack([u, v, first / divisor, second / divisor]) / 10


class Field(eqx.Module):
    """A network of one hidden layer, of the state, or of time and the state."""

    mlp: eqx.nn.MLP
    timed: bool

    def __init__(self, size: int, timed: bool, key):
        sizes = size + timed, size, HIDDEN, 1
        self.mlp = eqx.nn.MLP(*sizes, activation=jnp.tanh, key=key)
        self.timed = timed

    def __call__(self, t, y):
        return self.mlp(jnp.append(t, y) if self.timed else y)


def apply(t, y, network):
    return network(t, y)


@dataclasses.dataclass(frozen=True)
class Dynamics:
    """One experiment."""

    true_field: Callable
    y0: tuple[float, ...]
    t1: float
    steps: int
    checkpoints: int
    bases: tuple[str, ...]
    training_steps: int
    timed: bool = False
    noise: float = 0.0
    tolerance: float | None = None
    """Of steps that adapt; they are constant without it."""

    @property
    def dt0(self) -> float:
        return self.t1 / self.steps

    @property
    def ts(self) -> Array:
        """The ends of the constant steps: the times of the data."""
        return jnp.linspace(0.0, self.t1, self.steps + 1)[1:]

    @property
    def observed(self) -> slice:
        """Which of these are the last of a tenth of the steps."""
        every = self.steps // OBSERVED
        return slice(every - 1, None, every)

    def data(self, key) -> Array:
        tight = diffrax.PIDController(rtol=1e-12, atol=1e-12)
        method = Method(diffrax.Dopri8(), diffrax.DirectAdjoint())
        kwargs = dict(saveat=diffrax.SaveAt(ts=self.ts), stepsize_controller=tight)
        ys = self.solve(method, None, self.dt0, field=self.true_field, **kwargs).ys
        return ys + self.noise * jax.random.normal(key, ys.shape)

    def solve(self, method: Method, network, dt0, field: Callable = apply, **kwargs):
        y0 = jnp.array(self.y0)
        return method.solve(field, 0.0, self.t1, dt0, y0, network, **kwargs)

    def training_loss(self, method: Method) -> Callable:
        kwargs: dict[str, Any] = dict(saveat=diffrax.SaveAt(steps=True))
        kwargs["max_steps"] = self.steps
        if self.tolerance is not None:
            kwargs = self.controlled(self.tolerance, self.ts)

        def loss(network, data):
            ys = self.solve(method, network, self.dt0, **kwargs).ys
            return jnp.mean((ys - data) ** 2)

        return loss

    def controlled(self, tolerance, ts) -> dict[str, Any]:
        pid = diffrax.PIDController(rtol=tolerance, atol=tolerance)
        saveat = diffrax.SaveAt(ts=ts)
        return dict(saveat=saveat, stepsize_controller=pid, max_steps=MAX_STEPS)

    def observed_loss(self, method, rest, data, max_steps: int) -> Callable:
        """Of the weights, and a number of constant steps or a tolerance."""

        def loss(weights, rung):
            network, ts, dt0 = eqx.combine(weights, rest), self.ts[self.observed], 0.0
            if self.tolerance is None:
                kwargs: dict[str, Any] = dict(saveat=diffrax.SaveAt(ts=ts))
                kwargs["max_steps"], dt0 = max_steps, self.t1 / rung
            else:
                kwargs, dt0 = self.controlled(rung, ts), self.dt0
            ys = self.solve(method, network, dt0, **kwargs).ys
            return jnp.mean((ys - data[self.observed]) ** 2)

        return loss

    def final_loss(self, method: Method, rest) -> Callable:
        """Of the state at the end alone, in constant steps: with no path to save."""

        def loss(weights):
            network = eqx.combine(weights, rest)
            ys = self.solve(method, network, self.dt0, max_steps=self.steps).ys
            return jnp.sum(ys**2)

        return loss

    def accepted_steps(self, method: Method, network, tolerance) -> int:
        kwargs = self.controlled(tolerance, self.ts)
        solve = eqx.filter_jit(lambda: self.solve(method, network, self.dt0, **kwargs))
        return int(solve().stats["num_accepted_steps"])

    @property
    def rungs(self) -> list:
        """Of ever more accurate solutions."""
        if self.tolerance is not None:
            return [10 ** (-k / 4) for k in range(12, 33)]
        finer = [round(1.1**k) for k in range(8, 1 + int(math.log(400, 1.1)))]
        return sorted({OBSERVED * n for n in finer} | {self.steps})

    @property
    def curve(self) -> list:
        """The rungs to draw."""
        if self.tolerance is not None:
            return [10.0**-k for k in range(3, 9)]
        return [20, 50, 100, 200, 500, 1000, 2000]


def contestants(experiment: Dynamics, base: str) -> dict[str, Method]:
    fewer = math.isqrt(experiment.steps) + 1
    methods = reversible_methods(base) | {
        f"{n} checkpoints": checkpointed(base, n)
        for n in (experiment.checkpoints, fewer)
    }
    if base != "Euler":
        adjoint = diffrax.RecursiveCheckpointAdjoint(experiment.checkpoints)
        name = f"{experiment.checkpoints} checkpoints, stages in a loop"
        methods[name] = Method(BASES[base], adjoint)
    return methods


def training_of(experiment: Dynamics, seed: int) -> Training:
    key, key_data = jax.random.split(jax.random.key(seed))
    network = Field(len(experiment.y0), experiment.timed, key)
    data = experiment.data(key_data)
    adamw = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    return Training(network, lambda i: (data,), adamw)


def at_equal_steps(
    experiment: Dynamics, base: str, training: Training, programs: dict, repeats: int
) -> list[dict]:
    """Time and memory of a training step."""
    baseline = f"{experiment.checkpoints} checkpoints"
    (weights, rest, state), batch = training.parts(), training.batches(0)
    inputs = weights, state, *batch
    seconds = median_times({k: (p, *inputs) for k, p in programs.items()}, repeats)
    rows = []
    for name, method in contestants(experiment, base).items():
        final = compiled_gradient(experiment.final_loss(method, rest), weights)
        checkpoints = getattr(method.adjoint, "checkpoints", None)
        states = states_kept(name, experiment.steps, checkpoints)
        if experiment.tolerance is not None and checkpoints is None:
            states += 2 * MAX_STEPS / len(experiment.y0)  # Two times of each step.
        row = {
            "base": base,
            "method": name,
            "step (ms)": seconds[name] * 1e3,
            "speed-up": seconds[baseline] / seconds[name],
            "states": states,
            "bytes": temporary_bytes(programs[name]),
            "bytes, no path": temporary_bytes(final),
        }
        rows.append(row)
    return rows


def at_equal_accuracy(
    experiment: Dynamics, base: str, network, data, repeats: int
) -> tuple[list[dict], dict[str, list]]:
    """Of gradients through the trained network."""
    adaptive = experiment.tolerance is not None
    checkpoints = experiment.checkpoints if adaptive else None
    methods = reversible_methods(base)
    methods |= {"checkpoints": checkpointed(base, checkpoints)}
    weights, rest = eqx.partition(network, eqx.is_inexact_array)
    # Constant steps, which end at the observed times: its interpolation errs more.
    tight = dataclasses.replace(experiment, tolerance=None)
    exact = tight.observed_loss(EXACT, rest, data, experiment.steps)
    accuracy = Accuracy(
        loss_by=lambda method, n: experiment.observed_loss(method, rest, data, n),
        weights=weights,
        reference=jax.jit(jax.grad(exact))(weights, float(experiment.steps)),
        rungs=experiment.rungs,
        curve=experiment.curve,
        published=experiment.tolerance or experiment.steps,
    )
    rows, curves = accuracy.compare(methods, repeats)
    for row in rows:
        name, rung = row["method"], row["rung"]
        if adaptive:
            row["steps"] = experiment.accepted_steps(methods[name], network, rung)
        else:
            row["states"] = states_kept(name, rung)
    return [dict(base=base) | row for row in rows], curves


def trained(
    experiment: Dynamics, base: str, training: Training, programs: dict, steps, console
) -> tuple[Any, list[dict]]:
    """The network by the checkpointed base, and a row of each method's training."""
    methods = contestants(experiment, base)
    rows, network = [], None
    for name in (PUBLISHED, DEFAULT, f"{experiment.checkpoints} checkpoints"):
        bar = tracker(f"{base}, {name}", console)
        without = experiment.training_loss(unchecked(methods[name]))
        again = functools.partial(training.compile, without)
        network, losses, refused = training.run(programs[name], again, steps, bar)
        rows.append(
            {
                "base": base,
                "method": name,
                "last loss": losses[-1],
                "best loss": min(losses),
                "refused at": refused,
                "losses": losses[:: max(1, steps // 100)],
            }
        )
    return network, rows


def dynamics(experiment: Dynamics, options: argparse.Namespace, console: Console):
    steps = 3 if options.quick else experiment.training_steps
    if options.quick:
        checkpoints = default_checkpoints(2 * OBSERVED)
        smaller = dict(steps=2 * OBSERVED, checkpoints=checkpoints)
        experiment = dataclasses.replace(
            experiment, bases=experiment.bases[:1], **smaller
        )
    training = training_of(experiment, options.seed)
    (data,) = training.batches(0)
    results = {"training": [], "equal steps": [], "equal accuracy": [], "curves": {}}
    for base in experiment.bases:
        programs = {
            name: training.compile(experiment.training_loss(method))
            for name, method in contestants(experiment, base).items()
        }
        network, rows = trained(experiment, base, training, programs, steps, console)
        results["training"] += rows
        results["equal steps"] += at_equal_steps(
            experiment, base, training, programs, options.repeats
        )
        rows, curves = at_equal_accuracy(
            experiment, base, network, data, options.repeats
        )
        results["equal accuracy"] += rows
        results["curves"][base] = dict(rungs=experiment.curve, errors=curves)
    return results


WHITE_DWARF = Dynamics(
    true_field=white_dwarf,
    y0=(1.0, 0.0),
    t1=5.0,
    steps=1000,
    checkpoints=44,
    bases=("Euler", "Midpoint", "Ralston", "RK4"),
    training_steps=1000,
    timed=True,
)
OSCILLATORS = Dynamics(
    true_field=oscillators,
    y0=(0.0, -1.43, -1.4, 0.4),
    t1=3.0,
    steps=500,
    checkpoints=31,
    bases=("Euler", "Midpoint", "Ralston", "RK4"),
    training_steps=10_000,
    noise=0.01,
)
PENDULUM = Dynamics(
    true_field=double_pendulum,
    y0=(0.15, 0.2, 0.0, 0.0),
    t1=2.0,
    steps=500,
    checkpoints=32,
    bases=("Bosh3",),
    training_steps=10_000,
    noise=0.01,
    tolerance=1e-6,
)
