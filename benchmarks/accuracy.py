"""What a gradient costs that is accurate enough: each method at its own steps.

For each problem of problems.py and each method of methods.py and peers.py this takes
the smallest number of steps (from 4, by factors of the square root of 2), or the
largest tolerance (by factors of 10**(1/4)), at which the gradient is within 1e-3, and
within 1e-6, of the true one, there and at the next finer. Then it measures what the
gradient costs there: to 1e-3 in single precision, to 1e-6 in double. (The SDE: 1e-2
and 1e-3, both in double, each library on a Brownian path of its own.) The true gradient
is that of Dopri8 at a tolerance of 1e-13 in double precision.

    python benchmarks/accuracy.py                     # four problems, some minutes
    python benchmarks/accuracy.py --full              # all nine, and more methods
    python benchmarks/accuracy.py --problems Lorenz   # those named
    python benchmarks/accuracy.py --full --methods "Tsit5, checkpoints" ...
    python benchmarks/accuracy.py --quick             # to see that it runs

It needs the extra `examples`, and `peers` for the methods in PyTorch; without it, it
says so and goes on without them. What the bytes are: of JAX, all that XLA plans to
allocate besides inputs and outputs; of PyTorch, see peers.py, which leaves out what an
operation needs while it runs. So the two compare only roughly, in favour of PyTorch.
"""

import argparse
import dataclasses
import functools as ft
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import peers
from measuring import (
    compile_program,
    interleaved_times,
    medians,
    parser_of,
    print_table,
    relative_error,
    write_json,
)
from methods import (
    BROWNIAN_TOLERANCE,
    CHECKPOINTED,
    Method,
    make_gradient,
    make_loss,
    methods_for,
)
from pareto import Row, draw, tables
from peers import Peer, Run, peers_for
from problems import Problem, all_problems
from rich.progress import Progress

DEFAULT = ("Kepler", "neural ODE, width 64", "reaction-diffusion", "SDE")
QUICK = ("van der Pol",)
LIMIT = 20_000  # Steps to be tried.
PEER_LIMIT = 5_000
PATIENCE = 2.0  # Seconds for one gradient, after which to search no further;
LONGEST = 60.0  # in all, as long as what is found is wrong by more than itself.
REPLAYED = "Tsit5, adaptive, replayed", "Tsit5, adaptive, recorded and replayed"
TRIES = 3  # Finer resolutions, where the first misses in the precision that is timed.
SECONDS = 2.0  # Of repeats of one method.
REFERENCE = Method("", "Dopri8", "", CHECKPOINTED, adaptive=True)
STOCHASTIC_REFERENCE = Method("", "Heun", "", CHECKPOINTED)

AnyMethod = Method | Peer
Gradient = Callable[[float], tuple[Any, int]]
"""Of a resolution: the gradient, and how many steps it took."""


def resolutions(problem: Problem, method: AnyMethod) -> Iterator[float]:
    """From coarse to fine: tolerances, or numbers of steps."""
    if method.adaptive:
        yield from (10 ** (-k / 4) for k in range(4, 52))
        return
    limit = LIMIT if isinstance(method, Method) else PEER_LIMIT
    last, divisor = 0, problem.divisor
    for k in range(4, 60):
        steps = divisor * max(1, round(2 ** (k / 2) / divisor))
        if last < steps <= limit:
            yield steps
        last = max(last, steps)


def jax_gradient(
    problem: Problem, method: Method, max_steps: int, seed: int
) -> Gradient:
    """Of any resolution, with room for `max_steps`."""
    loss = make_loss(problem, method, max_steps, throw=False, seed=seed)
    program = compile_program(make_gradient(loss), problem.inputs, np.float64(1))

    def gradient(resolution):
        if not method.adaptive:
            resolution = problem.t1 / resolution
        (_, steps), ct = program.run(problem.inputs, np.float64(resolution))
        return jax.block_until_ready(ct), int(steps)

    return gradient


def path_for(problem: Problem, seed: int) -> peers.Path:
    return peers.Path(problem, seed, round(1 / BROWNIAN_TOLERANCE))


def peer_gradient(problem: Problem, peer: Peer, seed: int) -> Gradient:
    brownian = path_for(problem, seed) if problem.kind == "SDE" else None

    def gradient(resolution):
        run = Run(problem, peer, resolution, seed)
        run.brownian = brownian
        try:
            return run(), 0
        except AssertionError:
            # How torchdiffeq says that the state, or the step, is no longer a number.
            return [np.nan], 0

    return gradient


