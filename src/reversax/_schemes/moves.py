r"""What a step is made of: moves, each of which can be undone and pulled back.

A state consists of parts, in the numbers of an arithmetic. A step leads from one to the
next by moves, of which each is a bijection,

    (M)    s_{i+1} = m_i(s_i),        s_i = m_i^-1(s_{i+1}),

and most add to one part an increment that follows from another one,

    (A)    b1 = b + c Psi(a),         b = b1 - c Psi(a).

With the cotangents of the parts after it, such a move is pulled back by

    (T)    ct_a += pull(c ct_b),      Psi, pull = vjp(Psi, a).

A step is written once, as its moves. Going back undoes them from the last to the first,
each evaluated once, by `vjp`, for (A) and for (T).
"""

import abc
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree

from .._numbers.arithmetic import AbstractArithmetic, Code
from .._xla.isolation import Evaluation
from .control import Leg
from .kept import Kept, value_of
from .rows import is_array, through

Codes = tuple[Code, ...]
"""The parts of a state, in an arithmetic. Of their values the tree is the same."""


def add_trees(a: PyTree[Array], b: PyTree[Array]) -> PyTree[Array]:
    """`a + b`, in the dtypes of `a`; `None` leaves of `a` stay."""
    return jtu.tree_map(lambda x, y: x + y.astype(x.dtype), a, b)


def add_some(a: PyTree[Array], b: Any) -> PyTree[Array]:
    """`a`, with `b` added unless that is `None`: item by item of tuples and lists."""
    if b is None:
        return a
    if type(b) in (tuple, list):
        return type(b)(add_some(x, y) for x, y in zip(a, b, strict=True))
    return add_trees(a, b)


def chosen(pred: Bool[Array, "..."], new: PyTree, old: PyTree) -> PyTree[Array]:
    """`new` where `pred`, which has an axis of lanes if all else has one."""
    pred = jnp.asarray(pred)

    def leaf(x, y):
        return jnp.where(pred.reshape(pred.shape + (1,) * (x.ndim - pred.ndim)), x, y)

    return jtu.tree_map(leaf, new, old)


class Context(NamedTuple):
    """What the moves of a step act in."""

    arithmetic: AbstractArithmetic
    fields: Any
    """[`Fields`][]; or, going forward under the adjoints of Diffrax, an increment."""
    extends: bool = False
    """Whether an error estimate or dense output may be asked for."""
    each: Callable = lambda fn, *args: fn(None, *args)
    """`fn(lane, *args)`, lane by lane where a batch is walked over at once; `lane` has
    `shed(lost)`."""
    keeps: bool = False
    """Whether what is kept has its residuals, going back: each evaluation of it is
    pulled back in the step, or in an earlier one, after that in which it was found."""


class Cotangents(NamedTuple):
    """Of the values of a state's parts, and of what fields depend on."""

    parts: tuple[PyTree[Array], ...]
    parameters: PyTree[Array]


class AbstractMove(eqx.Module):
    """A bijection of states."""

    @property
    def leg(self) -> PyTree[Leg | None]:
        """What an increment is evaluated over, if one is."""
        return None

    @abc.abstractmethod
    def take(self, context: Context, codes: Codes) -> tuple[Codes, Any]:
        """The state after it; and what was met on the way, if anything."""

    @abc.abstractmethod
    def undo(self, context: Context, codes: Codes) -> tuple[Codes, Any]:
        """The state before it; and what is needed to pull back."""

    @abc.abstractmethod
    def pull(
        self, context: Context, met: Any, ct: Cotangents, ct_met: Any = None
    ) -> tuple[Cotangents, PyTree[Leg | None]]:
        """The cotangents before it, given what `undo` met, and the cotangents of that
        by other ways, if any; and the cotangents of its leg."""

    def undo_and_pull(
        self, context: Context, codes: Codes, ct: Cotangents
    ) -> tuple[Codes, Cotangents, PyTree[Leg | None]]:
        codes, met = self.undo(context, codes)
        return codes, *self.pull(context, met, ct)


def _replaced(parts: tuple, i: int, x: Any) -> tuple:
    return *parts[:i], x, *parts[i + 1 :]


