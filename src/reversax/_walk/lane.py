"""One solve, or one lane of a batch of them, as the walk back over it sees it."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from .._numbers.arithmetic import State
from .._numbers.schedule import Count, Index
from .._schemes.control import Time
from .._schemes.coupling import Pair
from .._schemes.increment import AbstractIncrement
from .._schemes.twins import Scheme, StepEnds, dense_info
from .._schemes.watch import Scale
from .certificate import checked_tangents, largest_of_pair, round_trip
from .clock import Clock, any_of, inexact, pull_through
from .forward import tape_of
from .observe import Observation, Pulled, add_trees, zeros_like_inexact
from .setup import Setup
from .tape import Record, Tape


class Outputs(NamedTuple):
    """What of Diffrax's final state may be differentiated, or its cotangents."""

    pair: Pair | None
    ys: list[PyTree[Array]]
    ts: list[Array | None]
    dense_infos: PyTree[Array]
    """Of all steps, and the times of their ends after the first start; `None` unless
    asked for, as what concerns events."""
    dense_ts: Array | None
    event_dense_info: PyTree[Array]
    """Of the last step, and its interval."""
    event_tprev: Array | None
    event_tnext: Array | None


def outputs_of(final_state: Any, pair: Any) -> Outputs:
    """What of a final state, or of the cotangent of one, concerns differentiation."""
    save_states = Setup.save_states(final_state)
    return Outputs(
        pair,
        [s.ys for s in save_states],
        [s.ts for s in save_states],
        final_state.dense_infos,
        final_state.dense_ts,
        final_state.event_dense_info,
        final_state.event_tprev,
        final_state.event_tnext,
    )


class CotangentOfDense(eqx.Module):
    """The cotangents of the dense output of all steps, and of the last one."""

    ct: Outputs
    num_steps: Index
    """How many steps were accepted."""
    last_end: Array | None
    """Where the last step that was made ended, if there is an event."""

    def of_start(self) -> Array | float:
        """The cotangent of `t0`."""
        ct, total = self.ct, 0.0
        if ct.dense_ts is not None:
            total = total + ct.dense_ts[0]
        if ct.event_tprev is not None and ct.event_tnext is not None:
            both = ct.event_tprev + ct.event_tnext
            total = total + jnp.where(self.num_steps == 0, both, 0)
        return total

    def of_step(
        self, index: Index, interval: tuple[Time, Time], ends: StepEnds
    ) -> tuple[StepEnds, tuple[Array, Array]]:
        """The cotangents of a step's ends and of its interval."""
        ct = self.ct
        ct_t0, ct_t1 = zeros_like_inexact(tuple(map(jnp.asarray, interval)))
        info, pull = eqx.filter_vjp(lambda e: inexact(dense_info(e)), ends)
        ct_info = jtu.tree_map(jnp.zeros_like, info)
        if ct.dense_ts is not None:
            row = jtu.tree_map(lambda x: x[index], ct.dense_infos)
            ct_info = add_trees(ct_info, row)
            ct_t1 = ct_t1 + ct.dense_ts[index + 1]
        if ct.event_dense_info is not None:
            last = index == self.num_steps - 1
            at_last = lambda x: jnp.where(last, x, 0)
            event = ct.event_dense_info, (ct.event_tprev, ct.event_tnext)
            # A solve that ended with a rejected step has the dense output of that one,
            # which cannot be found again.
            accepted = interval[1] == self.last_end
            lost = lambda x: jnp.where(accepted | (x == 0), x, jnp.nan)
            event = jtu.tree_map(lost, event)
            ct_event, (ct_start, ct_end) = jtu.tree_map(at_last, event)
            ct_info = add_trees(ct_info, ct_event)
            ct_t0, ct_t1 = ct_t0 + ct_start, ct_t1 + ct_end
        return inexact(pull(ct_info)[0]), (ct_t0, ct_t1)


