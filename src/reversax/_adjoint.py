"""`ReversibleAdjoint`: what users hand to `diffrax.diffeqsolve`."""

from typing import Any

import diffrax as dfx
import equinox as eqx
import jax.tree_util as jtu

from ._walk.cotangents import outputs_of
from ._walk.event import locate
from ._walk.faults import raise_if_failed
from ._walk.rule import solve
from ._walk.setup import CALL, set_up
from ._xla.guard import detached, reverse_only


class ReversibleAdjoint(dfx.AbstractAdjoint):
    """Exact gradients of `diffrax.diffeqsolve` in memory independent of the number of
    steps, for a [`reversax.Reversible`][] solver.

    The gradient is that of the discrete solve, as
    [`diffrax.RecursiveCheckpointAdjoint`][] would compute it, for the same solver. It
    is taken with respect to `y0`, `args` and the parameters of the terms and of
    `SaveAt(fn=...)`, including values that their functions close over; and to `t0`,
    `t1`, `dt0`, `SaveAt(ts=...)` and the numbers of the controller. Saved values, dense
    output and the state and time of events may be differentiated, and once more in
    forward mode (`jax.hessian`).

    Use it for solves of many steps, or where memory is short. For a stiff problem,
    for an implicit solver, or for forward-mode differentiation use one of Diffrax's
    adjoints. For a short solve of a small state, checkpointing the plain base
    solver is as good.

    Memory is a few copies of the state and of the parameters; with a controller
    that adapts two numbers per step of `max_steps`; with [`reversax.FixedPoint`][]
    (the default) 256 bits per element of the state, or a quarter of a bit per step of
    `max_steps` if that is more (the sum of 320 and that with a controller that adapts;
    `halvings_per_step` bits per step if that is given to [`reversax.Symmetric`][]);
    and with [`reversax.FloatingPoint`][] a pair of states at every `restart_every`
    steps. An event records the times of constant steps too;
    recorded times that are differentiated, two numbers more a step for each number
    that they are differentiated by. Dense output takes the memory that it takes
    under any adjoint. Backward, each step costs as many vector field evaluations as
    forward, and their pull-backs.

    Every backward pass checks that it arrives at the initial state again: to the bit
    with [`reversax.FixedPoint`][], else to a tolerance. So it does for a solver of your
    own with a `backward_step`, of which the gradient is that of its steps forward, at
    states that are off by what `backward_step` misses. The factors by which a
    controller changes the step count as constants, which is how Diffrax's own are made.
    """

    round_trip_tolerance: float | None = None
    restart_every: int | str | None = "auto"
    progress_meter: dfx.AbstractProgressMeter = dfx.NoProgressMeter()

    def __check_init__(self):
        if not isinstance(self.progress_meter, dfx.AbstractProgressMeter):
            raise TypeError(
                "Pass a progress meter of Diffrax, such as "
                "`diffrax.TqdmProgressMeter()`, as `reversax.ReversibleAdjoint("
                f"progress_meter=...)`, not {self.progress_meter!r}."
            )
        tolerance = self.round_trip_tolerance
        if tolerance is None:
            return
        is_number = isinstance(tolerance, int | float) and type(tolerance) is not bool
        if not (is_number and tolerance >= 0):
            raise ValueError(
                "Pass a Python number of at least 0, `math.inf`, or `None` as "
                "`reversax.ReversibleAdjoint(round_trip_tolerance=...)`, not "
                f"{tolerance!r}."
            )

    def loop(
        self: Any = None,
        *,
        throw,
        passed_solver_state,
        passed_controller_state,
        **problem,
    ):
        del passed_controller_state
        if self is None:  # Diffrax calls whatever it is given.
            raise TypeError(
                "Pass `adjoint=reversax.ReversibleAdjoint()` with the brackets, not "
                "the class."
            )
        parts, setup = set_up(
            **problem,
            call=CALL,
            throw=throw,
            passed_solver_state=passed_solver_state,
            round_trip_tolerance=self.round_trip_tolerance,
            restart_every=self.restart_every,
            backward_meter=self.progress_meter,
        )
        inexact, rest = eqx.partition(parts, eqx.is_inexact_array)
        parts = eqx.combine(jtu.tree_map(reverse_only, inexact), rest)
        final_state, aux_stats = solve(parts, setup)
        if throw:
            final_state = raise_if_failed(final_state, setup)
        final_state = _detach_the_rest(final_state)
        event = problem["event"]
        if event is not None and event.root_finder is not None:
            y = setup.scheme.readout(final_state.solver_state.codes)
            final_state = eqx.tree_at(lambda s: s.y, final_state, y)
            del problem["init_state"]
            final_state = locate(final_state, **problem)
        return final_state, aux_stats


