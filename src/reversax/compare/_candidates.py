"""What is compared: pairs of a solver and an adjoint."""

import dataclasses

import diffrax as dfx

from .._adjoint import ReversibleAdjoint
from .._coupling import McCallumFoster
from .._solver import Reversible


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A solver and an adjoint, which `reversax compare` measures as one of several."""

    name: str
    """What it is called in the table, the plot and the JSON file."""
    solver: dfx.AbstractSolver
    adjoint: dfx.AbstractAdjoint
    dt0: float | None = None
    """Its own first or constant step; by default the problem's."""
    stepsize_controller: dfx.AbstractStepSizeController | None = None
    """Its own; by default the problem's."""

    @property
    def cautionary(self) -> bool:
        """Whether nothing bounds the error of its gradient, so that it is measured but
        never recommended."""
        return isinstance(self.adjoint, dfx.BacksolveAdjoint)


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
    solver: dfx.AbstractSolver, quick: bool = False
) -> list[Candidate]:
    """The candidates that a problem with the base `solver` is compared by.

    - The base, Bosh3 and Heun, each with `diffrax.RecursiveCheckpointAdjoint`.
    - The base with `diffrax.BacksolveAdjoint`, as a warning.
    - [`reversax.Reversible`][] over the base, Bosh3 and Euler with
        [`reversax.ReversibleAdjoint`][].
    - The published scheme, [`reversax.McCallumFoster`][] over the base.

    In the place of a base that cannot be made reversible, such as an implicit one,
    Tsit5 is.

    **Arguments:** `solver`, the base; `quick`, for only the base and Euler, and neither
    `BacksolveAdjoint` nor the published scheme.
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
        name = f"{type(solver).__name__}, backsolve"
        candidates.append(Candidate(name, solver, dfx.BacksolveAdjoint()))
    return candidates
