"""The methods in PyTorch that accuracy.py and matrix.py compare, of the extra `peers`.

- torchdiffeq: `odeint` and `odeint_adjoint`, RK4 (its own, Kutta's 3/8 rule) with
  constant steps and Dopri5 with adaptive ones
- torchcde: `cdeint`, the same with and without adjoint
- torchsde: `sdeint` by the midpoint rule, and `sdeint_adjoint` by the reversible Heun
  method with `adjoint_reversible_heun`

All run eagerly, as these libraries are used, on as many threads as PyTorch chooses.
Their memory is the peak, over the forward and the backward pass, of the bytes in the
distinct storages that autograd keeps for later use, less parameters, `y0` and the
control. (Temporaries within an operation are not in it.)
"""

# The extra may be missing, for those who check types too.
# pyright: reportMissingImports=false, reportPossiblyUnboundVariable=false

import argparse
import dataclasses
import importlib.util
import weakref
from typing import Any

import measuring
import numpy as np
from problems import Problem
from rich.console import Console

PACKAGES = ("torch", "torchdiffeq", "torchsde", "torchcde")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
WITHOUT = (
    f"Without the methods in PyTorch: {', '.join(MISSING)} cannot be imported. "
    "They come with the extra `peers`: pip install '.[peers]'"
)


def begin(options: argparse.Namespace) -> tuple[Console, dict]:
    """As `measuring.begin`; it says which of these packages is missing."""
    packages = measuring.PACKAGES if MISSING else (*measuring.PACKAGES, *PACKAGES)
    console, about = measuring.begin(options, packages, missing=MISSING)
    if MISSING:
        console.print(WITHOUT)
    return console, about


if not MISSING:
    import torch
    import torchcde
    import torchdiffeq
    import torchsde


@dataclasses.dataclass(frozen=True)
class Peer:
    library: str
    solver: str
    adjoint: bool
    adaptive: bool = False

    @property
    def how(self) -> str:
        function = {"torchdiffeq": "odeint", "torchcde": "cdeint"}
        return function.get(self.library, "sdeint") + "_adjoint" * self.adjoint

    @property
    def name(self) -> str:
        return f"{self.solver}{', adaptive' * self.adaptive}, {self.how}"

    @property
    def exact(self) -> bool:
        """Whether the gradient is that of the discrete solve."""
        return not self.adjoint or self.solver == "reversible_heun"


def peers_for(kind: str) -> list[Peer]:
    """Of a problem of this kind; none where one of the packages is missing."""
    if MISSING:
        return []
    if kind == "SDE":
        return [
            Peer("torchsde", "midpoint", False),
            Peer("torchsde", "reversible_heun", False),
            Peer("torchsde", "reversible_heun", True),
        ]
    library = "torchdiffeq" if kind == "ODE" else "torchcde"
    return [
        Peer(library, solver, adjoint, adaptive)
        for solver, adaptive in (("rk4", False), ("dopri5", True))
        for adjoint in (False, True)
    ]


class Kept:
    """Counts what autograd keeps: the largest number of bytes at one time."""

    def __init__(self, inputs: list[Any]):
        self.free = {self._address(x) for x in inputs}
        self.references: dict[int, int] = {}
        self.now = self.peak = 0

    @staticmethod
    def _address(tensor: Any) -> int:
        return tensor.untyped_storage().data_ptr()

    def hooks(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda box: box[0])

    def pack(self, tensor: Any) -> "Box":
        # Detached, since an output that holds its own graph would never be released.
        box, address = Box([tensor.detach()]), self._address(tensor)
        if address not in self.free:
            size = tensor.untyped_storage().nbytes()
            if address not in self.references:
                self.references[address] = 0
                self.now += size
                self.peak = max(self.peak, self.now)
            self.references[address] += 1
            weakref.finalize(box, self.release, address, size)
        return box

    def release(self, address: int, size: int) -> None:
        self.references[address] -= 1
        if not self.references[address]:
            del self.references[address]
            self.now -= size


class Box(list):
    """A list that can be watched."""

    __slots__ = ("__weakref__",)


