"""The times of a solve, and the pull-back of their cotangents to its clock."""

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from .._numbers.schedule import Index
from .._schemes.moves import add_trees
from .._schemes.scheme import Span
from .clock import Clock, pull_through
from .times import AbstractTimes


class Timeline(eqx.Module):
    """The times of the steps, and what they follow from."""

    times: AbstractTimes
    diff: Clock
    """The differentiated part of the clock."""
    rest: Clock
    looks_back: bool = eqx.field(static=True)
    """Whether steps depend on where the one before began."""

    @property
    def clock(self) -> Clock:
        return eqx.combine(self.diff, self.rest)

    def first(self) -> Span:
        clock = self.clock
        return Span(clock.t0, clock.first_end, grid=clock.grid)

    def last_of(self, num_steps: Index) -> tuple[Index, Span]:
        """The last of so many steps."""
        t0 = self.clock.t0
        index, start, end = self.times.last_of(num_steps, t0)
        if not self.looks_back:
            return index, Span(start, end, grid=self.clock.grid)
        _, before, _ = self.times.last_of(jnp.maximum(num_steps - 1, 1), t0)
        return index, Span(start, end, jnp.where(num_steps > 0, before, t0))

    def pull(self, index: Index, ct: Span) -> Clock:
        """The cotangent of the clock from that of a step's times."""
        pull = self.times.pull_interval
        ct_clock = pull(index, (ct.start, ct.end), self.diff, self.rest)
        if ct.grid is not None:
            grid = lambda clock: clock.grid[:2]
            more = pull_through(grid, self.diff, self.rest, ct.grid[:2])
            ct_clock = add_trees(ct_clock, more)
        if ct.before is None:
            return ct_clock
        before = ct.before, jnp.zeros_like(ct.before)
        more = pull(jnp.maximum(index - 1, 0), before, self.diff, self.rest)
        return add_trees(ct_clock, more)

    def pull_t0(self, ct: Array) -> Clock:
        start = lambda clock: jnp.asarray(clock.t0)
        return pull_through(start, self.diff, self.rest, ct)

    def pull_time_after(self, num_steps: Index, ct: Array) -> Clock:
        """The cotangent of the clock from that of the time after so many steps."""
        last = jnp.maximum(num_steps - 1, 0)
        of_end = self.pull(last, Span(0 * ct, ct))
        choose = lambda a, b: jnp.where(num_steps > 0, a, b)
        return jtu.tree_map(choose, of_end, self.pull_t0(ct))
