"""The contestants of paper.py, and how they are trained, timed and compared."""

import dataclasses
import functools as ft
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.stages import Compiled
from rich.console import Console
from rich.progress import track
from schemes import RungeKutta4, relative_error

import reversax

PUBLISHED, DEFAULT = "published", "default"
BITS_OF_DOUBLE = 64
REACHABLE = 1e-9  # A smaller error of the gradient is too near to round-off to aim at.


class Ralston3(diffrax.AbstractERK):
    """Ralston's third-order method, which the paper calls Ralston."""

    tableau: ClassVar[diffrax.ButcherTableau] = diffrax.ButcherTableau(
        a_lower=(np.array([1 / 2]), np.array([0, 3 / 4])),
        b_sol=np.array([2 / 9, 1 / 3, 4 / 9]),
        b_error=np.array([2 / 9, 1 / 3 - 1, 4 / 9]),
        c=np.array([1 / 2, 3 / 4]),
    )
    interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

    def order(self, terms):
        return 3


class Unrolled(diffrax.AbstractAdaptiveSolver):
    """A base's own tableau, its stages one after the other, on a single array.

    Diffrax runs the stages of a Runge-Kutta method in a loop, which on small networks
    takes longer than the stages. The paper's own solvers are written like this one.
    """

    base: Any
    term_structure: ClassVar = diffrax.AbstractTerm

    @property
    def interpolation_cls(self):
        return self.base.interpolation_cls

    def order(self, terms):
        return self.base.order(terms)

    def init(self, terms, t0, t1, y0, args):
        return None

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del solver_state, made_jump
        tableau, control, ks = self.base.tableau, terms.contr(t0, t1), []

        def combine(weights):
            pairs = zip(map(float, weights), ks, strict=True)
            return sum((w * k for w, k in pairs if w != 0), jnp.zeros_like(y0))

        for a, c in zip([(), *tableau.a_lower], [0.0, *tableau.c], strict=True):
            y = y0 + combine(a) if len(a) else y0
            ks.append(terms.vf_prod(t0 + float(c) * (t1 - t0), y, args, control))
        y1 = y0 + combine(tableau.b_sol)
        dense_info = dict(y0=y0, y1=y1, k=jnp.stack(ks))
        error = combine(tableau.b_error)
        return y1, error, dense_info, None, diffrax.RESULTS.successful


BASES = {
    "Euler": diffrax.Euler(),
    "Midpoint": diffrax.Midpoint(),
    "Ralston": Ralston3(),
    "RK4": RungeKutta4(),
    "Bosh3": diffrax.Bosh3(),
    "Dopri5": diffrax.Dopri5(),
}


class Method(NamedTuple):
    solver: Any
    adjoint: Any

    def solve(self, field, t0, t1, dt0, y0, args, **kwargs) -> Any:
        """`diffeqsolve` with this solver and this adjoint."""
        term = diffrax.ODETerm(field)
        times = t0, t1, dt0
        kwargs = dict(adjoint=self.adjoint) | kwargs
        return diffrax.diffeqsolve(term, self.solver, *times, y0, args, **kwargs)


# As published: without a check of the round trip.
UNCHECKED = reversax.ReversibleAdjoint(math.inf)


def unrolled(base: str) -> Any:
    solver = BASES[base]
    return Unrolled(solver) if isinstance(solver, diffrax.AbstractERK) else solver


def reversible_methods(base: str, coupling_parameter=0.999) -> dict[str, Method]:
    coupling, adjoint = reversax.McCallumFoster, reversax.ReversibleAdjoint()
    published = reversax.Reversible(BASES[base], coupling(coupling_parameter))
    return {
        PUBLISHED: Method(published, adjoint),
        DEFAULT: Method(reversax.Reversible(BASES[base]), adjoint),
    }


def checkpointed(base: str, checkpoints: int | None = None) -> Method:
    adjoint = diffrax.RecursiveCheckpointAdjoint(checkpoints)
    return Method(unrolled(base), adjoint)


def default_checkpoints(steps: int) -> int:
    """How many Diffrax keeps of so many steps: some sqrt(2 n)."""
    return math.floor(-1.5 + math.sqrt(2 * steps + 0.25)) + 1


def states_kept(name: str, steps: int, checkpoints: int | None = None) -> float:
    """In states of doubles: what of the path is in memory in the backward pass."""
    if name == PUBLISHED:
        return 2.0
    if name == DEFAULT:  # Two twins of two words, and the bits that were shed.
        return 4 + max(256, steps / 4) / BITS_OF_DOUBLE
    return float(checkpoints or default_checkpoints(steps))


