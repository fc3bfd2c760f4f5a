r"""The way back: each step undone, and differentiated, from where it was made.

Its certificate is that it arrives where the way forward began: in fixed point to the
bit; in floating point with what the twins are off, relative to the largest size of the
solution, not above the square root of the machine epsilon. Nor may the field have
changed its buffers: what it did on the way back, it did on the way forward too.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ._steps import Controller, grid_of_ends
from ._twins import Bits, largest
from ._walk import Walk

_SECOND = (
    "Differentiate once: `reversax_torch.odeint` has no second derivative. Use "
    "`torchdiffeq.odeint`, or forward over reverse with the JAX package reversax."
)
_FORWARD = (
    "Use reverse mode (`backward`, `torch.func.grad`): `reversax_torch.odeint` has no "
    "forward mode. Or use `torchdiffeq.odeint`."
)
_BATCHED = (
    "Give the batch a dimension of the state, or loop: under `torch.vmap` only `y0` "
    "may be batched, and only it may have gradients for each element."
)
_CLOSED = (
    "Pass the module that has the parameters as `func`, with `functional_call` around "
    "the call of `odeint`: under `torch.func.grad`, and where they have hooks, a "
    "function that reads them, and its `adjoint_params`, do not belong together."
)
_CAUSES = (
    "Call `func.eval()`, and have the field return the same for the same `(t, y)`: "
    "dropout in training mode, BatchNorm in training mode and a counter of calls that "
    "changes its value do not, nor do sums in no fixed order on a GPU (for which there "
    "is `torch.use_deterministic_algorithms(True)`). "
)
_INEXACT = "Leave out the option `coupling`: without it nothing is lost on the way. "
_ACCEPTS = "`options={'round_trip_tolerance': ...}` accepts it."


class Solve(torch.autograd.Function):
    """The solution at `t`, as one function for autograd."""

    @staticmethod
    def forward(walk: Walk, t: Tensor, y0: Tensor, *params: Tensor) -> Tensor:
        return walk.run(walk.forward, params, t.detach().double(), y0.detach())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.walk, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> tuple:
        wanted = ctx.needs_input_grad[3:]
        cts = PullBack.apply(ctx.walk, wanted, ct, *ctx.saved_tensors)
        t_ct, y0_ct, *found = cts
        return None, t_ct, y0_ct, *(found.pop(0) if x else None for x in wanted)

    @staticmethod
    def vmap(info: Any, dims: tuple, walk: Walk, t, y0, *params) -> tuple:
        if any(d is not None for d in (dims[1], *dims[3:])):
            raise NotImplementedError(_BATCHED)
        field = torch.vmap(walk.field, in_dims=(None, 0))
        walk.batched = replace(walk, field=field, checks=False)
        walk.batched.look_at(t, y0, *params)
        return Solve.apply(walk.batched, t, y0.movedim(dims[2], 0), *params), 1

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise NotImplementedError(_FORWARD)


class PullBack(torch.autograd.Function):
    """The cotangents of `t`, the initial state and the parameters that are wanted."""

    @staticmethod
    def forward(walk: Walk, wanted: tuple, ct, t, y0, *params) -> tuple:
        return walk.run(back, params, walk, wanted, ct, t, y0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None: ...

    @staticmethod
    def backward(ctx: Any, *cts: Tensor) -> None:
        raise NotImplementedError(_SECOND)

    @staticmethod
    def vmap(info: Any, dims: tuple, walk: Walk, wanted, ct, t, y0, *params):
        if walk.batched is None and dims[2] is not None:
            # Of one solve, for several cotangents.
            pull = lambda c: PullBack.apply(walk, wanted, c, t, y0, *params)
            each = [pull(c) for c in ct.unbind(dims[2])]
            return tuple(map(torch.stack, zip(*each, strict=True))), (0,) * len(each[0])
        if any(wanted) or dims[3] is not None or walk.time_gradient:
            raise NotImplementedError(_BATCHED)
        y0 = y0.movedim(dims[4], 0)
        ct = ct.movedim(dims[2], 1) if dims[2] is not None else ct[:, None]
        ct = ct.expand(len(t), *y0.shape)
        return PullBack.apply(walk.batched, wanted, ct, t, y0, *params), (None, 0)

    jvp = Solve.jvp


def back(walk: Walk, wanted: tuple, ct: Tensor, t: Tensor, y0: Tensor) -> tuple:
    """The cotangents, if the certificate holds."""
    buffers = lambda: [] if walk.module is None else walk.module.buffers()
    versions = lambda: [(id(x), x._version) for x in buffers()]
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


def wide(dtype: torch.dtype) -> torch.dtype:
    """That in which to sum."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


