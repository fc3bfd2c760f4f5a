r"""Saved outputs, and the pull-back of their cotangents into the step they fell into.

Diffrax writes the outputs of a `SubSaveAt` into one array, in order of time. With `j`
of its `ts` saved and `n` steps accepted so far, the rows written are

    (R)    [t0] + j + n // steps

so the row of any output follows from counters alone, and a walk over the steps from the
last to the first meets every row once. A time `ts[j]` belongs to the step at whose end
it was saved: the first one that ends at or after it.
"""

from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree

from ._arithmetic import State
from ._coupling import Index
from ._increment import Time
from ._pair import StepEnds, TwinInterpolation, dense_info


def is_subsaveat(x: Any) -> bool:
    return isinstance(x, dfx.SubSaveAt)


def add_trees(a: PyTree[Array], b: PyTree[Array]) -> PyTree[Array]:
    """`a + b`, in the dtypes of `a`; `None` leaves of `a` stay."""
    return jtu.tree_map(lambda x, y: x + y.astype(x.dtype), a, b)


def close_fn(sub: dfx.SubSaveAt, args: PyTree, t: Time, y: State) -> Callable:
    """`fn(t, y)` of a `SubSaveAt`, with all it depends on among its leaves."""
    return eqx.filter_closure_convert(lambda t, y: sub.fn(t, y, args), t, y)


class Observation(eqx.Module):
    """The outputs of one `SubSaveAt`: where they were saved, and their cotangents.

    `ct_ys` has the structure of `ys`, with `None` for what is not differentiable.
    The methods return cotangents of `fn`, with those of what it was applied to.
    """

    sub: dfx.SubSaveAt
    ct_ys: PyTree[Array]

    def _ct_row(self, row: Index) -> PyTree[Array]:
        return jtu.tree_map(lambda x: x[row], self.ct_ys)

    def _row(self, num_ts: Index, num_steps: Index) -> Index:
        row = int(self.sub.t0) + num_ts  # (R)
        if self.sub.steps != 0:
            row = row + num_steps // self.sub.steps
        return row

    def pull_final(
        self, fn: Callable, t: Time, readout: State, num_ts: Index, num_steps: Index
    ) -> tuple[PyTree, State]:
        """Pulls back what `t1=True` saved, after `num_steps` steps."""
        zeros = zeros_like_inexact((fn, readout))
        if not self.sub.t1 or self.sub.steps == 1:
            return zeros  # With `steps=1` it is the last step's output.
        ct = self._ct_row(self._row(num_ts, num_steps))
        ct = _pull_fn(fn, t, readout, ct)
        if self.sub.steps == 0:
            return ct
        return _where(jnp.asarray(num_steps % self.sub.steps != 0), ct, zeros)

    def pull_initial(
        self, fn: Callable, t0: Time, readout: State, trivial: Bool[Array, ""]
    ) -> tuple[PyTree, State]:
        """Pulls back what was saved before the first step.

        That is what `t0=True` saved; and in a trivial solve, with `t0 == t1`, all of
        `ts`, whose outputs are then one and the same.
        """
        zeros = zeros_like_inexact((fn, readout))
        ct = zeros
        if self.sub.t0:
            ct = _pull_fn(fn, t0, readout, self._ct_row(jnp.array(0)))
        if self.sub.ts is not None:
            first, size = int(self.sub.t0), len(self.sub.ts)
            rows = jtu.tree_map(lambda x: x[first : first + size], self.ct_ys)
            ct_sum = jtu.tree_map(lambda x: x.sum(axis=0), rows)
            ct_ts = _pull_fn(fn, t0, readout, ct_sum)
            ct = add_trees(ct, _where(trivial, ct_ts, zeros))
        return ct

    def pull_step_end(
        self, fn: Callable, t1: Time, readout1: State, num_ts: Index, index: Index
    ) -> tuple[PyTree, State]:
        """Pulls back what `steps` saved at the end of step `index`.

        `num_ts` is how many of `ts` had been saved by then.
        """
        zeros = zeros_like_inexact((fn, readout1))
        if self.sub.steps == 0:
            return zeros
        row = self._row(num_ts, index + 1) - 1
        pull = lambda: _pull_fn(fn, t1, readout1, self._ct_row(row))
        if self.sub.steps == 1:
            return pull()
        return lax.cond((index + 1) % self.sub.steps == 0, pull, lambda: zeros)

    def pull_inside_step(
        self,
        fn: Callable,
        base_cls: Callable,
        interval: tuple[Time, Time],
        previous_end: Time,
        ends: StepEnds,
        num_ts: Index,
        index: Index,
    ) -> tuple[Index, tuple[PyTree, StepEnds]]:
        """Pulls back what was saved at `ts` inside step `index`.

        `num_ts` is how many of `ts` had been saved at the end of the step; returns how
        many had been at its start, and the cotangents of `fn` and `ends`.
        """
        ct = zeros_like_inexact((fn, ends))
        ts = self.sub.ts
        if ts is None:
            return num_ts, ct
        t0, t1 = interval

        def saved(fn_and_ends, t):
            fn, ends = fn_and_ends
            info = dense_info(ends)
            y = TwinInterpolation(base_cls=base_cls, t0=t0, t1=t1, **info).evaluate(t)
            return _inexact(fn(t, y))

        def inside(carry):
            j, _ = carry
            # The first step saved whatever lies before its end.
            return (j > 0) & ((index == 0) | (ts[j - 1] > previous_end))

        def pull_one(carry):
            j, ct = carry
            j = j - 1
            _, pull = eqx.filter_vjp(lambda p: saved(p, ts[j]), (fn, ends))
            (ct_here,) = pull(self._ct_row(self._row(j, index)))
            return j, add_trees(ct, _inexact(ct_here))

        return lax.while_loop(inside, pull_one, (num_ts, ct))


def _inexact(tree: PyTree) -> PyTree:
    return eqx.filter(tree, eqx.is_inexact_array)


def zeros_like_inexact(tree: PyTree) -> PyTree[Array]:
    return jtu.tree_map(jnp.zeros_like, _inexact(tree))


def _pull_fn(
    fn: Callable, t: Time, y: State, ct: PyTree[Array]
) -> tuple[PyTree, State]:
    """The cotangents of `fn` and `y` from that of `fn(t, y)`."""
    _, pull = eqx.filter_vjp(lambda p: _inexact(p[0](t, p[1])), (fn, y))
    (ct_fn_and_y,) = pull(ct)
    return _inexact(ct_fn_and_y)


def _where(pred: Bool[Array, ""], a: PyTree[Array], b: PyTree[Array]) -> PyTree[Array]:
    # Applied after a pull-back: what was never saved may not be differentiable, and
    # nothing times infinity is not nothing.
    return jtu.tree_map(lambda x, y: jnp.where(pred, x, y), a, b)
