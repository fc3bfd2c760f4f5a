"""Experiments of the paper's first version: regression; what a flow and a CDE share.

For paper.py, which says what is compared. All take 100 steps to a time of one, or more
of the same size to a longer time.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from paper_common import (
    BASES,
    DEFAULT,
    PUBLISHED,
    Accuracy,
    Method,
    Training,
    checkpointed,
    compiled_gradient,
    median_times,
    reversible_methods,
    states_kept,
    temporary_bytes,
    tracker,
    unchecked,
    unrolled,
)
from rich.console import Console
from schemes import relative_error

H = 0.01
CHECKPOINTS = "checkpoints"
EXACT = Method(diffrax.Dopri8(), diffrax.RecursiveCheckpointAdjoint())


@dataclasses.dataclass(frozen=True)
class Stored:
    """Plain differentiation of the solve, with every intermediate result stored."""

    solver: Any
    adjoint: Any = None

    def solve(self, field, t0, t1, dt0, y0, args, *, max_steps):
        del t1
        term = diffrax.ODETerm(field)

        def step(y, i):
            times = t0 + i * dt0, t0 + (i + 1) * dt0
            y1, *_ = self.solver.step(term, *times, y, args, None, False)
            return y1, None

        y1, _ = jax.lax.scan(step, y0, jnp.arange(max_steps))
        return SimpleNamespace(ys=y1[None])


def methods_over(base: str, coupling_parameter=0.999) -> dict[str, Method]:
    methods = reversible_methods(base, coupling_parameter)
    return methods | {CHECKPOINTS: checkpointed(base)}


# Regression: `x` is carried to `x**3 + x`.

POINTS, COUPLING_PARAMETER = 1000, 0.99
FEWER_POINTS = 100  # Ours: errors are means over the points, and so hardly change.


def cubic_loss(method, rest, points: int, t1, steps, max_steps: int) -> Callable:
    x = jnp.linspace(-2.0, 2.0, points)

    def field(t, y, weights):
        return jax.vmap(eqx.combine(weights, rest))(y)

    def loss(weights, t1=t1, steps=steps):
        ys = method.solve(
            field, 0.0, t1, t1 / steps, x, weights, max_steps=max_steps
        ).ys
        return jnp.mean((ys[0] - (x**3 + x)) ** 2)

    return loss


def absolute_difference(gradient: Any, reference: Any) -> float:
    """The sum of the absolute values, as published."""
    flat = lambda tree: jax.flatten_util.ravel_pytree(tree)[0]
    return float(jnp.abs(flat(gradient) - flat(reference)).sum())


def cubic_methods(base: str) -> dict[str, Method]:
    adjoint = diffrax.BacksolveAdjoint()
    return {
        # It solves for a tree of arrays, which `Unrolled` does not take.
        "optimise-then-discretise": Method(BASES[base], adjoint),
        PUBLISHED: unchecked(reversible_methods(base, COUPLING_PARAMETER)[PUBLISHED]),
        f"{PUBLISHED}, 0.999": unchecked(reversible_methods(base)[PUBLISHED]),
        DEFAULT: reversible_methods(base)[DEFAULT],
        CHECKPOINTS: checkpointed(base),
    }


def cubic_network(seed: int) -> tuple[Any, Any]:
    key = jax.random.key(seed)
    mlp = eqx.nn.MLP("scalar", "scalar", 50, 1, activation=jnp.tanh, key=key)
    return eqx.partition(mlp, eqx.is_inexact_array)


def cubic_errors(quick: bool, seeds: int, console: Console) -> list[dict]:
    """By the time of integration: mean differences to the gradient of the base."""
    times = np.linspace(1.0, 5.0, 2 if quick else 5)
    points, most = (20 if quick else FEWER_POINTS), 512
    _, rest = cubic_network(0)
    make = lambda method, n: cubic_loss(method, rest, points, None, None, n)
    gradients = {
        name: jax.jit(jax.grad(make(method, most)))
        for name, method in cubic_methods("Midpoint").items()
    }
    exact, rows = jax.jit(jax.grad(make(EXACT, most))), []
    for t1 in tracker("cubic: errors", console)(times):
        differences = {name: [] for name in gradients}
        errors = {name: [] for name in gradients}
        for seed in range(seeds):
            weights, _ = cubic_network(seed)
            found = {n: g(weights, t1, t1 / H) for n, g in gradients.items()}
            truth = exact(weights, t1, 20 * t1)
            for name, gradient in found.items():
                difference = absolute_difference(gradient, found[CHECKPOINTS])
                differences[name].append(difference)
                errors[name].append(absolute_difference(gradient, truth))
        for name in gradients:
            mean, error = map(float, map(np.mean, (differences[name], errors[name])))
            row = {"T": float(t1), "method": name, "to the base's": mean}
            rows.append(row | {"to the exact": error})
    return rows


def cubic_own(base: str, quick: bool) -> list[dict]:
    """How far a reversed gradient is from the same solver's, checkpointed."""
    weights, rest = cubic_network(0)
    t1, points = (1.0, 20) if quick else (5.0, FEWER_POINTS)
    steps, rows = round(t1 / H), []
    recursive = diffrax.RecursiveCheckpointAdjoint()
    for name, method in cubic_methods(base).items():
        if name in (CHECKPOINTS, "optimise-then-discretise"):
            continue
        reversed_, own = (
            jax.jit(jax.grad(cubic_loss(m, rest, points, t1, steps, steps)))(weights)
            for m in (method, method._replace(adjoint=recursive))
        )
        difference = relative_error(reversed_, own)
        rows.append({"T": t1, "method": name, "to its own": difference})
    return rows


