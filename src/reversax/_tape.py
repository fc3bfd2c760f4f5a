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
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree, Real, UInt32

from ._compat import buffer_at_set, prevbefore, replayed_end, while_loop
from ._coupling import Index, Pair
from ._increment import Time
from ._isolation import isolated_product
from ._pair import Scheme

_BITS = 32


def just_below(t1: Time) -> Time:
    """100 ulps below `t1`: Diffrax's loop takes for `t1` what comes after."""
    return lax.fori_loop(0, 100, lambda _, t: prevbefore(t), t1)


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

    controller: dfx.ConstantStepSize | dfx.StepTo
    first_state: PyTree
    """The controller's state before the first step."""
    t0: Time
    t1: Time
    first_end: Time
    just_below_t1: Time
    isolated: bool = eqx.field(static=True)
    """Whether times must have the same bits in both passes."""

    def _ends(self, index: Array) -> Array:
        """The ends of any number of steps."""
        multiply = isolated_product if self.isolated else lambda a, b: a * b
        end = replayed_end(self.controller, self.first_state, index, multiply)
        end = jnp.where(end > self.just_below_t1, self.t1, end)
        return jnp.where(index == 0, self.first_end, end)

    def interval(self, index: Index) -> tuple[Time, Time]:
        previous_end, end = self._ends(jnp.stack([index - 1, index]))
        return jnp.where(index == 0, self.t0, previous_end), end

    def previous_end(self, index: Index) -> Time:
        return self.interval(index)[0]


class RecordedTimes(AbstractTimes):
    """The intervals that a `Recorder` saw."""

    starts: Real[Array, " max_steps"]
    ends: Real[Array, " max_steps"]

    def interval(self, index: Index) -> tuple[Time, Time]:
        return self.starts[index], self.ends[index]

    def previous_end(self, index: Index) -> Time:
        return self.ends[jnp.maximum(index - 1, 0)]


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

    @property
    def empty(self) -> bool:
        sheds = self.scheme.sheds_every is not None
        return not (self.times or sheds or self.restart_every is not None)

    def halving(self, index: Index) -> tuple[Array, Any]:
        """Whether the gap is halved at a step, and which halving of the solve it is."""
        every = self.scheme.sheds_every
        assert every is not None
        number = self.steps_before + index
        before = self.steps_before // every
        return jnp.asarray((number + 1) % every == 0), number // every - before

    def restart(self, index: Index) -> tuple[Array, Array]:
        """Whether the pair that a step starts from is kept, and as which."""
        assert self.restart_every is not None
        at = (index % self.restart_every == 0) & (index > 0)
        return jnp.asarray(at), jnp.maximum(index // self.restart_every - 1, 0)

    def blank(self, t0: Time, pair0: Pair) -> "Record":
        """An empty record."""
        rows = lambda num, x, dtype: jnp.zeros((num, *jnp.shape(x)), dtype)
        times, bits, pairs = None, None, None
        if self.times:
            empty = rows(self.max_steps, t0, jnp.result_type(t0))
            times = RecordedTimes(empty, empty)
        if self.scheme.sheds_every is not None:
            assert self.max_steps is not None
            num = -(-(self.max_steps // self.scheme.sheds_every + 1) // _BITS)
            states = self.scheme.decode(pair0).y
            bits = jtu.tree_map(lambda x: rows(num, x, jnp.uint32), states)
        if self.restart_every is not None:
            assert self.max_steps is not None
            num = self.max_steps // self.restart_every
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
        shift = (halving % _BITS).astype(jnp.uint32)
        read = lambda rows: (rows[halving // _BITS] >> shift) & 1
        return jtu.tree_map(read, self.record.bits)

    def kept_pair(self, index: Index, otherwise: Pair) -> tuple[Array, Pair]:
        """Whether the pair that a step starts from was kept, and that pair."""
        if self.record.pairs is None:
            return jnp.array(False), otherwise
        at, row = self.plan.restart(index)
        read = lambda rows, x: jnp.where(at, rows[row], x)
        return at, jtu.tree_map(read, self.record.pairs, otherwise)


class RecorderState(eqx.Module):
    inner: PyTree
    record: Record
    num_accepted: Index


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

    def wrap(self, direction):
        raise NotImplementedError  # Done before the adjoint is called.

    def init(self, *args, **kwargs):
        raise NotImplementedError  # The adjoint's loop begins with a state of its own.

    def begin(self, inner_state: PyTree, t0: Time, pair0: Pair) -> RecorderState:
        record = self.plan.blank(t0, pair0)
        return RecorderState(inner_state, record, jnp.zeros((), jnp.int32))

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        readout = self.plan.scheme.readout
        keep, next_t0, next_t1, made_jump, inner, result = (
            self.controller.adapt_step_size(
                t0,
                t1,
                readout(y0),
                readout(y1_candidate),
                args,
                y_error,
                error_order,
                controller_state.inner,
            )
        )
        index = controller_state.num_accepted
        if self.prescribed is not None:
            _, next_t1 = self.prescribed.interval(index + 1)
        record = self._record(
            controller_state.record, index, (t0, t1), y0, y1_candidate, keep
        )
        state = RecorderState(inner, record, index + jnp.where(keep, 1, 0))
        return keep, next_t0, next_t1, made_jump, state, result

    def _record(
        self,
        record: Record,
        index: Index,
        interval: tuple[Time, Time],
        pair0: Pair,
        pair1: Pair,
        keep: Any,
    ) -> Record:
        (times, bits, pairs), plan = record, self.plan
        if times is not None:
            times = RecordedTimes(
                buffer_at_set(times.starts, index, interval[0], pred=keep),
                buffer_at_set(times.ends, index, interval[1], pred=keep),
            )
        if bits is not None:
            halves, halving = plan.halving(index)
            row, shift = halving // _BITS, (halving % _BITS).astype(jnp.uint32)
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
