"""What the forward pass leaves behind: no states, but what reversing them needs.

- The interval of every accepted step, if the controller adapts: the *pair* (start, end)
  of each, since after a jump the next step starts two ulps past the last one's end, so
  one time a step would not do. `ConstantStepSize` and `StepTo` prescribe their times,
  so those are computed again and nothing is kept.
- In exact arithmetic the bits that the coupling shed, one per element of the state and
  halving, thirty-two of an element's to a word.
- In floating point, now and then the pair itself, for the way back to restart from.

All of it is written by a wrapper around the controller, the `Recorder`.
"""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree, Real, UInt32

from ._clock import Clock, Moment, Sensitivity, pull_row, pull_through
from ._compat import buffer_at_set, replayed_end, while_loop
from ._control import Time
from ._coupling import Index, Pair, divided
from ._isolation import isolated_product
from ._pair import Scheme

_BITS = 32


def prescribes_times(controller: dfx.AbstractStepSizeController) -> bool:
    """Whether every step's interval is known beforehand."""
    return type(controller) in (dfx.ConstantStepSize, dfx.StepTo)


class AbstractTimes(eqx.Module):
    """The intervals of the accepted steps, counted from 0, in normalised time."""

    @abc.abstractmethod
    def interval(self, index: Index) -> tuple[Time, Time]:
        """Where step `index` began and ended."""

    @abc.abstractmethod
    def previous_end(self, index: Index) -> Time:
        """Where the step before `index` ended (anywhere, for the first)."""

    @abc.abstractmethod
    def pull_interval(
        self, index: Index, ct: tuple[Time, Time], clock: Clock, other: Clock
    ) -> Clock:
        """The cotangent of the differentiated part of the clock, from those of the
        start and the end of a step."""

    def last_of(self, num_steps: Index, t0: Time) -> tuple[Index, Time, Time]:
        """The last of the first `num_steps` steps: its index, start and end.

        With none left it is a step of no length at `t0`. A lane of a batch that has
        undone all its steps goes on computing while others are at it; what it computes
        is thrown away, but must not fail: it stays at the initial time and state.
        """
        index = jnp.maximum(num_steps - 1, 0)
        some = num_steps > 0
        start, end = self.interval(index)
        return index, jnp.where(some, start, t0), jnp.where(some, end, t0)


class PrescribedTimes(AbstractTimes):
    """The intervals that `ConstantStepSize` or `StepTo` prescribe."""

    clock: Clock
    just_below_t1: Time

    def _ends(self, index: Array) -> Array:
        """The ends of any number of steps."""
        clock = self.clock
        controller: Any = clock.controller
        # With the same bits in both passes: an output saved at the very end of a step
        # belongs to it, or to the next.
        end = replayed_end(controller, clock.controller_state, index, isolated_product)
        end = jnp.where(end > self.just_below_t1, clock.t1, end)
        return jnp.where(index == 0, clock.first_end, end)

    def interval(self, index: Index) -> tuple[Time, Time]:
        previous_end, end = self._ends(jnp.stack([index - 1, index]))
        return jnp.where(index == 0, self.clock.t0, previous_end), end

    def previous_end(self, index: Index) -> Time:
        return self.interval(index)[0]

    def pull_interval(self, index, ct, clock, other):
        def interval(clock):
            return PrescribedTimes(clock, self.just_below_t1).interval(index)

        return pull_through(interval, clock, other, ct)


class RecordedTimes(AbstractTimes):
    """The intervals that a `Recorder` saw."""

    starts: Real[Array, " max_steps"]
    ends: Real[Array, " max_steps"]
    derivatives: tuple[Array, Array] | None
    """Of both, with respect to all numbers of the clock that are differentiated, (J);
    `None` if none is."""

    def interval(self, index: Index) -> tuple[Time, Time]:
        return self.starts[index], self.ends[index]

    def previous_end(self, index: Index) -> Time:
        return self.ends[jnp.maximum(index - 1, 0)]

    def pull_interval(self, index, ct, clock, other):
        del other
        assert self.derivatives is not None
        starts, ends = self.derivatives
        return pull_row((starts[index], ends[index]), ct, clock)


