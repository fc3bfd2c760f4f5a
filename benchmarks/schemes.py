"""What the two couplings and the two arithmetics of `Reversible` are worth.

- speed:      the time of one value and gradient, on the small network of gradient.py
              with constant steps, in single precision. Symmetric over Euler is of order
              two, and so compared with Heun under `RecursiveCheckpointAdjoint()`. The
              errors of both are computed in double precision, where they can be seen.
- precision:  the error of the final state against the evaluations of the vector field,
              in double precision, of Euler, Bosh3 and Tsit5 alone and under either
              coupling. Counted are the stages behind an increment: one that is used
              again by the next step belongs to that.
- damped:     `y' = MLP(y) - 5 y`, which contracts, in single precision. The loss is the
              mean of `y**2` over 40 times. Errors are relative to Tsit5 in double
              precision with ten times the steps; that of the gradient is one for all
              weights and initial states together.

The published coupling, McCallumFoster, is always in floating point.
"""

import argparse
import functools as ft
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from gradient import Setting
from matplotlib.figure import Figure
from measuring import (
    add_parts,
    begin,
    interleaved_times,
    parser_of,
    print_table,
    relative_error,
    run_parts,
    write_json,
)
from rich.console import Console
from rich.progress import track

import reversax


class RungeKutta4(diffrax.AbstractERK):
    """A user's own tableau."""

    tableau: ClassVar[diffrax.ButcherTableau] = diffrax.ButcherTableau(
        a_lower=(np.array([0.5]), np.array([0.0, 0.5]), np.array([0.0, 0.0, 1.0])),
        b_sol=np.array([1 / 6, 1 / 3, 1 / 3, 1 / 6]),
        b_error=np.array([1 / 6 - 1, 1 / 3, 1 / 3, 1 / 6]),
        c=np.array([0.5, 0.5, 1.0]),
    )
    interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

    def order(self, terms):
        return 4


def solve(field, solver, t1, dt0, y0, args=None, **kwargs) -> Any:
    term = diffrax.ODETerm(field)
    return diffrax.diffeqsolve(term, solver, 0.0, t1, dt0, y0, args, **kwargs)


# Of speed, at most these ratios are required.
REQUIRED_TO_HEUN = {"batched": 0.65, "vmap": 0.45}
REQUIRED_FIXED_TO_FLOATING = 1.1

FIXED, FLOATING = "fixed point", "floating point"
ARITHMETICS = {FIXED: reversax.FixedPoint(), FLOATING: reversax.FloatingPoint()}
CHECKPOINT = diffrax.RecursiveCheckpointAdjoint()
HEUN, SYMMETRIC_EULER = "Heun, checkpoint", f"Symmetric, Euler, {FIXED}"
FAST = {HEUN: (diffrax.Heun(), CHECKPOINT)} | {
    f"Symmetric, {type(base).__name__}, {name}": (
        reversax.Reversible(base, reversax.Symmetric(), arithmetic),
        reversax.ReversibleAdjoint(),
    )
    for base in (diffrax.Euler(), diffrax.Tsit5())
    for name, arithmetic in ARITHMETICS.items()
}


def final_states(setting: Setting, solver: Any, adjoint: Any) -> Callable:
    """A function of weights and initial states."""
    _, rest = setting.inputs()
    over_batch = setting.batching == "vmap"

    def field(t, y, mlp):
        return 0.5 * (mlp(y) if over_batch else jax.vmap(mlp)(y))

    def solve_batch(weights, y0s):
        mlp, dt = eqx.combine(weights, rest), 1 / setting.steps
        kwargs = dict(max_steps=setting.steps + 1, adjoint=adjoint)
        one = lambda y0: solve(field, solver, 1.0, dt, y0, mlp, **kwargs).ys
        return (jax.vmap(one) if over_batch else one)(y0s)

    return solve_batch


