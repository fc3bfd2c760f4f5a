"""What is compared: pairs of a solver and an adjoint."""

import dataclasses

import diffrax as dfx

from .._adjoint import ReversibleAdjoint
from .._multistep import SymmetricMultistep
from .._numbers.schedule import MOST
from .._schemes.coupling import McCallumFoster, Symmetric
from .._schemes.own import undoes_itself
from .._solver import Reversible
from ._scan import RematerialisedScan


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A solver and an adjoint, which `reversax compare` measures as one of several."""

    name: str
    """What it is called in the table, the plot and the JSON file."""
    solver: dfx.AbstractSolver
    adjoint: dfx.AbstractAdjoint | RematerialisedScan
    dt0: float | None = None
    """Its own first step; by default the problem's. The length of constant steps is
    searched for, from this on."""
    stepsize_controller: dfx.AbstractStepSizeController | None = None
    """Its own; by default the problem's."""

    @property
    def cautionary(self) -> bool:
        """Whether nothing bounds the error of its gradient, so that it is measured but
        never recommended."""
        return isinstance(self.adjoint, dfx.BacksolveAdjoint)

    @property
    def is_control(self) -> bool:
        """Whether it is what one would write by hand, and only measured to compare."""
        return isinstance(self.adjoint, RematerialisedScan)

    @property
    def searched_as(self) -> "Candidate":
        """The same discrete solve, of which one program serves for many numbers of
        steps: a scan is of so many as it is compiled for."""
        if not self.is_control:
            return self
        return dataclasses.replace(self, adjoint=dfx.RecursiveCheckpointAdjoint())

    def with_all_halvings(self) -> "Candidate | None":
        """With as many bits shed at each step as are of use, if it is one that spreads
        a fixed number of them over the solve."""
        solver = self.solver
        if not isinstance(solver, Reversible):
            return None
        coupling = solver.coupling
        if not isinstance(coupling, Symmetric) or coupling.halvings_per_step != "auto":
            return None
        if undoes_itself(solver.solver):
            return None
        more = Reversible(solver.solver, Symmetric(MOST), solver.arithmetic)
        name = f"{self.name.removesuffix(')')}, halvings_per_step={MOST})"
        return dataclasses.replace(self, name=name, solver=more)


_CONTROL = Candidate(
    "Tsit5, plain scan (control)",
    dfx.Tsit5(),
    RematerialisedScan(),
    stepsize_controller=dfx.ConstantStepSize(),
)


def _multistep() -> Candidate:
    solver, constant = Reversible(SymmetricMultistep()), dfx.ConstantStepSize()
    name = "Reversible(SymmetricMultistep)"
    return Candidate(name, solver, ReversibleAdjoint(), stepsize_controller=constant)


def _by_name(*solvers: dfx.AbstractSolver) -> dict[str, dfx.AbstractSolver]:
    return {type(solver).__name__: solver for solver in solvers}


def _explicit(solver: dfx.AbstractSolver) -> dfx.AbstractSolver:
    """The solver, or Tsit5 in the place of one that cannot be made reversible."""
    try:
        Reversible(solver)
    except ValueError:
        return dfx.Tsit5()
    return solver


def default_candidates(
    solver: dfx.AbstractSolver, quick: bool = False, *, ordinary: bool = True
) -> list[Candidate]:
    """The candidates that a problem with the base `solver` is compared by.

    - The base, Bosh3 and Heun, each with `diffrax.RecursiveCheckpointAdjoint`.
    - The base with `diffrax.BacksolveAdjoint`, as a warning.
    - [`reversax.Reversible`][] over the base, Bosh3 and Euler with
        [`reversax.ReversibleAdjoint`][].
    - The published scheme, [`reversax.McCallumFoster`][] over the base.
    - [`reversax.SymmetricMultistep`][] in constant steps, of an ordinary equation.
    - The control: Tsit5 in constant steps as one would write it by hand, in a
        `jax.lax.scan` of a `jax.checkpoint`ed step. It is measured, and not recommended
        as it can do little of what `diffrax.diffeqsolve` can.

    In the place of a base that cannot be made reversible, such as an implicit one,
    Tsit5 is.

    **Arguments:** `solver`, the base; `quick`, for only the base and Euler, and neither
    `BacksolveAdjoint` nor the published scheme nor a multistep method; `ordinary`,
    whether the equation is one, a single `diffrax.ODETerm`.

    Where damping is found to drive the twins of a reversible one apart, the command
    adds the same with `Symmetric(halvings_per_step=4)`.
    """
    plain = _by_name(solver) if quick else _by_name(solver, dfx.Bosh3(), dfx.Heun())
    explicit = _explicit(solver)
    bases = _by_name(explicit, *([] if quick else [dfx.Bosh3()]), dfx.Euler())
    checkpoints, reverse = dfx.RecursiveCheckpointAdjoint(), ReversibleAdjoint()
    candidates = [
        Candidate(f"{name}, checkpointed", base, checkpoints)
        for name, base in plain.items()
    ]
    candidates += [
        Candidate(f"Reversible({name})", Reversible(base), reverse)
        for name, base in bases.items()
    ]
    if not quick:
        published = Reversible(explicit, McCallumFoster())
        name = f"Reversible({type(explicit).__name__}, McCallumFoster)"
        candidates.append(Candidate(name, published, reverse))
        if ordinary:
            candidates.append(_multistep())
        name = f"{type(solver).__name__}, backsolve"
        candidates.append(Candidate(name, solver, dfx.BacksolveAdjoint()))
    return [*candidates, _CONTROL]
