r"""How the window of a symmetric multistep method is begun.

By a one-step method `Psi`, from `(0, ..., 0, y_0)`, `k - 1` times

    (S1)   f = (f_1, ..., f_{k-1}, f(t, w_{k-1}))
    (S2)   w_0 += w_{k-1} + Psi(w_{k-1}, f_{k-1}),  and (M2),

of which the first stage is (S1), and once more (S1): now the window leads `k - 1` steps
further than the solve has come. So it is turned once more, for `y_0` to be the newest,
and until it is full steps only turn it: (M2), and the `f`s alike. ((M2) is that of
`multistep_moves.py`.)

(S1) is evaluated by itself, as where a step that is undone finds it again: among the
other stages it might have other bits.
"""

import equinox as eqx

from .control import Leg
from .kept import bare
from .moves import AbstractMove, Codes, Context, Cotangents, add_trees
from .multistep_window import (
    Window,
    cotangents_of,
    sum_of,
    turned,
    turned_back,
    window_of_cotangents,
    zeros_of,
)


class Slope(AbstractMove):
    """(S1)."""

    over: Leg
    steps: int = eqx.field(static=True)

    @property
    def leg(self) -> Leg:
        return self.over

    def take(self, context: Context, codes: Codes):
        window = Window.of(codes, self.steps)
        y = context.arithmetic.decode(window.values[-1])
        slope = context.fields.core(self.over, y, extends=False).increment
        slopes = *window.slopes[1:], slope
        return Window(window.values, slopes, window.correction).codes, None

    def undo(self, context: Context, codes: Codes):
        window = Window.of(codes, self.steps)
        y = context.arithmetic.decode(window.values[-1])
        slopes = zeros_of(window.slopes[-1]), *window.slopes[:-1]
        before = Window(window.values, slopes, window.correction).codes
        return before, context.fields.evaluate(self.over, y)

    def pull(self, context: Context, met, ct: Cotangents, ct_met=None):
        window = window_of_cotangents(ct, self.steps)
        *slopes, ct_slope = window.slopes
        ct_p, ct_leg, ct_y = met.pull((ct_slope, zeros_of(met.value[1])))[0]
        values = *window.values[:-1], add_trees(window.values[-1], ct_y)
        new = Window(values, (zeros_of(ct_slope), *slopes), window.correction)
        parameters = add_trees(ct.parameters, ct_p)
        return cotangents_of(ct, new)._replace(parameters=parameters), ct_leg


class Launch(AbstractMove):
    """(S2)."""

    over: Leg
    steps: int = eqx.field(static=True)

    @property
    def leg(self) -> Leg:
        return self.over

    def take(self, context: Context, codes: Codes):
        window, arithmetic = Window.of(codes, self.steps), context.arithmetic
        last = window.values[-1]
        reads = arithmetic.decode(last), window.slopes[-1]
        core = context.fields.core(self.over, reads, extends=False)
        values = *window.values[1:], arithmetic.add(last, core.increment)  # (S2)
        return Window(values, window.slopes, window.correction).codes, None

    def undo(self, context: Context, codes: Codes):
        window, arithmetic = Window.of(codes, self.steps), context.arithmetic
        *values, newest = window.values
        reads = arithmetic.decode(values[-1]), window.slopes[-1]
        met = context.fields.evaluate(self.over, reads)
        found = arithmetic.add(values[-1], met.value[0])
        # Zero, as it was, if that is what was found.
        rest = arithmetic.encode(arithmetic.difference(newest, found))
        before = Window((rest, *values), window.slopes, window.correction)
        return before.codes, met

    def pull(self, context: Context, met, ct: Cotangents, ct_met=None):
        window = window_of_cotangents(ct, self.steps)
        *values, ct_newest = window.values
        ct_value = ct_newest, zeros_of(met.value[1])
        ct_p, ct_leg, (ct_y, ct_slope) = met.pull(ct_value)[0]
        values[-1] = sum_of(values[-1], ct_newest, ct_y)
        slopes = *window.slopes[:-1], add_trees(window.slopes[-1], ct_slope)
        new = Window((ct_newest, *values), slopes, window.correction)
        parameters = add_trees(ct.parameters, ct_p)
        return cotangents_of(ct, new)._replace(parameters=parameters), ct_leg


class Turn(AbstractMove):
    """(M2), of values and derivatives."""

    steps: int = eqx.field(static=True)

    def take(self, context: Context, codes: Codes):
        window = Window.of(codes, self.steps)
        return window.turned(turned).codes, None

    def undo(self, context: Context, codes: Codes):
        # (What comes before is evaluated again: a window that never was full has none
        # of it.)
        return Window.of(bare(codes), self.steps).turned(turned_back).codes, None

    def pull(self, context: Context, met, ct: Cotangents, ct_met=None):
        window = window_of_cotangents(ct, self.steps)
        return cotangents_of(ct, window.turned(turned_back)), None
