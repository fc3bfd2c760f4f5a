r"""What a base solver must be, where no tableau says that it is.

Each step of ours takes several of the base, from other states than it would meet by
itself, forwards and backwards in time. So a step may depend on nothing but its start,

    (M)    step(t0, t1, y, memory) = step(t0, t1, y, init(t0, t1, y)),

and one of no length must lead nowhere,

    (I)    step(t, t, y) = y.

Solvers of Diffrax are so. Of others, (M) is refused where a step may read an array that
the one before it left, unless the user says that it holds; and (I) is tried, on states
that a solve has met. Where a step of no length is no number nothing is learned.
"""

import diffrax as dfx
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree

from .._numbers.arithmetic import State
from .._numbers.schedule import Index
from .._xla.compat import depends_on_argument, unvmap_any
from .control import Time
from .increment import AbstractIncrement, is_tableau
from .own import undoes_itself
from .problem import Problem, is_of_diffrax
from .watch import default_tolerance, largest, not_too_small


def _remembers(solver: dfx.AbstractSolver, problem: Problem) -> bool:
    """Whether a step may depend on arrays that the one before it left."""
    terms, t0, y0, args = problem

    def begin(t0, y0):
        return solver.init(terms, t0, t0, y0, args)

    state = eqx.filter_eval_shape(begin, t0, y0)
    is_shape = lambda x: isinstance(x, jax.ShapeDtypeStruct)
    arrays, rest = eqx.partition(state, is_shape)
    if not jtu.tree_leaves(arrays):
        return False

    def step(arrays):
        state = eqx.combine(arrays, rest)
        y1, error, dense_info, _, result = solver.step(
            terms, t0, t0, y0, args, state, False
        )
        return eqx.filter((y1, error, dense_info, result), eqx.is_array)

    return depends_on_argument(step, arrays)


def check_memory(solver: dfx.AbstractSolver, memoryless: bool, problem: Problem):
    """Refuses a base of which (M) is neither known nor seen nor said."""
    known = is_tableau(solver) or is_of_diffrax(solver) or undoes_itself(solver)
    # (What those that undo themselves remember is a part of the state.)
    if memoryless or known:
        return
    if not _remembers(solver, problem):
        return
    name = type(solver).__name__
    raise ValueError(
        f"Keep the plain `{name}` with `adjoint=diffrax.RecursiveCheckpointAdjoint()`: "
        "its step reads arrays that the step before left in `solver_state` (a history, "
        f"a filter, a warm start), and here every step begins with `{name}.init(...)`. "
        "If that gives the same up to round-off, as for a stage evaluated at the end "
        "of a step, say so by `reversax.Reversible(..., memoryless=True)`."
    )


def _is_moved(increment: AbstractIncrement, t: Time, y: State) -> Bool[Array, ""]:
    """Whether (I) fails at a state, by more than half the digits."""
    by = jtu.tree_leaves(largest(increment.of_no_length(t, y)))
    sizes, tolerance = not_too_small(largest(y)), default_tolerance(jtu.tree_leaves(y))
    # NaN passes.
    moved = [b > tolerance * s for b, s in zip(by, sizes, strict=True)]
    return jnp.stack([jnp.array(False), *moved]).any()


def checked_at(
    out: PyTree, increment: AbstractIncrement, *at: tuple[Time, State]
) -> PyTree:
    """`out`, which raises if (I) fails at one of these times and states."""
    if not increment.may_move:
        return out
    stacked = jtu.tree_map(lambda *x: jnp.stack(x), *at)
    moved = lax.map(lambda x: _is_moved(increment, *x), stacked).any()
    return eqx.error_if(out, moved, _MOVES)


def checked_sometimes(
    out: PyTree,
    increment: AbstractIncrement,
    index: Index,
    sound: Bool[Array, ""],
    at: tuple[Time, State],
) -> PyTree:
    """`out`, which raises if (I) fails at the time and state after step `index`; tried
    at the first one, after 1, 4, 16, ... of them, and where it was not `sound`."""
    if not increment.may_move:
        return out
    due = (index & (index - 1) == 0) & (index & 0x55555555 == index) | ~sound
    is_moved = lambda: _is_moved(increment, *at)
    moved = lax.cond(unvmap_any(due), is_moved, lambda: jnp.array(False))
    return eqx.error_if(out, moved, _MOVES)


_MOVES = (
    "Give `reversax.Reversible(...)` a base whose step of no length returns its state: "
    "this one's does not, and each step here leads there and back. If it resets, clips "
    "or projects the state, do so between solves: end each by `diffrax.Event` and "
    "begin the next from the changed state. Or keep the plain solver with "
    "`adjoint=diffrax.RecursiveCheckpointAdjoint()`."
)
