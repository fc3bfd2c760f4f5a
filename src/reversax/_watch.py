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

A gap that is looked at every `k` steps, in which it was halved `b` times a step, and
widened from `g` to `g'`, would have been kept by

    (N)    b + log2(g'/g)/k

halvings a step; or by steps shorter in that proportion.
"""

import functools as ft
import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._arithmetic import State
from ._compat import unvmap_any
from ._control import Time
from ._coupling import Pair
from ._halvings import Index, divided
from ._pair import Scheme

Scale = PyTree[Float[Array, ""]]

SOUND, APART, LOST, OUTGROWN = range(4)
"""What may be the matter: nothing; the twins were driven apart; the vector field did
not return a number; the state left the range of its arithmetic."""

LOOKS = 64
"""How often to look, in a solve of a known number of steps,"""
_AT_FIRST = 16
"""beside so many steps at its beginning."""
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
    gap: Float[Array, ""]
    """The largest `g`."""
    growth: Float[Array, ""]
    """Of its binary logarithm, a step, (N) without `b`."""
    num_steps: Int[Array, ""]
    """After how many steps, and at which time, all was well."""
    time: Array
    state: Int[Array, ""]
    """What was the matter afterwards."""

    @property
    def is_sound(self) -> Bool[Array, ""]:
        return self.state == SOUND


def begin(y0: State, t0: Time, num_steps: Index) -> Watch:
    zero = jnp.zeros((), jnp.float32)
    size = lax.stop_gradient(largest(y0))
    time = lax.stop_gradient(jnp.asarray(t0))
    none = jnp.zeros((), jnp.int32)
    return Watch(size, zero, zero, zero, jnp.asarray(num_steps), time, none)


def look(watch: Watch, scheme: Scheme, pair: Pair, t: Time, num_steps: Index) -> Watch:
    """The pair after `num_steps` steps, at `t`, seen."""
    pair, t = lax.stop_gradient((pair, jnp.asarray(t)))
    twins = scheme.decode(pair)
    # Of what the coupling drives, also where the solution is one of the twins.
    mean = jtu.tree_map(lambda y, z: (y + z) / 2, twins.y, twins.z)
    gap = largest(scheme.gap(pair))
    size = jtu.tree_map(jnp.maximum, watch.size, largest(mean))
    ratio, widest = jnp.zeros((2,), jnp.float32)
    for g, s in zip(jtu.tree_leaves(gap), not_too_small(size), strict=True):
        of_leaf = jnp.where(g == 0, g, g / jnp.where(s == 0, 1, s))
        ratio = jnp.maximum(ratio, of_leaf.astype(jnp.float32))  # (W)
        widest = jnp.maximum(widest, g.astype(jnp.float32))
    steps = jnp.maximum(num_steps - watch.num_steps, 1).astype(jnp.float32)
    grown = jnp.log2(widest / watch.gap) / steps  # (N)
    # Of single steps some halve the gap and some do not: then the mean of several.
    share = jnp.where((steps < 4) & (watch.growth != 0), 0.25, 1.0)
    grown = watch.growth + share * (grown - watch.growth)
    growth = jnp.where(jnp.isfinite(grown), grown, watch.growth)
    finite = jnp.isfinite(ratio)
    apart = finite | (watch.ratio > _SUSPECT)
    state = jnp.where(apart, APART, why_lost(scheme, pair))
    # (W), phrased so that NaN fails. The end of a solve may have been seen already.
    sound = (ratio <= 1) | ((ratio <= 10) & (watch.ratio <= 1))
    sound = sound | (watch.num_steps == num_steps) & (num_steps > 0)
    good = Watch(size, ratio, widest, growth, jnp.asarray(num_steps), t, watch.state)
    places = lambda w: (w.growth, w.state)
    bad = eqx.tree_at(places, watch, (growth, state.astype(watch.state.dtype)))
    choose = lambda p: lambda a, b: jnp.where(p, a, b.astype(a.dtype))
    seen = jtu.tree_map(choose(sound), good, bad)
    return jtu.tree_map(choose(watch.is_sound), seen, watch)


def why_lost(scheme: Scheme, pair: Pair) -> Int[Array, ""]:
    """What was the matter with a pair that is not finite."""
    outgrown = scheme.arithmetic.outgrown((pair.y, pair.z))
    return jnp.where(outgrown, OUTGROWN, LOST)


def look_sometimes(watch: Watch, every: Any, *seen: Any) -> Watch:
    """[`look`][] at the first steps, and at every so many, a number or an array."""
    if isinstance(every, int) and every == 1:
        return look(watch, *seen)
    *_, num_steps = seen
    _, phase = divided(num_steps, every)
    due = (phase == 0) | (num_steps <= _AT_FIRST)
    # One conditional for all the lanes of a batch, for it to remain one.
    return lax.cond(unvmap_any(due), lambda: look(watch, *seen), lambda: watch)


def look_every(num_steps: Any) -> Any:
    """At every how many of so many steps to look."""
    n = jnp.maximum(jnp.asarray(num_steps), 1).astype(jnp.uint32)
    quotient, _ = divided(n + LOOKS - 1, LOOKS)
    return quotient