@dataclasses.dataclass(frozen=True)
class Training:
    """A loss of `(network, *batch)`, and what minimises it."""

    network: Any
    batches: Callable[[int], tuple]
    """Of the number of the training step."""
    optimiser: optax.GradientTransformation

    def parts(self) -> tuple[Any, Any, Any]:
        weights, rest = eqx.partition(self.network, eqx.is_inexact_array)
        return weights, rest, self.optimiser.init(weights)

    def compile(self, loss: Callable) -> Compiled:
        """One training step: `(weights, state, *batch) -> (weights, state, loss)`."""
        weights, rest, state = self.parts()

        def update(weights, state, *batch):
            of_weights = lambda weights: loss(eqx.combine(weights, rest), *batch)
            value, gradient = jax.value_and_grad(of_weights)(weights)
            updates, state = self.optimiser.update(gradient, state, weights)
            return eqx.apply_updates(weights, updates), state, value

        return jax.jit(update).lower(weights, state, *self.batches(0)).compile()

    def run(
        self, program: Compiled, compile_unchecked: Callable, steps: int, track
    ) -> tuple[Any, list[float], str | None]:
        """The trained network, the losses, and the step at which the check of the
        round trip refused a gradient, from which on training goes on without it."""
        refused = None
        (weights, rest, state), losses = self.parts(), []
        for i in track(range(steps)):
            inputs = weights, state, *self.batches(i)
            try:
                weights, state, value = jax.block_until_ready(program(*inputs))
            except jax.errors.JaxRuntimeError as error:
                if refused is not None or "round trip" not in str(error):
                    raise
                program, refused = compile_unchecked(), f"step {i}"
                weights, state, value = program(*inputs)
            losses.append(float(value))
        return eqx.combine(weights, rest), losses, refused


def unchecked(method: Method) -> Method:
    reversible = isinstance(method.adjoint, reversax.ReversibleAdjoint)
    return method._replace(adjoint=UNCHECKED) if reversible else method


def tracker(description: str, console: Console) -> Callable[[Iterable], Iterable]:
    return ft.partial(track, description=description, console=console, transient=True)


def temporary_bytes(program: Compiled) -> int:
    memory = program.memory_analysis()
    assert memory is not None, "this backend does not say how much memory it uses"
    return memory.temp_size_in_bytes


def compiled_gradient(loss: Callable, weights: Any, *inputs) -> Compiled:
    return jax.jit(jax.value_and_grad(loss)).lower(weights, *inputs).compile()


def median_times(programs: Mapping[str, tuple], repeats: int) -> dict[str, float]:
    """Seconds of each `(program, *inputs)`; they are run in turn."""
    times = {name: [] for name in programs}
    for repeat in range(repeats + 1):
        for name, (program, *inputs) in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*inputs))
            if repeat > 0:  # The first is to warm up.
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def first_to_reach(
    error_at: Callable[[Any], float], rungs: Sequence, target: float
) -> tuple[Any, float]:
    """The first rung at which the error is no larger than the target, and the error;
    the last rung if none is."""
    rung, error = rungs[-1], math.inf
    for rung in rungs:
        error = error_at(rung)
        if error <= target:
            break
    return rung, error


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """How accurate gradients are, by how fine the solves are."""

    loss_by: Callable[[Method, int], Callable]
    """Of a method and `max_steps`: a loss of `(weights, rung)`."""
    weights: Any
    reference: Any
    """The gradient, as exactly as can be."""
    rungs: Sequence
    """Numbers of steps, or tolerances, from coarse to fine."""
    curve: Sequence
    """Those of which to note all errors."""
    published: Any
    """The rung of the published setting."""

    def errors(self, method: Method) -> Callable[[Any], float]:
        """A function of the rung; compiled once."""
        most = int(max(*self.rungs, *self.curve, 4096))
        gradient = jax.jit(jax.grad(self.loss_by(method, most)))

        def error(rung) -> float:
            found = gradient(self.weights, jnp.asarray(rung, float))
            difference = relative_error(found, self.reference)
            return difference if math.isfinite(difference) else math.inf

        return error

    def compare(self, methods: Mapping[str, Method], repeats: int) -> tuple:
        """The time of gradients as accurate as that of the last method in its
        published setting: a row for each method; and its errors along the curve."""
        # What is measured of the published method does not depend on the check.
        errors = {name: self.errors(unchecked(m)) for name, m in methods.items()}
        curves = {name: list(map(error, self.curve)) for name, error in errors.items()}
        *_, baseline = methods
        target = max(REACHABLE, errors[baseline](self.published))
        rows, programs = [], {}
        for name, method in methods.items():
            rung, error = first_to_reach(errors[name], self.rungs, target)
            at_rung = ft.partial(self.loss_by(method, max(int(rung), 1)), rung=rung)
            programs[name] = compiled_gradient(at_rung, self.weights), self.weights
            row = {"method": name, "error as published": errors[name](self.published)}
            row |= {"target": target, "rung": rung}
            rows.append(row | {"error": error if error <= target else None})
        seconds = median_times(programs, repeats)
        for row in rows:
            name = row["method"]
            row["gradient (ms)"] = seconds[name] * 1e3
            row["speed-up"] = seconds[baseline] / seconds[name]
        return rows, curves
