"""What symmetric multistep methods cost, and how far they are stable.

- `network`: time and memory of a gradient through a neural ODE, in single precision,
  with the fewest steps with which it is accurate enough, against Tsit5's with
  checkpoints, in a rematerialised scan, and `Reversible(Tsit5)`
- `counts`: evaluations of the vector field, of a solve and of its gradient
- `problems`: the evaluations with which a solution is within 1e-6, against Tsit5's
- `stability`: the longest steps with which solutions of `y' = a y` do not grow

    python benchmarks/multistep.py                             # all
    python benchmarks/multistep.py network                     # one of them
    python benchmarks/multistep.py network --networks 64x1     # width 64, one state
    python benchmarks/multistep.py --quick                     # to see that it runs

The steps of `network` are found in double precision: the error is that of the discrete
solve. What round-off adds to it in single precision, where it is timed, is in a column
of its own; at 1e-7 it is more. Times are medians of runs in turn. It needs the extra
`examples`.
"""

import argparse
import dataclasses
import functools as ft
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from measuring import (
    add_parts,
    as_cell,
    begin,
    compile_program,
    interleaved_times,
    medians,
    parser_of,
    print_table,
    relative_error,
    run_parts,
    write_json,
)
from methods import (
    CHECKPOINTED,
    REVERSED,
    Method,
    count_calls,
    make_gradient,
    make_loss,
    make_solve,
)
from problems import Problem, kepler, lorenz, lotka_volterra, neural_ode, van_der_pol
from rich.console import Console
from rich.progress import track

from reversax._schemes.multistep_weights import ORDERS, Weights, weights_of_order

NETWORKS = {"256x256": (1e-4, 1e-7), "64x64": (1e-3, 1e-6), "64x1": (1e-3, 1e-6)}
"""Width and batch, and the targets of the relative error of the gradient."""
CHECKPOINTS = Method("Diffrax", "Tsit5", "checkpoints", CHECKPOINTED)
RIVALS = (
    CHECKPOINTS,
    Method("plain JAX", "Tsit5", "rematerialised"),
    Method("reversax", "Reversible(Tsit5)", "reversed", REVERSED),
)
SIX, SIX_UNCORRECTED, FOUR, FOUR_BY_BOSH3 = (
    Method("reversax", f"Reversible(SymmetricMultistep({of}))", "reversed", REVERSED)
    for of in ("6", "6, correct_every=None", "4", "4, starter=Bosh3")
)
REFERENCE = Method("", "Dopri8", "", CHECKPOINTED, adaptive=True)
FINEST = 1e-12  # The tolerance of the reference.
LIMIT = 4096  # Steps to be tried.
SECONDS = 5.0  # Of repeats of one program.


# The fewest steps.

Error = Callable[[int], float]
"""Of a number of steps."""


def fewest(error: Error, target: float, least: int = 8) -> int | None:
    """Steps within the target, as are the next more, on a grid of factors 2**(1/8):
    found by doubling and halving, as errors fall. `None` if there are none."""
    steps_of = lambda k: round(least * 2 ** (k / 8))
    within = ft.cache(lambda k: error(steps_of(k)) <= target)
    missed, met = -8, 0
    while not within(met):
        missed, met = met, met + 8
        if steps_of(met) > LIMIT:
            return None
    while met - missed > 1 and met > 0:
        middle = (missed + met) // 2
        missed, met = (missed, middle) if within(middle) else (middle, met)
    while not (within(met) and within(met + 1)):
        met += 1
    return steps_of(met)


def error_of(problem: Problem, method: Method, reference, *, gradient: bool) -> Error:
    """Of the gradient, or of the solution."""
    run = compiled(problem, method, LIMIT, gradient=gradient)

    @ft.cache
    def error(steps):
        return relative_error(run(problem.t1 / steps), reference)

    return error


def compiled(problem: Problem, method: Method, max_steps: int, *, gradient: bool):
    """Of the length of a step, or of the tolerance."""
    if gradient:
        of_loss = make_gradient(make_loss(problem, method, max_steps, throw=False))
        fn = lambda inputs, resolution: of_loss(inputs, resolution)[1]
    else:
        solve = make_solve(problem, method, max_steps, throw=False)
        fn = lambda inputs, resolution: solve(*inputs, resolution)[0]
    program = compile_program(fn, problem.inputs, np.float64(1))
    return lambda x: jax.block_until_ready(program.run(problem.inputs, np.float64(x)))


# Gradients of networks.

