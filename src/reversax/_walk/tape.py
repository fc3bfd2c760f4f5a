"""What the forward pass leaves behind: no states, but what reversing them needs.

- The interval of every accepted step, if the controller adapts: the *pair* (start, end)
  of each, since after a jump the next step starts two ulps past the last one's end, so
  one time a step would not do. `ConstantStepSize` and `StepTo` prescribe their times,
  so those are computed again and nothing is kept.
- The bits that steps lost, of each element of the state thirty-two to a word; those of
  one step may begin in one word and end in the next. Or numbers that they lost.
- In floating point, now and then the state itself, for the way back to restart from.

All of it is written by a wrapper around the controller, the `Recorder`. If there is
something that no error estimate has (`unwatched` of a scheme), it also asks the
controller whether that is too large: whether it would reject a step whose error were

    (L)    |g| / LIMIT,

which nothing else would stop. With twins under the published coupling `g` is the gap
between them. Healthy solves have some tolerances of it, up to some thousands.
"""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree, Shaped

from .._numbers.schedule import AbstractSchedule, Count, Index, divided
from .._schemes.control import Time
from .._schemes.moves import Codes
from .._schemes.scheme import AbstractScheme, Lost
from .._schemes.watch import LOST, OUTGROWN, SOUND
from .._xla.compat import DIVERGED, buffer_at_set, while_loop
from .._xla.one_kernel import in_one_kernel
from .clock import Moment, Sensitivity
from .times import AbstractTimes, PrescribedTimes, RecordedTimes

_BITS = 32
_REMEMBERED = 16  # Tries.
LIMIT = 1e4
"""How many tolerances that may be."""


class Restarts(eqx.Module):
    """Where the state is kept: at every so many steps, or where so many bits were lost
    since, if their number is chosen."""

    every: int = eqx.field(static=True)
    counts_bits: bool = eqx.field(static=True, default=False)

    def number(self, most_steps: int, most_bits: int) -> int:
        """Not less than how many states are kept."""
        return (most_bits if self.counts_bits else most_steps) // self.every

    def at(self, index: Index, shed: Count, last: Count) -> tuple[Array, Array]:
        """Whether the state that a step starts from is kept, and as which: with `shed`
        bits lost before it, of which `last` in the step before."""
        if not self.counts_bits:
            number, phase = divided(index, self.every)
            return (phase == 0) & (number > 0), jnp.maximum(number, 1) - 1
        number, _ = divided(shed, self.every)
        before, _ = divided(jnp.asarray(shed) - last, self.every)
        return number > before, jnp.maximum(number, 1) - 1


