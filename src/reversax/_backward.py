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

import functools as ft
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, PyTree

from ._arithmetic import State
from ._certificate import Scale, largest_of_pair, round_trip
from ._coupling import Index, Pair
from ._forward import tape_of
from ._increment import AbstractIncrement, Time
from ._observe import Observation, add_trees, zeros_like_inexact
from ._pair import Scheme, StepEnds, undo_step
from ._psi import Psi
from ._setup import Setup
from ._tape import Record, Tape


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
    round_trips: list[Float[Array, ""]]
    """The largest error of a round trip met so far, per leaf."""


class _Differentiated:
    """Evaluates an increment once, keeping its value, pull-back and argument."""

    def __init__(self, psi: Psi, t0: Time, t1: Time):
        self._psi, self._times = psi, (t0, t1)

    def __call__(self, y: State) -> State:
        self.argument = y
        self.core = self._psi.core(*self._times, y)
        self.increment, self._for_dense = self.core.value
        self._pull_dense: Callable | None = None
        return self.increment

    def dense_info(self) -> PyTree[Array]:
        """The base's dense output of the step."""
        if not self._psi.dense:
            return None
        evaluation = self._psi.dense_info(*self._times, self.argument, self.core)
        self._pull_dense = evaluation.pull
        return eqx.combine(evaluation.value, evaluation.other)

    def pull(self, ct_increment: State, ct_dense_info: PyTree[Array]) -> tuple:
        """The cotangents of parameters and argument, from that of the increment, which
        must have been evaluated, and of dense output, `None` for that never read."""
        ct_value = ct_increment, zeros_like_inexact(self._for_dense)
        if self._pull_dense is None or ct_dense_info is None:
            return self.core.pull(ct_value)[0]
        ct_p, ct_y, ct = self._pull_dense(ct_dense_info)[0]
        ct_p_core, ct_y_core = self.core.pull(add_trees(ct_value, ct))[0]
        return add_trees(ct_p_core, ct_p), add_trees(ct_y_core, ct_y)


class Lane(eqx.Module):
    """What the walk needs to know of one solve, and what it does lane by lane.

    The parameters, the increment and the saved functions, come in two pieces: what is
    differentiated and the rest, to be joined by `equinox.combine`. Cotangents of the
    saved functions are lists with one entry for each observation.
    """

    scheme: Scheme
    tape: Tape
    t0: Time
    trivial: Bool[Array, ""]
    """Whether `t0 == t1`."""
    base_interpolation_cls: Callable = eqx.field(static=True)
    error: bool = eqx.field(static=True)
    dense: bool = eqx.field(static=True)
    observations: list[Observation]
    diff: tuple[AbstractIncrement, list[Callable]]
    nondiff: tuple[AbstractIncrement, list[Callable]]

    def last_of(self, num_steps: Index) -> tuple[Index, Time, Time]:
        return self.tape.times.last_of(num_steps, self.t0)

    def size(self, pair: Pair) -> Scale:
        return largest_of_pair(self.scheme, pair)

    def pull_readout(self, ct_readout: State, pair: Pair) -> Pair:
        """The cotangent of a pair from that of its readout."""
        decoded = self.scheme.decode(pair)
        return jax.vjp(self.scheme.coupling.readout, decoded)[1](ct_readout)[0]

    def unmix(self, pair: Pair, index: Index) -> Pair:
        """(BC)."""
        steps = self.tape.plan.steps_before + index
        return self.scheme.unmix(pair, steps, lambda: self.tape.shed_bits(index))

    def pull_mix(self, ct_mixed: Pair, pair0: Pair, index: Index) -> Pair:
        """(TC)."""
        steps = self.tape.plan.steps_before + index
        mix = lambda pair: self.scheme.mix_states(pair, steps)
        return jax.vjp(mix, self.scheme.decode(pair0))[1](ct_mixed)[0]

    def restart(
        self, pair0: Pair, index: Index, scale: Scale
    ) -> tuple[Pair, list[Float[Array, ""]]]:
        """The kept pair in the place of a reconstructed one, where there is one, and by
        how much that was off."""
        at, kept = self.tape.kept_pair(index, pair0)
        errors = round_trip(self.scheme, pair0, kept, scale)
        return kept, [jnp.where(at, x, 0) for x in errors]

    def ends(self, pair0: Pair, pair1: Pair, z, increment, dense_info) -> StepEnds:
        readout0, readout1 = self.scheme.readout(pair0), self.scheme.readout(pair1)
        return StepEnds(readout0, readout1, z, increment, dense_info)

    def _observed(self, num_ts: list[Index]) -> Iterable:
        _, fns = eqx.combine(self.diff, self.nondiff)
        return zip(self.observations, fns, num_ts, strict=True)

    def _add_readouts(self, pair: Pair, pulled: list) -> tuple[list[PyTree], Pair]:
        ct_pair = zeros_like_inexact(self.scheme.decode(pair))
        for _, ct_readout in pulled:
            ct_pair = add_trees(ct_pair, self.pull_readout(ct_readout, pair))
        return [ct_fn for ct_fn, _ in pulled], ct_pair

    def pull_at_end(
        self, pair: Pair, num_ts: list[Index], num_steps: Index, t_final: Time
    ) -> tuple[list[PyTree], Pair]:
        """Pulls back what was saved after the last step: to `fn`s and final pair."""
        readout = self.scheme.readout(pair)
        pulled = [
            observation.pull_final(fn, t_final, readout, j, num_steps)
            for observation, fn, j in self._observed(num_ts)
        ]
        return self._add_readouts(pair, pulled)

    def pull_at_start(
        self, pair: Pair, num_ts: list[Index]
    ) -> tuple[list[PyTree], Pair]:
        """Pulls back what was saved before the first step: to `fn`s and first pair."""
        readout = self.scheme.readout(pair)
        pulled = [
            observation.pull_initial(fn, self.t0, readout, self.trivial)
            for observation, fn, _ in self._observed(num_ts)
        ]
        return self._add_readouts(pair, pulled)

    def pull_outputs(
        self, num_ts: list[Index], index: Index, t0: Time, t1: Time, ends: StepEnds
    ) -> tuple[list[Index], list[PyTree], StepEnds]:
        """Pulls back all that was saved during a step."""
        previous_end = self.tape.times.previous_end(index)
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


