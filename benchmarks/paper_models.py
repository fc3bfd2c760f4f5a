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


def gradient_bytes(methods: dict, loss_by: Callable, weights, *inputs) -> dict:
    """Of compiled programs, which are not run."""
    return {
        name: temporary_bytes(compiled_gradient(loss_by(method), weights, *inputs))
        for name, method in methods.items()
    }


# Regression: `x` is carried to `x**3 + x`.

POINTS, COUPLING_PARAMETER = 1000, 0.99


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
        "optimise-then-discretise": Method(unrolled(base), adjoint),
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
    times = np.linspace(1.0, 5.0, 2 if quick else 9)
    points, most = (20, 500) if quick else (POINTS, 500)
    _, rest = cubic_network(0)
    make = lambda method, n: cubic_loss(method, rest, points, None, None, n)
    gradients = {
        name: jax.jit(jax.grad(make(method, most)))
        for name, method in cubic_methods("Midpoint").items()
    }
    exact, rows = jax.jit(jax.grad(make(EXACT, most))), []
    for t1 in tracker("cubic: errors", console)(times):
        differences, errors = {name: [] for name in gradients}, {}
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
    t1, points = (1.0, 20) if quick else (5.0, POINTS)
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
    quick, repeats = options.quick, min(options.repeats, 5)
    weights, rest = cubic_network(0)
    t1, points = (1.0, 20) if quick else (5.0, POINTS)
    steps = round(t1 / H)
    exact = cubic_loss(EXACT, rest, points, t1, 20 * t1, 200)
    accuracy = Accuracy(
        loss_by=lambda method, n: (
            lambda weights, rung: cubic_loss(method, rest, points, t1, rung, n)(weights)
        ),
        weights=weights,
        reference=jax.jit(jax.grad(exact))(weights),
        rungs=[*range(10, 200, 10), *range(200, 2001, 25)],
        curve=[25, 50, 100, 200, 400],
        published=steps,
    )
    equal, curves = [], {}
    for base in ("Midpoint",) if quick else ("Euler", "Midpoint"):
        rows, curves[base] = accuracy.compare(methods_over(base), repeats)
        equal += [dict(base=base) | row for row in rows]
    return {
        "gradient errors": cubic_errors(quick, 1 if quick else 5, console),
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
    """In the published size: to measure memory and time."""
    training: Training
    """In a size of ours."""
    training_steps: int
    steps: int
    score: Callable[[Any], dict[str, float]]
    """Of a trained network."""


def model_costs(model: Model, bases, timed: tuple[str, ...], repeats: int):
    weights, rest = eqx.partition(model.network, eqx.is_inexact_array)

    def loss_by(method):
        loss = model.loss(method, model.steps, model.steps)
        return lambda weights, *batch: loss(eqx.combine(weights, rest), *batch)

    rows = []
    for base in bases:
        methods = methods_over(base)
        programs = {
            name: compiled_gradient(loss_by(method), weights, *model.batch)
            for name, method in methods.items()
        }
        bytes_of = {name: temporary_bytes(p) for name, p in programs.items()}
        stored = {"stored": Stored(unrolled(base))}
        bytes_of |= gradient_bytes(stored, loss_by, weights, *model.batch)
        runs = {n: (p, weights, *model.batch) for n, p in programs.items()}
        seconds = median_times(runs, repeats) if base in timed else {}
        for name, size in bytes_of.items():
            row: dict[str, Any] = {"base": base, "method": name, "bytes": size}
            row["stored / it"] = bytes_of["stored"] / size
            row["checkpoints / it"] = bytes_of[CHECKPOINTS] / size
            time = seconds.get(name)
            row["gradient (ms)"] = None if time is None else time * 1e3
            row["speed-up"] = None if time is None else seconds[CHECKPOINTS] / time
            rows.append(row)
    return rows


def model_training(model: Model, base: str, steps: int, console: Console):
    network, rows = None, []
    loss_by = lambda method: model.loss(method, model.steps, model.steps)
    for name, method in methods_over(base).items():
        bar = tracker(f"{base}, {name}", console)
        program = model.training.compile(loss_by(method))
        again = functools.partial(model.training.compile, loss_by(unchecked(method)))
        network, losses, refused = model.training.run(program, again, steps, bar)
        row = {"base": base, "method": name, "best loss": min(losses)}
        row |= model.score(network) | {"refused at": refused}
        rows.append(row | {"losses": losses[:: max(1, steps // 100)]})
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
        curve=[10, 20, 50, 100, 200],
        published=model.steps,
    )
    equal, curves = [], {}
    for base in bases:
        rows, errors = accuracy.compare(methods_over(base), repeats)
        equal += [dict(base=base) | row for row in rows]
        curves[base] = dict(rungs=accuracy.curve, errors=errors)
    return equal, curves


def measure_model(model: Model, options: argparse.Namespace, console: Console) -> dict:
    quick, repeats = options.quick, min(options.repeats, 3)
    bases = ("Midpoint",) if quick else ("Midpoint", "RK4", "Dopri5")
    steps = 2 if quick else model.training_steps
    network, training = model_training(model, "Midpoint", steps, console)
    rungs = [*range(5, 100, 5), *range(100, 401, 20)]
    compared = bases if quick else ("Euler", "Midpoint", "RK4")
    equal, curves = model_accuracy(model, compared, network, rungs, options.repeats)
    costs = model_costs(model, bases, ("Midpoint",), repeats)
    return {
        "training": training,
        "published size": costs,
        "equal accuracy": equal,
        "curves": curves,
    }
