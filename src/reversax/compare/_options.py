"""The arguments and options of `reversax compare`, each with its help."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from ._recommend import Prefer as _Prefer

_WANTED, _HOW, _OUTPUT = "What is wanted", "How to measure", "What to write"


def as_number_of_bytes(text: Any) -> int:
    """`512MiB`, `2e9` or `1.5 GB` in bytes."""
    found = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([kKMGT]?)(i?)B?\s*", str(text))
    try:
        number = float(found[1]) if found else 0.0
    except ValueError:  # Such as 1.2.3.
        number = 0.0
    if found is None or not number > 0:
        raise typer.BadParameter(f"{text!r} is no size, such as 512MiB, 2GB or 1e9.")
    base = 1024 if found[3] else 1000
    return round(number * base ** " KMGT".index((found[2] or " ").upper()))


def _writable(path: Path | None) -> Path | None:
    if path is not None and not path.resolve().parent.is_dir():
        raise typer.BadParameter(f"There is no directory {path.resolve().parent}.")
    return path


def _positive(value: float) -> float:
    if not value > 0:
        raise typer.BadParameter(f"{value} is not above zero.")
    return value


Target = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:FUNCTION",
        help="A function that returns a reversax.compare.Problem. MODULE is a module, "
        "or a path that ends in .py. FUNCTION is by default `problem`; it takes no "
        "argument, or `seed`.",
        show_default=False,
    ),
]
Tolerance = Annotated[
    float,
    typer.Option(
        callback=_positive,
        help="The relative error of the gradient that is accurate enough.",
        rich_help_panel=_WANTED,
    ),
]
MemoryLimit = Annotated[
    int | None,
    typer.Option(
        parser=as_number_of_bytes,
        metavar="SIZE",
        help="The most temporary memory of a gradient, such as 512MiB or 2GB.",
        rich_help_panel=_WANTED,
    ),
]
Prefer = Annotated[
    _Prefer,
    typer.Option(
        help="Of the candidates that are accurate and small enough, take the one with "
        "the least of this.",
        rich_help_panel=_WANTED,
    ),
]
Repeats = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="How many runs to take the median time of.",
        show_default="7; with --quick 3",
        rich_help_panel=_HOW,
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        help="Given to the function, if it takes `seed`.", rich_help_panel=_HOW
    ),
]
Quick = Annotated[
    bool,
    typer.Option(
        "--quick",
        help="Compare only the base solver, checkpointed and reversible, and "
        "reversible Euler.",
        rich_help_panel=_HOW,
    ),
]
Traceback = Annotated[
    bool,
    typer.Option(
        "--traceback",
        help="Show all of the traceback of an error, not only what is in your files.",
        rich_help_panel=_OUTPUT,
    ),
]
Json = Annotated[
    Path | None,
    typer.Option(
        dir_okay=False,
        callback=_writable,
        metavar="PATH",
        help="Write all that was measured to this file.",
        rich_help_panel=_OUTPUT,
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        dir_okay=False,
        callback=_writable,
        metavar="PATH",
        help="Draw time against memory to this file, in the format that its ending "
        "names: .png, .pdf, .svg.",
        rich_help_panel=_OUTPUT,
    ),
]