def truncation_errors(setting: Setting) -> dict[str, float]:
    """Of the final states, for the two schemes of order two."""
    args, _ = setting.inputs()
    with jax.enable_x64(True):
        args = jax.tree.map(np.float64, args)
        run = lambda *method: jax.jit(final_states(setting, *method))(*args)
        reference = run(diffrax.Dopri8(), CHECKPOINT)
        error = lambda name: relative_error(run(*FAST[name]), reference)
        return {name: error(name) for name in (HEUN, SYMMETRIC_EULER)}


def measure_times(setting: Setting, repeats: int) -> dict[str, list[float]]:
    args, _ = setting.inputs()
    compiled = {}
    for name, method in FAST.items():
        batch = final_states(setting, *method)
        loss = lambda weights, y0s, batch=batch: jnp.sum(batch(weights, y0s) ** 2)
        gradient = jax.value_and_grad(loss, argnums=(0, 1))
        run = jax.jit(gradient).lower(*args).compile()
        compiled[name] = ft.partial(run, *args)
    return interleaved_times(compiled, repeats)


def requirements(medians: dict[str, dict[str, float]]) -> Iterator[dict]:
    for batching, median in medians.items():
        comparisons: list[tuple] = [(SYMMETRIC_EULER, HEUN, REQUIRED_TO_HEUN[batching])]
        for base in ("Euler", "Tsit5"):
            pair = [f"Symmetric, {base}, {arithmetic}" for arithmetic in ARITHMETICS]
            comparisons.append((*pair, REQUIRED_FIXED_TO_FLOATING))
        for name, other, required in comparisons:
            ratio = median[name] / median[other]
            row = dict(batching=batching, what=f"{name} / {other}", measured=ratio)
            yield row | {"at most": required, "met": ratio <= required}


def speed(options: argparse.Namespace, console: Console) -> list[dict]:
    steps = options.steps
    make = lambda kind: Setting("small", 64, steps, kind, "constant", options.seed)
    settings = [make("batched"), make("vmap")]
    errors = truncation_errors(settings[0])
    rows, cells, medians = [], [], {}
    for setting in track(settings, "speed", console=console, transient=True):
        times = measure_times(setting, options.repeats)
        median = {name: statistics.median(ts) for name, ts in times.items()}
        medians[setting.batching] = median
        for name, ts in times.items():
            contestant = dict(batching=setting.batching, contestant=name)
            ratio, error = median[name] / median[HEUN], errors.get(name)
            shown = {"time (ms)": median[name] * 1e3, "ratio": ratio, "error": error}
            cells.append(contestant | shown)
            rows.append(contestant | dict(steps=steps, times=ts, error=error))
    caption = (
        f"Medians of {options.repeats} runs in turn; ratios are to {HEUN}. Errors are "
        f"relative, of the final states after {steps} steps in double precision."
    )
    print_table(console, "Speed of one gradient", cells, caption)
    print_table(console, "Required ratios of times", list(requirements(medians)))
    return rows


def kepler(t, y, args):
    position, velocity = y[:2], y[2:]
    return jnp.concatenate([velocity, -position / jnp.linalg.norm(position) ** 3])


def van_der_pol(t, y, args):
    return jnp.stack([y[1], (1 - y[0] ** 2) * y[1] - y[0]])


def lotka_volterra(t, y, args):
    rates = jnp.stack([y[0] * (1.5 - y[1]), y[1] * (y[0] - 3)])
    return rates + 0.1 * jnp.sin(t)


T1 = 3.0
PROBLEMS = {
    "Kepler": (kepler, (0.6, 0.0, 0.0, math.sqrt(1.4 / 0.6))),  # Eccentricity 0.4.
    "van der Pol": (van_der_pol, (2.0, 0.0)),
    "driven Lotka-Volterra": (lotka_volterra, (1.0, 1.0)),
}
BASES = {1: diffrax.Euler(), 3: diffrax.Bosh3(), 5: diffrax.Tsit5()}
NUM_STAGES = {1: 1, 3: 3, 5: 6}  # Those behind the increment.
COUPLINGS = {
    "base alone": None,
    "McCallumFoster(0.999)": reversax.McCallumFoster(),
    "Symmetric()": reversax.Symmetric(),
}
ROUND_OFF = 1e-11  # Slopes are measured of errors above it.