def _pulled(
    met: Evaluation, ct_value: Any, ct: Cotangents, reads: int
) -> tuple[Cotangents, Leg]:
    """(T), of what was evaluated at the part `reads`, and the cotangents of its leg."""
    ct_p, ct_leg, ct_a = met.pull(ct_value)[0]
    parts = _replaced(ct.parts, reads, add_trees(ct.parts[reads], ct_a))
    return Cotangents(parts, add_trees(ct.parameters, ct_p)), ct_leg


class Add(AbstractMove):
    """(A): to the part `into`, the increment that follows from the part `reads`."""

    over: Leg
    into: int = eqx.field(static=True)
    reads: int = eqx.field(static=True)

    @property
    def leg(self) -> Leg:
        return self.over

    def take(self, context: Context, codes: Codes):
        arithmetic = context.arithmetic
        a = value_of(arithmetic, codes[self.reads])
        core = context.fields.core(self.over, a, extends=context.extends)
        increment = self.over.times_factor(core.increment)
        b = arithmetic.add(codes[self.into], increment)  # (A)
        return _replaced(codes, self.into, b), core

    def undo(self, context: Context, codes: Codes):
        arithmetic = context.arithmetic
        a = value_of(arithmetic, codes[self.reads])
        evaluation = context.fields.evaluate(self.over, a)
        increment = self.over.times_factor(evaluation.value[0])
        b = arithmetic.subtract(codes[self.into], increment)  # (A)
        return _replaced(codes, self.into, b), evaluation

    def pull(self, context: Context, met, ct: Cotangents, ct_met=None):
        ct_increment = self.over.times_factor(ct.parts[self.into])
        ct_rest = jtu.tree_map(jnp.zeros_like, met.value[1])
        if ct_met is not None:
            ct_increment, ct_rest = add_trees(ct_increment, ct_met[0]), ct_met[1]
        return _pulled(met, (ct_increment, ct_rest), ct, self.reads)


class Renew(AbstractMove):
    """What is kept, evaluated from the part `reads`; `kept` says which part it is."""

    over: Leg
    reads: int = eqx.field(static=True)
    kept: int = eqx.field(static=True)

    @property
    def leg(self) -> Leg:
        return self.over

    def take(self, context: Context, codes: Codes):
        a = context.arithmetic.decode(codes[self.reads])
        value = context.fields.core(self.over, a, extends=False).increment
        return _replaced(codes, self.kept, Kept(value)), None

    def undo(self, context: Context, codes: Codes):
        a, fields = context.arithmetic.decode(codes[self.reads]), context.fields
        if context.keeps:
            residuals = codes[self.kept].residuals
            evaluation = fields.pull_back_again(self.over, a, residuals)
        else:
            evaluation = fields.evaluate(self.over, a)
        return _replaced(codes, self.kept, Kept(None)), evaluation

    def pull(self, context: Context, met, ct: Cotangents, ct_met=None):
        value = ct.parts[self.kept], met.value[1]
        zeros = jtu.tree_map(jnp.zeros_like, ct.parts[self.kept])
        ct = ct._replace(parts=_replaced(ct.parts, self.kept, zeros))
        return _pulled(met, value, ct, self.reads)


class Recall(AbstractMove):
    """Nothing on the way forward. Going back, what was kept is evaluated again."""

    over: Leg
    reads: int = eqx.field(static=True)
    kept: int = eqx.field(static=True)

    def take(self, context: Context, codes: Codes):
        return codes, None

    def undo(self, context: Context, codes: Codes):
        a, keeps = context.arithmetic.decode(codes[self.reads]), context.keeps
        found = context.fields.evaluate(self.over, a, keeps=keeps)
        kept = Kept(found.value[0], found.residuals if keeps else None)
        return _replaced(codes, self.kept, kept), None

    def pull(self, context: Context, met, ct: Cotangents, ct_met=None):
        return ct, None


class Swap(AbstractMove):
    """Two parts change places."""

    def take(self, context: Context, codes: Codes):
        return codes[::-1], None

    def undo(self, context: Context, codes: Codes):
        return codes[::-1], None

    def pull(self, context: Context, met, ct: Cotangents, ct_met=None):
        return ct._replace(parts=ct.parts[::-1]), None


