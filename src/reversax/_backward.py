r"""The walk back over the accepted steps: reconstruction and pull-back in one.

With cotangents `ct_y, ct_z` of the pair at the end of a step, each increment is
evaluated once, by `jax.vjp`, and serves twice:

    (B2)   z  = z1 + Psi_b,    Psi_b, pull_b = vjp(Psi_{-h}(t1, .), y1)
    (B1)   y  = y1 - Psi_f,    Psi_f, pull_f = vjp(Psi_{h}(t0, .), z)
    (BC)   (y0, z0) = unmix(y, z)

    (T2)   ct_y += pull_b(-ct_z)            transposes (F2)
    (T1)   ct_z += pull_f(ct_y)             transposes (F1)
    (TC)   (ct_y, ct_z) = mix^T(ct_y, ct_z)  transposes (C)

Cotangents of outputs join where their outputs were read off: those of the readouts at
the two ends of a step before (T2) and after (TC), those of the interpolant also with
the increment's in (T1).
"""

from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, PyTree

from ._coupling import Pair
from ._increment import AbstractIncrement, State, Time
from ._observe import Observation, add_trees, zeros_like_inexact
from ._pair import Scheme, StepEnds, undo_step
from ._tape import AbstractTape, Index

Scale = PyTree[Float[Array, ""]]


def largest(tree: PyTree[Array]) -> Scale:
    """The largest absolute value in each leaf."""
    return jtu.tree_map(lambda x: jnp.max(jnp.abs(x), initial=0), tree)


def largest_of_pair(scheme: Scheme, pair: Pair) -> Scale:
    decoded = scheme.decode(pair)
    return jtu.tree_map(jnp.maximum, largest(decoded.y), largest(decoded.z))


def wide(x: Array) -> Array:
    """`x` in a dtype fit for summing over many steps: half precision becomes single."""
    narrow = jnp.finfo(x.dtype).bits < 32
    return x.astype(jnp.float32) if narrow else x


class Carry(eqx.Module):
    """What the walk carries from the end of a step to its start."""

    num_steps: Index
    """How many steps are still to be undone."""
    pair: Pair
    ct_pair: Pair
    ct_parameters: PyTree[Array]
    num_ts: list[Index]
    """For each observation, how many of its `ts` are still to be pulled back."""
    scale: Scale
    """The largest size of the state met so far, per leaf."""


class _Differentiated:
    """Evaluates `fn(parameters, y) -> (increment, dense_info)` once, keeping both the
    values and the pull-back."""

    def __init__(self, fn: Callable[[PyTree, State], Any], parameters: PyTree):
        self._fn = fn
        self._parameters = parameters

    def __call__(self, y: State) -> State:
        def split(parameters, y):
            increment, dense_info = self._fn(parameters, y)
            inexact, rest = eqx.partition(dense_info, eqx.is_inexact_array)
            return (increment, inexact), rest

        self.argument = y
        (self.increment, inexact), self.pull, rest = jax.vjp(
            split, self._parameters, y, has_aux=True
        )
        self.dense_info = eqx.combine(inexact, rest)
        return self.increment


