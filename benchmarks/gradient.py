"""What a gradient through a solve costs: time, memory, compilation, evaluations.

    python benchmarks/gradient.py [--quick] [--steps N] [--repeats K] [--json PATH]

The field is `y' = MLP(y) / 2`, two hidden layers of tanh, a state of 8 numbers, over
t in [0, 1], and the gradient is that of `sum(y(1)**2)` with respect to the weights and
the initial states. A batch is solved either as one state, "batched" inside the field,
or by a "vmap" of the solve. Steps are "constant", or "adaptive": a PID controller whose
`dtmax` makes the steps about as many. Three contestants:

- reversible:  `Reversible(Tsit5())` with `ReversibleAdjoint()`
- checkpoint:  `Tsit5()` with `RecursiveCheckpointAdjoint()`
- scan:        plain Tsit5, its six stages unrolled, in a `jax.lax.scan` over
               `jax.checkpoint`ed steps: every state is stored, nothing else is. It is
               the least work a gradient of Tsit5 can do. It cannot adapt its steps, so
               its cells are empty there.

Ratios are to "checkpoint". That one recomputes the more the longer the solve (its work
is n log n in the number of steps n), so the ratios depend on the number of steps. The
"difference" is the relative one of the whole gradient, again to "checkpoint":
"reversible" is another scheme of the same order, so there it is of the size of the
truncation errors, and for "scan" of round-off.
"""

import argparse
import dataclasses
import datetime
import functools as ft
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import reversax

STATE_SIZE = 8
WIDTH_AND_BATCH = {"small": (64, 64), "large": (512, 16), "counting": (8, 2)}
BASELINE = "checkpoint"
CONTESTANTS = ("reversible", BASELINE, "scan")

# At most these ratios of reversible to checkpoint are required on the small network.
REQUIRED_TIME = {"batched": 1.0, "vmap": 0.7}
REQUIRED_COMPILE = 1.0


@dataclasses.dataclass(frozen=True)
class Setting:
    """One problem that all the contestants differentiate."""

    network: str
    steps: int
    batching: str
    stepping: str
    seed: int

    @property
    def contestants(self) -> tuple[str, ...]:
        adaptive = self.stepping == "adaptive"
        return tuple(c for c in CONTESTANTS if not (adaptive and c == "scan"))

    @property
    def title(self) -> str:
        return f"{self.network}, {self.batching}, {self.stepping}"

    def inputs(self) -> tuple[eqx.nn.MLP, jax.Array]:
        key_mlp, key_y0 = jax.random.split(jax.random.PRNGKey(self.seed))
        width, batch = WIDTH_AND_BATCH[self.network]
        sizes = STATE_SIZE, STATE_SIZE, width, 2
        mlp = eqx.nn.MLP(*sizes, activation=jnp.tanh, key=key_mlp)
        return mlp, jax.random.normal(key_y0, (batch, STATE_SIZE))


@dataclasses.dataclass
class Result:
    """What was measured of one contestant."""

    times: list[float] = dataclasses.field(default_factory=list)
    trace_times: list[float] = dataclasses.field(default_factory=list)
    compile_times: list[float] = dataclasses.field(default_factory=list)
    temp_bytes: int = 0
    accepted_steps: float = 0
    evaluations_forward: float = 0
    evaluations_gradient: float = 0
    gradient: Any = None
    difference: float = 0

    @property
    def time(self) -> float:
        return statistics.median(self.times)

    @property
    def preparation_time(self) -> float:
        both = zip(self.trace_times, self.compile_times, strict=True)
        return statistics.median(map(sum, both))


# A solve takes a field `f(t, y, mlp)`, the initial state and the network, and returns
# the final state and how many steps it took.


def diffrax_solve(setting: Setting, contestant: str) -> Callable:
    dt = 1 / setting.steps
    if setting.stepping == "constant":
        controller, max_steps = diffrax.ConstantStepSize(), setting.steps + 1
    else:
        controller = diffrax.PIDController(rtol=1e-6, atol=1e-6, dtmax=dt)
        max_steps = 2 * setting.steps
    solver, adjoint = diffrax.Tsit5(), diffrax.RecursiveCheckpointAdjoint()
    if contestant == "reversible":
        solver, adjoint = reversax.Reversible(solver), reversax.ReversibleAdjoint()

    def solve(field, y0, mlp):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            solver,
            t0=0.0,
            t1=1.0,
            dt0=dt,
            y0=y0,
            args=mlp,
            stepsize_controller=controller,
            max_steps=max_steps,
            adjoint=adjoint,
        )
        assert solution.ys is not None
        return solution.ys[0], solution.stats["num_accepted_steps"]

    return solve


