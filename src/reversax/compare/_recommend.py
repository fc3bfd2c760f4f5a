"""Which candidate to take, by a rule.

1. Only those count that gave a gradient within the wanted tolerance of the reference
   and keep to the memory limit, and none of which the error is bounded by nothing
   (`BacksolveAdjoint`), and not the control, which is no solver of Diffrax.
2. Of these, only the *efficient* ones: no other is both faster and smaller (Pareto).
3. Of these, the fastest; or by the preference for memory the smallest. What is within
   a tenth of that counts as equal to it, and then the other quantity decides.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

from ._measure import Measurement

Prefer = Literal["time", "memory"]
Verdict = Literal[
    "take it",
    "efficient",
    "beaten",
    "too large",
    "inaccurate",
    "unchecked",
    "control",
    "failed",
]
_EQUAL = 1.1


@dataclasses.dataclass(frozen=True)
class Wish:
    """What the user wants of a candidate."""

    tolerance: float = 1e-3
    memory_limit: int | None = None
    """In bytes."""
    prefer: Prefer = "time"


@dataclasses.dataclass(frozen=True)
class Recommendation:
    chosen: str | None
    within: list[str]
    """The candidates that fulfil 1."""
    efficient: list[str]
    """Those of them that fulfil 2, the fastest first."""
    text: str
    """All this in words."""


def seconds_of(measurement: Measurement) -> float:
    assert measurement.median_seconds is not None
    return measurement.median_seconds


def bytes_of(measurement: Measurement) -> int:
    assert measurement.temporary_bytes is not None
    return measurement.temporary_bytes


def is_accurate(measurement: Measurement, wish: Wish) -> bool:
    """Whether it may be taken."""
    return _is_to_be_taken(measurement) and _is_within(measurement, wish)


def _is_to_be_taken(measurement: Measurement) -> bool:
    m = measurement
    return m.failure is None and not m.cautionary and not m.control


def _is_within(measurement: Measurement, wish: Wish) -> bool:
    error = measurement.gradient_error
    return error is not None and error <= wish.tolerance


def _fits(measurement: Measurement, wish: Wish) -> bool:
    return wish.memory_limit is None or bytes_of(measurement) <= wish.memory_limit


def efficient(measurements: Sequence[Measurement]) -> list[Measurement]:
    """Those that no other beats in both time and memory, the fastest first."""
    front: list[Measurement] = []
    for x in sorted(measurements, key=lambda x: (seconds_of(x), bytes_of(x))):
        if not front or bytes_of(x) < bytes_of(front[-1]):
            front.append(x)
    return front


def recommend(measurements: Sequence[Measurement], wish: Wish) -> Recommendation:
    accurate = [x for x in measurements if is_accurate(x, wish)]
    within = [x for x in accurate if _fits(x, wish)]
    names = [x.candidate for x in within]
    if not within:
        text = _why_none(measurements, accurate, wish)
        return Recommendation(None, names, [], text)
    front = efficient(within)
    first, second = (
        (seconds_of, bytes_of) if wish.prefer == "time" else (bytes_of, seconds_of)
    )
    best = min(map(first, front))
    chosen = min((x for x in front if first(x) <= _EQUAL * best), key=second)
    text = _why(chosen, front, len(within), wish)
    controls = [x for x in measurements if x.control and x.failure is None]
    text = " ".join([text, *(_beside_control(chosen, x, wish) for x in controls)])
    return Recommendation(chosen.candidate, names, [x.candidate for x in front], text)


def verdict(
    measurement: Measurement, recommendation: Recommendation, wish: Wish
) -> Verdict:
    name = measurement.candidate
    if measurement.failure is not None:
        return "failed"
    if name == recommendation.chosen:
        return "take it"
    if measurement.cautionary:
        return "unchecked"
    if measurement.control:
        return "control"
    if not is_accurate(measurement, wish):
        return "inaccurate"
    if name not in recommendation.within:
        return "too large"
    return "efficient" if name in recommendation.efficient else "beaten"


def _why(
    chosen: Measurement, front: list[Measurement], num_within: int, wish: Wish
) -> str:
    adjoint = chosen.adjoint.partition("(")[0]
    time, memory = as_seconds(seconds_of(chosen)), as_bytes(bytes_of(chosen))
    lines = [
        f"Take {chosen.candidate}, with {adjoint}{_steps_of(chosen)}. Its gradient is "
        f"within {chosen.gradient_error:.1e} of the reference (wanted: "
        f"{wish.tolerance:g}), in {time} and {memory}."
    ]
    if num_within == 1:
        lines.append("No other candidate is as accurate" + _and_small(wish) + ".")
        return " ".join(lines)
    superlative = {"time": "fastest", "memory": "smallest"}[wish.prefer]
    among = f"of the {num_within} that are as accurate" + _and_small(wish)
    if len(front) == 1:
        lines.append(f"It is both the fastest and the smallest {among}.")
        return " ".join(lines)
    best = min(front, key=seconds_of if wish.prefer == "time" else bytes_of)
    if best is chosen:
        lines.append(f"It is the {superlative} {among}.")
    else:
        other = {"time": "smaller", "memory": "faster"}[wish.prefer]
        lines.append(
            f"It is {other} than {best.candidate}, the {superlative} {among}, from "
            "which it differs by less than a tenth in that."
        )
    lines.append(_alternative(chosen, front, wish))
    return " ".join(lines).strip()


def _steps_of(measurement: Measurement) -> str:
    """As it would be written in a program."""
    if measurement.rtol is not None:
        return f", rtol={measurement.rtol:.2g}, atol={measurement.atol:.2g}"
    if measurement.dt0 is None or measurement.num_steps is None:
        return ""
    # Six digits of `dt0` may make for a step too many.
    return f", dt0=(t1 - t0)/{measurement.num_steps:.0f}"


def _beside_control(chosen: Measurement, control: Measurement, wish: Wish) -> str:
    time, memory = as_seconds(seconds_of(control)), as_bytes(bytes_of(control))
    text = (
        f"For comparison, what one would write by hand, {control.candidate}: {time} "
        f"and {memory} in {control.num_steps:.0f} steps"
    )
    if not _is_within(control, wish):
        return f"{text}, and not as accurate ({control.gradient_error:.1e})."
    times = seconds_of(control) / seconds_of(chosen)
    larger = bytes_of(control) / bytes_of(chosen)
    return f"{text}, {times:.2g} times as long and {larger:.2g} times the memory."


def _and_small(wish: Wish) -> str:
    if wish.memory_limit is None:
        return ""
    return f" and take at most {as_bytes(wish.memory_limit)}"


def _alternative(chosen: Measurement, front: list[Measurement], wish: Wish) -> str:
    """The other end of the front, if it is worth a word."""
    other = front[-1] if wish.prefer == "time" else front[0]
    if other is chosen:
        return ""
    time, memory = (
        seconds_of(other) / seconds_of(chosen),
        bytes_of(other) / bytes_of(chosen),
    )
    name = other.candidate
    if wish.prefer == "time":
        return (
            f"{name} takes {1 / memory:.2g} times less memory and {time:.2g} times as "
            "long: --prefer memory."
        )
    return (
        f"{name} is {1 / time:.2g} times as fast and takes {memory:.2g} times the "
        "memory: --prefer time."
    )


def _why_none(
    measurements: Sequence[Measurement], accurate: list[Measurement], wish: Wish
) -> str:
    if accurate:
        least = min(accurate, key=bytes_of)
        return (
            f"None of the {len(accurate)} candidates that are accurate enough takes at "
            f"most {as_bytes(wish.memory_limit or 0)}: the smallest, {least.candidate},"
            f" takes {as_bytes(bytes_of(least))}. Raise --memory-limit."
        )
    error: Callable = lambda x: x.gradient_error
    usable = [x for x in measurements if _is_to_be_taken(x) and error(x)]
    if not usable:
        return "No candidate gave a gradient that can be relied on."
    best = min(usable, key=error)
    return (
        f"No candidate's gradient is within {wish.tolerance:g} of the reference. "
        f"The nearest, {best.candidate}, is within {error(best):.1e}. Allow more "
        "steps (`max_steps` of the problem), take double precision, or a larger "
        "--tolerance."
    )


def as_seconds(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def as_bytes(size: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} B"