CAPTION = (
    "Errors of the gradient in double precision, and in single, where it is timed; "
    "times and bytes by those of Tsit5 with checkpoints, in a rematerialised scan, "
    "and of Reversible(Tsit5), the twins."
)


def short(method: Method) -> str:
    """`Reversible(SymmetricMultistep(6))` as `Multistep(6)`."""
    name = method.name.removesuffix(", reversed")
    return name.removeprefix("Reversible(Symmetric").removesuffix(
        ")" if "Multistep" in name else ""
    )


def of_name(name: str, seed: int) -> Problem:
    width, batch = map(int, name.split("x"))
    return neural_ode(seed, width, batch)


def network(options: argparse.Namespace, console: Console) -> list[dict]:
    if options.quick:
        methods, networks = (*RIVALS, FOUR), {"4x2": (1e-2,)}
    else:
        methods = *RIVALS, SIX, FOUR, FOUR_BY_BOSH3
        networks = {name: NETWORKS[name] for name in options.networks}
    rows = []
    for name, targets in networks.items():
        problem = of_name(name, options.seed)
        with jax.enable_x64(True):
            true = compiled(problem, REFERENCE, LIMIT, gradient=True)(FINEST)
            searched = {}
            for method in methods:
                if method.scheme not in searched:
                    known = problem, method.scheme, true
                    searched[method.scheme] = error_of(*known, gradient=True)
            for target in targets:
                for error in searched.values():
                    fewest(error, target)
        for target in targets:
            of_this = timed(problem, methods, searched, target, true, options)
            rows += [{"width x batch": name, "within": target} | x for x in of_this]
            title = f"Network {name}, gradient within {target:g}"
            print_table(console, title, of_this, CAPTION)
            for row in of_this:  # To be pasted.
                print("|", " | ".join(map(as_cell, row.values())), "|")
    return rows


def timed(problem, methods, searched, target, true, options) -> list[dict]:
    at, rows, runs = problem.cast(np.float32), {}, {}
    inputs = jax.tree.map(jnp.asarray, at.inputs)
    for method in methods:
        error = searched[method.scheme]
        steps = fewest(error, target)
        assert steps is not None
        gradient = make_gradient(make_loss(at, method, steps))
        step = jnp.float32(at.t1 / steps)
        program = compile_program(gradient, inputs, step)
        runs[method] = ft.partial(program.run, inputs, step)
        rows[method] = {
            "method": short(method),
            "steps": steps,
            "error": error(steps),
            "in single": relative_error(runs[method]()[1], true),
            "compile (s)": program.preparation_seconds,
            "bytes": program.temporary_bytes,
        }
    times = medians(interleaved_times(runs, options.repeats, SECONDS))
    checkpoints, scan, twins = (times[method] for method in RIVALS)
    for method, row in rows.items():
        row["ms"] = times[method] * 1e3
        row["/ checkpoints"] = times[method] / checkpoints
        row["/ scan"] = times[method] / scan
        row["/ twins"] = times[method] / twins
        row["bytes / twins'"] = row["bytes"] / rows[RIVALS[2]]["bytes"]
    return list(rows.values())


# Evaluations.


def forward_of(problem: Problem, method: Method, steps: int) -> Callable:
    solve = make_solve(problem, method, steps)
    dt = np.float32(problem.t1 / steps)
    return lambda inputs: jnp.mean(solve(*inputs, dt)[0] ** 2)


def made(method: Method, steps: int, wrap: Callable, problem: Problem) -> Callable:
    return wrap(forward_of(problem, method, steps))


def counts(options: argparse.Namespace, console: Console) -> list[dict]:
    # Large enough for what a pull-back reads to be kept.
    problem = neural_ode(options.seed, width=64, batch=8).cast(np.float32)
    methods = (*RIVALS[1:], SIX, SIX_UNCORRECTED, FOUR, FOUR_BY_BOSH3)
    few, rows = 64, []
    methods = methods[1:3] if options.quick else methods
    for method in track(methods, "counts", console=console, transient=True):
        row: dict = {"method": short(method)}
        for name, wrap in (("solve", lambda x: x), ("gradient", jax.value_and_grad)):
            first, both = [
                count_calls(problem, ft.partial(made, method, steps, wrap))
                for steps in (few, 2 * few)
            ]
            row[f"{name}, a step"] = (both - first) / few
            row[f"{name}, besides"] = 2 * first - both
        rows.append(row)
    caption = (
        f"Of {few} and {2 * few} steps. A gradient has those of its solve, and each "
        "pull-back's of the value; besides is what does not grow with the steps."
    )
    print_table(console, "Evaluations of the vector field", rows, caption)
    return rows


