"""`round_trip_error`: how well a solve can be undone, measured without a gradient."""

from typing import NamedTuple

import diffrax as dfx
import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import Array, Int, PyTree

from ._numbers.arithmetic import State
from ._schemes.coupling import Pair
from ._walk.backward import Walk, walk_back_without_cotangents
from ._walk.cotangents import Outputs
from ._walk.faults import raise_if_failed
from ._walk.forward import run
from ._walk.lane import make_lane
from ._walk.setup import Parts, set_up
from ._xla.compat import nondifferentiable

_CALL = "`reversax.round_trip_error(...)`"
_NO_DERIVATIVE = (
    f"Apply `jax.lax.stop_gradient` to the arguments of {_CALL}: it measures "
    "round-off, which has no derivative."
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
        parts, setup = set_up(
            **solve,
            call=_CALL,
            throw=throw,
            passed_solver_state=passed_solver_state,
            round_trip_tolerance=None,
            restart_every=None,
            backward_meter=dfx.NoProgressMeter(),
        )
        beginning, increment = nondifferentiable(parts[:2], msg=_NO_DERIVATIVE)
        clock = nondifferentiable(parts.clock, msg=_NO_DERIVATIVE)
        parts = Parts(beginning, increment, parts.fns, clock)
        # As for a gradient with respect to everything, so that the same is measured.
        nothing = jtu.tree_map(lambda _: False, parts)
        everything = jtu.tree_map(eqx.is_inexact_array, increment)
        perturbed = nothing._replace(increment=everything)
        forward = run(parts, setup, perturbed=perturbed)
        num_steps = forward.final_state.num_accepted_steps
        no_outputs: list = [None for _ in parts.fns]
        none = Outputs(None, no_outputs, no_outputs, *[None] * 5)
        record = forward.record
        lane = make_lane(parts, setup, record, none, (num_steps, None), perturbed)
        counts = num_steps, forward.num_shed
        walk = Walk(lane)
        reconstructed = walk_back_without_cotangents(walk, forward.codes, *counts)
        codes0 = beginning.encoded(setup.scheme)
        error = setup.scheme.difference(reconstructed, codes0)
        final_state = forward.final_state
        if throw:
            final_state = raise_if_failed(final_state, setup, _CALL)
        return final_state, dict(forward.aux_stats, round_trip_error=error)


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