def _detach_the_rest(final_state: Any) -> Any:
    """All but what may be differentiated made constant."""
    outputs = outputs_of(final_state, final_state.solver_state)
    outputs = outputs, final_state.controller_state  # Of which the use is refused.
    kept = {id(x) for x in jtu.tree_leaves(outputs) if eqx.is_inexact_array(x)}

    def leaf(x):
        return detached(x) if eqx.is_array(x) and id(x) not in kept else x

    return jtu.tree_map(leaf, final_state)


ReversibleAdjoint.__init__.__doc__ = """**Arguments:**

- `round_trip_tolerance`: how far from `y0` the backward pass may arrive, relative to
    the largest size that the state had, per leaf of the state; dimensionless. By
    default zero with [`reversax.FixedPoint`][], else the square root of the machine
    epsilon: 3.5e-4 in single precision, 1.5e-8 in double; the coarsest leaf counts.
    (Some ulps of the largest leaf pass in any leaf.) For a solver of which the
    `backward_step` undoes a step only nearly, the accuracy that a gradient needs.
    `math.inf` switches the check off.
- `restart_every`: with [`reversax.FloatingPoint`][], at every how many accepted steps
    to keep the pair of states, for the backward pass to restart from (and to check its
    round trip by); a Python integer of at least 1, or `None` for never. By default,
    "auto", as seldom as the coupling, the precision of the state and the tolerance
    allow: at 0.999 some 13,500 steps in double precision and 3,400 in single; with
    [`reversax.Symmetric`][] after 20 halvings and 5. It knows nothing of the vector
    field: on a contracting flow give a smaller number. Needs `max_steps`, else nothing
    is kept. With [`reversax.FixedPoint`][] tangents of Hessians restart.
- `progress_meter`: shows how far the backward pass has come (the `progress_meter` of
    `diffrax.diffeqsolve` shows the forward pass), by default nothing; of a batch, how
    far the lane with most steps has.

**Raises:** `TypeError` and `ValueError` for arguments that are none. When a solve
begins, `TypeError` for a solver that is not [`reversax.Reversible`][], `ValueError` for
`max_steps=None` where there is something to record. When a solve fails,
`equinox.EquinoxRuntimeError`: with the result `diffrax.RESULTS.nonfinite` when the
vector field returned no number or a state left the range of its arithmetic, and with
`diffrax.RESULTS.nonlinear_divergence` when damping drove the twins apart, so far that
their gap is larger than the state, or, if no error estimate has it
([`reversax.McCallumFoster`][]), than 10,000 tolerances of the controller. When
differentiated, `NotImplementedError` in forward mode, in reverse mode once more, and
for a controller of your own whose steps have a derivative with respect to the state;
`equinox.EquinoxRuntimeError` for a derivative with respect to times through a returned
`controller_state`. In the backward pass, `equinox.EquinoxRuntimeError` if the solve
failed, if the round trip exceeds the tolerance, or if the tangents of a Hessian have
lost half their digits.
With `throw=False` a solve that itself overflowed gets a gradient of NaN instead.
"""
