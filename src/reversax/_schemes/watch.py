r"""Watching that the twins stay together.

What holds them together is the coupling; a damped mode drives them apart, and if it is
the faster, their gap grows from step to step until the solution is nothing but that.
With `g` the largest `|y - z|` of a leaf and `s` the largest `|y + z|/2` that it had so
far, a pair is sound as long as

    (W)    r = max over leaves of g/s  <=  1,   or  r <= 10  and the last one was <= 1,

which nothing satisfies that is not a number. (`s` is never taken smaller than (M) of
`certificate.py` says.) Healthy solves stay far below one: a step adds to the gap what
the base's own error is. One step that is much too coarse may pass it, of which the
coupling has removed most by the next look; what grows stays above. Under a controller
the gap is watched by that too, `tape.py`.

A step that makes `b` halvings, and widens the gap from `g0` to `g`, would have left it
as it was with

    (N)    b + log2(g/g0)

halvings; or if it had been shorter in that proportion.
"""

import functools as ft
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._numbers.arithmetic import State
from .._numbers.schedule import Index, divided
from .._xla.bits import bits_of
from .._xla.compat import unvmap_any
from .control import Time
from .moves import Codes
from .scheme import AbstractScheme, Lost

Scale = PyTree[Float[Array, ""]]

SOUND, APART, LOST, OUTGROWN = range(4)
"""What may be the matter: nothing; the twins were driven apart; the vector field did
not return a number; the state left the range of its arithmetic."""

_LOOKS = 64
"""How often to look, in a solve of a known number of steps,"""
_AT_FIRST = 16
"""beside so many steps at its beginning, and the last one."""
_SUSPECT = 0.1
"""Of a ratio: at the next look it may be no number any more."""


def largest(tree: PyTree[Array]) -> Scale:
    """The largest absolute value in each leaf; no number, if one of them is none."""

    def leaf(x):
        sizes = jnp.abs(x)
        # The maximum of floating-point numbers may pass over what is none: XLA leaves
        # that of 4,096 numbers and more on a CPU to a library which does.
        found = jnp.max(bits_of(sizes), initial=0)
        return lax.bitcast_convert_type(found, sizes.dtype)

    return jtu.tree_map(leaf, tree)


def default_tolerance(leaves: Sequence[Array]) -> float:
    return math.sqrt(max(float(jnp.finfo(x.dtype).eps) for x in leaves))


def not_too_small(scale: Scale) -> list[Float[Array, ""]]:
    """The sizes of the leaves, none so small as the round-off of others, (M)."""
    scales = jtu.tree_leaves(scale)
    if not scales:
        return []
    overall = 64 * default_tolerance(scales) * ft.reduce(jnp.maximum, scales, 0)
    return [jnp.maximum(s, overall) for s in scales]


class Watch(eqx.Module):
    """What was seen of a solve, in one array: what a loop carries it copies, array by
    array, at each step."""

    numbers: Float[Array, " 4+leaves"]

    @property
    def state(self) -> Int[Array, ""]:
        """What was the matter, if something was."""
        return self.numbers[0].astype(jnp.int32)

    @property
    def time(self) -> Float[Array, ""]:
        """Until when all was well."""
        return self.numbers[1]

    @property
    def ratio(self) -> Float[Array, ""]:
        """`r` of (W)."""
        return self.numbers[2]

    @property
    def needed(self) -> Float[Array, ""]:
        """How many bits a step would have kept the gap small, (N)."""
        return self.numbers[3]

    @property
    def sizes(self) -> Float[Array, " leaves"]:
        """`s` of (W)."""
        return self.numbers[4:]

    @property
    def is_sound(self) -> Bool[Array, ""]:
        return self.state == SOUND

    def with_state(self, state: Int[Array, ""]) -> "Watch":
        return Watch(self.numbers.at[0].set(state.astype(self.numbers.dtype)))


class Seen(NamedTuple):
    """A step to look at, which ends at `t1`."""

    scheme: AbstractScheme
    codes0: Codes
    codes1: Codes
    lost: Lost
    t1: Time


def begin(y0: State, t0: Time) -> Watch:
    sizes = jtu.tree_leaves(largest(y0))
    kinds = [np.dtype(jnp.float32), *(jnp.result_type(x) for x in (t0, *sizes))]
    dtype = max(kinds, key=lambda kind: kind.itemsize)
    return Watch(_together([SOUND, t0, 0, 0, *sizes], dtype))


def _together(numbers: Sequence[Any], dtype: Any) -> Float[Array, " numbers"]:
    return lax.stop_gradient(jnp.stack([jnp.asarray(x, dtype) for x in numbers]))


def look(watch: Watch, seen: Seen) -> Watch:
    """The watch after a step."""
    dtype = watch.numbers.dtype
    scheme, codes0, codes1 = lax.stop_gradient((seen.scheme, seen.codes0, seen.codes1))
    now = jtu.tree_leaves(largest(scheme.mean(codes1)))
    if not now:
        return watch
    sizes = jnp.maximum(watch.sizes, _together(now, dtype))
    index = seen.lost.index
    gap0, gap1 = scheme.gap(codes0, index), scheme.gap(codes1, index + 1)
    if gap0 is None or gap1 is None:
        # Nothing to compare with; but what is no number is seen.
        gap0, gap1 = jtu.tree_map(lambda x: 0 * x, (now, now))
    gaps, before = (_together(jtu.tree_leaves(largest(x)), dtype) for x in (gap1, gap0))
    # Each in the precision of its leaf, which says what round-off is.
    narrow = [s.astype(x.dtype) for s, x in zip(sizes, now, strict=True)]
    against = _together(not_too_small(narrow), dtype)
    ratio = jnp.max(gaps / jnp.where(against == 0, 1, against))  # (W)
    bits = jnp.asarray(seen.lost.number).astype(dtype)
    needed = bits + jnp.log2(jnp.max(gaps) / jnp.max(before))  # (N)
    needed = jnp.where(jnp.isfinite(needed), needed, watch.needed)
    apart = jnp.isfinite(ratio) | (watch.ratio > _SUSPECT)
    state = jnp.where(apart, APART, LOST)
    # (W), phrased so that NaN fails.
    sound = (ratio <= 1) | ((ratio <= 10) & (watch.ratio <= 1))
    good = _together([SOUND, seen.t1, ratio, needed, *sizes], dtype)
    bad = _together([state, watch.time, watch.ratio, needed, *watch.sizes], dtype)
    numbers = jnp.where(sound, good, bad)
    return Watch(jnp.where(watch.is_sound, numbers, watch.numbers))


def look_sometimes(watch: Watch, index: Index, every: Any, end: Time, seen: Seen):
    """[`look`][] at the first steps and at the one that ends at `end`, and at every so
    many, a number or an array; `index` steps were taken before."""
    if isinstance(every, int) and every == 1:
        return look(watch, seen)
    _, phase = divided(index, every)
    due = (phase == 0) | (index < _AT_FIRST) | (seen.t1 >= lax.stop_gradient(end))
    # One conditional for all the lanes of a batch, for it to remain one.
    return lax.cond(unvmap_any(due), lambda: look(watch, seen), lambda: watch)


def look_every(num_steps: Any) -> Any:
    """At every how many of so many steps to look."""
    quotient, _ = divided(num_steps + _LOOKS - 1, _LOOKS)
    return quotient
