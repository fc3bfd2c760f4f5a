r"""Watching that the twins stay together.

What holds them together is the coupling; a damped mode drives them apart, and if it is
the faster, their gap grows from step to step until the solution is nothing but that.
With `g` the largest `|y - z|` of a leaf and `s` the largest `|y + z|/2` that it had so
far, a pair is sound as long as

    (W)    r = max over leaves of g/s  <=  1,   or  r <= 10  and the last one was <= 1,

which nothing satisfies that is not a number. (`s` is never taken smaller than (M) of
`_certificate.py` says.) Healthy solves stay far below one: a step adds to the gap what
the base's own error is. One step that is much too coarse may pass it, of which the
coupling has removed most by the next look; what grows stays above. Under a controller
the gap is watched by that too, `_tape.py`.

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
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._arithmetic import State
from ._compat import unvmap_any
from ._control import Time
from ._coupling import Pair
from ._halvings import Count, Index, divided
from ._pair import Scheme

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
    """The largest absolute value in each leaf."""
    return jtu.tree_map(lambda x: jnp.max(jnp.abs(x), initial=0), tree)


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
    """What was seen of a solve."""

    size: Scale
    """`s` of (W), per leaf."""
    ratio: Float[Array, ""]
    """`r` of (W)."""
    needed: Float[Array, ""]
    """How many halvings a step would have kept the twins together, (N)."""
    time: Array
    """When all was well."""
    state: Int[Array, ""]
    """What was the matter afterwards."""

    @property
    def is_sound(self) -> Bool[Array, ""]:
        return self.state == SOUND


class Seen(NamedTuple):
    """A step to look at, which makes so many halvings and ends at `t1`."""

    scheme: Scheme
    pair0: Pair
    pair1: Pair
    halvings: Count
    t1: Time


def begin(y0: State, t0: Time) -> Watch:
    zero, state = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    size, t0 = lax.stop_gradient((largest(y0), jnp.asarray(t0)))
    return Watch(size, zero, zero, t0, state)


def look(watch: Watch, seen: Seen) -> Watch:
    """The watch after a step."""
    seen = lax.stop_gradient(seen)
    twins = seen.scheme.decode(seen.pair1)
    # Of what the coupling drives, also where the solution is one of the twins.
    mean = jtu.tree_map(lambda y, z: (y + z) / 2, twins.y, twins.z)
    gap = largest(seen.scheme.gap(seen.pair1))
    size = jtu.tree_map(jnp.maximum, watch.size, largest(mean))
    ratios = [
        jnp.where(g == 0, g, g / jnp.where(s == 0, 1, s))
        for g, s in zip(jtu.tree_leaves(gap), not_too_small(size), strict=True)
    ]
    ratio = _widest(ratios)  # (W)
    before = _widest(jtu.tree_leaves(largest(seen.scheme.gap(seen.pair0))))
    needed = seen.halvings + jnp.log2(_widest(jtu.tree_leaves(gap)) / before)  # (N)
    needed = jnp.where(jnp.isfinite(needed), needed, watch.needed)
    apart = jnp.isfinite(ratio) | (watch.ratio > _SUSPECT)
    state = jnp.where(apart, APART, LOST).astype(watch.state.dtype)
    # (W), phrased so that NaN fails.
    sound = (ratio <= 1) | ((ratio <= 10) & (watch.ratio <= 1))
    time = jnp.asarray(seen.t1)
    good = Watch(size, ratio, needed, time, watch.state)
    bad = Watch(watch.size, watch.ratio, needed, watch.time, state)
    choose = lambda p: lambda a, b: jnp.where(p, a, b)
    return jtu.tree_map(
        choose(watch.is_sound), jtu.tree_map(choose(sound), good, bad), watch
    )


def _widest(gaps: Sequence[Array]) -> Float[Array, ""]:
    zero = jnp.zeros((), jnp.float32)
    return ft.reduce(jnp.maximum, [x.astype(jnp.float32) for x in gaps], zero)


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
