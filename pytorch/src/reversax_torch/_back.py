r"""The way back: each step undone, and differentiated, from where it was made.

Its certificate is that it arrives where the way forward began: in fixed point to the
bit; in floating point with what the twins are off, relative to the largest size of the
solution, not above the square root of the machine epsilon. Nor may the field have
changed its buffers: what it did on the way back, it did on the way forward too.
"""

import contextlib
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from ._twins import Bits, Pair
from ._walk import Problem, Walk, largest

_CAUSES = (
    "Call `func.eval()`, and have the field return the same for the same `(t, y)`: "
    "dropout in training mode, BatchNorm in training mode and a counter of calls that "
    "changes its value do not, nor do sums in no fixed order on a GPU (for which there "
    "is `torch.use_deterministic_algorithms(True)`). "
)
_INEXACT = "Leave out the option `coupling`: without it nothing is lost on the way. "
_CLOSED = (
    "Pass the module that has the parameters as `func`, with `functional_call` around "
    "the call of `odeint`: under `torch.func.grad` a function that reads them, and its "
    "`adjoint_params`, do not belong together."
)
_ACCEPTS = "`options={'round_trip_tolerance': ...}` accepts it."


def wide(dtype: torch.dtype) -> torch.dtype:
    """That in which to sum."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


@contextlib.contextmanager
def without_hooks(params: tuple[Tensor, ...]):
    """Those of parameters are for their whole gradient, on which they are called."""
    found = [(p._backward_hooks, dict(p._backward_hooks or {})) for p in params]
    found = [(hooks, kept) for hooks, kept in found if hooks is not None]
    for hooks, _ in found:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, kept in found:
            hooks.update(kept)


def having(module: nn.Module | None, names: list, params: list) -> Any:
    """Has a module its parameters of the forward pass, in the place of which
    `torch.func.functional_call` gives it others for a while."""
    now = {} if module is None else dict(module.named_parameters())
    named = zip(names, params, strict=True)
    given = {name: p for name, p in named if name and now.get(name) is not p}
    if module is None or not given:
        return contextlib.nullcontext()
    return _reparametrize_module(module, given)


def back(
    problem: Problem, t: Tensor, y0: Tensor, ct: Tensor, params: tuple, names: list
) -> tuple[Tensor, ...]:
    """The cotangents of `t`, `y0` and the parameters, from that of the solution."""
    assert problem.walk is not None
    buffers = lambda: [] if problem.module is None else problem.module.buffers()
    versions = lambda: [(id(x), x._version) for x in buffers()]
    before = versions()
    if any(
        name is None and not p.requires_grad
        for name, p in zip(names, params, strict=True)
    ):
        raise NotImplementedError(_CLOSED)
    own = [p if p.requires_grad else p.detach().requires_grad_() for p in params]
    with problem.autocast(), without_hooks(params), having(problem.module, names, own):
        way = WayBack(problem, problem.walk, ct, own)
    certify(problem, problem.walk, way.pair, y0.detach())
    if problem.tolerance != math.inf and versions() != before:
        raise RuntimeError(
            f"{_CAUSES}It found the initial state again, but the field changed its "
            f"buffers, in both passes. {_ACCEPTS}"
        )
    sums = [s.to(p.dtype) for s, p in zip(way.params, params, strict=True)]
    return way.of_times(t), (way.y + way.z + ct[0]).to(y0.dtype), *sums


def certify(problem: Problem, walk: Walk, found: Pair, y0: Tensor) -> None:
    """Raises if the way back ended elsewhere than at the initial state."""
    twins, tolerance = problem.twins, problem.tolerance
    true = twins.encode(y0)
    off = [twins.decode(n - true, wide(y0.dtype)) for n in found]
    error = max(float(largest(x)) for x in off) / (walk.size or 1.0)
    if tolerance is None:
        tolerance = 0.0 if twins.exact else math.sqrt(torch.finfo(y0.dtype).eps)
    # Phrased so that NaN fails.
    if not error <= tolerance and tolerance != math.inf:
        raise RuntimeError(
            f"{_CAUSES if twins.exact else _INEXACT}The backward pass did not find the "
            f"initial state again: it was off by {error:.1e} of the solution's largest "
            f"size, of which {tolerance:.1e} is allowed. {_ACCEPTS}"
        )


class WayBack:
    """A solve on its way back."""

    def __init__(self, problem: Problem, walk: Walk, ct: Tensor, params: list):
        self.problem, self.walk, self.inputs = problem, walk, params
        # What was recorded stays, for who goes back once more.
        self.pair, self.bits = walk.pair, Bits([*walk.bits.words])
        self.ct = ct.to(wide(ct.dtype))
        self.y = self.z = torch.zeros_like(self.ct[0])
        """Cotangents of the twins."""
        self.params = [torch.zeros_like(p, dtype=wide(p.dtype)) for p in params]
        self.ends, self.asked = [0.0] * len(walk.times), [0.0] * len(ct)
        """Cotangents of the ends of steps, and of the times asked for."""
        for step in reversed(range(len(walk.halvings))):
            self.undo(step)

    def readout(self) -> Tensor:
        return self.problem.readout(*map(self.problem.twins.decode, self.pair))

    def of_readout(self, ct: Tensor) -> None:
        y, z = self.problem.twins.weights
        self.y, self.z = self.y + y * ct, self.z + z * ct

    def undo(self, step: int) -> None:
        problem, twins, walk = self.problem, self.problem.twins, self.walk
        b, (t0, t1) = walk.halvings[step], walk.times[step : step + 2]
        inside = [(row, theta) for row, theta in walk.rows[step] if theta is not None]
        for row, theta in walk.rows[step]:
            self.of_readout(self.ct[row] * (1.0 if theta is None else theta))  # (D)
        r1 = self.readout() if inside and problem.time_gradient else None
        y, z = self.pair

        value, ct, found = self.pulled(t1, t0, y, -self.z, [])
        z = z + twins.encode(value)  # (B2)
        self.y = self.y + ct
        self.ends[step + 1] += found[0]
        self.ends[step] += found[1]

        value, ct, found = self.pulled(t0, t1, z, self.y, inside)
        y = y - twins.encode(value)  # (B1)
        self.z = self.z + ct
        self.ends[step] += found[0]
        self.ends[step + 1] += found[1]

        self.pair = twins.unmix(y, z, b, self.bits)  # (BC)
        (yy, yz, zy, zz), (y, z) = twins.mixing(b), (self.y, self.z)
        self.y, self.z = yy * y + zy * z, yz * y + zz * z
        for row, theta in inside:
            self.of_readout(self.ct[row] * (1 - theta))  # (D)
        if r1 is not None:
            slope = r1 - self.readout()
            for (row, theta), more in zip(inside, found[2:], strict=True):
                # Of a share of a step, (t - t0)/(t1 - t0).
                more = (more + float((self.ct[row] * slope).sum())) / (t1 - t0)
                self.asked[row] += more
                self.ends[step] -= more * (1 - theta)
                self.ends[step + 1] -= more * theta

    def pulled(self, t0: float, t1: float, start: Any, ct: Tensor, inside: list):
        """An increment, and the cotangents of where it starts from and of its times,
        from its own; those of the parameters are added up."""
        thetas, y = [theta for _, theta in inside], self.problem.twins.decode(start)
        part, departures, times = self.problem.increment(t0, t1, y, thetas)
        cts = [ct, *(self.ct[row] for row, _ in inside)]
        pairs = zip([part.value, *departures], cts, strict=True)
        pairs = [(x, c.to(x.dtype)) for x, c in pairs if x.requires_grad]
        leaves: list[Any] = [part.y, *(times if self.problem.time_gradient else [])]
        found: Any = [None] * (len(leaves) + len(self.inputs))
        if pairs:
            # What the field reads may have a graph of its own, which is needed again.
            outputs, cts = zip(*pairs, strict=True)
            found = torch.autograd.grad(
                outputs, [*leaves, *self.inputs], cts, True, allow_unused=True
            )
        for total, more in zip(self.params, found[len(leaves) :], strict=True):
            if more is not None:
                total += more
        of_times = [0.0 if x is None else float(x) for x in found[1 : len(leaves)]]
        y_ct = torch.zeros_like(ct) if found[0] is None else found[0].to(ct.dtype)
        return part.value.detach(), y_ct, of_times or [0.0] * len(times)

    def of_times(self, t: Tensor) -> Tensor:
        if not self.problem.time_gradient:
            return torch.zeros_like(t)
        with torch.enable_grad():
            leaf = t.detach().double().requires_grad_()
            ends = self.walk.grid(leaf)
        as_tensor = lambda x: torch.tensor(x, dtype=torch.float64, device=t.device)
        (found,) = torch.autograd.grad(ends, leaf, as_tensor(self.ends))
        return (found + as_tensor(self.asked)).to(t.dtype)
