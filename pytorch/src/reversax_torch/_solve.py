r"""A solve as one function for autograd. On the way back each step is undone, and
differentiated, from where it was made.

A controller is told of the base's own estimate `u` and of what the step, of `b`
halvings, adds to the gap between the twins:

    (E)    e = Psi_{h}(t0, z) + Psi_{-h}(t1, y1)
    (U)    |u| + 5/2 * sqrt(|u|*|e|) + 2**-b * |e|.

A pair is sound, not driven apart by damping, as long as the largest `|y - z|`, over the
largest size `s` of the solution so far, is

    (W)    r <= 1,   or  r <= 10  and the last one was <= 1.

The certificate of the way back is that it arrives where the way forward began: in fixed
point to the bit, in floating point to the square root of the machine epsilon times `s`.
Nor may the field have changed its buffers: it did so on the way forward too then.
"""

import math
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ._steps import Base, Controller, Field, Grid, at_times, combined, increment
from ._twins import McCallumFoster, Symmetric, largest, push

_CAUSES = (
    "Call `func.eval()`, and have the field return the same for the same `(t, y)`: "
    "dropout in training mode, BatchNorm in training mode and a counter of calls that "
    "changes its value do not, nor do sums in no fixed order on a GPU (for which there "
    "is `torch.use_deterministic_algorithms(True)`). "
)
_INEXACT = "Leave out the option `coupling`: without it nothing is lost on the way. "
_ACCEPTS = "`options={'round_trip_tolerance': ...}` accepts it."