def scan_solve(setting: Setting) -> Callable:
    dt = 1 / setting.steps
    tableau = diffrax.Tsit5.tableau
    b = np.trim_zeros(tableau.b_sol, "b")  # The seventh stage is for the error alone.
    a = [np.zeros(0), *tableau.a_lower][: len(b)]
    c = [0.0, *tableau.c][: len(b)]

    def combine(weights, ks):
        return dt * sum(float(w) * k for w, k in zip(weights, ks, strict=True))

    def solve(field, y0, mlp):
        # Inside a scan nothing can be merged with the forward pass, so there is no
        # need to pay for preventing it.
        @ft.partial(jax.checkpoint, prevent_cse=False)
        def step(y, i):
            ks = []
            for a_i, c_i in zip(a, c, strict=True):
                y_i = y + combine(a_i, ks) if ks else y
                ks.append(field((i + float(c_i)) * dt, y_i, mlp))
            return y + combine(b, ks), None

        y1, _ = jax.lax.scan(step, y0, jnp.arange(setting.steps))
        return y1, jnp.array(setting.steps)

    return solve


def make_loss(
    setting: Setting, contestant: str, count: Callable | None = None
) -> Callable:
    """`loss(weights, y0s) -> (value, accepted steps)`; a new function at each call, so
    that nothing about it has been cached. `count` is called at each evaluation."""
    mlp, _ = setting.inputs()
    _, static = eqx.partition(mlp, eqx.is_inexact_array)
    scan = contestant == "scan"
    solve = scan_solve(setting) if scan else diffrax_solve(setting, contestant)

    def field(t, y, mlp):
        if count is not None:
            jax.debug.callback(count)
        return 0.5 * (jax.vmap(mlp)(y) if setting.batching == "batched" else mlp(y))

    def loss(weights, y0s):
        mlp = eqx.combine(weights, static)
        solve_one = lambda y0: solve(field, y0, mlp)
        over_batch = setting.batching == "vmap"
        y1s, steps = (jax.vmap(solve_one) if over_batch else solve_one)(y0s)
        return jnp.sum(y1s**2), steps

    return loss


def arguments(setting: Setting) -> tuple:
    mlp, y0s = setting.inputs()
    return eqx.filter(mlp, eqx.is_inexact_array), y0s


def compile_gradient(setting: Setting, contestant: str, result: Result) -> Callable:
    """Compiles from scratch, noting how long it took."""
    args = arguments(setting)
    loss = make_loss(setting, contestant)
    jax.clear_caches()
    gc.collect()
    start = time.perf_counter()
    gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    lowered = jax.jit(gradient).lower(*args)
    traced = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    result.trace_times.append(traced - start)
    result.compile_times.append(end - traced)
    memory = compiled.memory_analysis()
    assert memory is not None
    result.temp_bytes = memory.temp_size_in_bytes
    return compiled


def count_evaluations(setting: Setting, contestant: str, result: Result) -> None:
    """Counts on a narrow network and a batch of two, with the same number of steps.

    A vmapped callback is called once for each member of the batch, a batched one once.
    """
    setting = dataclasses.replace(setting, network="counting")
    calls = 0

    def count():
        nonlocal calls
        calls += 1

    def evaluations_per_step(transform: Callable) -> float:
        nonlocal calls
        calls = 0
        fn = jax.jit(transform(make_loss(setting, contestant, count)))
        *_, steps = jax.tree.leaves(fn(*arguments(setting))[0])
        jax.effects_barrier()
        return calls / float(jnp.sum(steps))

    gradient = lambda loss: jax.value_and_grad(loss, has_aux=True)
    result.evaluations_forward = evaluations_per_step(
        lambda loss: lambda *args: (loss(*args), None)
    )
    result.evaluations_gradient = evaluations_per_step(gradient)


def time_runs(
    setting: Setting, compiled: dict, results: dict[str, Result], repeats: int
) -> None:
    """Times the contestants in turn, so that a slow spell hits them all."""
    args = arguments(setting)
    for contestant, gradient in compiled.items():  # Warms up.
        (_, steps), grads = jax.block_until_ready(gradient(*args))
        results[contestant].accepted_steps = float(jnp.mean(steps))
        results[contestant].gradient = jax.flatten_util.ravel_pytree(grads)[0]
    for _ in range(repeats):
        for contestant, gradient in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(gradient(*args))
            results[contestant].times.append(time.perf_counter() - start)


def measure(
    setting: Setting, repeats: int, compiles: int, note: Callable[[str], None]
) -> dict[str, Result]:
    results = {contestant: Result() for contestant in setting.contestants}
    compiled = {}
    note("compiling")
    for _ in range(compiles):
        for contestant, result in results.items():
            compiled[contestant] = compile_gradient(setting, contestant, result)
    note("timing")
    time_runs(setting, compiled, results, repeats)
    note("counting")
    for contestant, result in results.items():
        count_evaluations(setting, contestant, result)
        reference = results[BASELINE].gradient
        error = jnp.linalg.norm(result.gradient - reference)
        result.difference = float(error / jnp.linalg.norm(reference))
    return results


def settings(options: argparse.Namespace) -> list[Setting]:
    steps = {"small": options.steps, "large": options.large_steps}
    return [
        Setting(network, steps[network], batching, stepping, options.seed)
        for network in (["small"] if options.quick else ["small", "large"])
        for batching in ("batched", "vmap")
        for stepping in ("constant", "adaptive")
    ]


