"""The command `reversax compare`."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Annotated

import jax
import typer
from rich.console import Console
from rich.text import Text

from .. import __version__
from . import _options
from ._gradient import Reference
from ._load import TheirError, load_problem, raised_here, their_traceback
from ._measure import Measurement, Options, compare as measure
from ._plot import write_plot
from ._problem import REFUSALS, Problem, Refusal
from ._recommend import Wish, recommend
from ._report import circumstances, show, write_json
from ._setting import Report

_EXIT_CODES = """
Exit codes: 0, a candidate is recommended. 1, the problem raised an error, or there is
nothing to compare with. 2, a wrong call: an option, a module or function that is not
there, a function that returns no problem, a stochastic equation. 3, measured, but no
candidate is accurate (and small) enough.
"""
_NONE_RECOMMENDED = 3

app = typer.Typer(
    name="reversax",
    help="Exact gradients of differential equation solvers in constant memory.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"reversax {__version__}")
        raise typer.Exit


@app.callback()
def _reversax(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the version and exit.",
        ),
    ] = False,
) -> None:
    pass


@app.command(epilog=_EXIT_CODES)
def compare(
    target: _options.Target,
    tolerance: _options.Tolerance = 1e-3,
    memory_limit: _options.MemoryLimit = None,
    prefer: _options.Prefer = "time",
    repeats: _options.Repeats = None,
    seed: _options.Seed = 0,
    quick: _options.Quick = False,
    json: _options.Json = None,
    plot: _options.Plot = None,
    traceback: _options.Traceback = False,
) -> None:
    """Measure which solver and which adjoint to take for a problem of yours.

    For each of several pairs of solver and adjoint, finds the fewest steps, or the
    loosest tolerance, with which the gradient of your loss is accurate enough; and
    prints its error against a tight reference, its time and its memory, and which one
    to take.
    """
    options = Options(
        tolerance=tolerance,
        repeats=(3 if quick else 7) if repeats is None else repeats,
        quick=quick,
    )
    wish = Wish(tolerance, memory_limit, prefer)
    with _errors_shown(traceback):
        problem = load_problem(target, seed)
        reference, measurements = _measure(problem, options)
    recommendation = recommend(measurements, wish)
    # Rich takes a file or a pipe to be 80 columns wide, less than the table needs.
    console = Console(width=None if sys.stdout.isatty() else 128)
    show(console, target, reference, measurements, recommendation, wish)
    if json is not None:
        asked = dict(problem=target, seed=seed, options=vars(wish) | options._asdict())
        about = circumstances() | asked
        write_json(json, about, reference, measurements, recommendation)
    if plot is not None:
        write_plot(plot, f"{target}, one gradient", measurements, recommendation, wish)
    if recommendation.chosen is None:
        raise typer.Exit(_NONE_RECOMMENDED)


@contextlib.contextmanager
def _errors_shown(whole_traceback: bool) -> Iterator[None]:
    """Ends the program at an error of the user's, which it shows as such."""
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 128)
    try:
        yield
    except Exception as error:  # Any: the solves call the user's functions.
        if whole_traceback and not isinstance(error, Refusal):
            raise
        exit_code, said = _explained(error)
        console.print(Text(said, style="red"), soft_wrap=True)
        raise typer.Exit(exit_code) from None


def _explained(error: Exception) -> tuple[int, str]:
    """The exit code, and what to say; an error that is no one's but ours is raised."""
    if isinstance(error, Refusal):
        return error.exit_code, str(error)
    said = str(error) if isinstance(error, TheirError) else their_traceback(error)
    if said is None:
        if raised_here(error) or not isinstance(error, REFUSALS):
            raise error
        said = f"The problem was refused. {type(error).__name__}: {error}"
    return 1, f"{said}\n(--traceback shows all of it.)"


@contextlib.contextmanager
def _progress() -> Iterator[Report]:
    """Says what is done: on a terminal in one line that changes, else line by line."""
    console, start = Console(stderr=True), time.monotonic()
    timed = lambda what: f"[{time.monotonic() - start:4.0f} s] {what}"
    if not console.is_terminal:
        yield lambda what: print(timed(what), file=sys.stderr, flush=True)
        return
    with console.status("") as status:
        yield lambda what: status.update(Text(timed(what)))


def _measure(problem: Problem, options: Options) -> tuple[Reference, list[Measurement]]:
    with _no_compilation_cache(), _progress() as report:
        return measure(problem, options, report)


@contextlib.contextmanager
def _no_compilation_cache() -> Iterator[None]:
    """Times to compile would be those to read from disk."""
    before = jax.config.jax_enable_compilation_cache  # pyright: ignore
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