def classics() -> tuple[Problem, ...]:
    y0 = np.array([0.5, 0.0, 0.0, math.sqrt(1.5 / 0.5)])
    eccentric = dataclasses.replace(kepler(), name="Kepler, e = 0.5", y0=y0)
    return eccentric, lotka_volterra(), van_der_pol(), lorenz()


def problems(options: argparse.Namespace, console: Console) -> list[dict]:
    target = 1e-2 if options.quick else 1e-6
    methods = (CHECKPOINTS, RIVALS[2], SIX, SIX_UNCORRECTED, FOUR)
    chosen = classics()
    if options.quick:
        methods, chosen = methods[::2], chosen[2:3]
    rows = []
    for problem in track(chosen, "problems", console=console, transient=True):
        with jax.enable_x64(True):
            true = compiled(problem, REFERENCE, LIMIT, gradient=False)(FINEST)
            errors = {m: error_of(problem, m, true, gradient=False) for m in methods}
            found = {m: fewest(error, target) for m, error in errors.items()}
        single, of_tsit5 = problem.cast(np.float32), None
        for method, steps in found.items():
            row: dict = {"problem": problem.name, "method": short(method)}
            row |= {"steps": steps, "error": None, "evaluations": None}
            row["/ Tsit5's"] = None
            rows.append(row)
            if steps is None:
                continue
            forward = ft.partial(forward_of, method=method, steps=steps)
            evaluations = count_calls(single, forward)
            of_tsit5 = of_tsit5 or evaluations
            row["error"] = errors[method](steps)
            row["evaluations"] = evaluations
            row["/ Tsit5's"] = evaluations / of_tsit5
    print_table(console, f"Evaluations, for a solution within {target:g}", rows)
    return rows


# Stability.

RATE = 0.1
"""Modes that grow by `exp(RATE h |a|)` a step, and no more, are taken to be stable: in
the time in which the solution changes by the factor e they grow by a tenth."""
GRID = 0.005


def growth(weights: Weights, a: complex, every: int | None) -> float:
    """`log |x|` a step, of the mode that grows most, of `y' = a y` by steps of 1: the
    largest eigenvalue of as many steps as lie between two corrections."""
    k = weights.steps
    step = np.eye(2 * k, k=1, dtype=complex)  # Of the values, and the derivatives.
    step[k - 1] = 0
    step[k - 1, :k] = -np.array(weights.alphas[:k])
    step[k - 1, k + 1 :] = weights.betas[1:k]
    step[-1] = a * step[k - 1]
    if every is None:
        return math.log(np.abs(np.linalg.eigvals(step)).max())
    amplitude = np.array([*weights.values, *weights.slopes])
    alternating = np.array([(-1) ** j for j in range(k)] + [0] * k)
    corrected = np.eye(2 * k) - np.outer(alternating, amplitude)
    between = np.linalg.matrix_power(step, every) @ corrected
    return math.log(np.abs(np.linalg.eigvals(between)).max()) / every


def longest(weights: Weights, direction: complex, every: int | None) -> tuple:
    """The longest stable step, and the most growth, in `h |a|`, up to half of it."""
    rates: list[float] = []
    while not rates or rates[-1] <= RATE:
        length = GRID * (len(rates) + 1)
        rates.append(growth(weights, length * direction, every) / length)
    stable = len(rates) - 1
    return GRID * stable, max([0.0, *rates[: stable // 2]])


def stability(options: argparse.Namespace, console: Console) -> list[dict]:
    rows = []
    for order in ORDERS:
        for every in (None, order, 8, 16, 32):
            row: dict = {"order": order, "correct_every": str(every)}
            for name, direction in (("damped", -1), ("oscillating", 1j)):
                known = weights_of_order(order), direction, every
                row[f"{name}: up to"], row[f"{name}: growth"] = longest(*known)
            rows.append(row)
    caption = (
        "The largest h |a| up to which no mode grows by more than "
        f"exp({RATE} h |a|) a step; and by how much one does up to half of that, as a "
        "share of h |a|."
    )
    print_table(console, "Longest stable steps of y' = a y", rows, caption)
    return rows


PARTS = (network, counts, problems, stability)


def main() -> None:
    parser = parser_of(__doc__)
    add_parts(parser, PARTS)
    add, names = parser.add_argument, list(NETWORKS)
    add("--networks", nargs="+", choices=names, default=names, help="these only")
    parser.set_defaults(repeats=9)
    options = parser.parse_args()
    console, about = begin(options)
    write_json(options.json, about, dict(run_parts(PARTS, options, console)))


if __name__ == "__main__":
    main()
