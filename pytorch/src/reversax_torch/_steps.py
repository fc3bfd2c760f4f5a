r"""What steps add, where they end, and how often each halves the gap of the twins.

The bases are torchdiffeq's explicit Runge-Kutta methods, and Tsit5 (Ch. Tsitouras,
"Runge-Kutta pairs of order 5(4)", 2011), with their numbers in `bases.json`:

    k_i = f(t0 + c_i*h, y + h * sum_j a_ij k_j),   Psi_h(t0, y) = h * sum_i b_i k_i.

Between the ends `r0`, `r1` of a step from `z`, with `theta` from 0 to 1 and the base's
interpolant `u(theta) = z + h * sum_i b_i(theta) k_i`, the solution is

    (D)    r(theta) = (1 - theta) r0 + theta r1 + v(theta),
           v(theta) = u(theta) - z - theta*Psi_h(t0, z).

A damped mode `y' = alpha*y` widens the gap by `exp(h*abs(alpha))` a step, over `T` by
`abs(alpha)*T/ln(2)` halvings, however many steps there are. So `n`, 256 or, with a
controller, 320, are spread over it, and at least one made in four steps:

    (T)    min(4, floor(n*s') - floor(n*s)),   s = (t - t0)/(t1 - t0).
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Time = float | Tensor  # A tensor where there are gradients by times.
Field = Callable[[Time, Tensor], Tensor]
Grid = Callable[[Tensor], Tensor]  # The ends of steps, of the times asked for.
at_times: Grid = lambda t: t


class Base:
    """`error` has the weights of an estimate, `dense` the coefficients of `theta`, ...
    in `b_i(theta)`: none, or one more than `b`, of the field at the end of the step."""

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


def halvings_of(value: Any, total: int) -> Callable[[list[int], float, float], int]:
    """Those of a step, from those made and the shares of time before and after it."""

    def over_time(made: list[int], before: float, after: float) -> int:
        # Round-off is not to move a whole number.
        now = math.floor(total * after + 1e-6) - math.floor(total * before + 1e-6)
        return min(4, now) or int(len(made) > 2 and not any(made[-3:]))  # (T)

    if value == "auto":
        return over_time
    each = Fraction(value).limit_denominator(10**6)
    if not (0 < each <= 30 and 1 in (each.numerator, each.denominator)):
        raise ValueError(
            'Pass "auto", an integer from 1 to 30, or 1/m for an integer m as the '
            f"option `halvings_per_step`, not {value!r}."
        )
    until = lambda step: math.floor(step * each)
    return lambda made, *_: until(len(made) + 1) - until(len(made))


def even(t: Tensor, size: float | None, count: int | None) -> Tensor:
    """Steps of one size, of which the last may be shorter, or so many of one size."""
    length = t[-1] - t[0]
    # A step that is left over by round-off alone is none.
    n = count or math.ceil(abs(length.item()) / (size or 1.0) * (1 - 1e-12))
    h = length / n if size is None else length.sign() * size
    return torch.cat([t[0] + torch.arange(n, device=t.device) * h, t[-1:]])


@dataclass(frozen=True)
class Controller:
    """torchdiffeq's choice of steps, all lengths positive."""

    rtol: Any
    atol: Any
    norm: Callable[[Tensor], Any]
    first_step: float | None = None
    min_step: float = 0.0
    max_step: float = math.inf
    safety: float = 0.9
    ifactor: float = 10.0
    dfactor: float = 0.2
    max_num_steps: float = math.inf
    step_t: Any = ()

    def ratio(self, error: Tensor, y0: Tensor, y1: Tensor) -> float:
        allowed = self.atol + self.rtol * torch.maximum(y0.abs(), y1.abs())
        return abs(float(self.norm(error / allowed)))

    def next(self, h: float, ratio: float, order: int) -> float:
        factor = self.safety / max(ratio, 1e-300) ** (1 / order)
        factor = max(factor, 1.0 if ratio < 1 else self.dfactor)
        return min(max(h * min(factor, self.ifactor), self.min_step), self.max_step)

    def first(self, field: Callable, t0: float, y0: Tensor, order: int, sign: float):
        """Hairer, Norsett & Wanner, II.4."""
        if self.first_step is not None:
            return abs(self.first_step)
        f0 = field(t0, y0)
        d0, d1 = self.ratio(y0, y0, y0), self.ratio(f0, y0, y0)
        if not math.isfinite(d0 + d1):
            return math.nan
        h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
        f1 = field(t0 + sign * h0, y0 + sign * h0 * f0)
        d2 = self.ratio(f1 - f0, y0, y0) / h0
        flat = d1 <= 1e-15 and d2 <= 1e-15
        h1 = max(1e-6, h0 * 1e-3) if flat else (0.01 / max(d1, d2)) ** (1 / order)
        return min(100 * h0, h1, self.max_step)

    def end(self, t: float, h: float, t1: float, tries: int) -> float:
        """Where a step of length `h` ends: not beyond `t1`, nor `step_t`."""
        sign = math.copysign(1.0, t1 - t)
        ahead = [s for s in (*self.step_t, t1) if (s - t) * sign > 0]
        stop = min(ahead, key=lambda s: abs(s - t))
        # So that no step is much shorter than its neighbours.
        end = stop if abs(stop - t) <= h * (1 + 1e-6) else t + sign * h
        if tries >= self.max_num_steps or t + (end - t) / 2 in (t, end) or h != h:
            raise RuntimeError(
                "Allow larger errors (1e-6 is the least in single precision) or more "
                "steps, or look for what is not finite or not smooth in the field: the "
                f"controller came to t = {t:g} in {tries} steps."
            )
        return end
