"""The control of a step: what drives the terms over it.

Over a step from `t0` to `t1` a term is driven by the length of the step, by the
increment of a path, or by that of a Brownian path `W` and its Levy areas. The reverse
half of a reversible step runs along the same path in the opposite direction, where

    (R)    dt -> -dt,    W -> -W,    H -> H,    K -> -K

with `H` the space-time and `K` the space-time-time Levy area, which are the mean of
what the path is above its chord and the first moment of that about the middle (Foster,
Lyons & Oberhauser, arXiv 1904.06998). So the control is evaluated once a step, which
for a Brownian tree is most of the work, and (R) gives it to the reverse half exactly.

A solver that takes its own steps asks the terms for the control itself. It is given
`StepTerm`s, which know it already. They also stand in for Diffrax's `WrapTerm`, which
turns time around where `t1 < t0`, but changes the sign of `H` too.
"""

from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree, Real

from .._numbers.arithmetic import scaled
from .._xla.compat import WrapTerm, depends_on_argument, flips_space_time_area

Time = Real[Array, ""] | np.ndarray | float
Sign = Array | np.ndarray | int
Control = PyTree[Any]

_KNOWN_INCREMENTS = (
    dfx.BrownianIncrement,
    dfx.SpaceTimeLevyArea,
    dfx.SpaceTimeTimeLevyArea,
)


def _is_increment(x: Any) -> bool:
    return isinstance(x, dfx.AbstractBrownianIncrement)


def times(sign: Sign, tree: PyTree[Array]) -> PyTree[Array]:
    sign_of = lambda x: jnp.asarray(sign).astype(jnp.result_type(jnp.real(x)))
    return jtu.tree_map(lambda x: scaled(x, sign_of(x)), tree)


def in_direction(control: Control, sign: Sign) -> Control:
    """A control, or with `sign` -1 that of the reversed path, (R); its own inverse and
    its own transpose."""

    def leaf(x):
        if not _is_increment(x):
            return times(sign, x)
        if type(x) not in _KNOWN_INCREMENTS:
            raise NotImplementedError(
                "Use a Brownian path with `levy_area=` one of "
                "`diffrax.BrownianIncrement`, `diffrax.SpaceTimeLevyArea` and "
                "`diffrax.SpaceTimeTimeLevyArea`: what becomes of a "
                f"`{type(x).__name__}` along the reversed path is not known to "
                "`reversax.Reversible(...)`."
            )
        signed = times(sign, x)
        if isinstance(x, dfx.AbstractSpaceTimeLevyArea):
            signed = eqx.tree_at(lambda s: s.H, signed, x.H)
        return signed

    return jtu.tree_map(leaf, control, is_leaf=_is_increment)  # (R)


class Leg(NamedTuple):
    """A part of a step that adds one increment: where it leads from and to, its
    control, and what the increment is multiplied by. Or several, stacked; or the
    cotangents of some of this."""

    start: Any
    end: Any
    factor: Any
    """-1 where the leg leads back to the start of the step, against the control."""
    control: Control
    which: int = 0
    """Which of the vector fields, if there are several."""

    def times_factor(self, increment: PyTree[Array]) -> PyTree[Array]:
        return times(self.factor, increment)


def whole_leg(t0: Time, t1: Time, control: Control) -> Leg:
    """Of a step, forwards."""
    return Leg(t0, t1, np.ones((), jnp.result_type(t0)), control)


def _unwrapped(term: dfx.AbstractTerm) -> tuple[dfx.AbstractTerm, Sign]:
    """A term as the user wrote it, and the direction that its time runs in."""
    if isinstance(term, WrapTerm):
        return term.term, term.direction
    return term, 1


def direction_of(terms: PyTree[dfx.AbstractTerm]) -> Sign:
    """The direction that time runs in, 1 or -1, as the user has it."""
    _, direction = _unwrapped(jtu.tree_leaves(terms, is_leaf=_is_single_term)[0])
    return direction


def _is_brownian(x: Any) -> bool:
    return isinstance(x, dfx.AbstractBrownianPath)