class Run:
    """The gradient of a problem by a peer, as a callable to time."""

    def __init__(self, problem: Problem, peer: Peer, resolution: float, seed: int):
        """`resolution` is the number of steps, or the tolerance of an adaptive peer."""
        as_leaf = lambda x: torch.tensor(x, requires_grad=True)
        self.problem, self.peer, self.resolution = problem, peer, resolution
        self.seed, self.evaluations = seed, 0
        self.brownian: Any = None
        self.parameters = [as_leaf(p) for p in problem.parameters]
        # torchsde takes batches only.
        self.y0 = as_leaf(problem.y0[None] if problem.kind == "SDE" else problem.y0)
        self.ts = torch.tensor([0.0, problem.t1], dtype=self.y0.dtype)
        self.control = None
        if problem.control is not None:
            knots = np.linspace(0.0, problem.t1, len(problem.control))
            knots = torch.tensor(knots, dtype=self.y0.dtype)
            values = torch.tensor(problem.control)
            make = torchcde.hermite_cubic_coefficients_with_backward_differences
            self.control = torchcde.CubicSpline(make(values, knots), knots)

    @property
    def inputs(self) -> list[Any]:
        return [*self.parameters, self.y0]

    def field(self, t: Any, y: Any) -> Any:
        self.evaluations += 1
        return self.problem.field(torch, t, y, self.parameters)

    def __call__(self) -> list[np.ndarray]:
        """The gradient."""
        loss = torch.mean(self.solve() ** 2)
        return [x.numpy() for x in torch.autograd.grad(loss, self.inputs)]

    def solve(self) -> Any:
        """The final state."""
        kind = self.problem.kind
        solve = dict(ODE=self.solve_ode, CDE=self.solve_cde, SDE=self.solve_sde)[kind]
        return solve()

    def options(self) -> dict[str, Any]:
        kwargs: dict[str, Any] = dict(method=self.peer.solver)
        if self.peer.adjoint:
            kwargs["adjoint_params"] = tuple(self.parameters)
        if self.peer.adaptive:
            return kwargs | dict(rtol=self.resolution, atol=self.resolution)
        # The adjoint solves from t1 to t0.
        number, dtype = int(self.resolution) + 1, self.y0.dtype
        grid = lambda f, y0, t: torch.linspace(
            float(t[0]), float(t[-1]), number, dtype=dtype
        )
        return kwargs | dict(options=dict(grid_constructor=grid))

    def solve_ode(self) -> Any:
        adjoint = self.peer.adjoint
        solve = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint
        return solve(self.field, self.y0, self.ts, **self.options())[-1]

    def solve_cde(self) -> Any:
        kwargs = self.options() | dict(adjoint=self.peer.adjoint)
        ys = torchcde.cdeint(self.control, self.field, self.y0, self.ts, **kwargs)
        return ys[..., -1, :]

    def solve_sde(self) -> Any:
        kwargs: dict[str, Any] = dict(method=self.peer.solver)
        if self.peer.adjoint:
            kwargs["adjoint_params"] = tuple(self.parameters)
            kwargs["adjoint_method"] = "adjoint_" + self.peer.solver
        dt = self.problem.t1 / self.resolution
        path = self.brownian
        if path is None:
            size, dtype = self.y0.shape, self.y0.dtype
            path = torchsde.BrownianInterval(
                0.0, self.problem.t1, size, dtype=dtype, entropy=self.seed, dt=dt
            )
        solve = torchsde.sdeint_adjoint if self.peer.adjoint else torchsde.sdeint
        equation = Equation(self)
        return solve(equation, self.y0, self.ts, bm=path, dt=dt, **kwargs)[-1]

    def count(self) -> tuple[list[np.ndarray], int, int]:
        """A gradient, the bytes kept for it and its evaluations of the field."""
        self.evaluations = 0
        known = list(self.inputs)
        if self.control is not None:
            known += list(self.control.buffers())
        kept = Kept(known)
        with kept.hooks():
            gradient = self()
        return gradient, kept.peak, self.evaluations


class Equation:
    """As torchsde takes it."""

    noise_type, sde_type = "diagonal", "stratonovich"

    def __init__(self, run: Run):
        self.f = run.field
        self.run = run

    def g(self, t: Any, y: Any) -> Any:
        problem, parameters = self.run.problem, self.run.parameters
        assert problem.noise is not None
        return problem.noise(torch, t, y, parameters)


class Path:
    """A Brownian path that is the same whichever steps are taken along it, by which to
    compare them: linear between the points of a fine grid. (That of `BrownianInterval`,
    which is timed, depends on the steps, or else takes far longer.)"""

    levy_area_approximation, device = "none", "cpu"

    def __init__(self, problem: Problem, seed: int, intervals: int):
        self.shape = (1, *problem.y0.shape)
        rng = np.random.default_rng((seed, 6))
        self.dt = problem.t1 / intervals
        moves = rng.standard_normal((intervals, *self.shape)) * self.dt**0.5
        start = np.zeros((1, *self.shape))
        self.values = torch.tensor(np.concatenate([start, np.cumsum(moves, axis=0)]))
        self.dtype = self.values.dtype

    def at(self, t: Any) -> Any:
        index, last = float(t) / self.dt, len(self.values) - 1
        left = min(int(index), last - 1)
        step = self.values[left + 1] - self.values[left]
        return self.values[left] + (index - left) * step

    def __call__(self, ta: Any, tb: Any, **kwargs: Any) -> Any:
        # No space-time areas: no solver here asks for them.
        assert not any(kwargs.values())
        return self.at(tb) - self.at(ta)
