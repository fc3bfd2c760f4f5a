"""What the benchmarks share: circumstances, compilation, timing, tables and files."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.stages import Compiled
from rich.console import Console
from rich.table import Table

Name = TypeVar("Name", bound=Hashable)

PACKAGES = ("jax", "jaxlib", "diffrax", "equinox", "reversax")


def circumstances(
    options: argparse.Namespace, packages: tuple[str, ...] = PACKAGES
) -> dict[str, Any]:
    """When, where, with what; the options hold the seed."""
    return dict(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions={name: importlib.metadata.version(name) for name in packages},
        python=platform.python_version(),
        platform=platform.platform(),
        device=str(jax.devices()[0].device_kind),
        cpu_count=usable_cores(),
        load_average=os.getloadavg() if hasattr(os, "getloadavg") else None,
        options={k: v for k, v in vars(options).items() if k not in ("json", "figure")},
    )


def usable_cores() -> int | None:
    """Fewer than the machine has where the process is held to some of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def begin(
    options: argparse.Namespace, packages: tuple[str, ...] = PACKAGES, **more: Any
) -> tuple[Console, dict[str, Any]]:
    """Where to print, and the circumstances, printed there: they belong to the file."""
    jax.config.update("jax_enable_compilation_cache", False)
    # Rich takes a file or a pipe to be 80 columns wide, less than the tables need.
    console = Console(width=None if sys.stdout.isatty() else 140)
    about = circumstances(options, packages) | more
    console.print(about)
    return console, about


def add_parts(parser: argparse.ArgumentParser, parts: Sequence[Callable]) -> None:
    names = [part.__name__ for part in parts]
    parser.add_argument("part", nargs="?", choices=names, help="by default all")


def run_parts(
    parts: Sequence[Callable], options: argparse.Namespace, console: Console
) -> Iterator[tuple[str, Any]]:
    """The name of each part that was asked for and what it measured, one by one."""
    for part in parts:
        if options.part in (None, part.__name__):
            start = time.perf_counter()
            measured = part(options, console)
            took = time.perf_counter() - start
            console.print(f"{part.__name__}: measured in {took:.0f} s")
            yield part.__name__, measured


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """With the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    add = parser.add_argument
    add("--repeats", type=int, default=5, help="timed runs of each")
    add("--seed", type=int, default=0)
    add("--quick", action="store_true", help="a smoke test, short solves")
    add("--json", type=Path, metavar="PATH", help="where to write the results")
    return parser


def write_json(path: Path | None, about: dict, results: Any) -> None:
    """One line for each row of the results, which keeps differences readable."""
    if path is None:
        return
    about_lines = json.dumps(about, indent=1, default=str)[:-2]
    if not isinstance(results, Mapping):
        results = {"results": results}
    parts = []
    for part, rows in results.items():
        lines = ",\n  ".join(json.dumps(row, default=str) for row in rows)
        parts.append(f' "{part}": [\n  {lines}\n ]')
    path.write_text(about_lines + ",\n" + ",\n".join(parts) + "\n}\n")


def as_cell(x: Any) -> str:
    if x is None:
        return "-"
    if isinstance(x, bool | np.bool_):
        return "yes" if x else "no"
    if isinstance(x, float):
        return f"{x:.2f}" if 0.01 < abs(x) < 1000 else f"{x:.1e}"
    return str(x)


def print_table(
    console: Console, title: str, rows: list[dict], caption: str = ""
) -> None:
    """One column for each key, one section for each value of the first."""
    table = Table(title=title, caption=caption, caption_justify="left")
    for heading in rows[0]:
        numbers = any(type(row[heading]) in (int, float) for row in rows)
        table.add_column(heading, justify="right" if numbers else "left")
    first = [next(iter(row.values())) for row in rows]
    for row, x, following in zip(rows, first, [*first[1:], None], strict=True):
        table.add_row(*map(as_cell, row.values()), end_section=x != following)
    console.print(table)


def relative_error(x: Any, reference: Any) -> float:
    """`|x - reference| / |reference|` over all leaves, in double precision."""
    # By numpy, since outside of `enable_x64` JAX would make them single.
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    x, reference = np.float64(flat(x)), np.float64(flat(reference))
    return float(np.linalg.norm(x - reference) / np.linalg.norm(reference))


class Program(NamedTuple):
    """A compiled function, and how long it took to trace and to compile."""

    run: Compiled
    trace_seconds: float
    compile_seconds: float

    @property
    def preparation_seconds(self) -> float:
        return self.trace_seconds + self.compile_seconds

    @property
    def temporary_bytes(self) -> int:
        """What XLA plans to allocate besides inputs and outputs."""
        memory = self.run.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes


def compile_program(fn: Callable, *inputs) -> Program:
    start = time.perf_counter()
    lowered = jax.jit(fn).lower(*inputs)
    traced = time.perf_counter()
    compiled = lowered.compile()
    return Program(compiled, traced - start, time.perf_counter() - traced)


def compile_gradient(loss: Callable, *inputs, argnums=0) -> Program:
    return compile_program(jax.value_and_grad(loss, argnums=argnums), *inputs)


def interleaved_times(
    runs: Mapping[Name, Callable[[], Any]], repeats: int, seconds: float = float("inf")
) -> dict[Name, list[float]]:
    """Seconds of each run. The repeats are in turn, so that a slow spell hits them
    all. A run that has used up its `seconds` is not repeated further."""
    for run in runs.values():  # Warms up.
        jax.block_until_ready(run())
    times: dict[Name, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            if times[name] and sum(times[name]) > seconds:
                continue
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - start)
    return times


def medians(times: Mapping[Name, list[float]]) -> dict[Name, float]:
    return {name: statistics.median(seconds) for name, seconds in times.items()}
