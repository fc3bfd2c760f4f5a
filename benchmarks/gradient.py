"""What a gradient through a solve costs: time, memory, compilation, evaluations.

The field is `y' = MLP(y) / 2`, two hidden layers of tanh, a state of 8 numbers, over
t in [0, 1], and the gradient is that of `sum(y(1)**2)` with respect to the weights and
the initial states. A batch is solved either as one state, "batched" inside the field,
or by a "vmap" of the solve. Steps are "constant", or "adaptive": a PID controller whose
`dtmax` makes the steps about as many. Four contestants:

- published:   `Reversible(Tsit5(), McCallumFoster())` with `ReversibleAdjoint()`
- reversible:  `Reversible(Tsit5())`, the default, with `ReversibleAdjoint()`
- checkpoint:  `Tsit5()` with `RecursiveCheckpointAdjoint()`
- scan:        plain Tsit5, six stages unrolled, in a `jax.lax.scan` over steps in
               `jax.checkpoint`: stores every state. Steps that adapt it cannot take.

Ratios are to "checkpoint", which by default keeps some sqrt(2 n) states of n steps. The
"difference" is the relative one of the whole gradient, to "checkpoint" too: for "scan"
round-off; the others, of order 5 and 6, add truncation errors. Evaluations are counted
in a separate run of a narrow network.
"""

import argparse
import dataclasses
import functools as ft
import gc
import statistics
import time
from collections.abc import Callable

import diffrax
import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
from measuring import (
    begin,
    compile_program,
    interleaved_times,
    parser_of,
    write_json,
)
from methods import scan
from rich.progress import Progress
from rich.table import Table

import reversax

STATE_SIZE = 8
WIDTHS = {"small": 64, "large": 512, "counting": 8}
BASELINE = "checkpoint"
CONTESTANTS = ("published", "reversible", BASELINE, "scan")

# At most these ratios of published to checkpoint are required on the small network, as
# they were set for that method; what is required of the default is in schemes.py.
REQUIRED_TIME = {"batched": 1.0, "vmap": 0.7}
REQUIRED_COMPILE = 1.0


@dataclasses.dataclass(frozen=True)
class Setting:
    """One problem that all the contestants differentiate."""

    network: str
    batch: int
    steps: int
    batching: str
    stepping: str
    seed: int

    @property
    def contestants(self) -> tuple[str, ...]:
        return CONTESTANTS if self.stepping == "constant" else CONTESTANTS[:-1]

    @property
    def title(self) -> str:
        return f"{self.network}, {self.batch} {self.batching}, {self.stepping}"

    def inputs(self) -> tuple[tuple, eqx.nn.MLP]:
        """The weights and initial states, and the network without its weights."""
        key_mlp, key_y0 = jax.random.split(jax.random.PRNGKey(self.seed))
        sizes = STATE_SIZE, STATE_SIZE, WIDTHS[self.network], 2
        mlp = eqx.nn.MLP(*sizes, activation=jnp.tanh, key=key_mlp)
        weights, rest = eqx.partition(mlp, eqx.is_inexact_array)
        return (weights, jax.random.normal(key_y0, (self.batch, STATE_SIZE))), rest


@dataclasses.dataclass
class Result:
    """What was measured of one contestant."""

    times: list[float] = dataclasses.field(default_factory=list)
    trace_times: list[float] = dataclasses.field(default_factory=list)
    compile_times: list[float] = dataclasses.field(default_factory=list)
    temp_bytes: int = 0
    accepted_steps: float = 0
    evaluations: tuple[float, ...] = ()
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
    if contestant == "published":
        coupling = reversax.McCallumFoster()
        solver = reversax.Reversible(solver, coupling=coupling)
        adjoint = reversax.ReversibleAdjoint()
    elif contestant == "reversible":
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
    dt, steps = 1 / setting.steps, setting.steps

    def solve(field, y0, mlp):
        y1 = scan(field, diffrax.Tsit5(), steps, rematerialised=True)(mlp, y0, dt)
        return y1, jnp.array(steps)

    return solve