class Repeated(AbstractMove):
    """The same moves several times, with arrays of which the rows are theirs: written,
    traced and, in a loop, compiled once."""

    moves: tuple[AbstractMove, ...]

    @property
    def leg(self) -> list:
        return [move.leg for move in self.moves]

    def _is_short(self, context: Context) -> bool:
        """Whether the moves are rather written out than put into a loop: two of few
        operations, of which a loop would copy what it carries."""
        arrays = jtu.tree_leaves(eqx.filter(self.moves, is_array))
        return context.fields.is_short and all(len(x) == 2 for x in arrays)

    def _through(self, context: Context, fn: Callable, carry: Any, **how) -> Any:
        how = dict(unroll=self._is_short(context)) | how
        in_lanes = context.fields.axes is not None
        return through(fn, carry, self.moves, in_lanes=in_lanes, **how)

    def take(self, context: Context, codes: Codes):
        fn = lambda codes, moves: take(moves, context, codes)
        return self._through(context, fn, codes)

    def undo(self, context: Context, codes: Codes):
        def fn(codes, moves):
            trail = undo(moves, context, codes)
            return trail.codes[0], trail.met

        # The first for the sake of what was met, all of it kept.
        unroll = context.fields.dense or self._is_short(context)
        return self._through(context, fn, codes, reverse=True, unroll=unroll)

    def pull(self, context: Context, met, ct: Cotangents, ct_met=None):
        ct_met = [None for _ in self.moves] if ct_met is None else ct_met

        def fn(ct, xs):
            moves, met, ct_met = xs
            return _pull(moves, context, met, ct, ct_met)

        xs = self.moves, met, ct_met
        return through(fn, ct, xs, reverse=True, unroll=True)

    def undo_and_pull(self, context: Context, codes: Codes, ct: Cotangents):
        def fn(carry, moves):
            codes, ct, ct_legs = undo_and_pull(moves, context, *carry)
            return (codes, ct), ct_legs

        (codes, ct), ct_legs = self._through(context, fn, (codes, ct), reverse=True)
        return codes, ct, ct_legs


Moves = Sequence[AbstractMove]


def stacked(moves: Moves) -> Any:
    """Moves of one kind, for [`Repeated`][]."""
    parts = [eqx.partition(move, is_array) for move in moves]
    arrays = jtu.tree_map(lambda *x: jnp.stack(x), *[a for a, _ in parts])
    return eqx.combine(arrays, parts[0][1])


def take(moves: Moves, context: Context, codes: Codes) -> tuple[Codes, list]:
    """(M): the state after all moves, and what each met."""
    met = []
    for move in moves:
        codes, met_here = move.take(context, codes)
        met.append(met_here)
    return codes, met


class Trail(NamedTuple):
    """What was found in undoing moves."""

    codes: list[Codes]
    """The state before each of the moves, and after the last."""
    met: list
    """What each needs to be pulled back."""


def undo(moves: Moves, context: Context, codes: Codes) -> Trail:
    """(M), back."""
    all_codes, all_met = [codes], []
    for move in reversed(moves):
        codes, met = move.undo(context, codes)
        all_codes.append(codes)
        all_met.append(met)
    return Trail(all_codes[::-1], all_met[::-1])


class Otherwise(NamedTuple):
    """Cotangents of what was found in undoing moves, by other ways than the moves;
    `None` where there is none."""

    parts: list
    """Of the state before each of the moves, and after the last."""
    met: list


def pull(
    moves: Moves, context: Context, trail: Trail, ct: Cotangents, more: Otherwise
) -> tuple[Cotangents, list]:
    """The cotangents before the moves, and those of their legs."""
    ct = ct._replace(parts=add_some(ct.parts, more.parts[-1]))
    ct_legs = []
    for i in reversed(range(len(moves))):
        ct, ct_leg = moves[i].pull(context, trail.met[i], ct, more.met[i])
        ct = ct._replace(parts=add_some(ct.parts, more.parts[i]))
        ct_legs.append(ct_leg)
    return ct, ct_legs[::-1]


def _pull(moves: Moves, context: Context, met: list, ct: Cotangents, ct_met: list):
    nothing = [None for _ in range(len(moves) + 1)]
    trail = Trail([() for _ in nothing], met)
    return pull(moves, context, trail, ct, Otherwise(nothing, ct_met))


def undo_and_pull(
    moves: Moves, context: Context, codes: Codes, ct: Cotangents
) -> tuple[Codes, Cotangents, list]:
    """Each move undone and pulled back at once: the state before them, its cotangents,
    and those of the legs."""
    ct_legs = []
    for move in reversed(moves):
        codes, ct, ct_leg = move.undo_and_pull(context, codes, ct)
        ct_legs.append(ct_leg)
    return codes, ct, ct_legs[::-1]
