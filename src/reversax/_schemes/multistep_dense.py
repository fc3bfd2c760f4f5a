"""What lies between the ends of a step of a symmetric multistep method:
`multistep_weights.py` has the polynomials."""

import abc
from typing import Any, ClassVar, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._numbers.arithmetic import State
from .._numbers.schedule import AbstractSchedule, Count, Index, Seldom
from .control import Control, Time, times
from .moves import Codes, Context, Moves, Otherwise, Trail, add_some
from .multistep_moves import Extend
from .multistep_weights import AHEAD, Weights, dense_weights
from .multistep_window import BITS, Window, sum_of, zeros_of
from .native import AbstractNative
from .scheme import CotangentsOfDense, Dense, Span


class WindowInterpolation(dfx.AbstractLocalInterpolation):
    """The polynomial with the values and derivatives at the ends of a step and at a
    third point, as `multistep_weights.py` says."""

    t0: Time
    t1: Time
    y0: State
    steps: tuple[State, State]
    """To the third point, and to the end of the step."""
    slopes: tuple[State, State, State]
    """The derivatives times the length of the step: at the third point, at its start
    and at its end."""
    third: Array
    """Where that point is. (Not an integer: Diffrax fills rows of dense output that are
    not used with infinity.)"""

    def evaluate(self, t0, t1=None, left: bool = True) -> PyTree:
        del left
        if t1 is not None:
            start, end = self.evaluate(t0), self.evaluate(t1)
            return jtu.tree_map(lambda a, b: b - a, start, end)
        length = self.t1 - self.t0
        share = (t0 - self.t0) / jnp.where(length == 0, 1, length)
        powers = share ** jnp.arange(1, 6)
        kind = self.third.astype(jnp.int32)
        weights = powers @ jnp.asarray(dense_weights(), powers.dtype)[kind]
        each = zip(weights, (*self.steps, *self.slopes), strict=True)
        return sum_of(self.y0, *[times(w, x) for w, x in each])


_POINTS = 0, -3, -2, -1
"""Of a window after a step: the point ahead of it, if it is the first, that behind it,
its start and its end."""


class _Points(NamedTuple):
    values: tuple[State, ...]
    slopes: tuple[State, ...]


def _info(third: Array, points: _Points, length: Control) -> dict[str, Any]:
    """The dense output, but for the place of the third point."""
    choose = lambda a, b: jnp.where(third == AHEAD, a, b)
    other, slope = [jtu.tree_map(choose, *x[:2]) for x in points]
    y0, y1 = points.values[2:]
    to = lambda y: jtu.tree_map(lambda a, b: a - b, y, y0)
    slopes = tuple(times(length, x) for x in (slope, *points.slopes[2:]))
    return dict(y0=y0, steps=(to(other), to(y1)), slopes=slopes)


class AbstractWindowed(AbstractNative):
    """A scheme whose parts are a window, its derivatives, and perhaps a correction."""

    weights: eqx.AbstractVar[Weights]
    correct_every: eqx.AbstractVar[int | None]
    equal_steps: ClassVar[bool] = True

    # What a step loses.

    @property
    def sheds(self) -> bool:
        return self.correct_every is not None

    @property
    def what_is_kept(self) -> str:
        return (
            f"a correction of {BITS} bits for each element of the state is recorded at "
            f"every {self.correct_every} steps (`reversax.SymmetricMultistep("
            "correct_every=None)` makes none)"
        )

    def schedule(self, start: Index, chosen: AbstractSchedule) -> AbstractSchedule:
        if self.correct_every is None:
            return super().schedule(start, chosen)
        return Seldom(BITS, self.correct_every)

    def shed(self, codes0: Codes, codes1: Codes, bits: Count) -> PyTree[Array]:
        return Window.of(codes1, self.weights.steps).correction

    # What lies between the ends of a step.

    @abc.abstractmethod
    def third_point(self, span: Span) -> Array:
        """Where that of the dense output of a step is."""

    def info(
        self,
        context: Context,
        span: Span,
        control: Control,
        ends: tuple[Codes, Codes],
        *,
        dense: bool,
    ) -> dict[str, Any]:
        if not dense:
            return self.empty_dense_info(self.readout(ends[1]))
        third = self.third_point(span)
        return _info(third, self._points(ends[1]), control) | dict(third=third)

    def empty_dense_info(self, y0: State) -> dict[str, Any]:
        zeros = zeros_of(y0)
        third = jnp.zeros((), jnp.float32)
        return dict(y0=y0, steps=(zeros,) * 2, slopes=(zeros,) * 3, third=third)

    def _points(self, codes: Codes) -> "_Points":
        """Of the parts at the end of a step."""
        k = self.weights.steps
        values, slopes = self.decode(codes)[:k], Window.of(codes, k).slopes
        return _Points(*[tuple(x[i] for i in _POINTS) for x in (values, slopes)])

    def dense(self, context: Context, moves: Moves, trail: Trail) -> Dense:
        extend, codes1, k = moves[-1], trail.codes[-1], self.weights.steps
        assert isinstance(extend, Extend)
        known = extend.third, self._points(codes1), extend.over.control
        info = context.each(lambda _, *x: _info(*x), *known)

        def pull_info(_, ct, third, points, control):
            fn = lambda *x: _info(third, *x)
            return jax.vjp(fn, points, control)[1](ct)

        def pull(ct_info):
            ct = {name: ct_info[name] for name in info}
            ct_points, ct_control = context.each(pull_info, ct, *known)
            rows = [[None] * k, [None] * k]
            for row, cts in zip(rows, ct_points, strict=True):
                for i, x in zip(_POINTS, cts, strict=True):
                    row[i] = add_some(x, row[i])
            of_kept = () if self.correct_every is None else (None,)
            end = *rows[0], tuple(rows[1]), *of_kept
            nothing = [None] * len(moves)
            ct_over = zeros_of(context.fields.varied(extend.over)[0])
            ct_over = ct_over._replace(control=ct_control)
            pulled = context.fields.pulls_control
            legs = [*nothing[1:], (ct_over, None)] if pulled else None
            return CotangentsOfDense(Otherwise([*nothing, end], nothing), None, legs)

        return Dense(info | dict(third=extend.third), pull)