def true_gradient(problem: Problem, seed: int, peer: bool = False) -> Any:
    """And a check that it has settled, to a hundredth of what is asked of others; a
    tenth for an SDE."""
    if problem.kind != "SDE":
        gradient = jax_gradient(problem, REFERENCE, LIMIT, seed)
        coarse, fine, share = 1e-11, 1e-13, 100
    elif peer:
        gradient = peer_gradient(problem, Peer("torchsde", "midpoint", False), seed)
        coarse, fine, share = 2**10, 2**11, 10
    else:
        gradient = jax_gradient(problem, STOCHASTIC_REFERENCE, 2**12, seed)
        coarse, fine, share = 2**11, 2**12, 10
    reference, _ = gradient(fine)
    difference = relative_error(gradient(coarse)[0], reference)
    if not difference <= min(problem.targets) / share:
        raise RuntimeError(
            f"{problem.name}: the reference has not settled: {difference:.1e}"
        )
    return reference


class Found(NamedTuple):
    """A resolution tried, how many steps it took, and the error of the gradient."""

    resolution: float
    steps: int
    error: float


def search(
    gradient: Gradient,
    grid: Iterable[float],
    reference: Any,
    targets: Iterable[float],
    patience: float = PATIENCE,
) -> dict[float, Found]:
    """The coarsest resolution for each target that can be met."""
    found: dict[float, Found] = {}
    missing, previous = sorted(targets, reverse=True), None
    begun = time.perf_counter()
    for resolution in grid:
        start = time.perf_counter()
        ct, steps = gradient(resolution)
        this = Found(resolution, steps, relative_error(ct, reference))
        for target in list(missing):
            if this.error <= target and previous and previous.error <= target:
                found[target] = previous
                missing.remove(target)
        previous = this
        # A solution that explodes, at a loose tolerance, takes longer than finer ones.
        sound, now = this.error < 1, time.perf_counter()
        too_long = now - start > patience if sound else now - begun > LONGEST
        if not missing or too_long:
            break
    return found


class Measurement(NamedTuple):
    """One problem in the precision of one target."""

    problem: Problem
    reference: Any
    seed: int

    def prepare(self, method: AnyMethod, found: Found, row: Row) -> Callable | None:
        """What to time, if the method meets its target here too."""
        finer = resolutions(self.problem, method)
        keep = lambda r: r <= found[0] if method.adaptive else r >= found[0]
        for resolution in list(filter(keep, finer))[:TRIES]:
            try:
                if isinstance(method, Method):
                    ready = self.prepare_jax(method, resolution, found.steps, row)
                else:
                    ready = self.prepare_peer(method, resolution, row)
            except jax.errors.JaxRuntimeError as error:
                # Of a compiled program it has the words of Equinox's somewhere inside.
                refused = "round trip" in str(error)
                row.failed = "refused: its round trip" if refused else "out of range"
                continue
            except AssertionError:  # As in `peer_gradient`.
                row.failed = f"not finite in {row.precision} precision"
                continue
            run, ct = ready
            row.tolerance = resolution if method.adaptive else None
            row.error = relative_error(ct, self.reference)
            if row.error <= row.target:
                row.failed = None
                return run
            row.failed = f"not in {row.precision} precision"
        return None

    def prepare_jax(
        self, method: Method, resolution: float, steps: int, row: Row
    ) -> tuple[Callable, Any]:
        problem = self.problem
        if method.adaptive:
            max_steps = 2 * steps  # As a user would, who cannot know how many it takes.
        else:
            max_steps = int(resolution)
            resolution = problem.t1 / resolution
        loss = make_loss(problem, method, max_steps, seed=self.seed)
        inputs = jax.tree.map(jnp.asarray, problem.inputs)
        at = inputs, jnp.asarray(resolution, problem.y0.dtype)
        program = compile_program(make_gradient(loss), *at)
        run = ft.partial(program.run, *at)
        (_, taken), ct = run()
        row.steps, row.bytes = int(taken), program.temporary_bytes
        row.trace_seconds = program.trace_seconds
        row.compile_seconds = program.compile_seconds
        return run, ct

    def prepare_peer(
        self, peer: Peer, resolution: float, row: Row
    ) -> tuple[Callable, Any]:
        row.steps = None if peer.adaptive else int(resolution)
        run = Run(self.problem, peer, resolution, self.seed)
        if self.problem.kind == "SDE":
            run.brownian = path_for(self.problem, self.seed)
        ct, row.bytes, row.evaluations = run.count()
        run.brownian = None  # Timed is the path that torchsde takes by default.
        return run, ct


