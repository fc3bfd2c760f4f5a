"""`round_trip_error`: how well a solve can be undone, measured without a gradient."""

from typing import NamedTuple

import diffrax as dfx
from jaxtyping import Array, Int, PyTree

from ._backward import walk_back_without_cotangents
from ._certificate import round_trip
from ._compat import nondifferentiable
from ._coupling import Pair
from ._forward import run, set_up, tape_of
from ._increment import State

_CALL = "`reversax.round_trip_error(...)`"
_NO_DERIVATIVE = (
    f"{_CALL} was differentiated, but it measures round-off, which has no derivative. "
    "Apply `jax.lax.stop_gradient` to its arguments."
)


class RoundTripError(NamedTuple):
    """What [`reversax.round_trip_error`][] returns."""

    error: Pair
    """The reconstructed minus the true initial pair: `error.y` and `error.z`, each
    with the structure, shapes and dtypes of `y0`."""
    num_steps: Int[Array, ""]
    """The number of accepted steps."""


class _ThereAndBack(dfx.AbstractAdjoint):
    """Solves forward and back, and leaves the difference among the statistics."""

    def loop(self, *, throw, passed_solver_state, passed_controller_state, **solve):
        del passed_controller_state
        (pair0, increment, fns), setup = set_up(
            **solve,
            call=_CALL,
            throw=throw,
            passed_solver_state=passed_solver_state,
            round_trip_tolerance=None,
        )
        pair0, increment = nondifferentiable((pair0, increment), msg=_NO_DERIVATIVE)
        final_state, aux_stats, recorded = run((pair0, increment, fns), setup)
        num_steps = final_state.num_accepted_steps
        reconstructed = walk_back_without_cotangents(
            setup.scheme,
            increment,
            tape_of(setup, recorded),
            setup.t0,
            final_state.solver_state,
            num_steps,
        )
        error = round_trip(setup.scheme, reconstructed, pair0)
        return final_state, dict(aux_stats, round_trip_error=error)


def round_trip_error(
    terms: PyTree[dfx.AbstractTerm],
    solver: dfx.AbstractSolver,
    t0,
    t1,
    dt0,
    y0: State,
    args: PyTree = None,
    *,
    stepsize_controller: dfx.AbstractStepSizeController = dfx.ConstantStepSize(),
    max_steps: int | None = 4096,
) -> RoundTripError:
    """Solves forward and back, and returns by how much the initial state was missed.

    Use it to choose a coupling parameter, a dtype or a number of steps before training:
    the gradient of [`reversax.ReversibleAdjoint`][] is exact as far as this error is
    small beside the state. It costs two solves and no derivatives. There is no need for
    it during training, since every backward pass checks itself.

    **Arguments:** as for `diffrax.diffeqsolve`; `solver` is a
    [`reversax.Reversible`][].

    **Returns:** the tuple `(error, num_steps)`. `error.y` and `error.z` are the
    reconstructed minus the true initial values of the two twins, shaped like `y0`, and
    `num_steps` counts the accepted steps.

    **Raises:** as a solve with [`reversax.ReversibleAdjoint`][] does when it begins,
    and as `diffrax.diffeqsolve` when the solve fails.
    """
    solution = dfx.diffeqsolve(
        terms,
        solver,
        t0,
        t1,
        dt0,
        y0,
        args,
        stepsize_controller=stepsize_controller,
        adjoint=_ThereAndBack(),
        max_steps=max_steps,
    )
    stats = solution.stats
    return RoundTripError(stats["round_trip_error"], stats["num_accepted_steps"])