def as_cells(result: Result, baseline: Result) -> list[str]:
    return [
        f"{result.time * 1e3:.1f}",
        f"{result.time / baseline.time:.2f}",
        f"{result.temp_bytes / 1e6:.3f}",
        f"{statistics.median(result.trace_times):.2f}",
        f"{statistics.median(result.compile_times):.2f}",
        f"{result.preparation_time / baseline.preparation_time:.2f}",
        f"{result.accepted_steps:.0f}",
        f"{result.evaluations_forward:.2f}",
        f"{result.evaluations_gradient:.2f}",
        f"{result.difference:.0e}",
    ]


def results_table(measured: dict[Setting, dict[str, Result]]) -> Table:
    caption = (
        "Temporary memory as XLA plans it. Trace includes lowering; the third of these "
        "columns is the ratio of both together. Evaluations of the vector field per "
        "accepted step, in the forward pass and in forward and backward pass together. "
        "The scan takes no adaptive steps."
    )
    table = Table(title="One gradient", caption=caption, caption_justify="left")
    table.add_column("")
    headings = ["time\n(ms)", "ratio", "temp\n(MB)", "trace\n(s)", "compile\n(s)"]
    headings += ["ratio", "steps", "evals\nforward", "evals\ngradient"]
    for heading in [*headings, "gradient\ndifference"]:
        table.add_column(heading, justify="right")
    for setting, results in measured.items():
        table.add_section()
        table.add_row(f"[bold]{setting.title}")
        for contestant in CONTESTANTS:
            cells = ["-"] * 10
            if contestant in results:
                cells = as_cells(results[contestant], results[BASELINE])
            table.add_row(contestant, *cells)
    return table


def requirements_table(measured: dict[Setting, dict[str, Result]]) -> Table:
    table = Table(title="Required of reversible, as ratios to checkpoint")
    for heading in ("small network", "what", "required", "measured", "met"):
        table.add_column(heading)
    for setting, results in measured.items():
        if setting.network != "small":
            continue
        ours, baseline = results["reversible"], results[BASELINE]
        preparation = ours.preparation_time / baseline.preparation_time
        for what, required, ratio in (
            ("time", REQUIRED_TIME[setting.batching], ours.time / baseline.time),
            ("trace and compile", REQUIRED_COMPILE, preparation),
        ):
            row = f"{setting.batching}, {setting.stepping}", what, f"at most {required}"
            table.add_row(*row, f"{ratio:.2f}", "yes" if ratio <= required else "no")
    return table


def circumstances(options: argparse.Namespace) -> dict[str, Any]:
    packages = ("jax", "jaxlib", "diffrax", "equinox", "reversax")
    return dict(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions={name: importlib.metadata.version(name) for name in packages},
        python=platform.python_version(),
        platform=platform.platform(),
        device=str(jax.devices()[0].device_kind),
        cpu_count=os.cpu_count(),
        load_average=os.getloadavg() if hasattr(os, "getloadavg") else None,
        options={k: v for k, v in vars(options).items() if k != "json"},
    )


def write_json(path: Path, about: dict, measured: dict) -> None:
    rows = []
    for setting, results in measured.items():
        for contestant, result in results.items():
            row = dataclasses.asdict(setting) | dict(contestant=contestant)
            row |= {k: v for k, v in vars(result).items() if k != "gradient"}
            rows.append(row)
    path.write_text(json.dumps(about | dict(results=rows), indent=1) + "\n")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--steps", type=int, help="of the small network; 1000 by default")
    add("--large-steps", type=int, default=100, help="of the large network")
    add("--repeats", type=int, help="timed runs of each; 7 by default")
    add("--compiles", type=int, help="of each, of the small network; 5 by default")
    add("--seed", type=int, default=0)
    add("--quick", action="store_true", help="a smoke test: small network, few steps")
    add("--json", type=Path, metavar="PATH", help="where to write the results")
    options = parser.parse_args()
    defaults = (50, 2, 1) if options.quick else (1000, 7, 5)
    for name, default in zip(("steps", "repeats", "compiles"), defaults, strict=True):
        if getattr(options, name) is None:
            setattr(options, name, default)
    return options


def main() -> None:
    options = parse_options()
    jax.config.update("jax_enable_compilation_cache", False)
    # Rich takes a file or a pipe to be 80 columns wide, less than the table needs.
    console = Console(width=None if sys.stdout.isatty() else 120)
    about = circumstances(options)
    console.print(about)
    measured = {}
    with Progress(console=console, transient=True) as progress:
        todo = settings(options)
        task = progress.add_task("", total=len(todo))
        for setting in todo:
            start, title = time.perf_counter(), setting.title
            note = lambda what, title=title: progress.update(
                task, description=f"{title}: {what}"
            )
            compiles = options.compiles if setting.network == "small" else 1
            measured[setting] = measure(setting, options.repeats, compiles, note)
            progress.advance(task)
            progress.console.print(f"{title}: {time.perf_counter() - start:.0f} s")
    console.print(results_table(measured))
    console.print(requirements_table(measured))
    if options.json is not None:
        write_json(options.json, about, measured)


if __name__ == "__main__":
    main()
