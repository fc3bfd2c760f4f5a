"""`ReversibleAdjoint`: one custom derivative rule around the whole solve.

Forward it runs Diffrax's loop, `_forward.py`, and keeps the final pair and the times of
the steps. Backward it walks the steps in reverse, `_backward.py`, and checks that it
arrives where the solve began, `_certificate.py`.
"""

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree

from ._backward import Carry, StepBack, largest_of_pair, walk_back, wide
from ._certificate import certify
from ._coupling import Pair
from ._forward import CALL, Setup, run, set_up
from ._guard import detached, forward_only, reverse_only
from ._observe import Observation
from ._tape import AbstractTape, Index


class _Residuals(eqx.Module):
    """What the backward pass needs of the forward pass."""

    pair: Pair
    tape: AbstractTape
    num_steps: Index
    num_ts: list[Index]
    t_final: Array


def _materialise(like: PyTree[Array], ct: PyTree) -> PyTree[Array]:
    """Zeros for symbolic zeros; `None` for what has no cotangent."""

    def leaf(x, ct):
        if not eqx.is_inexact_array(x):
            return None
        return jnp.zeros_like(x) if ct is None else ct

    return jtu.tree_map(leaf, like, ct)


@eqx.filter_custom_vjp
def _solve(parts, *, setup: Setup):
    final_state, aux_stats, _ = run(parts, setup)
    return final_state, aux_stats


@_solve.def_fwd
def _solve_fwd(perturbed, parts, *, setup: Setup):
    del perturbed
    final_state, aux_stats, tape = run(parts, setup)
    save_states = setup.save_states(final_state)
    residuals = _Residuals(
        pair=final_state.solver_state,
        tape=tape,
        num_steps=jnp.asarray(final_state.num_accepted_steps),
        num_ts=[jnp.asarray(s.saveat_ts_index) for s in save_states],
        t_final=final_state.tprev,
    )
    return (final_state, aux_stats), residuals


@_solve.def_bwd
def _solve_bwd(residuals: _Residuals, ct_out, perturbed, parts, *, setup: Setup):
    pair0, *_ = parts
    # Of the outputs only `ys` and the solver's state depend on what is differentiated:
    # times and step sizes do not, since Diffrax's controllers stop the gradient there.
    ct_final_state, _ = ct_out
    saved = zip(
        setup.subs,
        setup.save_states(setup.init_state),
        setup.save_states(ct_final_state),
        strict=True,
    )
    observations = [
        Observation(sub, _materialise(state.ys, ct.ys)) for sub, state, ct in saved
    ]
    diff, nondiff = eqx.partition(parts[1:], perturbed[1:])
    step_back = StepBack(
        scheme=setup.scheme,
        tape=residuals.tape,
        t0=setup.t0,
        base_interpolation_cls=setup.base_interpolation_cls,
        dense=setup.dense,
        observations=observations,
        diff=diff,
        nondiff=nondiff,
    )
    ct_pair = _materialise(residuals.pair, ct_final_state.solver_state)
    first = _first_carry(step_back, residuals, pair0, ct_pair)
    last = walk_back(step_back, first)
    ct_pair, ct_parameters = step_back.pull_outputs_at_start(last, setup.t0 == setup.t1)
    ct_parameters = jtu.tree_map(lambda d, ct: ct.astype(d.dtype), diff, ct_parameters)
    gradient = certify(
        (ct_pair, *ct_parameters),
        setup.scheme,
        reconstructed=last.pair,
        true=pair0,
        scale=last.scale,
        tolerance=setup.round_trip_tolerance,
        overflowed=_not_finite(residuals.pair),
        throw=setup.throw,
    )
    return jtu.tree_map(forward_only, gradient)


def _not_finite(pair: Pair) -> Bool[Array, ""]:
    leaves = [x for x in jtu.tree_leaves(pair) if eqx.is_inexact_array(x)]
    return ~jnp.stack([jnp.array(True), *(jnp.isfinite(x).all() for x in leaves)]).all()


