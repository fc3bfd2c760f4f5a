"""The table for people, and the JSON file for programs."""

import datetime
import importlib.metadata
import json
import math
import os
import platform
import textwrap
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ._gradient import Reference
from ._measure import Measurement
from ._recommend import Recommendation, Wish, as_bytes, as_seconds, verdict

_FORMAT = 2
_LONGEST = 400  # Of what a failure says, in the table; JSON has all of it.
_PACKAGES = ("reversax", "diffrax", "equinox", "jax", "jaxlib")


def circumstances() -> dict[str, Any]:
    """With what, and where, it was measured."""
    device = jax.devices()[0]
    return dict(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions={name: importlib.metadata.version(name) for name in _PACKAGES},
        python=platform.python_version(),
        platform=platform.platform(),
        device=dict(platform=device.platform, kind=device.device_kind),
        cpu_count=os.cpu_count(),
        load_average=os.getloadavg() if hasattr(os, "getloadavg") else None,
    )


def _number(x: float | None) -> str:
    return "-" if x is None else "0" if x == 0 else f"{x:.1e}"


_STYLES = {
    "take it": "bold green",
    "efficient": "green",
    "beaten": "",
    "failed": "red",
    "inaccurate": "dim",
    "unchecked": "dim",
    "control": "cyan",
    "too large": "dim",
}


def _row(measurement: Measurement) -> list[str]:
    m = measurement
    time, memory = m.median_seconds, m.temporary_bytes
    return [
        _number(m.gradient_error),
        _number(m.value_error),
        "-" if time is None else as_seconds(time),
        "-" if memory is None else as_bytes(memory),
        "-" if m.compile_seconds is None else f"{m.compile_seconds:.1f} s",
        "-" if m.num_steps is None else f"{m.num_steps:.0f}",
        _number(m.round_trip),
    ]


def _table(
    title: str, measurements: list[Measurement], recommendation, wish: Wish
) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("candidate")
    for heading in (
        "gradient\nerror",
        "value\nerror",
        "time",
        "memory",
        "compile",
        "steps",
        "round\ntrip",
    ):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    for measurement in measurements:
        mark = verdict(measurement, recommendation, wish)
        row = [measurement.candidate, *_row(measurement), mark]
        table.add_row(*row, style=_STYLES[mark])
    return table


def _sizes(reference: Reference) -> str:
    parts = reference.parts.items()
    sizes = [f"the {x.size:,} numbers in {name}" for name, x in parts if x.size]
    return " and ".join(sizes)


def show(
    console: Console,
    target: str,
    reference: Reference,
    measurements: list[Measurement],
    recommendation: Recommendation,
    wish: Wish,
) -> None:
    title = f"One gradient of the loss of {target}"
    console.print(_table(title, measurements, recommendation, wish))
    console.print(
        "Errors are relative to Dopri8 in double precision, adaptive, with "
        f"{reference.num_steps:.0f} steps; that gradient is known to "
        f"{reference.uncertainty:.0e}. It is with respect to {_sizes(reference)}. "
        "Time: the median of a gradient. Memory: temporary, as compiled.",
        style="dim",
    )
    for measurement in measurements:
        if measurement.failure is not None:
            said = Text(f"{measurement.candidate} failed. ", style="red")
            reason = textwrap.shorten(measurement.failure, _LONGEST, placeholder=" ...")
            console.print(said + Text(reason, style=""))
    console.print()
    console.print(Text(recommendation.text, style="bold"))


def _without_infinities(x: Any) -> Any:
    """JSON has no NaN and no infinities: `null` stands for them."""
    if isinstance(x, dict):
        return {key: _without_infinities(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_without_infinities(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def write_json(
    path: Path,
    about: dict[str, Any],
    reference: Reference,
    measurements: list[Measurement],
    recommendation: Recommendation,
) -> None:
    content = dict(
        format=_FORMAT,
        **about,
        reference=dict(
            value=reference.value,
            uncertainty=reference.uncertainty,
            num_steps=reference.num_steps,
        ),
        candidates=[
            vars(x) | dict(median_seconds=x.median_seconds) for x in measurements
        ],
        recommendation=vars(recommendation),
    )
    text = json.dumps(_without_infinities(content), indent=1, allow_nan=False)
    path.write_text(text + "\n")