def make_loss(
    setting: Setting, contestant: str, count: Callable | None = None
) -> Callable:
    """`loss(weights, y0s) -> (value, accepted steps)`; a new function at each call, so
    that nothing about it has been cached. `count` is called at each evaluation."""
    _, rest = setting.inputs()
    scan = contestant == "scan"
    solve = scan_solve(setting) if scan else diffrax_solve(setting, contestant)

    def field(t, y, mlp):
        if count is not None:
            # Without an argument, `jax.checkpoint` would not repeat it with the rest.
            jax.debug.callback(count, y)
        return 0.5 * (jax.vmap(mlp)(y) if setting.batching == "batched" else mlp(y))

    def loss(weights, y0s):
        mlp = eqx.combine(weights, rest)
        solve_one = lambda y0: solve(field, y0, mlp)
        over_batch = setting.batching == "vmap"
        y1s, steps = (jax.vmap(solve_one) if over_batch else solve_one)(y0s)
        return jnp.sum(y1s**2), steps

    return loss


def compile_gradient(setting: Setting, contestant: str, result: Result) -> Callable:
    """Compiles from scratch, noting how long it took."""
    args, _ = setting.inputs()
    loss = make_loss(setting, contestant)
    jax.clear_caches()
    gc.collect()
    gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    program = compile_program(gradient, *args)
    result.trace_times.append(program.trace_seconds)
    result.compile_times.append(program.compile_seconds)
    result.temp_bytes = program.temporary_bytes
    return program.run


@ft.cache
def count_evaluations(setting: Setting, contestant: str) -> tuple[float, float]:
    """Evaluations per accepted step: of a solve, and of its value and gradient."""

    def per_step(transform: Callable) -> float:
        calls = []
        args, _ = setting.inputs()
        fn = transform(make_loss(setting, contestant, calls.append))
        # It runs once, so optimising it would not pay.
        fn = jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})
        *_, steps = jax.tree.leaves(fn(*args)[0])
        jax.effects_barrier()
        return len(calls) / float(steps)

    forward = per_step(lambda loss: lambda *args: (loss(*args),))
    return forward, per_step(lambda loss: jax.value_and_grad(loss, has_aux=True))


def time_runs(
    setting: Setting, compiled: dict, results: dict[str, Result], repeats: int
) -> None:
    args, _ = setting.inputs()
    gradients = {}
    for contestant, run in compiled.items():
        (_, steps), gradient = run(*args)
        results[contestant].accepted_steps = float(jnp.mean(steps))
        gradients[contestant] = jax.flatten_util.ravel_pytree(gradient)[0]
    reference = gradients[BASELINE]
    for contestant, result in results.items():
        error = jnp.linalg.norm(gradients[contestant] - reference)
        result.difference = float(error / jnp.linalg.norm(reference))
    runs = {name: ft.partial(run, *args) for name, run in compiled.items()}
    for contestant, times in interleaved_times(runs, repeats).items():
        results[contestant].times = times


def measure(setting: Setting, options: argparse.Namespace) -> dict[str, Result]:
    results, compiled = {name: Result() for name in setting.contestants}, {}
    for _ in range(options.compiles if setting.network == "small" else 1):
        for contestant, result in results.items():
            compiled[contestant] = compile_gradient(setting, contestant, result)
    time_runs(setting, compiled, results, options.repeats)
    if not options.quick or setting.stepping == "constant":
        narrow = dict(network="counting", batch=2, batching="batched")
        counted = dataclasses.replace(setting, **narrow)
        for contestant, result in results.items():
            result.evaluations = count_evaluations(counted, contestant)
    return results