class Plan(eqx.Module):
    """What there is to record. Steps are counted from 0, those before the solve, if it
    resumes another, not among them."""

    scheme: AbstractScheme
    schedule: AbstractSchedule
    times: bool = eqx.field(static=True)
    restarts: Restarts | None
    max_steps: int | None = eqx.field(static=True)

    def blank(self, t0: Time, codes0: Codes, num_varied: int) -> "Record":
        """An empty record, with derivatives of the times by so many numbers."""
        rows = lambda num, x, dtype: jnp.zeros((num, *jnp.shape(x)), dtype)
        times, bits, codes, most = None, None, None, 0
        if self.max_steps is not None:
            most = self.schedule.most(self.max_steps)
        if self.times:
            empty = rows(self.max_steps, t0, jnp.result_type(t0))
            derivatives = None
            if num_varied > 0:
                empties = jnp.zeros((*empty.shape, num_varied), empty.dtype)
                derivatives = empties, empties
            times = RecordedTimes(empty, empty, derivatives)
        if self.scheme.sheds:
            assert self.max_steps is not None
            words = lambda x: max(1, -(-most // _bits_of(x)))
            bits = jax.eval_shape(self.scheme.shed, codes0, codes0, 1)
            bits = jtu.tree_map(lambda x: rows(words(x), x, x.dtype), bits)
        if self.restarts is not None:
            assert self.max_steps is not None
            num = self.restarts.number(self.max_steps, most)
            if num > 0:
                codes = jtu.tree_map(lambda x: rows(num, x, x.dtype), codes0)
        return Record(times, bits, codes)


class Record(NamedTuple):
    """What was recorded; `None` for what needs no record."""

    times: RecordedTimes | None
    bits: PyTree[Shaped[Array, "rows ..."]] | None
    codes: Codes | None


class Tape(eqx.Module):
    """What the walk back reads."""

    times: AbstractTimes
    record: Record
    plan: Plan

    def lost(self, index: Index, until: Count) -> Lost:
        """How many bits a step lost, given those until its end."""
        number = self._number(index)
        before = jnp.asarray(until) - jnp.asarray(number, jnp.uint32)
        return Lost(number, before, index)

    def _number(self, index: Index) -> Count:
        return self.plan.schedule.of_step(index, *self.times.interval(index))

    def shed(self, lost: Lost) -> PyTree[Array] | None:
        """What a step lost."""
        if self.record.bits is None:
            return None
        first, shift = _place(lost.before)
        mask = (np.uint32(1) << jnp.asarray(lost.number, jnp.uint32)) - np.uint32(1)

        def read(rows):
            if _is_number(rows):
                return rows[divided(lost.before, _bits_of(rows))[0]]
            bits = rows[first] >> shift
            if not self.plan.schedule.fills_words:
                # (None of the shifts is by a whole word.)
                bits = bits | ((rows[_next(first, rows)] << 1) << (_BITS - 1 - shift))
            return bits & mask

        return jtu.tree_map(read, self.record.bits)

    def kept(self, index: Index, shed: Count, otherwise: Codes) -> tuple[Array, Codes]:
        """Of a record with states: whether that of a step's start was kept, and it."""
        restarts, last = self.plan.restarts, 0
        assert restarts is not None
        if restarts.counts_bits:
            last = self._number(jnp.maximum(index - 1, 0))
            shed = jnp.where(index == 0, 0, shed)
        at, row = restarts.at(index, shed, last)
        read = lambda rows, x: jnp.where(at, rows[row], x)
        return at, jtu.tree_map(read, self.record.codes, otherwise)


class RecorderState(eqx.Module):
    inner: PyTree
    record: Record
    num_accepted: Index
    num_shed: Count
    """How many bits were lost."""
    tangents: PyTree[Array]
    """(J), of the next step, if the times are recorded and differentiated."""
    tried: Array | None
    """What was the matter with the last steps that were tried, accepted or not, as
    `watch.py` has it; `None` if every step is accepted."""
    since: Array | None
    """How many were tried since."""


class Recorder(dfx.AbstractStepSizeController):
    """Records accepted steps as planned, and else does as `controller`.

    A step-size controller is where to do so: it is told the very interval that was
    stepped over, and the loop's state before and after, which is of the scheme's parts;
    and its own state may hold buffers, which in the solver's state would be copied at
    every step.
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

    def begin(
        self, inner_state: PyTree, t0: Time, codes0: Codes, *, records: bool
    ) -> RecorderState:
        """The first state, which `records` steps for a walk back over them, or not."""
        tangents, num_varied = None, 0
        if self.sensitivity is not None:
            tangents = self.sensitivity.begin()
            num_varied = len(tangents.t0)
        record = Record(None, None, None)
        if records:
            record = self.plan.blank(t0, codes0, num_varied)
        zero = jnp.zeros((), jnp.int32)
        shed = jnp.zeros((), jnp.uint32)
        tried = zero if self.prescribed is None else None
        return RecorderState(inner_state, record, zero, shed, tangents, tried, tried)

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        readout = self.plan.scheme.readout
        states = readout(y0), readout(y1_candidate)

        def adapt(controller, moment: Moment, error=y_error):
            t0, t1, inner = moment
            known = (*states, args, error, error_order)
            return controller.adapt_step_size(t0, t1, *known, inner)

        moment = Moment(t0, t1, controller_state.inner)
        said = adapt(self.controller, moment)
        keep, next_t0, next_t1, made_jump, inner, result = said
        tangents = controller_state.tangents
        if self.sensitivity is not None:
            tangents = self.sensitivity.adapt(
                tangents, moment, adapt, self.just_below_t1
            )
        index, shed = controller_state.num_accepted, controller_state.num_shed
        tried, since = controller_state.tried, controller_state.since
        if self.prescribed is not None:
            _, next_t1 = self.prescribed.interval(index + 1)
        if tried is not None:
            scheme = self.plan.scheme
            gap = scheme.unwatched(y1_candidate)
            if gap is not None:
                share = jtu.tree_map(lambda x: jnp.abs(x) / LIMIT, gap)
                together, *_ = adapt(self.controller, moment, share)  # (L)
                apart = keep & ~jnp.asarray(together)
                result = dfx.RESULTS.where(apart, DIVERGED, result)
            lost = ~scheme.is_finite(y1_candidate)
            why = jnp.where(scheme.outgrown(y1_candidate), OUTGROWN, LOST)
            # A controller feels its way towards a time at which there is no number, in
            # ever shorter steps, until they have no length, which it does not change.
            since = jnp.where(lost, 0, since + jnp.where(t1 > t0, 1, 0))
            forgotten = jnp.where(since > _REMEMBERED, SOUND, tried)
            tried = jnp.where(lost, why, forgotten).astype(tried.dtype)
        bits_lost = self.plan.schedule.of_step(index, t0, t1)
        record = self._record(
            controller_state, bits_lost, (t0, t1), y0, y1_candidate, keep
        )
        index = index + jnp.where(keep, 1, 0)
        shed = shed + jnp.where(keep, bits_lost, 0).astype(shed.dtype)
        state = RecorderState(inner, record, index, shed, tangents, tried, since)
        return keep, next_t0, next_t1, made_jump, state, result

    def _record(
        self,
        state: RecorderState,
        bits_lost: Count,
        interval: tuple[Time, Time],
        codes0: Codes,
        codes1: Codes,
        keep: Any,
    ) -> Record:
        (times, bits, codes), plan = state.record, self.plan
        index, shed = state.num_accepted, state.num_shed
        if times is not None:
            start, end = map(jnp.asarray, interval)
            new = RecordedTimes(start, end, None)
            if state.tangents is not None:
                tangents = state.tangents.t0, state.tangents.t1
                new = RecordedTimes(start, end, tangents)
            set_row = lambda x, rows: buffer_at_set(rows, index, x, pred=keep)
            times = jtu.tree_map(set_row, new, times)
        if bits is not None:
            new = plan.scheme.shed(codes0, codes1, bits_lost)
            add = ft.partial(self._add_bits, shed, bits_lost, keep)
            # Over what is written first: in the loop a buffer is a tree of its own.
            bits = jtu.tree_map(add, new, bits)
        if codes is not None:
            assert plan.restarts is not None
            at, row = plan.restarts.at(index + 1, shed + bits_lost, bits_lost)
            write = lambda x, rows: buffer_at_set(rows, row, x, pred=keep & at)
            codes = jtu.tree_map(write, codes1, codes)
        return Record(times, bits, codes)

    def _add_bits(
        self, shed: Count, bits_lost: Count, keep: Any, new: Array, rows: Any
    ) -> Any:
        """Writes the bits of a step behind the `shed` ones."""
        keep = keep & (jnp.asarray(bits_lost) > 0)
        if _is_number(rows):
            row, _ = divided(shed, _bits_of(rows))
            return buffer_at_set(rows, row, new, pred=keep)
        row, shift = _place(shed)
        rows = buffer_at_set(rows, row, rows[row] | (new << shift), pred=keep)
        if self.plan.schedule.fills_words:
            return rows
        more = shift + bits_lost > _BITS
        # (None of the shifts is by a whole word.)
        beyond = (new >> 1) >> (_BITS - 1 - shift)
        return buffer_at_set(rows, _next(row, rows), beyond, pred=keep & more)


def _place(bit: Count) -> tuple[Array, Array]:
    """The word that a bit lies in, and where in it."""
    row, shift = divided(bit, _BITS)
    # Which tells a compiler that it is less than a word, as in `words.py`.
    return row, shift & np.uint32(_BITS - 1)


def _bits_of(x: Any) -> int:
    return x.dtype.itemsize * 8


def _is_number(rows: Any) -> bool:
    return jnp.issubdtype(rows.dtype, jnp.inexact)


def _next(row: Array, rows: Any) -> Array:
    """The row after one, or the last."""
    return jnp.minimum(row + 1, rows.shape[0] - 1)


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

    loop = ft.partial(while_loop, cond_fun, body_fun, max_steps=max_steps, kind="lax")
    return in_one_kernel(lambda state: loop(state, buffers=all_buffers), init_val)