@dataclass
class Walk:
    """A solve: what it is given, and what is kept of it for the way back."""

    field: Field
    base: Base
    twins: Symmetric | McCallumFoster
    steps: Grid | Controller
    halvings_of: Callable[[list[int], float, float], int]
    module: nn.Module
    names: list[str | None]  # Those that the module has for the parameters.
    checks: bool  # Whether the first increment is looked at for unknown tensors.
    time_gradient: bool = False
    records: bool = False  # Whether there will be a way back.
    batched: "Walk | None" = None  # The same for a batch, if under `torch.vmap`.

    def solve(self, *inputs: Tensor) -> Tensor:
        """Under `torch.func` what has a gradient shows at one of several levels."""
        if torch.is_grad_enabled():
            self.time_gradient |= inputs[0].requires_grad
            self.records |= any(x.requires_grad for x in inputs)
        device = inputs[1].device.type
        casts = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        self.autocast = torch.autocast(device, *casts)
        return Solve.apply(self, None, (), *inputs)

    def run(self, call: Callable, params: Sequence[Tensor], *arguments: Any) -> Any:
        """Calls it as in the forward pass, with substitutes of parameters that have
        hooks, which are for whole gradients, or are others, under `torch.func`."""
        now, given, self.params = dict(self.module.named_parameters()), {}, [*params]
        for i, (p, name) in enumerate(zip(params, self.names, strict=True)):
            # There is no public name for hooks.
            if name and (now.get(name) is not p or p._backward_hooks):
                self.params[i] = p.detach().requires_grad_(self.records)
                given[f"module.{name}"] = self.params[i]
        with self.autocast:
            if not given:
                return call(*arguments)
            caller = nn.Module()
            caller.module, caller.forward = self.module, call
            return torch.func.functional_call(caller, given, arguments)

    def increment(self, t0: float, t1: float, n: Any, inside: Sequence = ()) -> tuple:
        """That from the twin `n` and what it departs by `inside` the step; leaves, `h`,
        the field's values. Both passes record graphs: some kernels depend on that."""
        y = self.twins.decode(n).to(self.dtype).detach().requires_grad_(self.records)
        leaves, times = [y], [t0, t1, *(theta for _, theta in inside)]
        with torch.set_grad_enabled(self.records or self.checks):
            if self.time_gradient:
                leaves += [torch.tensor(times, dtype=torch.float64).requires_grad_()]
                times = leaves[1].unbind()
            h = times[1] - times[0]
            outputs, ks = increment(self.base, self.field, times[0], h, y, times[2:])
        if self.checks:
            self.checks = False
            check_that_all_are_known([*leaves, *self.params], outputs[0])
        return outputs, leaves, h, ks

    def forward(self, t: Tensor, y0: Tensor) -> Tensor:
        self.asked, self.dtype, code = t.tolist(), y0.dtype, self.twins.encode(y0)
        self.pair, self.bits = (code, code), []
        self.times, self.halvings = self.asked[:1], []
        self.peak, self.size, self.ratio = largest(y0), 0.0, 0.0
        ys = y0.expand(len(t), *y0.shape).clone()
        if isinstance(self.steps, Controller):
            self.adapt(ys, self.steps)
            return ys
        self.grid, times = self.steps, self.steps(t).tolist()
        if (times[0], times[-1]) != (self.asked[0], self.asked[-1]):
            raise ValueError("Begin the grid of steps at `t[0]` and end it at `t[-1]`.")
        n = len(times) - 1
        for i, t1 in enumerate(times[1:]):
            self.step(ys, t1)
            if i < 16 or i == n - 1 or i % max(1, n // 64) == 0:
                self.look()
        return ys

    def step(self, ys: Tensor, t1: float, control: Controller | None = None) -> float:
        """(C), (F1), (F2), not kept if the error, which it returns, is too large."""
        twins, t0, ratio = self.twins, self.times[-1], 0.0
        rows, inside = self.within(t0, t1)
        share = lambda t: (t - self.asked[0]) / (self.asked[-1] - self.asked[0])
        b = self.halvings_of(self.halvings, share(t0), share(t1))
        (y, z), shed = twins.mix(*self.pair, b)  # (C)
        outputs, _, h, ks = self.increment(t0, t1, z, inside)
        up, *departures = (x.detach() for x in outputs)
        stages = len(self.base.b)
        u = combined(None, h, self.base.error[:stages], ks) if control else up
        del outputs, ks  # With their graph.
        y = y + twins.encode(up)  # (F1)
        outputs, (start, *_), _, ks = self.increment(t1, t0, y)
        down = outputs[0].detach()
        z = z - twins.encode(down)  # (F2)
        found = torch.stack([up, down, start.detach(), twins.decode(z).to(up)])
        peak = torch.maximum(self.peak, largest(found))  # NaN stays.
        if control:
            for weight in self.base.error[stages:]:
                # Of the field at the end, which the other half of the step begins with.
                u.add_(ks[0].detach(), alpha=(t1 - t0) * weight)
            u, e = u.abs(), (up + down).abs()  # (E)
            error = u + 2.5 * u.sqrt() * e.sqrt() + e * 2.0**-b  # (U)
            ends = twins.readout(*self.pair), twins.readout(y, z)
            ratio = control.ratio(error, *ends) if peak < twins.largest else math.inf
            if not (ratio <= 1 or abs(t1 - t0) <= control.min_step):
                return ratio
        before, self.pair, self.peak = self.pair, (y, z), peak
        self.times.append(t1)
        self.halvings.append(b)
        if shed is not None and self.records:
            push(self.bits, shed, b)
        for row in rows:
            ys[row] = twins.readout(y, z)
        for (row, theta), departure in zip(inside, departures, strict=True):
            line = torch.lerp(twins.readout(*before), twins.readout(y, z), theta)
            ys[row] = line + departure  # (D)
        return ratio

    def within(self, t0: float, t1: float) -> tuple[Sequence, list[tuple[int, float]]]:
        """Rows that a step reaches: at its end; others with their share of it."""
        along = lambda t: math.copysign(1.0, t1 - t0) * t
        first, beyond = (bisect(self.asked, along(t), key=along) for t in (t0, t1))
        last = first if self.steps is at_times else len(self.asked) - 1
        share = lambda row: (self.asked[row] - t0) / (t1 - t0)
        inside = [(row, share(row)) for row in range(first, min(last, beyond))]
        return range(last, beyond), inside

    def look(self) -> None:
        peak, limit, t1 = float(self.peak), self.twins.largest, self.times[-1]
        if not peak < limit:
            raise FloatingPointError(
                "Pass the largest absolute value of the state as the option `largest`, "
                "take smaller steps, or look for what is not finite in the field: it "
                f"had come to {peak:.3g} at t = {t1:g}, of {limit:.3g} allowed."
            )
        self.size = max(self.size, float(largest(self.twins.readout(*self.pair))))
        y, z = map(self.twins.decode, self.pair)
        before, self.ratio = self.ratio, float(largest(y - z)) / (self.size or 1.0)
        if not (self.ratio <= 1 or (self.ratio <= 10 and before <= 1)):  # (W)
            raise FloatingPointError(
                "Take smaller steps, or more halvings of the gap, up to 4 as the "
                "option `halvings_per_step`: the field damps more than the coupling "
                f"holds, and drove the twins apart by t = {t1:g}."
            )

    def adapt(self, ys: Tensor, control: Controller) -> None:
        t0, end, order, tries = self.asked[0], self.asked[-1], self.base.order, 0
        h = control.first(self.field, t0, ys[0], order, math.copysign(1.0, end - t0))
        while (t0 := self.times[-1]) != end:
            t1 = control.end(t0, h, end, tries)
            ratio, tries = self.step(ys, t1, control), tries + 1
            h = control.next(abs(t1 - t0), ratio, order)
            if self.times[-1] == t1:
                self.look()
        # Steps that were chosen keep their lengths, but the last.
        made = torch.tensor(self.times[:-1], dtype=torch.float64) - self.times[0]
        self.grid = lambda t: torch.cat([t[0] + made.to(t.device), t[-1:]])


def check_that_all_are_known(known: list[Tensor], value: Tensor) -> None:
    """Raises if it depends on a tensor that has gradients and is not known."""
    ids, seen = {id(x) for x in known}, {None, *(x.grad_fn for x in known)}
    to_see: list[Any] = [value.grad_fn]
    for node in to_see:
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in ids:
            raise ValueError(
                "Pass `adjoint_params=(...)`, what the field reads that is to have a "
                "gradient (`tuple(module.parameters())`; `()` if nothing is): it reads "
                f"a tensor of shape {tuple(leaf.shape)} that is not known."
            )
        if node not in seen:
            seen.add(node)
            to_see.extend(parent for parent, _ in node.next_functions)


class Solve(torch.autograd.Function):
    """The solution at `t`; or, from cotangents `ct` of it, those of the inputs."""

    @staticmethod
    def forward(walk: Walk, ct: Tensor | None, wanted: tuple, t, y0, *params) -> Any:
        if ct is None:
            return walk.run(walk.forward, params, t.detach().double(), y0.detach())
        return walk.run(back, params, walk, wanted, ct, t, y0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.walk, ctx.ct, _, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cts: Tensor) -> tuple:
        if ctx.ct is not None:
            raise NotImplementedError(
                "Differentiate once. For second derivatives use `torchdiffeq.odeint`, "
                "or forward over reverse with the JAX package reversax."
            )
        wanted = ctx.needs_input_grad[5:]
        t, y0, *found = Solve.apply(ctx.walk, cts[0], wanted, *ctx.saved_tensors)
        return None, None, None, t, y0, *(found.pop(0) if x else None for x in wanted)

    @staticmethod
    def vmap(info: Any, dims: tuple, walk: Walk, ct, wanted, t, y0, *params) -> tuple:
        _, of_ct, _, of_t, of_y0, *others = dims
        if ct is not None and walk.batched is None:
            # Of one solve, for several cotangents.
            pull = lambda c: Solve.apply(walk, c, wanted, t, y0, *params)
            each = [pull(c) for c in ct.unbind(of_ct)]
            return tuple(map(torch.stack, zip(*each, strict=True))), (0,) * len(each[0])
        singly = any(wanted) or (walk.time_gradient and ct is not None)
        if singly or any(d is not None for d in (of_t, *others)):
            raise NotImplementedError(
                "Give the batch a dimension of the state, or loop: under `torch.vmap` "
                "only `y0` may be batched, and only it may have gradients for each "
                "element."
            )
        y0 = y0.movedim(of_y0, 0)
        if ct is None:
            field = torch.vmap(walk.field, in_dims=(None, 0))
            walk.batched = replace(walk, field=field, checks=False)
            return walk.batched.solve(t, y0, *params), 1
        ct = ct.movedim(of_ct, 1) if of_ct is not None else ct[:, None]
        ct = ct.expand(len(t), *y0.shape)
        return Solve.apply(walk.batched, ct, wanted, t, y0, *params), (None, 0)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise NotImplementedError(
            "Use reverse mode (`backward`, `torch.func.grad`), or `torchdiffeq.odeint`."
        )


def back(walk: Walk, wanted: tuple, ct: Tensor, t: Tensor, y0: Tensor) -> tuple:
    versions = lambda: [(id(x), x._version) for x in walk.module.buffers()]
    before, way, tolerance = versions(), WayBack(walk, ct, wanted), walk.twins.tolerance
    true, decode = walk.twins.encode(y0.detach()), walk.twins.decode
    off = max(float(largest(decode(n - true))) for n in way.pair) / (walk.size or 1.0)
    # Phrased so that NaN fails.
    if not off <= tolerance and tolerance != math.inf:
        raise RuntimeError(
            f"{_CAUSES if walk.twins.exact else _INEXACT}The backward pass did not "
            f"find the initial state again: it was off by {off:.1e} of the solution's "
            f"largest size, of which {tolerance:.1e} is allowed. {_ACCEPTS}"
        )
    if tolerance != math.inf and versions() != before:
        raise RuntimeError(
            f"{_CAUSES}It found the initial state again, but the field changed its "
            f"buffers, in both passes. {_ACCEPTS}"
        )
    sums = [s.to(p.dtype) for s, p in zip(way.sums, way.inputs, strict=True)]
    return way.of_times(t), (way.y + way.z + ct[0]).to(y0.dtype), *sums


class WayBack:
    """Cotangents of the twins, `y` and `z`, of the parameters that are wanted, `sums`,
    of the `ends` of steps, and of the times `asked` for."""

    def __init__(self, walk: Walk, ct: Tensor, wanted: Any):
        # What was recorded stays, for who goes back once more.
        self.walk, self.pair, self.bits = walk, walk.pair, [*walk.bits]
        self.inputs = [p for p, x in zip(walk.params, wanted, strict=True) if x]
        if not all(p.requires_grad and not p._backward_hooks for p in self.inputs):
            raise NotImplementedError(
                "Pass the module that has the parameters as `func`, `functional_call` "
                "around the solve: a function that reads them has no gradient by them "
                "under `torch.func.grad`, nor if they have hooks."
            )
        wide = lambda x: torch.promote_types(x.dtype, torch.float32)
        self.sums = [torch.zeros_like(p, dtype=wide(p)) for p in self.inputs]
        self.ct = ct.to(wide(ct))
        self.y = self.z = torch.zeros_like(self.ct[0])
        self.ends, self.asked = [0.0] * len(walk.times), [0.0] * len(ct)
        for step in reversed(range(len(walk.halvings))):
            self.undo(step)

    def of_readout(self, ct: Tensor) -> None:
        y, z = self.walk.twins.weights
        self.y, self.z = self.y + y * ct, self.z + z * ct

    def undo(self, step: int) -> None:
        walk, twins, b = self.walk, self.walk.twins, self.walk.halvings[step]
        ends = walk.times[step : step + 2]
        (rows, inside), after = walk.within(*ends), self.pair
        for row, theta in [*inside, *((row, 1.0) for row in rows)]:
            self.of_readout(self.ct[row] * theta)  # (D)
        y, z = after
        value, ct, _ = self.pulled(step + 1, step, y, -self.z)
        z, self.y = z + twins.encode(value), self.y + ct  # (B2)
        value, ct, slopes = self.pulled(step, step + 1, z, self.y, inside)
        y, self.z = y - twins.encode(value), self.z + ct  # (B1)
        self.pair = twins.unmix(y, z, b, self.bits)  # (BC)
        self.y, self.z = twins.pull(self.y, self.z, b)
        for row, theta in inside:
            self.of_readout(self.ct[row] * (1 - theta))  # (D)
        for (row, theta), slope in zip(inside, slopes, strict=False):
            # Of a share of a step, (t - t0)/(t1 - t0).
            line = twins.readout(*after) - twins.readout(*self.pair)
            of_t = (slope + float((self.ct[row] * line).sum())) / (ends[1] - ends[0])
            self.asked[row] += of_t
            self.ends[step] -= of_t * (1 - theta)
            self.ends[step + 1] -= of_t * theta

    def pulled(self, begin: int, end: int, n: Any, ct: Tensor, inside: Any = ()):
        """The increment between two ends of steps from the twin `n`, and the cotangents
        of that and of each `theta`; those of parameters and times are added up."""
        times = self.walk.times[begin], self.walk.times[end]
        outputs, leaves, *_ = self.walk.increment(*times, n, inside)
        cts = zip(outputs, [ct, *(self.ct[row] for row, _ in inside)], strict=True)
        pairs = [(x, c.to(x.dtype)) for x, c in cts if x.requires_grad]
        inputs = [*leaves, *self.inputs]
        found: Any = [torch.zeros_like(x) for x in inputs]
        if pairs:
            # What the field reads may have a graph of its own, which is needed again.
            xs, cts = zip(*pairs, strict=True)
            found = torch.autograd.grad(xs, inputs, cts, True, materialize_grads=True)
        for total, more in zip(self.sums, found[len(leaves) :], strict=True):
            total += more
        slopes = found[1].tolist() if self.walk.time_gradient else []
        for i, slope in zip((begin, end), slopes, strict=False):
            self.ends[i] += slope
        return outputs[0].detach(), found[0].to(ct.dtype), slopes[2:]

    def of_times(self, t: Tensor) -> Tensor:
        if not self.walk.time_gradient:
            return torch.zeros_like(t)
        leaf = t.detach().double().requires_grad_()
        with torch.enable_grad():
            ends = self.walk.grid(leaf)
        (found,) = torch.autograd.grad(ends, leaf, leaf.new_tensor(self.ends))
        return (found + leaf.new_tensor(self.asked)).to(t.dtype)
