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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from ._base import Base, Field, Increment, Time
from ._state import check_that_all_are_known
from ._steps import Controller, Grid, at_times, evenly, over_steps, over_time
from ._twins import Bits, McCallumFoster, Symmetric, largest


class Held(nn.ModuleDict):
    """Calls anything, in which its modules may then have other parameters."""

    def forward(self, call: Callable, *arguments: Any) -> Any:
        return call(*arguments)


@dataclass
class Walk:
    """A solve: what it is given, a field on tensors of real numbers among it, and what
    is kept of the way forward for the way back."""

    field: Field
    base: Base
    twins: Symmetric | McCallumFoster
    steps: Grid | Controller
    halvings_per_step: Fraction | None
    module: nn.Module | None
    names: list[str | None]
    """Those that the module has for the parameters."""
    autocast: tuple[str, torch.dtype, bool]
    checks: bool
    """Whether the first increment is looked at for tensors that are not known."""
    time_gradient: bool = False
    records: bool = False
    """Whether there will be a way back."""
    batched: "Walk | None" = None
    """The same for a batch, if it was solved under `torch.vmap`."""

    def look_at(self, t: Tensor, *others: Tensor) -> None:
        """Under `torch.func` what has a gradient shows at one of several levels."""
        if torch.is_grad_enabled():
            self.time_gradient |= t.requires_grad
            self.records |= any(x.requires_grad for x in (t, *others))

    def run(self, call: Callable, params: Sequence[Tensor], *arguments: Any) -> Any:
        """Calls it as in the forward pass. The module has substitutes of parameters
        with hooks, which are for whole gradients, and of those that are not its own:
        under `torch.func` autograd hands over others."""
        now = {} if self.module is None else dict(self.module.named_parameters())
        given, self.params = {}, [*params]
        for i, (p, name) in enumerate(zip(params, self.names, strict=True)):
            # There is no public name for hooks.
            if name and (now.get(name) is not p or p._backward_hooks):
                self.params[i] = p.detach().requires_grad_(self.records)
                given[f"module.{name}"] = self.params[i]
        with torch.autocast(*self.autocast):
            if self.module is None or not given:
                return call(*arguments)
            held = Held({"module": self.module})
            return torch.func.functional_call(held, given, (call, *arguments))

    def increment(
        self, t0: float, t1: float, n: Any, thetas: Sequence[float] = ()
    ) -> tuple[Increment, list[Tensor], list[Time]]:
        """That from the twin `n`, what it departs by within the step, and its times.
        Its graph is recorded in both passes: without it some kernels are others."""
        y = self.twins.decode(n).to(self.dtype, copy=True).requires_grad_(self.records)
        times: list[Any] = [t0, t1, *thetas]
        if self.time_gradient:
            leaf = lambda t: torch.tensor(t, dtype=torch.float64).requires_grad_()
            times = [leaf(t) for t in times]
        with torch.set_grad_enabled(self.records or self.checks):
            part = Increment(self.base, self.field, times[0], times[1] - times[0], y)
            departures = [part.departure(theta) for theta in times[2:]]
        if self.checks:
            self.checks = False
            check_that_all_are_known([y, *times, *self.params], part.value)
        return part, departures, times

    def forward(self, t: Tensor, y0: Tensor) -> Tensor:
        """The solution at `t`."""
        self.asked, self.dtype = t.tolist(), y0.dtype
        self.ys, code = y0.new_empty((len(t), *y0.shape)), self.twins.encode(y0)
        self.ys[0], self.pair, self.bits = y0, (code, code), Bits([])
        self.times, self.halvings, self.rows, self.row = self.asked[:1], [], [], 1
        """The ends of steps; for each step its halvings, and which rows of the times
        asked for it has, at what share of it: `None` is its end itself."""
        self.peak, self.size, self.ratio = largest(y0), 0.0, 0.0
        if isinstance(self.steps, Controller):
            self.adapt(self.steps, y0)
        else:
            self.follow(self.steps(t).tolist())
        ys = self.ys
        del self.ys  # So that what is kept dies with the graph of the solution.
        return ys

    def step(self, t1: float, b: int, control: Controller | None = None) -> float:
        """(C), (F1), (F2), of which nothing is kept where a controller finds the error
        too large. Returns that in units of what is allowed."""
        twins, t0, rows, ratio = self.twins, self.times[-1], self.within(t1), 0.0
        (y, z), shed = twins.mix(*self.pair, b)  # (C)
        inside = [theta for _, theta in rows if theta is not None]
        part, departures, _ = self.increment(t0, t1, z, inside)
        up, u = part.value.detach(), part.error().detach()
        del part  # With its graph.
        y = y + twins.encode(up)  # (F1)
        part = self.increment(t1, t0, y)[0]
        down = part.value.detach()
        z = z - twins.encode(down)  # (F2)
        sizes = map(largest, (up, down, part.y.detach(), twins.decode(z)))
        peak = torch.stack([self.peak, *sizes]).amax()  # NaN stays.
        if control:
            # What misses in `u` begins the other half of the step, so near to it.
            u = u.add(part.ks[0].detach(), alpha=(t1 - t0) * self.base.last).abs()
            e = (up + down).abs()  # (E)
            error = u + 2.5 * u.sqrt() * e.sqrt() + e * 2.0**-b  # (U)
            ends = twins.readout(*self.pair), twins.readout(y, z)
            ratio = control.ratio(error, *ends) if peak < twins.largest else math.inf
            if not (ratio <= 1 or abs(t1 - t0) <= control.min_step):
                return ratio
        before, self.pair = self.pair, (y, z)
        self.peak, self.row = peak, self.row + len(rows)
        self.times.append(t1)
        self.halvings.append(b)
        self.rows.append(rows)
        if shed is not None and self.records:
            self.bits.push(shed, b)
        for row, theta in rows:
            self.ys[row] = after = twins.readout(y, z)
            if theta is not None:
                line = torch.lerp(twins.readout(*before), after, theta)
                self.ys[row] = line + departures.pop(0).detach()  # (D)
        return ratio

    def within(self, t1: float) -> list[tuple[int, float | None]]:
        """The rows of the times asked for that a step reaches."""
        t0, last, row, rows = self.times[-1], len(self.asked) - 1, self.row, []
        while row <= last and (self.asked[row] - t1) * (t1 - t0) <= 0:
            ends = row == last or self.steps is at_times
            rows.append((row, None if ends else (self.asked[row] - t0) / (t1 - t0)))
            row += 1
        return rows

    def look(self) -> None:
        """Raises if the twins are apart, or numbers out of range."""
        peak, limit, t1 = float(self.peak), self.twins.largest, self.times[-1]
        if not peak < limit:
            raise FloatingPointError(
                "Pass the largest absolute value that the state reaches as "
                "`options={'largest': ...}`, take smaller steps, or look for what is "
                f"not finite in the field: it had come to {peak:.3g} at t = {t1:g}, of "
                f"{limit:.3g} allowed."
            )
        self.size = max(self.size, float(largest(self.twins.readout(*self.pair))))
        y, z = map(self.twins.decode, self.pair)
        before, self.ratio = self.ratio, float(largest(y - z)) / (self.size or 1.0)
        if not (self.ratio <= 1 or (self.ratio <= 10 and before <= 1)):  # (W)
            raise FloatingPointError(
                "Take smaller steps, or more halvings of the gap, up to "
                "`options={'halvings_per_step': 4}`: the field damps more than the "
                f"coupling holds, and drove the twins apart by t = {t1:g}."
            )

    def follow(self, times: list[float]) -> None:
        """Steps that are known beforehand."""
        if (times[0], times[-1]) != (self.asked[0], self.asked[-1]):
            raise ValueError("Begin the grid of steps at `t[0]` and end it at `t[-1]`.")
        n = len(times) - 1
        for i in range(n):
            self.step(times[i + 1], evenly(i, self.halvings_per_step or over_steps(n)))
            if i < 16 or i == n - 1 or i % max(1, n // 64) == 0:
                self.look()

    def adapt(self, control: Controller, y0: Tensor) -> None:
        """Steps that a controller chooses."""
        begin, end, order, tries = self.asked[0], self.asked[-1], self.base.order, 0
        share = lambda t: (t - begin) / (end - begin)
        h = control.first(self.field, begin, y0, order, math.copysign(1.0, end - begin))
        while (t0 := self.times[-1]) != end:
            t1, i = control.end(t0, h, end, tries), len(self.halvings)
            each = self.halvings_per_step
            b = evenly(i, each) if each else over_time(i, share(t0), share(t1))
            ratio, tries = self.step(t1, b, control), tries + 1
            h = control.next(abs(t1 - t0), ratio, order)
            if self.times[-1] == t1:
                self.look()