class Lane(eqx.Module):
    """What the walk needs to know of one solve, and what it does lane by lane.

    The parameters, the increment and the saved functions, come in two pieces: what is
    differentiated and the rest, to be joined by `equinox.combine`. Cotangents of the
    saved functions are lists with one entry for each observation.
    """

    scheme: Scheme
    tape: Tape
    clock_diff: Clock
    """The differentiated part of the clock."""
    clock_rest: Clock
    base_interpolation_cls: Callable = eqx.field(static=True)
    error: bool = eqx.field(static=True)
    dense: bool = eqx.field(static=True)
    times: bool = eqx.field(static=True)
    """Whether anything of the clock is differentiated."""
    round_trip_tolerance: float | None = eqx.field(static=True)
    observations: list[Observation]
    ct_dense: CotangentOfDense
    diff: tuple[AbstractIncrement, list[Callable]]
    nondiff: tuple[AbstractIncrement, list[Callable]]

    @property
    def clock(self) -> Clock:
        return eqx.combine(self.clock_diff, self.clock_rest)

    def last_of(self, num_steps: Index) -> tuple[Index, Time, Time]:
        return self.tape.times.last_of(num_steps, self.clock.t0)

    def pull_interval(self, index: Index, ct_t0: Array, ct_t1: Array) -> Clock:
        """The cotangent of the clock from that of a step's interval."""
        clocks = self.clock_diff, self.clock_rest
        return self.tape.times.pull_interval(index, (ct_t0, ct_t1), *clocks)

    def pull_t0(self, ct: Array) -> Clock:
        clocks = self.clock_diff, self.clock_rest
        return pull_through(lambda clock: jnp.asarray(clock.t0), *clocks, ct)

    def pull_time_after(self, num_steps: Index, ct: Array) -> Clock:
        """The cotangent of the clock from that of the time after so many steps."""
        of_end = self.pull_interval(jnp.maximum(num_steps - 1, 0), 0 * ct, ct)
        choose = lambda a, b: jnp.where(num_steps > 0, a, b)
        return jtu.tree_map(choose, of_end, self.pull_t0(ct))

    def no_cotangent_of_ts(self) -> list[Array | None]:
        times = [observation.ts for observation in self.observations]
        return [None if ts is None else jnp.zeros_like(ts) for ts in times]

    def size(self, pair: Pair) -> Scale:
        return largest_of_pair(self.scheme, pair)

    @property
    def allows_no_error(self) -> bool:
        """Whether a round trip fails by one bit, whatever the size of the state."""
        return self.scheme.arithmetic.exact and not self.round_trip_tolerance

    def no_errors_yet(self, scale: Scale) -> list[Float[Array, ""]]:
        """What `restart` returns, where nothing was off so far."""
        if self.tape.record.pairs is None:
            return []
        zero = jnp.zeros((), jnp.result_type(float))
        return [zero for _ in jtu.tree_leaves(scale)]

    def pull_readout(self, ct_readout: State, pair: Pair) -> Pair:
        """The cotangent of a pair from that of its readout."""
        decoded = self.scheme.decode(pair)
        return jax.vjp(self.scheme.coupling.readout, decoded)[1](ct_readout)[0]

    def halved(self, index: Index, shed: Count) -> "Halved":
        """The halvings of a step, given those that it and those before it made."""
        number = self.tape.halvings(index)
        return Halved(number, jnp.asarray(shed) - jnp.asarray(number, jnp.uint32))

    def unmix(self, pair: Pair, halved: "Halved") -> Pair:
        """(BC)."""
        shed_bits = lambda: self.tape.shed_bits(halved.before, halved.number)
        return self.scheme.unmix(pair, halved.number, shed_bits)

    def pull_mix(self, ct_mixed: Pair, pair0: Pair, halved: "Halved") -> Pair:
        """(TC)."""
        mix = lambda pair: self.scheme.mix_states(pair, halved.number)
        return jax.vjp(mix, self.scheme.decode(pair0))[1](ct_mixed)[0]

    def unmix_and_pull(
        self, mixed: Pair, ct_mixed: Pair, halved: "Halved"
    ) -> tuple[Pair, Pair]:
        """(BC) and (TC)."""
        pair0 = self.unmix(mixed, halved)
        return pair0, self.pull_mix(ct_mixed, pair0, halved)

    def restart(
        self, pair0: Pair, index: Index, halved: "Halved", scale: Scale
    ) -> tuple[Pair, list[Float[Array, ""]]]:
        """The kept pair in the place of a reconstructed one, where there is one, and by
        how much that was off; nothing if no pairs are kept."""
        if self.tape.record.pairs is None:
            return pair0, []
        at, kept = self.tape.kept_pair(index, halved.before, pair0)
        errors = round_trip(self.scheme, pair0, kept, scale)
        zero = jnp.zeros(())
        kept, _ = checked_tangents(self.round_trip_tolerance, kept, pair0, zero)
        return kept, [jnp.where(at, x, 0) for x in errors]

    def ends(self, pair0: Pair, pair1: Pair, z, increment, dense_info) -> StepEnds:
        readout0, readout1 = self.scheme.readout(pair0), self.scheme.readout(pair1)
        return StepEnds(readout0, readout1, z, increment, dense_info)

    def _observed(self, num_ts: list[Index]) -> Iterable:
        _, fns = eqx.combine(self.diff, self.nondiff)
        return zip(self.observations, fns, num_ts, strict=True)

    def _pull_saved(
        self, t: Time, pair: Pair, num_ts: list[Index], pull: Callable[..., Pulled]
    ) -> tuple[list[PyTree], Array, Pair]:
        """Pulls back what was saved of one time and pair: to `fn`s, time and pair.
        `pull(observation, fn, readout, num_ts)` does so for one of the outputs."""
        readout = self.scheme.readout(pair)
        ct_fns, ct_t = [], jnp.zeros_like(t)
        ct_pair = zeros_like_inexact(self.scheme.decode(pair))
        for observation, fn, j in self._observed(num_ts):
            ct = pull(observation, fn, readout, j)
            ct_fns.append(ct.fn)
            ct_t = ct_t + ct.t
            ct_pair = add_trees(ct_pair, self.pull_readout(ct.y, pair))
        return ct_fns, ct_t, ct_pair

    def pull_at_end(
        self, pair: Pair, num_ts: list[Index], num_steps: Index, t_final: Time
    ) -> tuple[list[PyTree], Array, Pair]:
        """Pulls back what was saved after the last step."""
        pull = lambda observation, fn, readout, j: observation.pull_final(
            fn, t_final, readout, j, num_steps
        )
        return self._pull_saved(t_final, pair, num_ts, pull)

    def pull_at_start(
        self, pair: Pair, num_ts: list[Index]
    ) -> tuple[list[PyTree], Array, Pair]:
        """Pulls back what was saved before the first step."""
        t0 = self.clock.t0
        trivial = jnp.asarray(t0 == self.clock.t1)
        pull = lambda observation, fn, readout, _: observation.pull_initial(
            fn, t0, readout, trivial
        )
        ct_fns, ct_t0, ct_pair = self._pull_saved(t0, pair, num_ts, pull)
        return ct_fns, ct_t0 + self.ct_dense.of_start(), ct_pair

    def pull_last_end(
        self, num_steps: Index, pair1: Pair, num_ts: list[Index]
    ) -> tuple[tuple[Index, Time, Time], tuple[list[PyTree], Array, Pair]]:
        """The last of so many steps, and what was saved at its end pulled back."""
        index, t0, t1 = self.last_of(num_steps)
        pull = lambda observation, fn, readout, j: observation.pull_step_end(
            fn, t1, readout, j, index
        )
        return (index, t0, t1), self._pull_saved(t1, pair1, num_ts, pull)

    def pull_inside_step(
        self,
        num_ts: list[Index],
        ct_ts: list[Array | None],
        index: Index,
        t0: Time,
        t1: Time,
        ends: StepEnds,
    ) -> "Inside":
        """Pulls back what was saved inside a step, and its dense output."""
        previous_end = self.tape.times.previous_end(index)
        ct_ends, ct_interval = zeros_like_inexact(
            (ends, (jnp.asarray(t0), jnp.asarray(t1)))
        )
        inside = Inside([], [], [], ct_ends, ct_interval)
        for (observation, fn, j), so_far in zip(
            self._observed(num_ts), ct_ts, strict=True
        ):
            base_cls, interval = self.base_interpolation_cls, (t0, t1)
            j, so_far, ct_fn, *ct = observation.pull_inside_step(
                fn, base_cls, interval, previous_end, ends, j, index, so_far
            )
            ct_ends, ct_interval = add_trees((ct_ends, ct_interval), tuple(ct))
            inside.num_ts.append(j)
            inside.ct_ts.append(so_far)
            inside.ct_fns.append(ct_fn)
        ct = self.ct_dense.of_step(index, (t0, t1), ends)
        ct_ends, ct_interval = add_trees((ct_ends, ct_interval), ct)
        return inside._replace(ct_ends=ct_ends, ct_interval=ct_interval)


