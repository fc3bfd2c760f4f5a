r"""The bases, explicit Runge-Kutta methods, whose numbers are in `bases.json`: those of
torchdiffeq; Tsit5 is Ch. Tsitouras, "Runge-Kutta pairs of order 5(4)" (2011). Their
increments are

    k_i = f(t0 + c_i*h, y + h * sum_j a_ij k_j),   Psi_h(t0, y) = h * sum_i b_i k_i.

Between the ends of a step from `z`, with `r0` and `r1` the solution there, `theta` from
0 to 1 and `u` the base's interpolant `z + h * sum_i b_i(theta) k_i`, the solution is

    (D)    r(theta) = u(theta) + (1 - theta) (r0 - u(0)) + theta (r1 - u(1))
                    = (1 - theta) r0 + theta r1 + v(theta),

           v(theta) = u(theta) - z - theta*Psi_h(t0, z).
"""

import json
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

Time = float | Tensor
"""A tensor where the derivative with respect to times is asked for."""
Field = Callable[[Time, Tensor], Tensor]


class Base:
    """`a`, `b` and `c`; the weights of an error estimate; by evaluation coefficients
    of `theta`, `theta**2`, ... in `b_i(theta)`. Of the last two there may be none, or
    one for the field at the end of the step too."""

    def __init__(self, order: int, a: list, b: str, error: str, dense: list):
        row = lambda text: [float(Fraction(number)) for number in text.split()]
        self.order, self.a, self.b = order, [*map(row, a)], row(b)
        self.error, self.dense = row(error), [*map(row, dense)]
        self.c = [*map(math.fsum, self.a)]


_TEXT = Path(__file__).with_name("bases.json").read_text()
BASES = {name: Base(**numbers) for name, numbers in json.loads(_TEXT).items()}


def _sum(
    y: Tensor | None, h: Time, weights: Sequence[Time], ks: Sequence[Tensor]
) -> Tensor:
    """`y + h * sum_i weights_i k_i`, `y` being `None` if it is zero."""
    for weight, k in zip(weights, ks, strict=False):
        if isinstance(factor := h * weight, Tensor):
            more = factor.to(k.device, k.dtype) * k
            y = more if y is None else y + more
        elif factor != 0:
            y = k * factor if y is None else torch.add(y, k, alpha=factor)
    return torch.zeros_like(ks[0]) if y is None else y


class Increment:
    """`Psi_h(t0, y)`, its `value`, and what it was made from."""

    def __init__(self, base: Base, field: Field, t0: Time, h: Time, y: Tensor):
        self.base, self.field, self.t0, self.h, self.y = base, field, t0, h, y
        self.ks: list[Tensor] = []
        for c, row in zip(base.c, base.a, strict=True):
            self.ks.append(field(t0 + c * h, _sum(y, h, row, self.ks)))
        self.value = _sum(None, h, base.b, self.ks)

    def error(self) -> Tensor:
        """The base's own estimate, but for the evaluation at the end of the step."""
        return _sum(None, self.h, self.base.error[: len(self.base.b)], self.ks)

    def departure(self, theta: Time) -> Tensor:
        """`v(theta)`; of a base without an interpolant by a shorter step."""
        if not self.base.dense:
            part = Increment(self.base, self.field, self.t0, theta * self.h, self.y)
            return _sum(part.value, -1.0, [theta], [self.value])
        if len(self.base.dense) > len(self.ks):
            self.ks.append(self.field(self.t0 + self.h, self.y + self.value))
        weights = []
        for row, b in zip(self.base.dense, (*self.base.b, 0.0), strict=False):
            terms = [a * theta**power for power, a in enumerate(row, 1) if a]
            weights.append(sum(terms, -b * theta))
        return _sum(None, self.h, weights, self.ks)