def slope(evaluations: list[int], errors: list[float]) -> float:
    points = zip(evaluations, errors, strict=True)
    x, y = np.log([p for p in points if p[1] > ROUND_OFF][-3:]).T
    return float(np.polyfit(x, y, 1)[0])


def draw(rows: list[dict], path: Path) -> None:
    figure = Figure(figsize=(9, 9), layout="constrained")
    grid = figure.subplots(len(PROBLEMS), len(BASES), sharex=True, sharey=True)
    styles = dict(zip(COUPLINGS, ["0.45 s", "C1 ^", "C0 o"], strict=True))
    for row in rows:
        i, j = list(PROBLEMS).index(row["problem"]), list(BASES).index(row["order"])
        color, marker = styles[row["scheme"]].split()
        kwargs = dict(color=color, marker=marker, markersize=5, label=row["scheme"])
        grid[i, j].loglog(row["evaluations"], row["errors"], **kwargs)
    for j, (order, base) in enumerate(BASES.items()):
        grid[0, j].set_title(f"{type(base).__name__}, of order {order}")
        grid[-1, j].set_xlabel("vector field evaluations")
    for i, problem in enumerate(PROBLEMS):
        grid[i, 0].set_ylabel(f"{problem}\nrelative error at t = {T1:g}")
    for axes in grid.flat:
        axes.grid(color="0.9")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    figure.savefig(path, dpi=150)


def precision_rows(quick: bool, console: Console) -> Iterator[dict]:
    steps = [20, 40, 80] if quick else [20, 40, 80, 160, 320, 640]
    tight = diffrax.PIDController(rtol=1e-13, atol=1e-13)
    for problem in track(PROBLEMS, "precision", console=console, transient=True):
        field, y0 = PROBLEMS[problem]
        options = dict(t1=T1, y0=jnp.array(y0), max_steps=100_000)
        run = ft.partial(solve, field, **options)
        exact = run(diffrax.Dopri8(), dt0=None, stepsize_controller=tight).ys
        for order, base in BASES.items():
            for scheme, coupling in COUPLINGS.items():
                solver, per_step = base, NUM_STAGES[order]
                if coupling is not None:
                    solver, per_step = reversax.Reversible(base, coupling), 2 * per_step
                run_by = jax.jit(ft.partial(run, solver))
                errors = [relative_error(run_by(dt0=T1 / n).ys, exact) for n in steps]
                row = dict(problem=problem, order=order, scheme=scheme, errors=errors)
                yield row | dict(evaluations=[per_step * n for n in steps])


def precision(options: argparse.Namespace, console: Console) -> list[dict]:
    with jax.enable_x64(True):
        rows = list(precision_rows(options.quick, console))
    caption = (
        "Of log error by log evaluations, through the last three errors above "
        f"{ROUND_OFF}. Symmetric in fixed point, McCallumFoster in floating point."
    )
    slopes = {}
    for row in rows:
        base = type(BASES[row["order"]]).__name__
        cells = slopes.setdefault((row["problem"], base), {})
        cells[row["scheme"]] = slope(row["evaluations"], row["errors"])
    cells = [dict(problem=p, base=b) | row for (p, b), row in slopes.items()]
    print_table(console, "Measured slopes", cells, caption)
    if options.figure is not None:
        draw(rows, options.figure)
    return rows


DAMPING, DT, BATCH, NUM_TS, RESTART_EVERY = 5.0, 0.02, 32, 40, 20