class Benchmark:
    def __init__(self, options: argparse.Namespace, progress: Progress):
        self.options, self.progress = options, progress

    def of(self, problem: Problem) -> list[Row]:
        kind, full = problem.kind, self.options.full
        methods = [*methods_for(kind, full), *peers_for(kind)]
        names = self.options.methods or (QUICK_METHODS if self.options.quick else None)
        if names is not None:
            methods = [m for m in methods if m.name in names]
        with jax.enable_x64(True):
            references, found = self.search(problem, methods)
        rows = []
        for target in self.targets(problem):
            single = target == problem.targets[0] and problem.kind != "SDE"
            dtype = np.float32 if single else np.float64
            with jax.enable_x64(not single):
                at = problem.cast(dtype)
                rows += self.measure(at, target, references, found)
        return rows + self.replayed(problem)

    def replayed(self, problem: Problem) -> list[Row]:
        """What replay.py measures, after the others."""
        options = self.options
        asked = REPLAYED if options.methods is None else options.methods
        names = set(REPLAYED) & set(asked)
        missing = importlib.util.find_spec("gradsolve") is None
        if missing or problem.kind != "ODE" or not names or options.quick:
            return []
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.json"
            command = [sys.executable, str(Path(__file__).with_name("replay.py"))]
            command += ["--problems", problem.name, "--json", str(path)]
            command += ["--seed", str(options.seed), "--repeats", str(options.repeats)]
            subprocess.run(command, check=True, capture_output=True)
            rows = [Row(**row) for row in json.loads(path.read_text())["results"]]
        return [row for row in rows if row.method in names]

    def targets(self, problem: Problem) -> tuple[float, ...]:
        return problem.targets[: 1 if self.options.quick else 2]

    def search(self, problem: Problem, methods: list[AnyMethod]) -> tuple[dict, dict]:
        """The true gradients, for each type of method; the resolutions, for each."""
        seed, targets = self.options.seed, self.targets(problem)
        references: dict[type, Any] = {Method: true_gradient(problem, seed)}
        references[Peer] = references[Method]
        if problem.kind == "SDE" and not peers.MISSING:
            references[Peer] = true_gradient(problem, seed, peer=True)
        found: dict[AnyMethod, dict[float, Found]] = {}
        for method in self.track(methods, f"{problem.name}: steps"):
            scheme = method.scheme if isinstance(method, Method) else method
            if scheme not in found:
                grid = resolutions(problem, scheme)
                if isinstance(scheme, Method):
                    gradient = jax_gradient(problem, scheme, LIMIT, seed)
                else:
                    gradient = peer_gradient(problem, scheme, seed)
                reference = references[type(scheme)]
                found[scheme] = search(gradient, grid, reference, targets)
            found[method] = found[scheme]
        return references, found

    def measure(self, problem, target: float, references, found) -> list[Row]:
        precision = "single" if problem.y0.dtype == np.float32 else "double"
        rows, runs = [], {}
        for method in self.track(list(found), f"{problem.name}: cost at {target:g}"):
            if not method.library:  # A scheme, by which others were found.
                continue
            name, library = method.name, method.library
            row = Row(problem.name, target, precision, library, name, method.exact)
            coarsest = found[method].get(target)
            if coarsest is None:
                row.failed = "not within the steps and the time tried"
            elif isinstance(method, Method) and coarsest.steps <= method.at_least:
                continue
            else:
                reference = references[type(method)]
                at = Measurement(problem, reference, self.options.seed)
                run = at.prepare(method, coarsest, row)
                if run is not None:
                    runs[len(rows)] = run
            rows.append(row)
        times = interleaved_times(runs, self.options.repeats, SECONDS)
        for i, median in medians(times).items():
            rows[i].times, rows[i].seconds = times[i], median
        return rows

    def track(self, sequence: list, description: str) -> Iterator:
        task = self.progress.add_task(description, total=len(sequence))
        for item in sequence:
            yield item
            self.progress.advance(task)
        self.progress.remove_task(task)


QUICK_METHODS = (
    "Reversible(Tsit5), reversed",
    "Tsit5, checkpoints",
    "Tsit5, stored",
    "rk4, odeint",
)


def parse_options() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    names = list(all_problems(0))
    add("--problems", nargs="+", choices=names, help="these only", metavar="NAME")
    add("--methods", nargs="+", help="these only, as tables name them", metavar="NAME")
    add("--full", action="store_true", help="all problems and methods")
    add("--figure", type=Path, metavar="PATH", help="where to draw time and memory")
    parser.set_defaults(repeats=9)
    options = parser.parse_args()
    if options.problems is None:
        options.problems = list(QUICK if options.quick else DEFAULT)
        if options.full:
            options.problems = names
    return options


def main() -> None:
    options = parse_options()
    console, about = peers.begin(options)
    rows, start = [], time.perf_counter()
    with Progress(console=console, transient=True) as progress:
        benchmark = Benchmark(options, progress)
        problems = all_problems(options.seed)
        for name in progress.track(options.problems, description="all problems"):
            begun = time.perf_counter()
            of_this = benchmark.of(problems[name])
            took = time.perf_counter() - begun
            rows += of_this
            for title, cells in tables(of_this):
                print_table(console, title, cells, f"{name}: measured in {took:.0f} s")
            write_json(options.json, about, map(dataclasses.asdict, rows))
    console.print(f"measured in {time.perf_counter() - start:.0f} s")
    if options.figure is not None:
        draw(rows, options.figure)


if __name__ == "__main__":
    main()
