r"""Saved outputs, and the pull-back of their cotangents into the step they fell into.

Diffrax writes the outputs of a `SubSaveAt` into one array, in order of time. With `j`
of its `ts` saved and `n` steps accepted so far, the rows written are

    (R)    [t0] + j + n // steps

so the row of any output follows from counters alone, and a walk over the steps from the
last to the first meets every row once. A time `ts[j]` belongs to the step at whose end
it was saved: the first one that ends at or after it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree, Real

from .._numbers.arithmetic import State
from .._numbers.schedule import Index
from .._schemes.control import Time
from .._schemes.moves import add_trees
from .._xla.closure import closed
from .clock import inexact


def is_subsaveat(x: Any) -> bool:
    return isinstance(x, dfx.SubSaveAt)


def close_fn(sub: dfx.SubSaveAt, args: PyTree, t: Time, y: State) -> Callable:
    """`fn(t, y)` of a `SubSaveAt`, with all it depends on among its leaves."""
    return closed(lambda t, y: sub.fn(t, y, args), t, y)


class Pulled(NamedTuple):
    """Cotangents of a saved function, and of the time and state it was applied to."""

    fn: PyTree[Array]
    t: Array
    y: State


class Saved(NamedTuple):
    """What of the times of one observation is still to be pulled back."""

    num_ts: Index
    """How many of `ts`."""
    ct_ts: Array | None
    """The cotangents of the others, if times are differentiated."""


class Interior(NamedTuple):
    """What dense output of a step is made from; or the cotangents of that."""

    interval: tuple[Time, Time]
    info: dict[str, Any]


class Inside(NamedTuple):
    """A step, of which outputs inside it are looked at."""

    index: Index
    previous_end: Time
    interpolation_cls: Callable
    interior: Interior


class Observation(eqx.Module):
    """The outputs of one `SubSaveAt`: where they were saved, and their cotangents.

    `ct_ys` has the structure of `ys`, with `None` for what is not differentiable;
    `ct_ts`, of the times that are returned, is there if times are differentiated.
    """

    sub: dfx.SubSaveAt
    ts: Real[Array, " times"] | None
    ct_ys: PyTree[Array]
    ct_ts: Real[Array, " rows"] | None

    def _row(self, num_ts: Index, num_steps: Index) -> Index:
        row = int(self.sub.t0) + num_ts  # (R)
        if self.sub.steps != 0:
            row = row + num_steps // self.sub.steps
        return row

    def _pull(self, fn: Callable, t: Time, y: State, row: Any) -> Pulled:
        """Pulls back the outputs in a row, or the sum of several: `t`, `fn(t, y)`."""
        sum_rows = lambda x: x[row].sum(axis=0) if isinstance(row, slice) else x[row]
        ct_ys, ct_ts = jtu.tree_map(sum_rows, (self.ct_ys, self.ct_ts))

        def output(primals):
            fn, t, y = primals
            # A scalar constant comes as a literal of the program, which is no array.
            return inexact(jtu.tree_map(jnp.asarray, fn(t, y)))

        _, pull = eqx.filter_vjp(output, (fn, jnp.asarray(t), y))
        ct_fn, ct_t, ct_y = inexact(pull(ct_ys)[0])
        return Pulled(ct_fn, ct_t if ct_ts is None else ct_t + ct_ts, ct_y)

    def _nothing(self, fn: Callable, t: Time, y: State) -> Pulled:
        return Pulled(*zeros_like_inexact((fn, jnp.asarray(t), y)))

    def pull_final(
        self, fn: Callable, t: Time, readout: State, num_ts: Index, num_steps: Index
    ) -> Pulled:
        """Pulls back what `t1=True` saved, after `num_steps` steps."""
        zeros = self._nothing(fn, t, readout)
        if not self.sub.t1 or self.sub.steps == 1:
            return zeros  # With `steps=1` it is the last step's output.
        ct = self._pull(fn, t, readout, self._row(num_ts, num_steps))
        if self.sub.steps == 0:
            return ct
        return _where(jnp.asarray(num_steps % self.sub.steps != 0), ct, zeros)

    def pull_initial(
        self, fn: Callable, t0: Time, readout: State, trivial: Bool[Array, ""]
    ) -> Pulled:
        """Pulls back what was saved before the first step.

        That is what `t0=True` saved; and in a trivial solve, with `t0 == t1`, all of
        `ts`, whose outputs are then one and the same.
        """
        zeros = self._nothing(fn, t0, readout)
        ct = zeros
        if self.sub.t0:
            ct = self._pull(fn, t0, readout, jnp.array(0))
        if self.ts is not None:
            first, size = int(self.sub.t0), len(self.ts)
            ct_ts = self._pull(fn, t0, readout, slice(first, first + size))
            ct = add_trees(ct, _where(trivial, ct_ts, zeros))
        return ct

    def pull_step_end(
        self, fn: Callable, t1: Time, readout1: State, num_ts: Index, index: Index
    ) -> Pulled:
        """Pulls back what `steps` saved at the end of step `index`.

        `num_ts` is how many of `ts` had been saved by then.
        """
        zeros = self._nothing(fn, t1, readout1)
        if self.sub.steps == 0:
            return zeros
        row = self._row(num_ts, index + 1) - 1
        pull = lambda: self._pull(fn, t1, readout1, row)
        if self.sub.steps == 1:
            return pull()
        return lax.cond((index + 1) % self.sub.steps == 0, pull, lambda: zeros)

    def pull_inside_step(
        self, fn: Callable, inside: "Inside", saved: "Saved"
    ) -> tuple["Saved", PyTree, "Interior"]:
        """Pulls back what was saved at `ts` inside a step.

        Returns what had been saved at its start, and the cotangents of `fn` and of the
        interior of the step.
        """
        ct = zeros_like_inexact((fn, inside.interior))
        ts = self.ts
        if ts is None:
            return saved, *ct

        def interpolate(interior, t):
            (t0, t1), info = interior
            return inside.interpolation_cls(t0=t0, t1=t1, **info).evaluate(t)

        def is_inside(carry):
            (j, _), _ = carry
            # The first step saved whatever lies before its end.
            after = ts[j - 1] > inside.previous_end
            return (j > 0) & ((inside.index == 0) | after)

        def pull_one(carry):
            (j, ct_ts), (ct_fn, ct_interior) = carry
            j = j - 1
            y, pull = eqx.filter_vjp(interpolate, inside.interior, ts[j])
            pulled = self._pull(fn, ts[j], y, self._row(j, inside.index))
            ct_here, ct_t = inexact(pull(pulled.y))
            if ct_ts is not None:
                ct_ts = ct_ts.at[j].add(pulled.t + ct_t)
            ct = add_trees((ct_fn, ct_interior), (pulled.fn, ct_here))
            return Saved(j, ct_ts), ct

        saved, ct = lax.while_loop(is_inside, pull_one, (saved, ct))
        return saved, *ct


def zeros_like_inexact(tree: PyTree) -> PyTree[Array]:
    return jtu.tree_map(jnp.zeros_like, inexact(tree))


def _where(pred: Bool[Array, ""], a: Any, b: Any) -> Any:
    # Applied after a pull-back: what was never saved may not be differentiable, and
    # nothing times infinity is not nothing.
    return jtu.tree_map(lambda x, y: jnp.where(pred, x, y), a, b)