class Plan(eqx.Module):
    """What there is to record. Steps are counted from 0, those before the solve, if it
    resumes another, not among them."""

    scheme: Scheme
    times: bool = eqx.field(static=True)
    restart_every: int | None = eqx.field(static=True)
    """At every how many steps the pair is kept."""
    max_steps: int | None = eqx.field(static=True)
    steps_before: Index
    """How many steps were taken before the solve; for the phase of the coupling."""

    def halving(self, index: Index) -> tuple[Array, Array]:
        """Whether the gap is halved at a step, and which halving of the solve it is."""
        every = self.scheme.sheds_every
        assert every is not None
        number, phase = divided(self.steps_before + index, every)
        before, _ = divided(self.steps_before, every)
        return phase == every - 1, number - before

    def restart(self, index: Index) -> tuple[Array, Array]:
        """Whether the pair that a step starts from is kept, and as which."""
        assert self.restart_every is not None
        number, phase = divided(index, self.restart_every)
        return (phase == 0) & (number > 0), jnp.maximum(number, 1) - 1

    def blank(self, t0: Time, pair0: Pair, num_varied: int) -> "Record":
        """An empty record, with derivatives of the times by so many numbers."""
        rows = lambda num, x, dtype: jnp.zeros((num, *jnp.shape(x)), dtype)
        times, bits, pairs = None, None, None
        if self.times:
            empty = rows(self.max_steps, t0, jnp.result_type(t0))
            derivatives = None
            if num_varied > 0:
                empties = jnp.zeros((*empty.shape, num_varied), empty.dtype)
                derivatives = empties, empties
            times = RecordedTimes(empty, empty, derivatives)
        if self.scheme.sheds_every is not None:
            assert self.max_steps is not None
            num = -(-(self.max_steps // self.scheme.sheds_every + 1) // _BITS)
            states = self.scheme.decode(pair0).y
            bits = jtu.tree_map(lambda x: rows(num, x, jnp.uint32), states)
        if self.restart_every is not None:
            assert self.max_steps is not None
            num = self.max_steps // self.restart_every
            if num > 0:
                pairs = jtu.tree_map(lambda x: rows(num, x, x.dtype), pair0)
        return Record(times, bits, pairs)


class Record(NamedTuple):
    """What was recorded; `None` for what needs no record."""

    times: RecordedTimes | None
    bits: PyTree[UInt32[Array, "rows ..."]] | None
    pairs: Pair | None


class Tape(eqx.Module):
    """What the walk back reads."""

    times: AbstractTimes
    record: Record
    plan: Plan

    def shed_bits(self, index: Index) -> PyTree[UInt32[Array, "..."]] | None:
        """What the coupling shed at a step: in the lowest bits, of those steps that
        shed any."""
        if self.record.bits is None:
            return None
        _, halving = self.plan.halving(index)
        row, shift = divided(halving, _BITS)
        read = lambda rows: (rows[row] >> shift) & 1
        return jtu.tree_map(read, self.record.bits)

    def kept_pair(self, index: Index, otherwise: Pair) -> tuple[Array, Pair]:
        """Of a record with pairs: whether that of a step's start was kept, and it."""
        at, row = self.plan.restart(index)
        read = lambda rows, x: jnp.where(at, rows[row], x)
        return at, jtu.tree_map(read, self.record.pairs, otherwise)


class RecorderState(eqx.Module):
    inner: PyTree
    record: Record
    num_accepted: Index
    tangents: PyTree[Array]
    """(J), of the next step, if the times are recorded and differentiated."""


class Recorder(dfx.AbstractStepSizeController):
    """Records accepted steps as planned, and else does as `controller`.

    A step-size controller is where to do so: it is told the very interval that was
    stepped over, and the loop's state before and after, which is the pair; and its own
    state may hold buffers, which in the solver's state would be copied at every step.
    """

    controller: dfx.AbstractStepSizeController
    plan: Plan
    prescribed: PrescribedTimes | None
    """The times, if the walk back computes them again: then they are computed in the
    same way here."""
    sensitivity: Sensitivity | None
    """If the times are recorded and differentiated."""
    just_below_t1: Time

    def wrap(self, direction):
        raise NotImplementedError  # Done before the adjoint is called.

    def init(self, *args, **kwargs):
        raise NotImplementedError  # The adjoint's loop begins with a state of its own.

    def begin(self, inner_state: PyTree, t0: Time, pair0: Pair) -> RecorderState:
        tangents, num_varied = None, 0
        if self.sensitivity is not None:
            tangents = self.sensitivity.begin()
            num_varied = len(tangents.t0)
        record = self.plan.blank(t0, pair0, num_varied)
        zero = jnp.zeros((), jnp.int32)
        return RecorderState(inner_state, record, zero, tangents)

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        readout = self.plan.scheme.readout
        states = readout(y0), readout(y1_candidate)

        def adapt(controller, moment: Moment):
            t0, t1, inner = moment
            known = (*states, args, y_error, error_order)
            return controller.adapt_step_size(t0, t1, *known, inner)

        moment = Moment(t0, t1, controller_state.inner)
        said = adapt(self.controller, moment)
        keep, next_t0, next_t1, made_jump, inner, result = said
        tangents = controller_state.tangents
        if self.sensitivity is not None:
            tangents = self.sensitivity.adapt(
                tangents, moment, adapt, self.just_below_t1
            )
        index = controller_state.num_accepted
        if self.prescribed is not None:
            _, next_t1 = self.prescribed.interval(index + 1)
        record = self._record(controller_state, (t0, t1), y0, y1_candidate, keep)
        index = index + jnp.where(keep, 1, 0)
        state = RecorderState(inner, record, index, tangents)
        return keep, next_t0, next_t1, made_jump, state, result

    def _record(
        self,
        state: RecorderState,
        interval: tuple[Time, Time],
        pair0: Pair,
        pair1: Pair,
        keep: Any,
    ) -> Record:
        (times, bits, pairs), plan = state.record, self.plan
        index = state.num_accepted
        if times is not None:
            start, end = map(jnp.asarray, interval)
            new = RecordedTimes(start, end, None)
            if state.tangents is not None:
                tangents = state.tangents.t0, state.tangents.t1
                new = RecordedTimes(start, end, tangents)
            set_row = lambda x, rows: buffer_at_set(rows, index, x, pred=keep)
            times = jtu.tree_map(set_row, new, times)
        if bits is not None:
            halves, halving = plan.halving(index)
            row, shift = divided(halving, _BITS)
            shed = plan.scheme.arithmetic.shed_bits(pair0.y, pair0.z)
            # Over what is written first: in the loop a buffer is a tree of its own.
            add = lambda bit, rows: buffer_at_set(
                rows, row, rows[row] | (bit << shift), pred=keep & halves
            )
            bits = jtu.tree_map(add, shed, bits)
        if pairs is not None:
            at, row = plan.restart(index + 1)
            write = lambda x, rows: buffer_at_set(rows, row, x, pred=keep & at)
            pairs = jtu.tree_map(write, pair1, pairs)
        return Record(times, bits, pairs)


def recording_while_loop(
    cond_fun: Callable,
    body_fun: Callable,
    init_val: Any,
    *,
    max_steps: int | None,
    buffers: Callable,
) -> Any:
    """Diffrax's outer loop, with the record written to in place."""

    def all_buffers(state):
        controller_state = state.controller_state
        if not isinstance(controller_state, RecorderState):
            return buffers(state)
        return [*buffers(state), *jtu.tree_leaves(controller_state.record)]

    return while_loop(
        cond_fun,
        body_fun,
        init_val,
        max_steps=max_steps,
        buffers=all_buffers,
        kind="lax",
    )