class WayBack:
    """A solve on its way back."""

    def __init__(self, walk: Walk, ct: Tensor, wanted: Any):
        # What was recorded stays, for who goes back once more.
        self.walk, self.pair, self.bits = walk, walk.pair, Bits([*walk.bits.words])
        self.inputs = [p for p, x in zip(walk.params, wanted, strict=True) if x]
        if not all(p.requires_grad and not p._backward_hooks for p in self.inputs):
            raise NotImplementedError(_CLOSED)
        self.sums = [torch.zeros_like(p, dtype=wide(p.dtype)) for p in self.inputs]
        """Cotangents of the parameters that are wanted."""
        self.ct = ct.to(wide(ct.dtype))
        self.y = self.z = torch.zeros_like(self.ct[0])
        """Cotangents of the twins."""
        self.ends, self.asked = [0.0] * len(walk.times), [0.0] * len(ct)
        """Cotangents of the ends of steps, and of the times asked for."""
        for step in reversed(range(len(walk.halvings))):
            self.undo(step)

    def of_readout(self, ct: Tensor) -> None:
        y, z = self.walk.twins.weights
        self.y, self.z = self.y + y * ct, self.z + z * ct

    def undo(self, step: int) -> None:
        walk, twins, b = self.walk, self.walk.twins, self.walk.halvings[step]
        inside = [(row, theta) for row, theta in walk.rows[step] if theta is not None]
        for row, theta in walk.rows[step]:
            self.of_readout(self.ct[row] * (1.0 if theta is None else theta))  # (D)
        (y, z), r1 = self.pair, twins.readout(*self.pair) if inside else None
        value, ct, _ = self.pulled(step + 1, step, y, -self.z)
        z, self.y = z + twins.encode(value), self.y + ct  # (B2)
        value, ct, slopes = self.pulled(step, step + 1, z, self.y, inside)
        y, self.z = y - twins.encode(value), self.z + ct  # (B1)
        self.pair = twins.unmix(y, z, b, self.bits)  # (BC)
        self.y, self.z = twins.pull(self.y, self.z, b)
        for row, theta in inside:
            self.of_readout(self.ct[row] * (1 - theta))  # (D)
        if r1 is not None and walk.time_gradient:
            line, (t0, t1) = r1 - twins.readout(*self.pair), walk.times[step : step + 2]
            for (row, theta), slope in zip(inside, slopes, strict=True):
                # Of a share of a step, (t - t0)/(t1 - t0).
                of_t = (slope + float((self.ct[row] * line).sum())) / (t1 - t0)
                self.asked[row] += of_t
                self.ends[step] -= of_t * (1 - theta)
                self.ends[step + 1] -= of_t * theta

    def pulled(self, begin: int, end: int, n: Any, ct: Tensor, inside: Any = ()):
        """The increment between two ends of steps from the twin `n`, and the cotangents
        of that and of each `theta`; those of parameters and times are added up."""
        walk, thetas = self.walk, [theta for _, theta in inside]
        part, departures, times = walk.increment(
            walk.times[begin], walk.times[end], n, thetas
        )
        cts = [ct, *(self.ct[row] for row, _ in inside)]
        pairs = zip([part.value, *departures], cts, strict=True)
        pairs = [(x, c.to(x.dtype)) for x, c in pairs if x.requires_grad]
        leaves: list[Any] = [part.y, *(times if walk.time_gradient else [])]
        found: Any = [None] * (len(leaves) + len(self.inputs))
        if pairs:
            # What the field reads may have a graph of its own, which is needed again.
            outputs, cts = zip(*pairs, strict=True)
            found = torch.autograd.grad(
                outputs, [*leaves, *self.inputs], cts, True, allow_unused=True
            )
        for total, more in zip(self.sums, found[len(leaves) :], strict=True):
            if more is not None:
                total += more
        slopes = [0.0 if x is None else float(x) for x in found[1 : len(leaves)]]
        if slopes:
            self.ends[begin] += slopes[0]
            self.ends[end] += slopes[1]
        y_ct = torch.zeros_like(ct) if found[0] is None else found[0].to(ct.dtype)
        return part.value.detach(), y_ct, slopes[2:]

    def of_times(self, t: Tensor) -> Tensor:
        """By the grid of steps, as a function of the times asked for."""
        if not self.walk.time_gradient:
            return torch.zeros_like(t)
        grid = self.walk.steps
        if isinstance(grid, Controller):
            grid = grid_of_ends(self.walk.times)
        with torch.enable_grad():
            leaf = t.detach().double().requires_grad_()
            ends = grid(leaf)
        as_tensor = lambda x: torch.tensor(x, dtype=torch.float64, device=t.device)
        (found,) = torch.autograd.grad(ends, leaf, as_tensor(self.ends))
        return (found + as_tensor(self.asked)).to(t.dtype)