def _first_carry(
    step_back: StepBack, residuals: _Residuals, pair0: Pair, ct_pair: Pair
) -> Carry:
    """Where the walk begins: at the end, with what was saved there pulled back."""
    sizes = [largest_of_pair(step_back.scheme, p) for p in (pair0, residuals.pair)]
    carry = Carry(
        num_steps=residuals.num_steps,
        pair=residuals.pair,
        ct_pair=ct_pair,
        ct_parameters=jtu.tree_map(lambda x: wide(jnp.zeros_like(x)), step_back.diff),
        num_ts=residuals.num_ts,
        scale=jtu.tree_map(jnp.maximum, *sizes),
    )
    return step_back.pull_outputs_at_end(carry, residuals.t_final)


class ReversibleAdjoint(dfx.AbstractAdjoint):
    """Exact gradients of `diffrax.diffeqsolve` in memory independent of the number of
    steps, for a [`reversax.Reversible`][] solver.

    The gradient is that of the discrete solve (up to the round-off of undoing its
    steps), as [`diffrax.RecursiveCheckpointAdjoint`][] would compute it, for the same
    solver. It is taken with respect to `y0`, `args` and the parameters of the terms
    and of `SaveAt(fn=...)`, including values that their functions close over.

    Use it for solves of many steps, or where memory is short. For a stiff problem, for
    an implicit solver, for events, dense output, derivatives with respect to times, or
    forward-mode differentiation use one of Diffrax's adjoints. For a short solve of a
    small state, checkpointing the plain base solver is as good.

    Memory is a few copies of the state and of the parameters, and with a controller
    that adapts two numbers per step of `max_steps`. Backward, each step costs as many
    vector field evaluations as forward, and their pull-backs.

    Every backward pass checks that it arrives at the initial state again. The times of
    the steps count as constants, which is how Diffrax's own controllers are made.
    """

    round_trip_tolerance: float | None = None

    def __check_init__(self):
        tolerance = self.round_trip_tolerance
        if tolerance is None:
            return
        is_number = isinstance(tolerance, int | float) and type(tolerance) is not bool
        if not (is_number and tolerance >= 0):
            raise ValueError(
                "`reversax.ReversibleAdjoint(round_trip_tolerance=...)` must be a "
                "Python number of at least 0, `math.inf`, or `None`, got "
                f"{tolerance!r}."
            )

    def loop(
        self,
        *,
        throw,
        passed_solver_state,
        passed_controller_state,
        **solve,
    ):
        del passed_controller_state
        parts, setup = set_up(
            **solve,
            call=CALL,
            throw=throw,
            passed_solver_state=passed_solver_state,
            round_trip_tolerance=self.round_trip_tolerance,
        )
        inexact, rest = eqx.partition(parts, eqx.is_inexact_array)
        parts = eqx.combine(jtu.tree_map(reverse_only, inexact), rest)
        final_state, aux_stats = _solve(parts, setup=setup)
        where = lambda s: [s.solver_state, *(x.ys for x in setup.save_states(s))]
        arrays, rest = eqx.partition(final_state, eqx.is_array)
        constant = eqx.combine(jtu.tree_map(detached, arrays), rest)
        final_state = eqx.tree_at(
            where, constant, where(final_state), is_leaf=lambda x: x is None
        )
        return final_state, aux_stats


ReversibleAdjoint.__init__.__doc__ = """**Arguments:**

- `round_trip_tolerance`: how far from `y0` the backward pass may arrive, relative to
    the largest size that the state had, per leaf of the state; dimensionless. By
    default the square root of the leaf's machine epsilon: 3.5e-4 in single precision,
    1.5e-8 in double. (Some ulps of the largest leaf pass in any leaf.) `math.inf`
    switches the check off.

**Raises:** when a solve begins, `TypeError` for a solver that is not
[`reversax.Reversible`][], `NotImplementedError` for `event=...` and
`SaveAt(dense=True)`, `ValueError` for `max_steps=None` with a controller that adapts.
When differentiated, an error for times and controllers, and `NotImplementedError` in
forward mode. In the backward pass, `equinox.EquinoxRuntimeError` if the round trip
exceeds the tolerance. With `throw=False` a solve that itself overflowed gets a gradient
of NaN instead.
"""