def settings(options: argparse.Namespace) -> list[Setting]:
    small = "small", options.batch, options.steps
    if options.quick:
        kinds = ("vmap", "constant"), ("batched", "adaptive")
        return [Setting(*small, *kind, options.seed) for kind in kinds]
    return [
        Setting(*network, batching, stepping, options.seed)
        for network in (small, ("large", 16, options.large_steps))
        for batching in ("batched", "vmap")
        for stepping in ("constant", "adaptive")
    ]


def as_cells(result: Result, baseline: Result) -> dict[str, str]:
    median = statistics.median
    forward, gradient = [f"{x:.2f}" for x in result.evaluations] or ["-", "-"]
    return {
        "time\n(ms)": f"{result.time * 1e3:.1f}",
        "ratio": f"{result.time / baseline.time:.2f}",
        "temp\n(MB)": f"{result.temp_bytes / 1e6:.3f}",
        "trace\n(s)": f"{median(result.trace_times):.2f}",
        "compile\n(s)": f"{median(result.compile_times):.2f}",
        "both,\nratio": f"{result.preparation_time / baseline.preparation_time:.2f}",
        "steps": f"{result.accepted_steps:.0f}",
        "evals\nforward": forward,
        "evals\ngradient": gradient,
        "gradient\ndifference": f"{result.difference:.0e}",
    }


def results_table(measured: dict[Setting, dict[str, Result]]) -> Table:
    caption = (
        "Temporary memory as XLA plans it. Trace includes lowering. Evaluations of the "
        "vector field per accepted step: forward, and forward and backward together."
    )
    table = Table(title="One gradient", caption=caption, caption_justify="left")
    table.add_column("")
    for heading in as_cells(*[next(iter(measured.values()))[BASELINE]] * 2):
        table.add_column(heading, justify="right")
    for setting, results in measured.items():
        table.add_section()
        table.add_row(f"[bold]{setting.title}")
        for contestant in CONTESTANTS:
            cells = ["-"] * (len(table.columns) - 1)
            if contestant in results:
                cells = as_cells(results[contestant], results[BASELINE]).values()
            table.add_row(contestant, *cells)
    return table


def requirements_table(measured: dict[Setting, dict[str, Result]]) -> Table:
    table = Table(title="Required of published, as ratios to checkpoint")
    for heading in ("small network", "what", "required", "measured", "met"):
        table.add_column(heading)
    for setting, results in measured.items():
        if setting.network != "small":
            continue
        ours, baseline = results["published"], results[BASELINE]
        preparation = ours.preparation_time / baseline.preparation_time
        for what, required, ratio in (
            ("time", REQUIRED_TIME[setting.batching], ours.time / baseline.time),
            ("trace and compile", REQUIRED_COMPILE, preparation),
        ):
            row = f"{setting.batching}, {setting.stepping}", what, f"at most {required}"
            table.add_row(*row, f"{ratio:.2f}", "yes" if ratio <= required else "no")
    return table


def as_rows(measured: dict) -> list[dict]:
    return [
        vars(setting) | dict(contestant=contestant) | vars(result)
        for setting, results in measured.items()
        for contestant, result in results.items()
    ]


def parse_options() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--batch", type=int, default=64, help="states of the small network")
    add("--steps", type=int, default=1000, help="of the small network")
    add("--large-steps", type=int, default=100, help="of the large network")
    add("--compiles", type=int, default=3, help="of each, of the small network")
    if parser.parse_args().quick:
        parser.set_defaults(steps=50, repeats=2, compiles=1)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    console, about = begin(options, widths=WIDTHS)
    measured = {}
    with Progress(console=console, transient=True) as progress:
        for setting in progress.track(settings(options), description="measuring"):
            start = time.perf_counter()
            measured[setting] = measure(setting, options)
            took = time.perf_counter() - start
            progress.console.print(f"{setting.title}: measured in {took:.0f} s")
    console.print(results_table(measured))
    console.print(requirements_table(measured))
    write_json(options.json, about, as_rows(measured))


if __name__ == "__main__":
    main()
