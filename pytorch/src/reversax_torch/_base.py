"""The bases, explicit Runge-Kutta methods, whose numbers are in `bases.json`: those of
torchdiffeq; Tsit5 is Ch. Tsitouras, "Runge-Kutta pairs of order 5(4)" (2011)."""

import json
import math
from fractions import Fraction
from pathlib import Path

Row = tuple[float, ...]


def _row(text: str) -> Row:
    return tuple(float(Fraction(number)) for number in text.split())


def _quartic(b: Row, middle: Row) -> tuple[Row, ...]:
    """Through the `middle` of a step and both ends, with their slopes."""
    rows, last = [], len(middle) - 1
    for i, (y1, m) in enumerate(zip(b, middle, strict=True)):
        begin, end = float(i == 0), float(i == last)
        square = end - 4 * begin - 5 * y1 + 16 * m
        cube = 5 * begin - 3 * end + 14 * y1 - 32 * m
        rows.append((begin, square, cube, 2 * (end - begin) - 8 * y1 + 16 * m))
    return tuple(rows)


class Base:
    """`a`, `b`, `c`; weights of an error estimate; the coefficients of `theta`,
    `theta**2`, ... in `b(theta)` of an interpolant, by weight. The last two, if it has
    them, may have one weight more, of the field at the end of the step."""

    def __init__(
        self, order: int, a: list, b: str, other: str, dense: list, middle: str
    ):
        self.order, self.a, self.b = order, tuple(map(_row, a)), _row(b)
        self.c = tuple(map(math.fsum, self.a))
        more = (*self.b, 0.0)
        self.error = tuple(x - y for x, y in zip(more, _row(other), strict=False))
        self.dense = tuple(map(_row, dense))
        if middle:
            self.dense = _quartic(more, _row(middle))


_TEXT = Path(__file__).with_name("bases.json").read_text()
BASES = {name: Base(**numbers) for name, numbers in json.loads(_TEXT).items()}
