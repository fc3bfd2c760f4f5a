"""`round_trip_error`: how well a solve can be undone, measured without a gradient."""

from typing import NamedTuple

import diffrax as dfx
import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import Array, Int, PyTree

from ._arithmetic import State
from ._backward import Walk, make_lane, walk_back_without_cotangents
from ._compat import nondifferentiable
from ._coupling import Pair
from ._forward import run
from ._setup import set_up

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
            restart_every=None,
        )
        parts = nondifferentiable((pair0, increment), msg=_NO_DERIVATIVE)
        pair0, increment = parts
        # As for a gradient with respect to everything, so that the same is measured.
        perturbed = jtu.tree_map(eqx.is_inexact_array, increment)
        forward = run((pair0, increment, fns), setup, perturbed=perturbed)
        no_outputs = [None for _ in fns]
        lane = make_lane(
            (increment, fns),
            setup,
            forward.record,
            no_outputs,
            False,
            (perturbed, jtu.tree_map(lambda _: False, fns)),
        )
        num_steps = forward.final_state.num_accepted_steps
        psi = Walk(lane, None, None).psi
        reconstructed = walk_back_without_cotangents(lane, psi, forward.pair, num_steps)
        error = setup.scheme.difference(reconstructed, pair0)
        return forward.final_state, dict(forward.aux_stats, round_trip_error=error)


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
