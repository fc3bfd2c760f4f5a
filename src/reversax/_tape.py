"""What the forward pass leaves behind of time: the interval of every accepted step.

A controller that adapts is wrapped in a `Recorder`, which notes the *pair* (start, end)
of every accepted step: after a jump the next step starts two ulps past the last one's
end, so one time a step would not do. `ConstantStepSize` and `StepTo` prescribe their
times, so those are computed again and nothing is kept.
"""

import abc
from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree, Real

from ._compat import buffer_at_set, prevbefore, replayed_end, while_loop
from ._increment import Time

Index = Int[Array, ""]


def prescribes_times(controller: dfx.AbstractStepSizeController) -> bool:
    """Whether every step's interval is known beforehand."""
    return type(controller) in (dfx.ConstantStepSize, dfx.StepTo)


class AbstractTape(eqx.Module):
    """The intervals of the accepted steps, counted from 0, in normalised time."""

    @abc.abstractmethod
    def start(self, index: Index) -> Time:
        """Where step `index` began."""

    @abc.abstractmethod
    def end(self, index: Index) -> Time:
        """Where step `index` ended."""

    def last_of(self, num_steps: Index, t0: Time) -> tuple[Index, Time, Time]:
        """The last of the first `num_steps` steps: its index, start and end.

        With none left it is a step of no length at `t0`. A lane of a batch that has
        undone all its steps goes on computing while others are at it; what it computes
        is thrown away, but must not fail: it stays at the initial time and state.
        """
        index = jnp.maximum(num_steps - 1, 0)
        some = num_steps > 0
        start = jnp.where(some, self.start(index), t0)
        return index, start, jnp.where(some, self.end(index), t0)


class PrescribedTape(AbstractTape):
    """The intervals that `ConstantStepSize` or `StepTo` prescribe."""

    controller: dfx.ConstantStepSize | dfx.StepTo
    first_state: PyTree
    """The controller's state before the first step."""
    t0: Time
    t1: Time
    first_end: Time

    def start(self, index: Index) -> Time:
        return jnp.where(index == 0, self.t0, self.end(index - 1))

    def end(self, index: Index) -> Time:
        end = replayed_end(self.controller, self.first_state, self.t1, index)
        # Diffrax's loop rounds to t1 what comes within 100 ulps of it.
        floor = lax.fori_loop(0, 100, lambda _, t: prevbefore(t), self.t1)
        end = jnp.where(end > floor, self.t1, end)
        return jnp.where(index == 0, self.first_end, end)


class RecordedTape(AbstractTape):
    """The intervals that a `Recorder` saw."""

    starts: Real[Array, " max_steps"]
    ends: Real[Array, " max_steps"]

    def start(self, index: Index) -> Time:
        return self.starts[index]

    def end(self, index: Index) -> Time:
        return self.ends[index]


class RecorderState(eqx.Module):
    inner: PyTree
    tape: RecordedTape
    num_accepted: Index


class Recorder(dfx.AbstractStepSizeController):
    """Notes the interval of each accepted step, and else does as `controller`.

    A step-size controller is where to do so: it is told the very interval that was
    stepped over, and its state may hold buffers, which in the solver's state would be
    copied at every step.
    """

    controller: dfx.AbstractStepSizeController

    def wrap(self, direction):
        return Recorder(self.controller.wrap(direction))

    def init(self, *args, **kwargs):
        raise NotImplementedError  # The adjoint's loop begins with a state of its own.

    def begin(self, inner_state: PyTree, t0: Time, max_steps: int) -> RecorderState:
        empty = jnp.zeros(max_steps, jnp.result_type(t0))
        return RecorderState(inner_state, RecordedTape(empty, empty), jnp.array(0))

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        keep, next_t0, next_t1, made_jump, inner, result = (
            self.controller.adapt_step_size(
                t0,
                t1,
                y0,
                y1_candidate,
                args,
                y_error,
                error_order,
                controller_state.inner,
            )
        )
        index, tape = controller_state.num_accepted, controller_state.tape
        tape = RecordedTape(
            buffer_at_set(tape.starts, index, t0, pred=keep),
            buffer_at_set(tape.ends, index, t1, pred=keep),
        )
        state = RecorderState(inner, tape, index + jnp.where(keep, 1, 0))
        return keep, next_t0, next_t1, made_jump, state, result


def recording_while_loop(
    cond_fun: Callable,
    body_fun: Callable,
    init_val: Any,
    *,
    max_steps: int | None,
    buffers: Callable,
) -> Any:
    """Diffrax's outer loop, with the recorder's arrays written to in place."""

    def all_buffers(state):
        controller_state = state.controller_state
        if not isinstance(controller_state, RecorderState):
            return buffers(state)
        tape = controller_state.tape
        return [*buffers(state), tape.starts, tape.ends]

    return while_loop(
        cond_fun,
        body_fun,
        init_val,
        max_steps=max_steps,
        buffers=all_buffers,
        kind="lax",
    )
