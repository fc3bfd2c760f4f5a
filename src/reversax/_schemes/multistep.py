"""Symmetric multistep methods: `multistep_moves.py` has the steps, and
`multistep_weights.py` the numbers.

Constant steps alone: all are of one length, which is that of the first where Diffrax
drives the solver, and else an equal share of the time of the solve. Fields are
evaluated at `t0 + j h`, the same number at every evaluation of the same value.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, cast

import diffrax as dfx
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array

from .._numbers.arithmetic import AbstractArithmetic, State
from .._numbers.schedule import Index
from .._xla.closure import closed
from .._xla.guard import with_derivative_of
from .._xla.programs import bytes_of
from .._xla.run_time import rounded_product
from .control import Control, Leg, Time, in_direction, is_of_time, times
from .increment import (
    AbstractIncrement,
    Advance,
    Core,
    check_like_state,
    make_increment,
)
from .moves import Codes, Context, Moves, Repeated, stacked
from .multistep_dense import AbstractWindowed, WindowInterpolation
from .multistep_moves import Correct, Extend, as_born
from .multistep_start import Launch, Slope, Turn
from .multistep_weights import AHEAD, ALONE, BEHIND, Weights
from .multistep_window import (
    WORTH_KEEPING,
    Ring,
    Window,
    increment,
    rounded,
    sum_of,
    zeros_of,
)
from .rows import row
from .scheme import Grid, Lost, Span, Values

START, FIELD, SUM = range(3)
"""Which of the fields: the one-step method from its first stage on, the vector field,
and (M1)."""


class MultistepFields(AbstractIncrement):
    """What a multistep method evaluates."""

    contr: Callable
    vf: Callable
    starter: AbstractIncrement
    weights: Weights = eqx.field(static=True)
    may_move: ClassVar[bool] = False

    def core(self, leg: Leg, y: Any, *, extends: bool, lanes: int = 1) -> Core:
        if leg.which == SUM:
            return Core(increment(self.weights, y, leg.control), (), None)
        if leg.which == FIELD:
            slope = self.vf(leg.start, y)
            check_like_state(slope, y)
            return Core(slope, (), None)
        y, slope = y
        first = times(leg.control, slope)
        core = self.starter.core_from(leg, y, first, lanes=lanes)
        return Core(core.increment, (), None)

    def extend(self, leg, y, core, *, error: bool, dense: bool) -> Advance:
        return Advance(core.increment, None, None)

    def close(self, t: Time, y: State) -> "MultistepFields":
        return MultistepFields(
            contr=closed(self.contr, t, t),
            vf=closed(self.vf, t, y),
            starter=self.starter.close(t, y),
            weights=self.weights,
        )


class Multistep(AbstractWindowed):
    """The parts are the window, its derivatives and the last correction."""

    arithmetic: AbstractArithmetic
    weights: Weights = eqx.field(static=True)
    starter: dfx.AbstractSolver = eqx.field(static=True)
    correct_every: int | None = eqx.field(static=True)
    interpolation_cls: Callable = eqx.field(static=True, default=WindowInterpolation)

    def fields(self, terms, args) -> MultistepFields:
        if not (isinstance(terms, dfx.AbstractTerm) and is_of_time(terms)):
            raise TypeError(
                "Pass a single `diffrax.ODETerm` (`diffrax.ControlTerm(...).to_ode()` "
                "of a controlled equation), or use a one-step base such as "
                "`reversax.Reversible(diffrax.Heun())`: a multistep method needs a "
                "derivative with respect to time. (`reversax.SymmetricMultistep(...)`)"
            )
        vf = lambda t, y: terms.vf(t, y, args)
        starter = make_increment(self.starter, terms, args)
        return MultistepFields(terms.contr, vf, starter, self.weights)

    # The parts of a state.

    def start(self, y0: State) -> Codes:
        encode = self.arithmetic.encode
        nothing = encode(zeros_of(y0))
        return *[nothing] * (self.weights.steps - 1), encode(y0)

    def read(self, values: Values) -> State:
        return values[self.weights.steps - 1]

    def rebase(self, codes: Codes, y0: State) -> Codes:
        k = self.weights.steps
        shift = jtu.tree_map(lambda a, b: a - b, y0, self.readout(codes))
        return *[self.arithmetic.add(code, shift) for code in codes[:k]], *codes[k:]

    def resume(self, codes: Codes, y0: State) -> Codes:
        # Steps may be of another length.
        return self.start(y0)

    def returned(self, codes: Codes) -> Codes:
        return codes

    # Steps.

    def control_span(self, span: Span) -> tuple[Time, Time]:
        grid = _grid_of(span)
        return 0 * grid.length, grid.length

    @property
    def prepares(self) -> bool:
        return True

    def with_kept(self, codes: Codes) -> Codes:
        zeros = zeros_of(self.arithmetic.decode(codes[-1]))
        kept = None if self.correct_every is None else rounded(zeros)
        slopes = (zeros,) * self.weights.steps
        return Window(codes, slopes, kept).codes

    def first_moves(self, span: Span, control: Control) -> Moves:
        grid, k, one = _grid_of(span), self.weights.steps, np.float32(1)
        ends = [_time(grid, j) for j in range(k)]
        # None is made beyond the end of a solve of fewer steps.
        made = [_is_made(grid, j) for j in range(k - 1)]
        controls = [in_direction(control, x) for x in made]
        *slopes, last = [Slope(Leg(t, t, one, None, FIELD), k) for t in ends]
        launches = [
            Launch(Leg(t0, t1, one, c, START), k)
            for t0, t1, c in zip(ends[:-1], ends[1:], controls, strict=True)
        ]
        first = Repeated((stacked(slopes), stacked(launches)))
        return first, last, Turn(k)

    def moves(self, span: Span, control: Control, lost: Lost) -> Moves:
        grid, k, one = _grid_of(span), self.weights.steps, np.float32(1)
        index = jnp.broadcast_to(lost.index, jnp.shape(span.start))
        over = Leg(span.start, span.end, one, control, SUM)
        at = lambda j: Leg(_time(grid, j), _time(grid, j), one, None, FIELD)
        oldest = jnp.maximum(index - (k - 1), 0)
        extend = Extend(
            over=over,
            at_newest=at(index + 1),
            at_oldest=at(oldest),
            full=index >= k - 1,
            born=_born(self, index, oldest),
            third=self.third_point(span),
            weights=self.weights,
        )
        if self.correct_every is None:
            return (extend,)
        return Correct(over, lost, self.weights), extend

    def residuals(
        self, context: Context, span: Span, index: Index, codes: Codes
    ) -> list | None:
        grid, k = _grid_of(span), self.weights.steps
        index = jnp.broadcast_to(index, jnp.shape(span.start))
        window = Window.of(codes, k)
        # (Of fewer steps than that, some times are others: they are not pulled back.)
        which = [jnp.maximum(index + 2 - k + j, 0) for j in range(k)]
        values = [
            as_born(context, value, window.correction, _born(self, index, i))
            for value, i in zip(window.values, which, strict=True)
        ]

        def evaluated(_, at):
            t, y = at
            leg = Leg(t, t, np.float32(1), None, FIELD)
            return None, context.fields.evaluate(leg, y, keeps=True).residuals

        stack = lambda *xs: jnp.stack(xs)
        at = jnp.stack([_time(grid, i) for i in which]), jtu.tree_map(stack, *values)
        if bytes_of(jax.eval_shape(evaluated, None, row(at, 0))[1]) < WORTH_KEEPING:
            return None
        _, rows = lax.scan(evaluated, None, at)
        ring = Ring(rows, jnp.int32(k - 1))
        return [ring] if window.correction is None else [ring, None]

    def third_point(self, span: Span) -> Array:
        grid = _grid_of(span)
        alone = jnp.where(_is_made(grid, 1), AHEAD, ALONE)
        third = jnp.where(span.start <= grid.begin, alone, BEHIND)
        return third.astype(jnp.float32)

    # Whether a result can be trusted.

    def gap(self, codes: Codes, num_steps: Index) -> State:
        """Sixteen times what alternates, by the values alone: at most the size of the
        state, so that alone would say nothing."""
        k = self.weights.steps
        share = lambda j: (-1) ** j * math.comb(k - 1, j) * 16 / 2 ** (k - 1)
        values = [times(share(j), x) for j, x in enumerate(self.decode(codes)[:k])]
        extended = jnp.asarray(num_steps) >= k
        return jtu.tree_map(lambda x: jnp.where(extended, x, 0), sum_of(*values))

    def driven_apart(self, needed: float, adaptive: bool) -> str:
        least = self.weights.steps
        seldom = self.correct_every is None or self.correct_every > least
        other = f", or `reversax.SymmetricMultistep(correct_every={least})`"
        return (
            f"Take smaller steps{other if seldom else ''}, or a one-step base for a "
            "damped problem, such as `reversax.Reversible(diffrax.Tsit5())`: values of "
            "successive steps alternate by more than a sixteenth of the state, so that "
            "the solution is not to be used."
        )


def _born(scheme: Multistep, index: Index, of: Index) -> Any:
    """The sign by which the last correction, until the step `index`, is in this value
    of the window after it, 1 or -1; or 0."""
    if scheme.correct_every is None:
        return 0
    k, every = scheme.weights.steps, scheme.correct_every
    last = (index + 1) // every * every - 1
    sign = 1 - 2 * ((of + k - 1 - last) % 2)
    return jnp.where((last >= 0) & (last >= of), sign, 0)


def _grid_of(span: Span) -> Grid:
    return cast(Grid, span.grid)


def _is_made(grid: Grid, index: int) -> Array:
    """Whether there is such a step before the end: 1 or 0."""
    begin, length, end = lax.stop_gradient(grid)
    return (begin + (index + 0.5) * length < end).astype(jnp.int32)


def _time(grid: Grid, index: Any) -> Time:
    """After so many steps."""
    dtype = jnp.result_type(grid.length)
    elapsed = rounded_product(jnp.asarray(index).astype(dtype), grid.length)
    t = jnp.asarray(grid.begin + elapsed)
    # Not beyond the end by round-off.
    end = lax.stop_gradient(jnp.asarray(grid.end, t.dtype))
    return with_derivative_of(t, jnp.minimum(t, jnp.broadcast_to(end, t.shape)))