def make_lane(
    parameters: tuple[AbstractIncrement, list[Callable]],
    setup: Setup,
    record: Record,
    ct_ys: list[PyTree],
    trivial: Any,
    perturbed: PyTree[bool],
) -> Lane:
    """The lane of one solve; or, given the axes of these things, the axes of a lane."""
    diff, nondiff = eqx.partition(parameters, perturbed)
    return Lane(
        scheme=setup.scheme,
        tape=tape_of(setup, record),
        t0=setup.t0,
        trivial=trivial,
        base_interpolation_cls=setup.base_interpolation_cls,
        error=setup.error,
        dense=setup.dense,
        observations=[
            Observation(sub, ct) for sub, ct in zip(setup.subs, ct_ys, strict=True)
        ],
        diff=diff,
        nondiff=nondiff,
    )


class Walk(eqx.Module):
    """The walk back over the steps of one solve, or of all lanes of a batch at once.

    With lanes every array but the cotangents of shared parameters has a leading axis.
    Increments are pulled back for all lanes together, which sums over them. A lane that
    has undone all its steps keeps what it has.
    """

    lane: Lane
    axes: Lane | None
    """Which leaves of `lane` have an axis of lanes; `None` without lanes."""
    axis_name: Hashable = eqx.field(static=True)

    def each(self, fn: Callable, *args) -> Any:
        """`fn(lane, *args)`, lane by lane."""
        if self.axes is None:
            return fn(self.lane, *args)
        in_axes = (self.axes, *[eqx.if_array(0)] * len(args))
        vmapped = eqx.filter_vmap(fn, in_axes=in_axes, axis_name=self.axis_name)
        return vmapped(self.lane, *args)

    def _keep_if_done(self, num_steps: Index, new: PyTree, old: PyTree) -> PyTree:
        if self.axes is None:
            return new
        choose = lambda _, n, a, b: jtu.tree_map(
            lambda x, y: jnp.where(n > 0, x, y), a, b
        )
        return self.each(choose, num_steps, new, old)

    @property
    def psi(self) -> Psi:
        """The increment, of all lanes."""
        lane, axes = self.lane, self.axes
        return Psi(
            lane.diff[0],
            lane.nondiff[0],
            None if axes is None else (axes.diff[0], axes.nondiff[0]),
            self.axis_name,
            lane.scheme.arithmetic.exact,
            lane.error,
            lane.dense,
        )

    def add_fns(self, ct_fns: list[PyTree], new: list[PyTree]) -> list[PyTree]:
        """Adds cotangents of the saved functions, of those leaves that have any."""
        _, diff_fns = self.lane.diff
        new = [
            eqx.filter(ct, only_where(diff))
            for ct, diff in zip(new, diff_fns, strict=True)
        ]
        if self.axes is not None:
            new = sum_over_lanes(new, self.axes.diff[1])
        return add_trees(ct_fns, new)

    def __call__(self, carry: Carry) -> Carry:
        if_active = ft.partial(self._keep_if_done, carry.num_steps)
        index, t0, t1 = self.each(Lane.last_of, carry.num_steps)
        forward = _Differentiated(self.psi, t0, t1)
        backward = _Differentiated(self.psi, t1, t0)
        unmix = lambda pair: self.each(Lane.unmix, pair, index)
        pair0 = undo_step(
            self.lane.scheme, carry.pair, forward, backward, unmix
        )  # (B2, B1, BC)

        values = forward.argument, forward.increment, forward.dense_info()
        ends = self.each(Lane.ends, pair0, carry.pair, *values)
        num_ts, *ct_outputs = self.each(
            Lane.pull_outputs, carry.num_ts, index, t0, t1, ends
        )
        nothing = zeros_like_inexact((ct_outputs, carry.ct_pair))
        (ct_fns, ct_ends), ct = if_active((ct_outputs, carry.ct_pair), nothing)

        ct = add_trees(ct, self.each(Lane.pull_readout, ct_ends.readout1, carry.pair))
        ct_p_backward, ct_y = backward.pull(jtu.tree_map(jnp.negative, ct.z), None)
        ct_y = add_trees(ct.y, ct_y)  # (T2)
        ct_increment = add_trees(ct_y, ct_ends.increment)
        ct_p_forward, ct_z = forward.pull(ct_increment, ct_ends.base_dense_info)
        ct_z = add_trees(ct.z, add_trees(ct_z, ct_ends.z))  # (T1)
        ct = self.each(Lane.pull_mix, Pair(ct_y, ct_z), pair0, index)  # (TC)
        ct = add_trees(ct, self.each(Lane.pull_readout, ct_ends.readout0, pair0))

        ct_parameters, ct_fns_total = carry.ct_parameters
        for ct_p in (ct_p_backward, ct_p_forward):
            ct_parameters = add_trees(ct_parameters, ct_p)
        scale = jtu.tree_map(jnp.maximum, carry.scale, self.each(Lane.size, pair0))
        pair0, errors = self.each(Lane.restart, pair0, index, scale)
        errors = jtu.tree_map(jnp.maximum, carry.round_trips, errors)
        new = pair0, ct, num_ts, scale, errors
        old = carry.pair, carry.ct_pair, carry.num_ts, carry.scale, carry.round_trips
        pair, ct_pair, num_ts, scale, errors = if_active(new, old)
        num_steps = jnp.maximum(carry.num_steps - 1, 0)
        ct_parameters = (ct_parameters, self.add_fns(ct_fns_total, ct_fns))
        return Carry(num_steps, pair, ct_pair, ct_parameters, num_ts, scale, errors)


