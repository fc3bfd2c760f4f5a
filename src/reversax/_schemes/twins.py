r"""One reversible step and its inverse.

With the coupling's `mix`, the increment `Psi` and the arithmetic's `add`, `subtract`:

    (C)    (y, z) = mix(y0, z0)
    (F1)   y1 = y + Psi_{h}(t0, z)
    (F2)   z1 = z - Psi_{-h}(t1, y1)

and, undone in the opposite order,

    (B2)   z  = z1 + Psi_{-h}(t1, y1)
    (B1)   y  = y1 - Psi_{h}(t0, z)
    (BC)   (y0, z0) = unmix(y, z)

The two halves of a step have one form, `b += s Psi(from, to, a)` and then `a`, `b`
change places, begun with `(a, b) = (z, y)`: with `s = 1` from `t0` to `t1` it is (F1),
with `s = -1` from `t1` to `t0` (F2). They are written, traced and, in a loop of two
trips, compiled once.

(McCallum & Foster, arXiv 2410.11648, equations (4) and (5), with their coupling.) All
of these act on codes of states (`arithmetic.py`), the increments on states.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree, UInt32

from .._numbers.arithmetic import (
    AbstractArithmetic,
    FloatingPoint,
    State,
)
from .._numbers.schedule import MOST, SELDOM, AbstractSchedule, Count, Index
from .control import Control, Leg, in_direction
from .coupling import AbstractCoupling, Pair, Symmetric
from .error_estimate import error_estimate
from .fields import Fields
from .increment import AbstractIncrement, Core
from .interpolation import StepEnds, dense_info
from .moves import (
    AbstractMove,
    Add,
    Codes,
    Context,
    Cotangents,
    Moves,
    Otherwise,
    Repeated,
    Swap,
    Trail,
    add_some,
)
from .rows import row
from .scheme import (
    AbstractAlike,
    CotangentsOfDense,
    Dense,
    Lost,
    Span,
    Step,
    Values,
)


def legs_of(span: Span, control: Control) -> Leg:
    """Those of (F1) and (F2), stacked."""
    t0, t1 = span.start, span.end
    # Of the times' dtype, so that `through` has them in one array.
    sign = np.array([1.0, -1.0], jnp.result_type(t0))
    both = jtu.tree_map(lambda *x: jnp.stack(x), control, in_direction(control, -1))
    return Leg(jnp.stack([t0, t1]), jnp.stack([t1, t0]), sign, both)


class Mix(AbstractMove):
    """(C)."""

    coupling: AbstractCoupling
    lost: Lost

    def take(self, context: Context, codes: Codes):
        mix = self.coupling.mix
        return tuple(mix(context.arithmetic, Pair(*codes), self.lost.number)), None

    def undo(self, context: Context, codes: Codes):
        def unmix(lane, codes, lost):
            bits = lambda: lane.shed(lost)
            known = context.arithmetic, Pair(*codes), lost.number
            return tuple(self.coupling.unmix(*known, bits))  # (BC)

        return context.each(unmix, codes, self.lost), None

    def pull(self, context: Context, met, ct: Cotangents, ct_met=None):
        def pull(_, ct, lost):  # (TC)
            mix = lambda pair: self.coupling.mix(FloatingPoint(), pair, lost.number)
            return tuple(jax.vjp(mix, Pair(*ct))[1](Pair(*ct))[0])

        return ct._replace(parts=context.each(pull, ct.parts, self.lost)), None


class Twins(AbstractAlike):
    """Two states, each advanced by increments that start from the other."""

    coupling: AbstractCoupling
    arithmetic: AbstractArithmetic
    interpolation_cls: Callable[..., dfx.AbstractLocalInterpolation] = eqx.field(
        static=True
    )
    estimates_error: ClassVar[bool] = True

    # The parts of a state.

    def read(self, values: Values) -> State:
        return self.coupling.readout(Pair(*values))

    def difference(self, a: Codes, b: Codes) -> Pair:
        return Pair(*super().difference(a, b))

    # A step.

    def moves(self, span: Span, control: Control, lost: Lost) -> Moves:
        half = Add(legs_of(span, control), into=0, reads=1), Swap()
        return Mix(self.coupling, lost), Repeated(half)

    def step(
        self,
        fields: Fields | AbstractIncrement,
        span: Span,
        codes: Codes,
        lost: Lost,
        *,
        error: bool,
        dense: bool,
    ) -> Step:
        mix, halves = self.moves(span, fields.contr(*span[:2]), lost)
        context = Context(self.arithmetic, fields, extends=error or dense)
        mixed, _ = mix.take(context, codes)
        codes1, (cores, _) = halves.take(context, mixed)
        ahead, z = row(cores, 0), self.arithmetic.decode(mixed[1])
        first = row(halves.leg[0], 0)
        advance = fields.extend(first, z, ahead, error=error, dense=dense)
        readouts = self.readout(codes), self.readout(codes1)
        ends = StepEnds(*readouts, z, ahead.increment, advance.dense_info)
        estimate = None
        if error:
            known = cores.increment, advance.error
            estimate = self._estimate(*known, lost.number, readouts[1])
        result = _result_of(ahead, row(cores, 1))
        return Step(codes1, estimate, dense_info(ends), result)

    def _estimate(
        self, increments: State, error: State | None, bits: Count, readout1: State
    ) -> State:
        watches_gap = self.coupling.watches_gap
        estimate = error_estimate(increments, error, bits, watches_gap)
        if not self.arithmetic.exact:
            return estimate
        # A controller that adapts rejects such a step.
        lost = lambda e, y: jnp.where(jnp.isnan(y), jnp.inf, e)
        return jtu.tree_map(lost, estimate, readout1)

    def dense(self, context: Context, moves: Moves, trail: Trail) -> Dense:
        return _dense_of(self, context, moves, trail)

    def empty_dense_info(self, y0: State) -> dict[str, Any]:
        zeros = jtu.tree_map(jnp.zeros_like, y0)
        return dict(base_dense_info=None, gap0=zeros, gap1=zeros)

    # What a step loses.

    @property
    def sheds(self) -> bool:
        return self.coupling.halves and self.arithmetic.exact

    @property
    def what_is_kept(self) -> str:
        number = getattr(self.coupling, "halvings_per_step", 0)
        some = f"at least 1/{SELDOM}" if isinstance(number, str) else f"{number:g}"
        return (
            f"`reversax.FixedPoint` records {some} bits a step for each element of the "
            "state (`arithmetic=reversax.FloatingPoint()` needs no record)"
        )

    def schedule(self, start: Index, chosen: AbstractSchedule) -> AbstractSchedule:
        return self.coupling.schedule(start, chosen)

    def shed(
        self, codes0: Codes, codes1: Codes, bits: Count
    ) -> PyTree[UInt32[Array, "..."]]:
        y, z = codes0
        return self.arithmetic.shed_bits(y, z, bits)

    @property
    def amplification(self) -> float | None:
        return self.coupling.amplification

    # Whether a result can be trusted.

    def mean(self, codes: Codes) -> State:
        """Also where the solution is one of the twins."""
        return jtu.tree_map(lambda y, z: (y + z) / 2, *self.decode(codes))

    def reached(self, codes: Codes) -> State:
        return self.arithmetic.decode(codes[1])

    def gap(self, codes: Codes, num_steps: Index = 0) -> State:
        return jtu.tree_map(lambda y, z: y - z, *self.decode(codes))

    def unwatched(self, codes: Codes) -> State | None:
        return None if self.coupling.watches_gap else self.gap(codes)

    def driven_apart(self, needed: float, adaptive: bool) -> str:
        symmetric = isinstance(self.coupling, Symmetric)
        return _driven_apart(symmetric, needed, adaptive)


def _dense_of(scheme: Twins, context: Context, moves: Moves, trail: Trail) -> Dense:
    (codes0, mixed, codes1), (_, (evaluations, _)) = trail
    first, z = row(evaluations, 0), scheme.arithmetic.decode(mixed[1])
    base = context.fields.dense_info(row(moves[1].leg[0], 0), z, first)
    readout = lambda _, codes: scheme.readout(codes)
    readout0, readout1 = [context.each(readout, x) for x in (codes0, codes1)]
    info = eqx.combine(base.value, base.other)
    ends = StepEnds(
        readout0=readout0,
        readout1=readout1,
        z=z,
        increment=first.value[0],
        base_dense_info=info,
    )
    inexact = lambda tree: eqx.filter(tree, eqx.is_inexact_array)
    pull_readout = lambda _, ct, codes: scheme.pull_readout(ct, codes)

    def pull(ct_info):
        _, pull_ends = eqx.filter_vjp(lambda e: inexact(dense_info(e)), ends)
        ct_ends = inexact(pull_ends(ct_info)[0])
        ct_p, ct_leg, ct_z, ct_value = base.pull(ct_ends.base_dense_info)[0]
        ct_value = add_some(ct_value[0], ct_ends.increment), ct_value[1]
        # Of the first of the halves alone.
        stacked = lambda x: jnp.stack([x, jnp.zeros_like(x)])
        ct_values, ct_legs = jtu.tree_map(stacked, (ct_value, ct_leg))
        ct_parts = [
            context.each(pull_readout, ct_ends.readout0, codes0),
            (None, add_some(ct_z, ct_ends.z)),
            context.each(pull_readout, ct_ends.readout1, codes1),
        ]
        otherwise = Otherwise(ct_parts, [None, [ct_values, None]])
        return CotangentsOfDense(otherwise, ct_p, [None, [ct_legs, None]])

    return Dense(dense_info(ends), pull)


def _driven_apart(symmetric: bool, needed: float, adaptive: bool) -> str:
    rest = "drove the twins apart, so that the solution is not to be used"
    # What grows widens the gap with the solution, and only by a step that is much too
    # long so far that it is larger than that.
    what = f"damping, or growth without bound, {rest}"
    if not symmetric:
        return f"Use `coupling=reversax.Symmetric()`, the default: {what}."
    if not needed > 0 or np.isinf(needed):
        return f"Take smaller steps: {what}."
    if needed <= MOST:
        what = f"damping {rest}"
        number = max(1, int(np.ceil(needed - 0.1)))
        return (
            f"Use `reversax.Symmetric(halvings_per_step={number})`: {what}. "
            f"{needed:.2g} halvings a step would have kept them together."
        )
    most = f"`reversax.Symmetric(halvings_per_step={MOST})`"
    if adaptive:
        return f"Use {most}, and a smaller tolerance: {what}."
    return (
        f"Take steps of at most {MOST / needed:.2g} of their length with {most}: "
        f"{what}."
    )


def _result_of(ahead: Core, behind: Core) -> dfx.RESULTS:
    if ahead.result is None or behind.result is None:
        return dfx.RESULTS.successful
    return dfx.RESULTS.where(dfx.is_okay(ahead.result), behind.result, ahead.result)
