"""One solve, or one lane of a batch of them, as the walk back over it sees it."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from .._numbers.schedule import Count, Index
from .._schemes.control import Time
from .._schemes.increment import AbstractIncrement
from .._schemes.moves import Codes, add_trees
from .._schemes.scheme import AbstractScheme, Lost, Span, Values
from .._schemes.watch import Scale
from .certificate import checked_tangents, largest_of, round_trip
from .clock import any_of
from .cotangents import CotangentOfDense, Outputs
from .forward import tape_of
from .observe import Inside, Interior, Observation, Pulled, Saved, zeros_like_inexact
from .setup import Parts, Setup
from .tape import Record, Tape
from .timeline import Timeline


class Observed(NamedTuple):
    """Cotangents of saved functions, and of the time and the state that they read."""

    fns: list[PyTree]
    t: Array
    values: Values


class ObservedInside(NamedTuple):
    """What was pulled back inside a step."""

    saved: list[Saved]
    fns: list[PyTree]
    interior: Interior


class Lane(eqx.Module):
    """What the walk needs to know of one solve, and what it does lane by lane.

    The parameters, the fields and the saved functions, come in two pieces: what is
    differentiated and the rest, to be joined by `equinox.combine`. Cotangents of the
    saved functions are lists with one entry for each observation.
    """

    scheme: AbstractScheme
    tape: Tape
    timeline: Timeline
    error: bool = eqx.field(static=True)
    dense: bool = eqx.field(static=True)
    times: bool = eqx.field(static=True)
    """Whether anything of the clock is differentiated."""
    round_trip_tolerance: float | None = eqx.field(static=True)
    observations: list[Observation]
    ct_dense: CotangentOfDense
    diff: tuple[AbstractIncrement, list[Callable]]
    nondiff: tuple[AbstractIncrement, list[Callable]]

    # The record.

    def last_of(self, num_steps: Index, num_shed: Count) -> tuple[Span, Lost]:
        """The last of so many steps, which lost so many bits, and what it lost."""
        index, span = self.timeline.last_of(num_steps)
        return span, self.tape.lost(index, num_shed)

    def shed(self, lost: Lost) -> PyTree[Array] | None:
        return self.tape.shed(lost)

    def size(self, codes: Codes) -> Scale:
        return largest_of(self.scheme, codes)

    @property
    def allows_no_error(self) -> bool:
        """Whether a round trip fails by one bit, whatever the size of the state."""
        return self.scheme.arithmetic.exact and not self.round_trip_tolerance

    def no_errors_yet(self, scale: Scale) -> list[Float[Array, ""]]:
        """What `restart` returns, where nothing was off so far."""
        if self.tape.record.codes is None:
            return []
        zero = jnp.zeros((), jnp.result_type(float))
        return [zero for _ in jtu.tree_leaves(scale)]

    def restart(
        self, codes0: Codes, lost: Lost, scale: Scale
    ) -> tuple[Codes, list[Float[Array, ""]]]:
        """The kept state in the place of a reconstructed one, where there is one, and
        by how much that was off; nothing if none are kept."""
        if self.tape.record.codes is None:
            return codes0, []
        at, kept = self.tape.kept(lost.index, lost.before, codes0)
        errors = round_trip(self.scheme, codes0, kept, scale)
        zero = jnp.zeros(())
        kept, _ = checked_tangents(self.round_trip_tolerance, kept, codes0, zero)
        return kept, [jnp.where(at, x, 0) for x in errors]

    # Outputs.

    def nothing_saved(self, num_ts: list[Index]) -> list[Saved]:
        """Of so many times, none pulled back yet."""
        no_ct = lambda ts: None if ts is None else jnp.zeros_like(ts)
        cts = [no_ct(x.ts) if self.times else None for x in self.observations]
        return [Saved(j, ct) for j, ct in zip(num_ts, cts, strict=True)]

    def _observed(self, saved: list[Saved]) -> Iterable:
        _, fns = eqx.combine(self.diff, self.nondiff)
        return zip(self.observations, fns, saved, strict=True)

    def _pull_saved(
        self, t: Time, codes: Codes, saved: list[Saved], pull: Callable[..., Pulled]
    ) -> Observed:
        """Pulls back what was saved of one time and state:
        `pull(observation, fn, readout, num_ts)` does so for one of the outputs."""
        readout = self.scheme.readout(codes)
        ct_fns, ct_t = [], jnp.zeros_like(t)
        ct_values = zeros_like_inexact(self.scheme.decode(codes))
        for observation, fn, (num_ts, _) in self._observed(saved):
            ct = pull(observation, fn, readout, num_ts)
            ct_fns.append(ct.fn)
            ct_t = ct_t + ct.t
            more = self.scheme.pull_readout(ct.y, codes)
            ct_values = add_trees(ct_values, more)
        return Observed(ct_fns, ct_t, ct_values)

    def pull_at_end(
        self, codes: Codes, saved: list[Saved], num_steps: Index, t_final: Time
    ) -> Observed:
        """Pulls back what was saved after the last step."""
        pull = lambda observation, fn, readout, j: observation.pull_final(
            fn, t_final, readout, j, num_steps
        )
        return self._pull_saved(t_final, codes, saved, pull)

    def pull_at_start(self, codes: Codes, saved: list[Saved]) -> Observed:
        """Pulls back what was saved before the first step."""
        clock = self.timeline.clock
        t0, trivial = clock.t0, jnp.asarray(clock.t0 == clock.t1)
        pull = lambda observation, fn, readout, _: observation.pull_initial(
            fn, t0, readout, trivial
        )
        observed = self._pull_saved(t0, codes, saved, pull)
        return observed._replace(t=observed.t + self.ct_dense.of_start())

    def pull_last_end(
        self, span: Span, lost: Lost, codes1: Codes, saved: list[Saved]
    ) -> Observed:
        """Pulls back what was saved at the end of a step."""
        pull = lambda observation, fn, readout, j: observation.pull_step_end(
            fn, span.end, readout, j, lost.index
        )
        return self._pull_saved(span.end, codes1, saved, pull)

    def pull_inside_step(
        self, span: Span, lost: Lost, info: dict[str, Any], saved: list[Saved]
    ) -> ObservedInside:
        """Pulls back what was saved inside a step, and its dense output."""
        index = lost.index
        interval = jnp.asarray(span.start), jnp.asarray(span.end)
        interior = Interior(interval, info)
        previous_end = self.tape.times.previous_end(index)
        cls = self.scheme.interpolation_cls
        inside = Inside(index, previous_end, cls, interior)
        ct_interior = zeros_like_inexact(interior)
        pulled = ObservedInside([], [], ct_interior)
        for observation, fn, saved_here in self._observed(saved):
            left, ct_fn, ct = observation.pull_inside_step(fn, inside, saved_here)
            ct_interior = add_trees(ct_interior, ct)
            pulled.saved.append(left)
            pulled.fns.append(ct_fn)
        ct = self.ct_dense.of_step(index, interior)
        return pulled._replace(interior=add_trees(ct_interior, ct))


def make_lane(
    parts: Parts,
    setup: Setup,
    record: Record,
    ct: Outputs,
    ends: tuple[Index, Array | None],
    perturbed: Parts,
) -> Lane:
    """The lane of one solve, for these cotangents of its outputs; or, given the axes of
    all of these, the axes of a lane. `ends` are the number of accepted steps, and where
    the last step that was made ended, if there is an event."""
    _, increment, fns, clock = parts
    differentiated = perturbed.increment, perturbed.fns
    diff, nondiff = eqx.partition((increment, fns), differentiated)
    tape = tape_of(setup, clock, record)
    diff_clock, rest_clock = eqx.partition(clock, perturbed.clock)
    times = any_of(perturbed.clock)
    rows = zip(setup.subs, clock.ts, ct.ys, ct.ts, strict=True)
    ct_of_dense = ct._replace(codes=None, ys=[], ts=[])  # Others are read elsewhere.
    return Lane(
        scheme=setup.scheme,
        tape=tape,
        timeline=Timeline(
            times=tape.times,
            diff=diff_clock,
            rest=rest_clock,
            looks_back=setup.scheme.looks_back,
        ),
        error=setup.error,
        dense=setup.dense,
        times=times,
        round_trip_tolerance=setup.round_trip_tolerance,
        observations=[
            Observation(sub, ts, ct_ys, ct_ts if times else None)
            for sub, ts, ct_ys, ct_ts in rows
        ],
        ct_dense=CotangentOfDense(ct_of_dense, *ends),
        diff=diff,
        nondiff=nondiff,
    )


def sum_over_lanes(ct: PyTree[Array], axes: PyTree[int | None]) -> PyTree[Array]:
    """Sums the cotangents of those leaves that all lanes share."""
    is_none = lambda x: x is None
    leaf = lambda a, x: x.sum(axis=0) if a is None and x is not None else x
    return jtu.tree_map(leaf, axes, ct, is_leaf=is_none)


def only_where(tree: PyTree) -> PyTree[bool]:
    """A filter for the leaves that `tree` has, where it may have `None`."""
    return jtu.tree_map(lambda x: x is not None, tree, is_leaf=lambda x: x is None)