def sum_over_lanes(ct: PyTree[Array], axes: PyTree[int | None]) -> PyTree[Array]:
    """Sums the cotangents of those leaves that all lanes share."""
    is_none = lambda x: x is None
    leaf = lambda a, x: x.sum(axis=0) if a is None and x is not None else x
    return jtu.tree_map(leaf, axes, ct, is_leaf=is_none)


def only_where(tree: PyTree) -> PyTree[bool]:
    """A filter for the leaves that `tree` has, where it may have `None`."""
    return jtu.tree_map(lambda x: x is not None, tree, is_leaf=lambda x: x is None)


def walk_back(walk: Walk, carry: Carry) -> Carry:
    """Undoes all the steps, accumulating cotangents."""
    return lax.while_loop(lambda c: jnp.any(c.num_steps > 0), lambda c: walk(c), carry)


def walk_back_without_cotangents(
    lane: Lane, psi: Psi, pair1: Pair, num_steps: Index
) -> Pair:
    """Undoes all the steps: the reconstructed initial pair."""

    def undo(carry):
        num_steps, pair = carry
        index, t0, t1 = lane.last_of(num_steps)
        forward = lambda z: psi.core(t0, t1, z).value[0]
        backward = lambda y: psi.core(t1, t0, y).value[0]
        unmix = lambda pair: lane.unmix(pair, index)
        return num_steps - 1, undo_step(lane.scheme, pair, forward, backward, unmix)

    _, pair0 = lax.while_loop(lambda c: c[0] > 0, undo, (num_steps, pair1))
    return pair0
