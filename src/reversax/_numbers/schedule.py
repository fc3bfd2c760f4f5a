r"""How many times the gap between the twins is halved at each step.

A damped mode `y' = alpha*y` widens the gap by `exp(h*abs(alpha))` a step, so that a
solve over a time `T` needs

    (N)    abs(alpha)*T / ln(2)

halvings in all, however it is divided into steps, of which each sheds one bit of every
element. So, where nothing else is asked for, a number of bits is spread over a solve.

- Where it is known beforehand that there are `n` steps, step `k = 0, 1, ...` has

      (P)    floor((k + 1)*p/q) - floor(k*p/q),    p/q = 4 up to n = 64, 256/n up to
                                                   n = 1024, and from there on 1/4.

- Where a controller chooses the steps, those of a step from `t` to `t'` follow time,

      (T)    max(f, min(4, floor(320*s') - floor(320*s))),   s = (t - t0)/(t1 - t0)

  with `f` one at every fourth step, and else zero. Both passes take `t` and `t'` from
  the same record.

More than four halvings at a step are of no use: for steps that need them an explicit
solver is not stable.
"""

import abc
from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt32

Index = Int[Array, ""] | int
Count = UInt32[Array, ""] | int

MOST = 4
"""Halvings at one step, where their number is chosen."""
SELDOM = 4
"""At least one is made in so many steps."""
BITS = 256
"""In a solve of few constant steps."""
BITS_IN_TIME = 320
"""Beside those that the shortest steps of a controller have anyway. Of the DETEST
problems, `benchmarks/detest.py`, the one most damped needs 260, (N)."""


def divided(count: Index, by: Count) -> tuple[UInt32[Array, ""], UInt32[Array, ""]]:
    """The quotient and the remainder of a count, which is never negative.

    A signed one would take a compiler a dozen operations, to round down and not to
    zero; and it repeats them in all that is fused with what depends on them.
    """
    unsigned = jnp.asarray(count).astype(jnp.uint32)
    divisor = np.uint32(by) if isinstance(by, int) else by
    return lax.div(unsigned, divisor), lax.rem(unsigned, divisor)


class AbstractSchedule(eqx.Module):
    """How many halvings each step of a solve makes; steps are counted from 0."""

    @abc.abstractmethod
    def of_step(self, index: Index, t0: Any, t1: Any) -> Count:
        """Of the step from `t0` to `t1`; a Python number if all have as many."""

    @abc.abstractmethod
    def most(self, max_steps: int) -> int:
        """Not less than all the halvings of so many steps."""

    @property
    @abc.abstractmethod
    def fills_words(self) -> bool:
        """Whether the bits of no step are divided between two words of 32."""


class PerStep(AbstractSchedule):
    """`p/q` at each step, a whole number of times, as evenly as can be, (P)."""

    p: Count
    q: Count
    """Both Python numbers, or, if they were chosen, both arrays."""
    start: Index
    """How many steps were taken before."""

    def of_step(self, index: Index, t0: Any, t1: Any) -> Count:
        if isinstance(self.p, int) and self.q == 1:
            return self.p
        k = jnp.asarray(self.start + index).astype(jnp.uint32)
        times = jnp.asarray(self.p, jnp.uint32)
        until = lambda k: divided(k * times, self.q)[0]
        return until(k + np.uint32(1)) - until(k)  # (P)

    def most(self, max_steps: int) -> int:
        if isinstance(self.p, int) and isinstance(self.q, int):
            return max_steps * self.p // self.q + (self.q > 1)
        return max(BITS, max_steps // SELDOM)

    @property
    def fills_words(self) -> bool:
        return isinstance(self.p, int) and self.p > 0 and 32 % self.p == 0


class Seldom(AbstractSchedule):
    """A number of bits, which divides a word, at the last of every so many steps."""

    bits: int = eqx.field(static=True)
    every: int = eqx.field(static=True)

    def of_step(self, index: Index, t0: Any, t1: Any) -> Count:
        _, phase = divided(index, self.every)
        return jnp.where(phase == self.every - 1, self.bits, 0).astype(jnp.uint32)

    def most(self, max_steps: int) -> int:
        return max_steps // self.every * self.bits

    @property
    def fills_words(self) -> bool:
        return True


class OverTime(AbstractSchedule):
    """A number of bits over the time from `t0` to `t1`, (T)."""

    t0: Any
    t1: Any

    def of_step(self, index: Index, t0: Any, t1: Any) -> Count:
        _, phase = divided(index, SELDOM)
        least = (phase == SELDOM - 1).astype(jnp.uint32)
        share = jnp.minimum(self._until(t1) - self._until(t0), MOST)
        return jnp.maximum(share, least)

    def _until(self, t: Any) -> UInt32[Array, ""]:
        t, start = lax.stop_gradient((jnp.asarray(t), self.t0))
        length = self.t1 - start
        # An infinite one leaves the least.
        share = (t - start) / jnp.where(length == 0, 1, length)
        return (BITS_IN_TIME * jnp.clip(share, 0, 1)).astype(jnp.uint32)

    def most(self, max_steps: int) -> int:
        return min(MOST * max_steps, BITS_IN_TIME + max_steps // SELDOM + 1)

    @property
    def fills_words(self) -> bool:
        return False


def over_steps(num_steps: Index) -> PerStep:
    """(P), of a number of steps that is negative where there is no end to them."""
    n = jnp.asarray(num_steps)
    few = (n <= BITS // MOST) & (n >= 0)
    many = (n >= BITS * SELDOM) | (n < 0)
    p = jnp.where(few, MOST, jnp.where(many, 1, BITS)).astype(jnp.uint32)
    q = jnp.where(few, 1, jnp.where(many, SELDOM, n)).astype(jnp.uint32)
    return PerStep(p, q, 0)


def over_time(t0: Any, t1: Any) -> OverTime:
    return OverTime(*lax.stop_gradient((jnp.asarray(t0), jnp.asarray(t1))))
