r"""The bases, explicit Runge-Kutta methods, with the numbers in `bases.json`, those of
torchdiffeq; Tsit5 is Ch. Tsitouras, "Runge-Kutta pairs of order 5(4)" (2011):

    k_i = f(t0 + c_i*h, y + h * sum_j a_ij k_j),   Psi_h(t0, y) = h * sum_i b_i k_i.

Between the ends `r0`, `r1` of a step from `z`, with `theta` from 0 to 1 and the base's
interpolant `u(theta) = z + h * sum_i b_i(theta) k_i`, the solution is

    (D)    r(theta) = u(theta) + (1 - theta) (r0 - u(0)) + theta (r1 - u(1))
                    = (1 - theta) r0 + theta r1 + v(theta),
           v(theta) = u(theta) - z - theta*Psi_h(t0, z).
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

Time = float | Tensor  # A tensor where there are gradients by times.
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


_NUMBERS = json.loads(Path(__file__).with_name("bases.json").read_text())
BASES = {name: Base(**numbers) for name, numbers in _NUMBERS.items()}


def combined(y: Tensor | None, h: Time, weights: Iterable, ks: list[Tensor]) -> Tensor:
    """`y + h * sum_i weights_i k_i`, `y` being `None` if it is zero."""
    for weight, k in zip(weights, ks, strict=False):
        if isinstance(factor := h * weight, Tensor):
            more = factor.to(k.device, k.dtype) * k
            y = more if y is None else y + more
        elif factor != 0:
            y = k * factor if y is None else torch.add(y, k, alpha=factor)
    return torch.zeros_like(ks[0]) if y is None else y


def increment(
    base: Base, field: Field, t0: Time, h: Time, y: Tensor, thetas: Sequence[Time] = ()
) -> tuple[list[Tensor], list[Tensor]]:
    """`Psi_h(t0, y)` and each `v(theta)`; what the field returned."""
    ks: list[Tensor] = []
    for c, row in zip(base.c, base.a, strict=True):
        ks.append(field(t0 + c * h, combined(y, h, row, ks)))
    outputs = [combined(None, h, base.b, ks)]
    if thetas and len(base.dense) > len(ks):
        ks.append(field(t0 + h, y + outputs[0]))
    for theta in thetas:
        if not base.dense:  # A shorter step.
            (part,), _ = increment(base, field, t0, theta * h, y)
            outputs.append(combined(part, -1.0, [theta], outputs[:1]))
            continue
        weights = []
        for row, b in zip(base.dense, (*base.b, 0.0), strict=False):
            terms = [a * theta**power for power, a in enumerate(row, 1) if a]
            weights.append(sum(terms, -b * theta))
        outputs.append(combined(None, h, weights, ks))
    return outputs, ks