def damped_contestants(quick: bool) -> Iterator[tuple]:
    """Base, coupling, arithmetic, after how many steps to restart; and the solver."""
    for base in [diffrax.Bosh3()] if quick else [diffrax.Bosh3(), RungeKutta4()]:
        of, wrap = type(base).__name__, ft.partial(reversax.Reversible, base)
        yield of, "Symmetric()", FIXED, None, wrap()
        for every in (None, RESTART_EVERY):
            solver = wrap(arithmetic=ARITHMETICS[FLOATING])
            yield of, "Symmetric()", FLOATING, every, solver
        for coupling_parameter in (0.999, 0.99, 0.9):
            name = f"McCallumFoster({coupling_parameter})"
            solver = wrap(reversax.McCallumFoster(coupling_parameter))
            yield of, name, FLOATING, None, solver
    yield "Heun", "BacksolveAdjoint()", None, None, diffrax.Heun()


def damped_gradient(solver, adjoint, steps: int, refined: int, inputs, rest) -> tuple:
    """Value and gradient, of `refined` times as many steps."""
    t1 = DT * steps

    def field(t, y, weights):
        return jax.vmap(eqx.combine(weights, rest))(y) - DAMPING * y

    def loss(inputs):
        weights, y0 = inputs
        ts = jnp.linspace(t1 / NUM_TS, t1, NUM_TS)
        kwargs = dict(adjoint=adjoint, saveat=diffrax.SaveAt(ts=ts))
        kwargs |= dict(max_steps=steps * refined + 1)
        ys = solve(field, solver, t1, DT / refined, y0, weights, **kwargs).ys
        return jnp.mean(ys**2)

    return eqx.filter_jit(jax.value_and_grad(loss))(inputs)


def checked_gradient(solver, restart_every, *problem) -> tuple[tuple, bool | None]:
    """Value and gradient, and whether the check of the round trip withholds them."""
    if not isinstance(solver, reversax.Reversible):
        return damped_gradient(solver, diffrax.BacksolveAdjoint(), *problem), None
    adjoint = reversax.ReversibleAdjoint(restart_every=restart_every)
    try:
        return jax.block_until_ready(damped_gradient(solver, adjoint, *problem)), False
    except eqx.EquinoxRuntimeError:
        adjoint = reversax.ReversibleAdjoint(math.inf, restart_every)
        return damped_gradient(solver, adjoint, *problem), True


def damped(options: argparse.Namespace, console: Console) -> list[dict]:
    steps = NUM_TS if options.quick else 200
    (weights, y0), rest = Setting("small", BATCH, 0, "", "", options.seed).inputs()
    inputs = weights, y0
    with jax.enable_x64(True):
        problem = steps, 10, jax.tree.map(np.float64, inputs), rest
        reference = damped_gradient(diffrax.Tsit5(), CHECKPOINT, *problem)
    problem = steps, 1, inputs, rest
    caption = (
        f"Relative errors after {steps} steps of {DT}, at a damping of {DAMPING:g}. "
        "Refused: by the check of the round trip, at its default tolerance; shown is "
        "then what it withholds. Restarts: at every so many steps, from a kept pair."
    )
    keys, rows = ("base", "coupling", "arithmetic", "restarts"), []
    contestants = list(damped_contestants(options.quick))
    for contestant in track(contestants, "damped", console=console, transient=True):
        *names, solver = contestant
        gradient, refused = checked_gradient(solver, names[-1], *problem)
        value_error, gradient_error = map(relative_error, gradient, reference)
        row = dict(zip(keys, names, strict=True))
        row |= {"value error": value_error, "gradient error": gradient_error}
        rows.append(row | dict(refused=refused))
    print_table(console, "Damped", rows, caption)
    return rows


PARTS = (speed, precision, damped)


def parse_options() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_parts(parser, PARTS)
    add = parser.add_argument
    add("--steps", type=int, default=1000, help="of the speed part")
    add("--figure", type=Path, metavar="PATH", help="where to draw the precision")
    if parser.parse_args().quick:
        parser.set_defaults(steps=50, repeats=2)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    console, about = begin(options)
    results = dict(run_parts(PARTS, options, console))
    write_json(options.json, about, results)


if __name__ == "__main__":
    main()