def cubic_costs(quick: bool, repeats: int) -> list[dict]:
    """Time and memory by the time of integration."""
    weights, rest = cubic_network(0)
    rows, points = [], 20 if quick else POINTS
    methods = {"stored": Stored(unrolled("Midpoint"))}
    methods |= methods_over("Midpoint", COUPLING_PARAMETER)
    for t1 in (1.0, 2.0) if quick else (1.0, 5.0):
        steps = round(t1 / H)
        programs = {
            name: compiled_gradient(
                cubic_loss(method, rest, points, t1, steps, steps), weights
            )
            for name, method in methods.items()
        }
        seconds = median_times({n: (p, weights) for n, p in programs.items()}, repeats)
        for name, program in programs.items():
            row = {"T": t1, "method": name, "gradient (ms)": seconds[name] * 1e3}
            row["speed-up"] = seconds[CHECKPOINTS] / seconds[name]
            row["states"] = steps if name == "stored" else states_kept(name, steps)
            rows.append(row | {"bytes": temporary_bytes(program)})
    return rows


def cubic(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    quick, repeats = options.quick, min(options.repeats, 3)
    weights, rest = cubic_network(0)
    t1, points = (1.0, 20) if quick else (5.0, FEWER_POINTS)
    steps = round(t1 / H)
    exact = cubic_loss(EXACT, rest, points, t1, 20 * t1, 200)
    accuracy = Accuracy(
        loss_by=lambda method, n: (
            lambda weights, rung: cubic_loss(method, rest, points, t1, rung, n)(weights)
        ),
        weights=weights,
        reference=jax.jit(jax.grad(exact))(weights),
        rungs=[50, 100] if quick else [*range(10, 200, 10), *range(200, 701, 25)],
        curve=[20, 50, 100] if quick else [25, 50, 100, 200, 400],
        published=steps,
    )
    equal, curves = [], {}
    for base in ("Midpoint",) if quick else ("Euler", "Midpoint"):
        rows, curves[base] = accuracy.compare(methods_over(base), repeats)
        equal += [dict(base=base) | row for row in rows]
    return {
        "gradient errors": cubic_errors(quick, 1 if quick else 3, console),
        "reversed and checkpointed": cubic_own("Midpoint", quick),
        "equal steps": cubic_costs(quick, repeats),
        "equal accuracy": equal,
        "curves": {b: dict(rungs=accuracy.curve, errors=c) for b, c in curves.items()},
    }


# What the flow and the CDE have in common.


@dataclasses.dataclass(frozen=True)
class Model:
    """A network, a loss of it, and what to measure of it."""

    loss: Callable
    """Of `(method, steps, max_steps)`: a loss of `(network, *batch)`."""
    network: Any
    batch: tuple
    """In the published size: to measure memory."""
    training: Training
    """In a size of ours."""
    training_steps: int
    steps: int
    score: Callable[[Any], dict[str, float]]
    """Of a trained network."""


def model_memory(model: Model, bases, console: Console) -> list[dict]:
    """Of gradients in the published size, which are compiled and not run."""
    weights, rest = eqx.partition(model.network, eqx.is_inexact_array)
    rows = []
    for base in tracker("memory", console)(bases):
        bytes_of: dict[str, int] = {}
        stored: dict[str, Any] = {"stored": Stored(unrolled(base))}
        for name, method in (stored | methods_over(base)).items():
            loss = model.loss(method, model.steps, model.steps)
            of_weights = lambda weights, *batch, loss=loss: loss(
                eqx.combine(weights, rest), *batch
            )
            program = compiled_gradient(of_weights, weights, *model.batch)
            bytes_of[name] = temporary_bytes(program)
        for name, size in bytes_of.items():
            row = {"base": base, "method": name, "bytes": size}
            row["stored / it"] = bytes_of["stored"] / size
            rows.append(row | {"checkpoints / it": bytes_of[CHECKPOINTS] / size})
    return rows


def model_training(
    model: Model, base: str, steps: int, repeats: int, console: Console
) -> tuple[Any, list[dict]]:
    """In a size of ours: what is reached, and the time of a step."""
    network, rows, programs = None, [], {}
    loss_by = lambda method: model.loss(method, model.steps, model.steps)
    weights, _, state = model.training.parts()
    inputs = weights, state, *model.training.batches(0)
    for name, method in methods_over(base).items():
        bar = tracker(f"{base}, {name}", console)
        program = model.training.compile(loss_by(method))
        again = functools.partial(model.training.compile, loss_by(unchecked(method)))
        network, losses, refused = model.training.run(program, again, steps, bar)
        row = {"base": base, "method": name, "best loss": min(losses)}
        row |= model.score(network) | {"refused at": refused}
        rows.append(row | {"losses": losses[:: max(1, steps // 100)]})
        programs[name] = program, *inputs
    seconds = median_times(programs, repeats)
    for row in rows:
        time = seconds[row["method"]]
        row |= {"step (ms)": time * 1e3, "speed-up": seconds[CHECKPOINTS] / time}
    return network, rows


def model_accuracy(model: Model, bases, network, rungs, repeats: int) -> tuple:
    """At the size of training."""
    weights, rest = eqx.partition(network, eqx.is_inexact_array)
    batch = model.training.batches(0)

    def loss_by(method, max_steps):
        return lambda weights, rung: model.loss(method, rung, max_steps)(
            eqx.combine(weights, rest), *batch
        )

    exact = jax.jit(jax.grad(loss_by(EXACT, 2 * model.steps)))
    accuracy = Accuracy(
        loss_by=loss_by,
        weights=weights,
        reference=exact(weights, 2.0 * model.steps),
        rungs=rungs,
        curve=[10, 20, 50, 100],
        published=model.steps,
    )
    equal, curves = [], {}
    for base in bases:
        rows, errors = accuracy.compare(methods_over(base), repeats)
        equal += [dict(base=base) | row for row in rows]
        curves[base] = dict(rungs=accuracy.curve, errors=errors)
    return equal, curves


def measure_model(model: Model, options: argparse.Namespace, console: Console) -> dict:
    quick, repeats = options.quick, min(options.repeats, 11)
    bases = ("Midpoint",) if quick else ("Midpoint", "RK4", "Dopri5")
    compared = bases if quick else ("Euler", "Midpoint")
    steps = 2 if quick else model.training_steps
    network, training = model_training(model, "Midpoint", steps, repeats, console)
    rungs = [*range(5, 100, 5), *range(100, 301, 20)]
    if quick:
        rungs = [5, 10]
    equal, curves = model_accuracy(model, compared, network, rungs, repeats)
    return {
        "training": training,
        "published size": model_memory(model, bases, console),
        "equal accuracy": equal,
        "curves": curves,
    }