def brownian_paths(terms: PyTree) -> list[dfx.AbstractBrownianPath]:
    """All of them: where there is one, the equation is stochastic."""
    leaves = jtu.tree_leaves(terms, is_leaf=_is_brownian)
    return [x for x in leaves if _is_brownian(x)]


def is_of_time(term: dfx.AbstractTerm) -> bool:
    """Whether nothing but time drives a term."""
    return isinstance(_unwrapped(term)[0], dfx.ODETerm)


def _has_brownian_control(term: dfx.AbstractTerm) -> bool:
    return _is_brownian(getattr(_unwrapped(term)[0], "control", None))


def _control_of(term: dfx.AbstractTerm, t0: Time, t1: Time, **options) -> Control:
    """The control of one term, with its Levy areas if it has any."""
    inner, direction = _unwrapped(term)
    if _has_brownian_control(term):
        options["use_levy"] = True
    start = jnp.where(direction == 1, t0, -t1)
    end = jnp.where(direction == 1, t1, -t0)
    return in_direction(inner.contr(start, end, **options), direction)


def _is_single_term(x: Any) -> bool:
    return isinstance(x, dfx.AbstractTerm) and not isinstance(x, dfx.MultiTerm)


def controls_of(terms: PyTree[dfx.AbstractTerm], t0: Time, t1: Time) -> list[Control]:
    """The controls of all terms over a step."""
    leaves = jtu.tree_leaves(terms, is_leaf=_is_single_term)
    return [_control_of(term, t0, t1) for term in leaves]


def noise_is_additive(
    terms: PyTree[dfx.AbstractTerm], t0: Time, y0: PyTree[Array], args: PyTree
) -> bool:
    """Whether what Brownian paths are multiplied by is independent of the state."""

    def depends(term) -> bool:
        driven = lambda y: term.vf_prod(t0, y, args, term.contr(t0, t0))
        return depends_on_argument(driven, y0)

    leaves = jtu.tree_leaves(terms, is_leaf=_is_single_term)
    return not any(depends(term) for term in leaves if _has_brownian_control(term))


class StepTerm(WrapTerm):
    """A term over a leg of a step, of which it knows the control."""

    leg: Leg

    def contr(self, t0, t1, *, use_levy: bool = False, **options) -> Any:
        leg = self.leg
        if t0 is leg.start and t1 is leg.end and not options:
            control = leg.control
        else:  # Of a part of the step, say.
            start = jnp.where(leg.factor > 0, t0, t1)
            end = jnp.where(leg.factor > 0, t1, t0)
            control = _control_of(self, start, end, **options)
            control = in_direction(control, leg.factor)
        if _is_increment(control) and not use_levy:
            return control.W
        return control


class _DriftOfSRK(StepTerm):
    """The drift as `diffrax.AbstractSRK` takes it: it uses the length of the step for
    its control, also where time runs backwards. The direction belongs to the field."""

    def contr(self, t0, t1, **options) -> Any:
        return super().contr(t0, t1, **options) * self.direction

    def prod(self, vf, control) -> Any:
        return super().prod(vf, control * self.direction)

    def vf_prod(self, t, y, args, control) -> Any:
        return super().vf_prod(t, y, args, control * self.direction)


def over_leg(
    solver: dfx.AbstractSolver, terms: PyTree[dfx.AbstractTerm], leg: Leg
) -> PyTree[dfx.AbstractTerm]:
    """The terms as `solver` is to see them over a leg of a step, of which `leg.control`
    are the [`controls_of`][] all."""
    leaves, treedef = jtu.tree_flatten(terms, is_leaf=_is_single_term)
    of_srk = isinstance(solver, dfx.AbstractSRK)
    controls = leg.control
    if of_srk and flips_space_time_area():  # It will do so once more.
        controls = [_with_area(c, leg.factor) for c in controls]
    known = []
    for i, (term, control) in enumerate(zip(leaves, controls, strict=True)):
        cls = _DriftOfSRK if of_srk and i == 0 else StepTerm
        known.append(cls(*_unwrapped(term), leg._replace(control=control)))
    return treedef.unflatten(known)


def _with_area(control: Control, sign: Sign) -> Control:
    if not isinstance(control, dfx.AbstractSpaceTimeLevyArea):
        return control
    return eqx.tree_at(lambda c: c.H, control, times(sign, control.H))