class Halved(NamedTuple):
    """How many halvings a step made, and how many were made before it. (A number that
    Python knows is one for all lanes.)"""

    number: Count
    before: Count


class Inside(NamedTuple):
    """What was pulled back inside a step."""

    num_ts: list[Index]
    """How many `ts` had been saved when it began."""
    ct_ts: list[Array | None]
    ct_fns: list[PyTree]
    ct_ends: StepEnds
    ct_interval: tuple[Array, Array]


def make_lane(
    parts: tuple[Pair, AbstractIncrement, list[Callable], Clock],
    setup: Setup,
    record: Record,
    ct: Outputs,
    ends: tuple[Index, Array | None],
    perturbed: PyTree[bool],
) -> Lane:
    """The lane of one solve, for these cotangents of its outputs; or, given the axes of
    all of these, the axes of a lane. `ends` are the number of accepted steps, and where
    the last step that was made ended, if there is an event."""
    _, increment, fns, clock = parts
    diff, nondiff = eqx.partition((increment, fns), tuple(perturbed[1:3]))
    clock_diff, clock_rest = eqx.partition(clock, perturbed[3])
    times = any_of(perturbed[3])
    rows = zip(setup.subs, clock.ts, ct.ys, ct.ts, strict=True)
    ct_of_dense = ct._replace(pair=None, ys=[], ts=[])  # The others are read elsewhere.
    return Lane(
        scheme=setup.scheme,
        tape=tape_of(setup, clock, record),
        clock_diff=clock_diff,
        clock_rest=clock_rest,
        base_interpolation_cls=setup.base_interpolation_cls,
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
