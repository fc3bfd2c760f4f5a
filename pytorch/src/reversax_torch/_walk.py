r"""The way forward.

A controller is told of the base's own estimate `u`, of what the step adds to the gap
between the twins, and of the `b` halvings of the step,

    (E)    e = Psi_{h}(t0, z) + Psi_{-h}(t1, y1)
    (U)    |u| + 5/2 * sqrt(|u|*|e|) + 2**-b * |e|.

With `g` the largest `|y - z|` and `s` the largest size of the solution so far, a pair
is sound, not driven apart by damping, as long as

    (W)    r = g/s  <=  1,   or  r <= 10  and the last one was <= 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from ._base import Base
from ._increment import Field, Increment, Time
from ._steps import Controller, Grid, evenly, grid_of_ends, over_steps, over_time
from ._twins import Bits, McCallumFoster, Pair, Symmetric


@dataclass
class Problem:
    """A solve, of a field on tensors of real numbers."""

    field: Field
    base: Base
    twins: Symmetric | McCallumFoster
    steps: Grid | Controller
    on_grid: bool
    """Whether steps end at the times asked for, and nowhere else."""
    halvings: Fraction | None
    tolerance: float | None
    records: bool
    """Whether there will be a way back."""
    time_gradient: bool
    module: nn.Module | None
    autocast: Callable[[], Any]
    names: list[str | None]
    """Those that the module has for the parameters."""
    check: Callable[[list, Tensor], None] | None = None
    """Of the first increment."""
    walk: "Walk | None" = None
    batched: "Problem | None" = None
    """The same for a batch, if it was solved under `torch.vmap`."""

    def readout(self, y: Tensor, z: Tensor) -> Tensor:
        return y * self.twins.weights[0] + z * self.twins.weights[1]

    def increment(
        self, t0: float, t1: float, y: Tensor, thetas: list[float]
    ) -> tuple[Increment, list[Tensor], list[Time]]:
        """What it departs by within the step, and its times. Its graph is recorded in
        both passes: without it some kernels are others."""
        y = y.detach().requires_grad_(self.records)
        times: list[Any] = [t0, t1, *thetas]
        if self.time_gradient:
            leaf = lambda t: torch.tensor(t, dtype=torch.float64).requires_grad_()
            times = [leaf(t) for t in times]
        with torch.set_grad_enabled(self.records or self.check is not None):
            part = Increment(self.base, self.field, times[0], times[1] - times[0], y)
            departures = [part.departure(theta) for theta in times[2:]]
        if self.check is not None:
            self.check([y, *times], part.value)
            self.check = None
        return part, departures, times


def largest(x: Tensor) -> Tensor:
    return x.abs().amax().float() if x.numel() else torch.zeros(())


class Walk:
    """A solve on its way, and what is kept of it for the way back."""

    def __init__(self, problem: Problem, t: Tensor, y0: Tensor):
        self.problem, self.t, self.asked = problem, t.double(), t.double().tolist()
        self.ys = y0.new_empty((len(t), *y0.shape))
        self.ys[0], code = y0, problem.twins.encode(y0)
        self.pair, self.decoded, self.bits = Pair(code, code), Pair(y0, y0), Bits([])
        self.times, self.halvings, self.rows = self.asked[:1], [], []
        """The ends of steps; for each step its halvings, and which rows of the times
        asked for it has, at what share of it: `None` is its end itself."""
        self.peak, self.size, self.ratio = largest(y0), 0.0, 0.0
        if isinstance(problem.steps, Controller):
            self.adapt(problem.steps)
        else:
            self.follow(problem.steps)

    def readout(self) -> Tensor:
        return self.problem.readout(*self.decoded)

    def step(self, t0: float, t1: float, b: int, rows: list, control: Any = None):
        """(C), (F1), (F2), of which nothing is kept where a controller finds the error
        too large. Returns that in units of what is allowed."""
        problem, twins = self.problem, self.problem.twins
        (y, z), shed = twins.mix(*self.pair, b)  # (C)
        thetas = [theta for _, theta in rows if theta is not None]
        part, departures, _ = problem.increment(t0, t1, twins.decode(z), thetas)
        up, u = part.value.detach(), part.error().detach().abs() if control else None
        del part
        y = y + twins.encode(up)  # (F1)
        y_now = twins.decode(y)
        down = problem.increment(t1, t0, y_now, [])[0].value.detach()
        z = z - twins.encode(down)  # (F2)
        before, after, ratio = self.readout(), Pair(y_now, twins.decode(z)), 0.0
        peak = torch.stack([largest(x) for x in (up, down, *after)]).amax()
        if u is not None:
            e = (up + down).abs()  # (E)
            error = u + 2.5 * u.sqrt() * e.sqrt() + e * 2.0**-b  # (U)
            ratio = control.ratio(error, before, problem.readout(*after))
            ratio = ratio if float(peak) < twins.largest else math.inf
            if not (ratio <= 1 or abs(t1 - t0) <= control.min_step):
                return ratio
        self.pair, self.decoded = Pair(y, z), after
        self.peak = torch.maximum(self.peak, peak)  # NaN stays.
        self.times.append(t1)
        self.halvings.append(b)
        self.rows.append(rows)
        if shed is not None and problem.records:
            self.bits.push(shed, b)
        for row, theta in rows:
            self.ys[row] = self.readout()
            if theta is not None:
                line = torch.lerp(before, self.readout(), theta)
                self.ys[row] = line + departures.pop(0).detach()  # (D)
        return ratio

    def within(self, row: int, t0: float, t1: float) -> list:
        """The rows, from one on, of the times asked for that a step reaches."""
        last, rows = len(self.asked) - 1, []
        while row < last and (self.asked[row] - t1) * (t1 - t0) <= 0:
            rows.append((row, (self.asked[row] - t0) / (t1 - t0)))
            row += 1
        return rows + [(last, None)] * (t1 == self.asked[-1])

    def look(self) -> None:
        """Raises if the twins are apart, or numbers out of range."""
        peak, limit, t1 = float(self.peak), self.problem.twins.largest, self.times[-1]
        if not peak < limit:
            raise FloatingPointError(
                "Pass the largest absolute value that the state reaches as "
                "`options={'largest': ...}`, take smaller steps, or look for what is "
                f"not finite in the field: it had come to {peak:.3g} at t = {t1:g}, of "
                f"{limit:.3g} allowed."
            )
        self.size = max(self.size, float(largest(self.readout())))
        gap = float(largest(self.decoded.y - self.decoded.z))
        before, self.ratio = self.ratio, gap / (self.size or 1.0)
        if not (self.ratio <= 1 or (self.ratio <= 10 and before <= 1)):  # (W)
            raise FloatingPointError(
                "Take smaller steps, or more halvings of the gap, up to "
                "`options={'halvings_per_step': 4}`: the field damps more than the "
                f"coupling holds, and drove the twins apart by t = {t1:g}."
            )

    def follow(self, steps: Grid) -> None:
        """Steps that are known beforehand."""
        problem, self.grid = self.problem, steps
        times, row = steps(self.t).tolist(), 1
        if (times[0], times[-1]) != (self.asked[0], self.asked[-1]):
            raise ValueError("Begin the grid of steps at `t[0]` and end it at `t[-1]`.")
        n = len(times) - 1
        each = over_steps(n) if problem.halvings is None else problem.halvings
        for i in range(n):
            t0, t1 = times[i], times[i + 1]
            rows = [(i + 1, None)] if problem.on_grid else self.within(row, t0, t1)
            row += len(rows)
            self.step(t0, t1, evenly(i, each), rows)
            if i < 16 or i == n - 1 or i % max(1, n // 64) == 0:
                self.look()

    def adapt(self, control: Controller) -> None:
        """Steps that a controller chooses."""
        problem, t0, end = self.problem, self.asked[0], self.asked[-1]
        order, row, tries, share = problem.base.order, 1, 0, 0.0
        with torch.no_grad():
            sign = math.copysign(1.0, end - t0)
            h = control.first(problem.field, t0, self.decoded.y, order, sign)
        while t0 != end:
            t1 = control.end(t0, h, end, tries)
            rows, index, tries = self.within(row, t0, t1), len(self.halvings), tries + 1
            later = (t1 - self.asked[0]) / (end - self.asked[0])
            b = over_time(index, share, later)
            if problem.halvings is not None:
                b = evenly(index, problem.halvings)
            ratio = self.step(t0, t1, b, rows, control)
            h = control.next(abs(t1 - t0), ratio, order)
            if self.times[-1] == t1:
                self.look()
                t0, row, share = t1, row + len(rows), later
        self.grid = grid_of_ends(self.times)
