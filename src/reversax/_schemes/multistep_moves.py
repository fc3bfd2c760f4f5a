r"""What a step of a symmetric multistep method consists of.

A state is a window of the last `k` values, `w_0` to `w_{k-1}`, in an arithmetic; their
derivatives `f_0` to `f_{k-1}`; and the last correction `D`. (Both are kept: what lies
behind them is evaluated, or read, again.) With the numbers of `multistep_weights.py`,
at every so many steps the alternating part of the window is taken from it,

    (C1)   D = d(w, f), rounded to single precision
    (C2)   w_j -= (-1)^j D

and each step adds to the oldest value, which becomes the newest,

    (M1)   w_0 += sum_{j<k/2} alpha_j (w_{k-j} - w_j)
                    + h (sum_{j<k/2} beta_j (f_j + f_{k-j}) + beta_{k/2} f_{k/2})
    (M2)   (w_0, ..., w_{k-1}) = (w_1, ..., w_{k-1}, w_0)
    (M3)   (f_0, ..., f_{k-1}) = (f_1, ..., f_{k-1}, f(t, w_{k-1})).

What (M1) adds depends neither on `w_0` nor on `f_0`, so it is taken back to the bit;
and (C2) since `D`, which is kept, is added again. What (M3) dropped was evaluated when
its value was new. A correction since then, of which there is one at most, as they are
`k` steps apart or more, is in the state, so the value as it was is known: one
evaluation. Its residuals are kept for the `k` steps until it is pulled back, in place
of those of the newest, which then are. (Where states are kept to restart from, the
newest is evaluated again to be pulled back.)
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree

from .._numbers.arithmetic import AbstractArithmetic, Code, State
from .._xla.compat import unvmap_any
from .control import Control, Leg, times
from .kept import bare, residuals_of, with_residuals
from .moves import AbstractMove, Codes, Context, Cotangents, add_trees, chosen
from .multistep_weights import Weights
from .multistep_window import (
    BITS,
    Ring,
    Slopes,
    Window,
    amplitude,
    as_kept,
    cotangents_of,
    differences,
    restored,
    rounded,
    steps_of,
    sum_of,
    turned_back,
    window_of_cotangents,
    zeros_of,
)
from .scheme import Lost


def _where(pred: Bool[Array, "..."], fn: Callable, otherwise: Callable, *args) -> Any:
    """`fn(*args)`, or, if `pred` holds in no lane of a batch, `otherwise(*args)`: `fn`
    sees to the lanes in which it does not hold."""
    return lax.cond(unvmap_any(jnp.any(pred)), fn, otherwise, *args)


def as_born(
    context: Context, value: Code, correction: PyTree[Array] | None, born: Any
) -> State:
    """A value as it was before the last correction, which is in it by `born`, (C2)."""
    arithmetic = context.arithmetic
    if correction is not None:
        by = restored(correction, arithmetic.decode(value))
        by = context.each(lambda _, sign, x: times(sign, x), born, by)
        value = arithmetic.add(value, by)
    return arithmetic.decode(value)


class Correct(AbstractMove):
    """(C1), (C2), at steps that lose bits."""

    over: Leg
    lost: Lost
    weights: Weights = eqx.field(static=True)

    @property
    def leg(self) -> Leg:
        return self.over

    @property
    def _due(self) -> Bool[Array, "..."]:
        return jnp.asarray(self.lost.number) > 0

    def take(self, context: Context, codes: Codes):
        arithmetic = context.arithmetic

        def corrected(codes):
            window = Window.of(codes, self.weights.steps)
            steps = steps_of(arithmetic, window.values)
            d = amplitude(self.weights, steps, window.slopes, self.over.control)
            correction = rounded(d)  # (C1)
            by = as_kept(d)
            values = self._moved(arithmetic, window.values, times(-1, by))
            new = Window(values, window.slopes, correction).codes
            return chosen(self._due, new, codes)

        return _where(self._due, corrected, lambda codes: codes, codes), None

    def _moved(self, arithmetic: AbstractArithmetic, values: Codes, by: State) -> Codes:
        """With `(-1)^j by` added to each, (C2)."""
        by = by, times(-1, by)
        return tuple(arithmetic.add(x, by[j % 2]) for j, x in enumerate(values))

    def undo(self, context: Context, codes: Codes):
        arithmetic = context.arithmetic

        def uncorrected(codes):
            window = Window.of(codes, self.weights.steps)
            like = arithmetic.decode(window.values[0])
            by = restored(window.correction, like)
            values = self._moved(arithmetic, window.values, by)
            new = Window(values, window.slopes, self._before(context)).codes
            return chosen(self._due, new, codes)

        # Residuals, which do not change, would be copied.
        residuals, codes = residuals_of(codes), bare(codes)
        codes = _where(self._due, uncorrected, lambda codes: codes, codes)
        slopes = Window.of(codes, self.weights.steps).slopes
        return with_residuals(codes, residuals), slopes

    def _before(self, context: Context) -> PyTree[Array]:
        """The correction before this one, if there was one."""
        before = jnp.asarray(self.lost.before)
        some, bits = before >= BITS, jnp.full_like(before, BITS)
        lost = Lost(bits, jnp.where(some, before, bits) - bits)
        found = context.each(lambda lane, x: lane.shed(x), lost)
        return chosen(some, found, zeros_of(found))

    def pull(self, context: Context, met: Slopes, ct: Cotangents, ct_met=None):
        def pulled(ct):
            window = window_of_cotangents(ct, self.weights.steps)
            signed = [times((-1) ** j, x) for j, x in enumerate(window.values)]
            ct_d = times(-1, sum_of(*signed))
            ct_d = chosen(self._due, ct_d, zeros_of(ct_d))
            fn = lambda *x: amplitude(self.weights, *x)
            pull_amplitude = lambda _, ct, *x: jax.vjp(fn, *x)[1](ct)
            steps = tuple(window.values[1:])  # Of their shapes; it is linear in them.
            known = ct_d, steps, met, self.over.control
            ct_steps, ct_slopes, ct_control = context.each(pull_amplitude, *known)
            nothing = zeros_of(window.values[0])
            later, earlier = (nothing, *ct_steps), (*ct_steps, nothing)
            values = tuple(
                jtu.tree_map(lambda x, a, b: x + a - b, *each)
                for each in zip(window.values, later, earlier, strict=True)
            )
            slopes = add_trees(window.slopes, ct_slopes)
            new = Window(values, slopes, window.correction)
            return cotangents_of(ct, new), self._of_leg(context, ct_control)

        def same(ct):
            return ct, self._of_leg(context, zeros_of(self.over.control))

        return _where(self._due, pulled, same, ct)

    def _of_leg(self, context: Context, ct_control: Control) -> Leg:
        ct_leg = zeros_of(context.fields.varied(self.over)[0])
        return ct_leg._replace(control=ct_control)


class Extend(AbstractMove):
    """(M1), (M2), (M3), of a window that is full."""

    over: Leg
    at_newest: Leg
    at_oldest: Leg
    full: Bool[Array, "..."]
    """Whether it is: else it is only turned."""
    born: Any
    """The sign by which the last correction is in the oldest value, 1 or -1; or 0."""
    third: Array
    """Where the third point of the dense output is."""
    weights: Weights = eqx.field(static=True)

    @property
    def leg(self) -> tuple[Leg, Leg]:
        return self.over, self.at_newest

    def take(self, context: Context, codes: Codes):
        window, arithmetic = Window.of(codes, self.weights.steps), context.arithmetic

        def extended(window):
            reads = differences(arithmetic, window.values), window.slopes[1:]
            core = context.fields.core(self.over, reads, extends=False)
            value = arithmetic.add(window.values[0], core.increment)  # (M1)
            at = self.at_newest, arithmetic.decode(value)
            slope = context.fields.core(*at, extends=False).increment  # (M3)
            return chosen(self.full, (value, slope), known(window))

        known = lambda window: (window.values[0], window.slopes[0])
        value, slope = _where(self.full, extended, known, window)
        values = *window.values[1:], value  # (M2)
        slopes = *window.slopes[1:], slope
        return Window(values, slopes, window.correction).codes, None

    def undo(self, context: Context, codes: Codes):
        codes, ring = _taken(codes, self.weights.steps)
        codes, met = self._undo(context, codes)
        return _given(codes, self.weights.steps, ring), met

    def _undo(self, context: Context, codes: Codes):
        """With the residuals of the newest derivative; then those of the oldest."""
        after, arithmetic = Window.of(codes, self.weights.steps), context.arithmetic
        values, slopes = turned_back(after.values), turned_back(after.slopes)
        newest = arithmetic.decode(after.values[-1])
        reads = differences(arithmetic, values), slopes[1:]
        evaluated = context.fields.evaluate(self.over, reads)
        value = arithmetic.subtract(values[0], evaluated.value[0])  # (M1)
        was = as_born(context, value, after.correction, self.born)
        if after.residuals is None:
            found = context.fields.evaluate(self.at_oldest, was)
            at_newest = context.fields.evaluate(self.at_newest, newest)
        else:
            # In lanes that are turned only, what is evaluated is pulled back as well,
            # times zero: it must not be what no solve would meet.
            was = chosen(self.full, was, newest)
            found = context.fields.evaluate(self.at_oldest, was, keeps=True)
            known = self.at_newest, newest, after.residuals
            at_newest = context.fields.pull_back_again(*known)
        new = chosen(self.full, (value, found.value[0]), (values[0], slopes[0]))  # (M3)
        residuals = None if after.residuals is None else found.residuals
        values, slopes = (new[0], *values[1:]), (new[1], *slopes[1:])
        before = Window(values, slopes, after.correction, residuals)
        return before.codes, (evaluated, at_newest)

    def pull(self, context: Context, met, ct: Cotangents, ct_met=None):
        evaluated, at_newest = met
        after = window_of_cotangents(ct, self.weights.steps)
        if_full = lambda tree: chosen(self.full, tree, zeros_of(tree))
        ct_slope = if_full(after.slopes[-1])
        value = ct_slope, zeros_of(at_newest.value[1])
        ct_p, ct_newest_leg, ct_y = at_newest.pull(value)[0]  # (M3)
        ct_value = add_trees(after.values[-1], ct_y)
        value = if_full(ct_value), zeros_of(evaluated.value[1])
        more, ct_over, (ct_apart, ct_slopes) = evaluated.pull(value)[0]  # (M1)
        values = list(turned_back((*after.values[:-1], ct_value)))
        k = len(values)
        for j, x in enumerate(ct_apart, 1):
            values[k - j] = add_trees(values[k - j], x)
            values[j] = jtu.tree_map(lambda a, b: a - b, values[j], x)
        slopes = after.slopes[:-1]
        ct_oldest = jtu.tree_map(lambda a, b: a - b, after.slopes[-1], ct_slope)
        slopes = ct_oldest, *add_trees(slopes, ct_slopes)
        before = cotangents_of(ct, Window(tuple(values), slopes, after.correction))
        parameters = add_trees(add_trees(ct.parameters, ct_p), more)
        return before._replace(parameters=parameters), (ct_over, ct_newest_leg)

    def undo_and_pull(self, context: Context, codes: Codes, ct: Cotangents):
        steps = self.weights.steps

        def undone(codes, ct):
            codes, met = self._undo(context, codes)
            return codes, *self.pull(context, met, ct)

        def turned(codes, ct):
            codes = Window.of(codes, steps).turned(turned_back).codes
            ct_window = window_of_cotangents(ct, steps).turned(turned_back)
            nothing = [context.fields.varied(leg)[0] for leg in self.leg]
            return codes, cotangents_of(ct, ct_window), tuple(zeros_of(nothing))

        # (The ring itself would be copied.)
        codes, ring = _taken(codes, steps)
        codes, *pulled = _where(self.full, undone, turned, codes, ct)
        return _given(codes, steps, ring), *pulled


def _taken(codes: Codes, steps: int) -> tuple[Codes, Ring | None]:
    """With the residuals of the newest derivative alone; and all of them."""
    window = Window.of(codes, steps)
    ring = window.residuals
    if ring is None:
        return codes, None
    return dataclasses.replace(window, residuals=ring.taken()).codes, ring


def _given(codes: Codes, steps: int, ring: Ring | None) -> Codes:
    """Undoes that, with the residuals of the oldest."""
    if ring is None:
        return codes
    window = Window.of(codes, steps)
    return dataclasses.replace(window, residuals=ring.given(window.residuals)).codes
