"""The intervals of the steps, as the way back finds them: prescribed or recorded."""

import abc
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Real

from .._numbers.schedule import Index
from .._schemes.control import Time
from .._xla.compat import replayed_end
from .._xla.run_time import rounded_product
from .clock import Clock, pull_row, pull_through


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
        end = replayed_end(controller, clock.controller_state, index, rounded_product)
        end = jnp.where(end > self.just_below_t1, clock.t1, end)
        return jnp.where(index == 0, clock.first_end, end)

    def interval(self, index: Index) -> tuple[Time, Time]:
        # Two at once, in both passes. One number divided by the number of steps has
        # other bits where that is a constant of the program (XLA multiplies by the
        # reciprocal) than where it is not; of several it always takes the reciprocal.
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