class StepBack(eqx.Module):
    """One step of the walk.

    The parameters, the increment and the saved functions, come in two
    pieces: what is differentiated and the rest, to be joined by `equinox.combine`.
    """

    scheme: Scheme
    tape: AbstractTape
    t0: Time
    base_interpolation_cls: Callable = eqx.field(static=True)
    dense: bool = eqx.field(static=True)
    observations: list[Observation]
    diff: tuple[AbstractIncrement, list[Callable]]
    nondiff: tuple[AbstractIncrement, list[Callable]]

    def pull_readout(self, ct_readout: State, pair: Pair) -> Pair:
        """The cotangent of a pair from that of its readout."""
        decoded = self.scheme.decode(pair)
        return jax.vjp(self.scheme.coupling.readout, decoded)[1](ct_readout)[0]

    def pull_outputs_at_end(self, carry: Carry, t_final: Time) -> Carry:
        """Adds the cotangents of what was saved after the last step."""
        readout = self.scheme.readout(carry.pair)
        pulled = [
            observation.pull_final(fn, t_final, readout, num_ts, carry.num_steps)
            for observation, fn, num_ts in self._observed(carry.num_ts)
        ]
        ct_pair, ct_parameters = self._add_pulled(carry, pulled)
        where = lambda c: (c.ct_pair, c.ct_parameters)
        return eqx.tree_at(where, carry, (ct_pair, ct_parameters))

    def pull_outputs_at_start(
        self, carry: Carry, trivial: Bool[Array, ""]
    ) -> tuple[Pair, PyTree[Array]]:
        """The cotangents of the initial pair and the parameters, with those of what
        was saved before the first step. In a trivial solve there are no steps."""
        readout = self.scheme.readout(carry.pair)
        pulled = [
            observation.pull_initial(fn, self.t0, readout, trivial)
            for observation, fn, _ in self._observed(carry.num_ts)
        ]
        return self._add_pulled(carry, pulled)

    def _observed(self, num_ts: list[Index]) -> Iterable:
        _, fns = eqx.combine(self.diff, self.nondiff)
        return zip(self.observations, fns, num_ts, strict=True)

    def _add_pulled(self, carry: Carry, pulled: list) -> tuple[Pair, PyTree[Array]]:
        ct_pair, (ct_increment, ct_fns) = carry.ct_pair, carry.ct_parameters
        for _, ct_readout in pulled:
            ct_pair = add_trees(ct_pair, self.pull_readout(ct_readout, carry.pair))
        ct_fns = self._add_fns(ct_fns, [ct_fn for ct_fn, _ in pulled])
        return ct_pair, (ct_increment, ct_fns)

    def _add_fns(self, ct_fns: list[PyTree], new: list[PyTree]) -> list[PyTree]:
        """Adds cotangents of the saved functions, of those leaves that have any."""
        _, diff_fns = self.diff
        return [
            add_trees(ct, eqx.filter(more, only_where(diff)))
            for ct, more, diff in zip(ct_fns, new, diff_fns, strict=True)
        ]

    def __call__(self, carry: Carry) -> Carry:
        index, t0, t1 = self.tape.last_of(carry.num_steps, self.t0)
        diff_increment, _ = self.diff
        nondiff_increment, _ = self.nondiff

        def psi_forward(p, z):
            increment = eqx.combine(p, nondiff_increment)
            out = increment(t0, t1, z, error=False, dense=self.dense)
            return out.increment, out.dense_info

        def psi_backward(p, y):
            increment = eqx.combine(p, nondiff_increment)
            return increment(t1, t0, y, error=False, dense=False).increment, None

        forward = _Differentiated(psi_forward, diff_increment)
        backward = _Differentiated(psi_backward, diff_increment)
        pair0 = undo_step(self.scheme, carry.pair, forward, backward)  # (B2, B1, BC)

        readout0, readout1 = self.scheme.readout(pair0), self.scheme.readout(carry.pair)
        ends = StepEnds(
            readout0,
            readout1,
            forward.argument,
            forward.increment,
            forward.dense_info,
        )
        num_ts, ct_fns, ct_ends = self._pull_outputs(carry.num_ts, index, t0, t1, ends)

        ct = add_trees(carry.ct_pair, self.pull_readout(ct_ends.readout1, carry.pair))
        negative_ct_z = jtu.tree_map(jnp.negative, ct.z)
        ct_p_backward, ct_y = backward.pull((negative_ct_z, None))
        ct_y = add_trees(ct.y, ct_y)  # (T2)
        ct_increment = add_trees(ct_y, ct_ends.increment)
        ct_p_forward, ct_z = forward.pull((ct_increment, ct_ends.base_dense_info))
        ct_z = add_trees(ct.z, add_trees(ct_z, ct_ends.z))  # (T1)
        mixed = self.scheme.decode(pair0)
        _, pull_mix = jax.vjp(self.scheme.coupling.mix, mixed)
        (ct,) = pull_mix(Pair(ct_y, ct_z))  # (TC)
        ct = add_trees(ct, self.pull_readout(ct_ends.readout0, pair0))

        ct_parameters, ct_fns_total = carry.ct_parameters
        for ct_p in (ct_p_backward, ct_p_forward):
            ct_parameters = add_trees(ct_parameters, ct_p)
        scale = largest_of_pair(self.scheme, pair0)
        return Carry(
            carry.num_steps - 1,
            pair0,
            ct,
            (ct_parameters, self._add_fns(ct_fns_total, ct_fns)),
            num_ts,
            jtu.tree_map(jnp.maximum, carry.scale, scale),
        )

    def _pull_outputs(
        self, num_ts: list[Index], index: Index, t0: Time, t1: Time, ends: StepEnds
    ) -> tuple[list[Index], list[PyTree], StepEnds]:
        """Pulls back all that was saved during a step."""
        previous_end = self.tape.end(jnp.maximum(index - 1, 0))
        ct_ends_total = zeros_like_inexact(ends)
        num_ts_before, ct_fns = [], []
        for observation, fn, j in self._observed(num_ts):
            ct_fn_end, ct_readout1 = observation.pull_step_end(
                fn, t1, ends.readout1, j, index
            )
            base_cls, interval = self.base_interpolation_cls, (t0, t1)
            j, (ct_fn, ct_ends) = observation.pull_inside_step(
                fn, base_cls, interval, previous_end, ends, j, index
            )
            ct_readout1 = add_trees(ct_ends.readout1, ct_readout1)
            ct_ends = ct_ends._replace(readout1=ct_readout1)
            ct_ends_total = add_trees(ct_ends_total, ct_ends)
            num_ts_before.append(j)
            ct_fns.append(add_trees(ct_fn, ct_fn_end))
        return num_ts_before, ct_fns, ct_ends_total


def only_where(tree: PyTree) -> PyTree[bool]:
    """A filter for the leaves that `tree` has, where it may have `None`."""
    return jtu.tree_map(lambda x: x is not None, tree, is_leaf=lambda x: x is None)


def walk_back(step_back: StepBack, carry: Carry) -> Carry:
    """Undoes all the steps, accumulating cotangents."""
    return lax.while_loop(lambda c: c.num_steps > 0, lambda c: step_back(c), carry)


def walk_back_without_cotangents(
    scheme: Scheme,
    increment: AbstractIncrement,
    tape: AbstractTape,
    t0: Time,
    pair1: Pair,
    num_steps: Index,
) -> Pair:
    """Undoes all the steps: the reconstructed initial pair."""

    def undo(carry):
        num_steps, pair = carry
        _, start, end = tape.last_of(num_steps, t0)
        psi = lambda ta, tb, y: increment(ta, tb, y, error=False, dense=False).increment
        pair = undo_step(
            scheme, pair, lambda z: psi(start, end, z), lambda y: psi(end, start, y)
        )
        return num_steps - 1, pair

    _, pair0 = lax.while_loop(lambda c: c[0] > 0, undo, (num_steps, pair1))
    return pair0
