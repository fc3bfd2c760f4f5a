"""A step of any scheme, undone and pulled back by its moves."""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._xla.isolation import Evaluation
from .control import Leg
from .fields import Fields
from .kept import bare, residuals_of, with_residuals
from .moves import (
    Codes,
    Context,
    Cotangents,
    Moves,
    add_some,
    add_trees,
    pull,
    undo,
    undo_and_pull,
)
from .scheme import AbstractScheme, Lost, Span


class Undoing(NamedTuple):
    """A step about to be undone, of all lanes."""

    span: Span
    lost: Lost
    codes: Codes
    """At its end, as the cotangents are."""
    ct: Cotangents
    residuals: list | None = None
    """Of what is kept, if its evaluations are pulled back from these."""


class Undone(NamedTuple):
    """The same at its start."""

    codes: Codes
    ct: Cotangents
    residuals: list | None
    ct_span: Span | None
    """If the times are differentiated."""
    observed: Any
    """What else was returned by `observe`."""


def undo_step(scheme: AbstractScheme, context: Context, undoing: Undoing) -> Codes:
    """The parts at the start of a step, without cotangents."""
    evaluation = context.fields.evaluate_control(*scheme.control_span(undoing.span))
    control = eqx.combine(evaluation.value, evaluation.other)
    moves = scheme.moves(undoing.span, control, undoing.lost)
    return undo(moves, context, undoing.codes).codes[0]


def undo_and_pull_step(
    scheme: AbstractScheme,
    context: Context,
    undoing: Undoing,
    observe: Callable | None,
) -> Undone:
    """Undoes a step and pulls its cotangents back.

    If there is something to `observe` inside it, all is undone first: `observe`
    is given the parts at the start and the dense output, and returns the cotangents
    of this and of the times, by what was observed.
    """
    fields, span = context.fields, undoing.span
    evaluation = fields.evaluate_control(*scheme.control_span(span))
    make = ft.partial(scheme.moves, lost=undoing.lost)
    moves, pull_legs = _moves_and_pull(make, fields, span, evaluation)
    codes1, context = _with_residuals(context, undoing)
    ct, observed = undoing.ct, None
    if observe is None:
        codes0, ct, ct_legs = undo_and_pull(moves, context, codes1, ct)
        codes0, residuals = bare(codes0), residuals_of(codes0)
    else:
        trail = undo(moves, context, codes1)
        residuals = residuals_of(trail.codes[0])
        trail = trail._replace(codes=[bare(codes) for codes in trail.codes])
        codes0, dense = trail.codes[0], scheme.dense(context, moves, trail)
        ct_info, observed = observe(codes0, dense.info)
        more = dense.pull(ct_info)
        ct = ct._replace(parameters=add_some(ct.parameters, more.parameters))
        ct, ct_legs = pull(moves, context, trail, ct, more.otherwise)
        ct_legs = add_some(ct_legs, more.legs)
    undone = Undone(codes0, ct, residuals if context.keeps else None, None, observed)
    if pull_legs is None:
        return undone
    return _pulled_to_times(scheme, span, evaluation, pull_legs(ct_legs)[0], undone)


def _with_residuals(context: Context, undoing: Undoing) -> tuple[Codes, Context]:
    if undoing.residuals is None:
        return undoing.codes, context
    codes = with_residuals(undoing.codes, undoing.residuals)
    return codes, context._replace(keeps=True)


def undo_and_pull_first(
    scheme: AbstractScheme, context: Context, undoing: Undoing
) -> Undone:
    """What comes before the first step, undone and pulled back."""
    if not scheme.prepares:
        return Undone(undoing.codes, undoing.ct, None, None, None)
    fields, span = context.fields, undoing.span
    evaluation = fields.evaluate_control(*scheme.control_span(span))
    moves, pull_legs = _moves_and_pull(scheme.first_moves, fields, span, evaluation)
    codes, context = _with_residuals(context, undoing)
    codes, ct, ct_legs = undo_and_pull(moves, context, codes, undoing.ct)
    undone = Undone(codes, ct, None, None, None)
    if pull_legs is None:
        return undone
    return _pulled_to_times(scheme, span, evaluation, pull_legs(ct_legs)[0], undone)


def undo_first(
    scheme: AbstractScheme, context: Context, span: Span, codes: Codes
) -> Codes:
    """The parts before what comes before the first step, without cotangents."""
    if not scheme.prepares:
        return codes
    evaluation = context.fields.evaluate_control(*scheme.control_span(span))
    control = eqx.combine(evaluation.value, evaluation.other)
    moves = scheme.first_moves(span, control)
    return undo(moves, context, codes).codes[0]


def _pulled_to_times(
    scheme: AbstractScheme,
    span: Span,
    evaluation: Evaluation,
    ct_legs: tuple,
    undone: Undone,
) -> Undone:
    """With the cotangents of times and of what the control depends on, from those of
    what legs have of both."""
    ct_span, ct_control = ct_legs
    ct_contr, ct_times = evaluation.pull(ct_control)[0]
    ct = undone.ct
    if jtu.tree_leaves(ct_contr):
        ct_contr = add_trees(ct.parameters.contr, ct_contr)
        parameters = eqx.tree_at(lambda p: p.contr, ct.parameters, ct_contr)
        undone = undone._replace(ct=ct._replace(parameters=parameters))
    if ct_times is None:
        return undone
    _, pull_span = jax.vjp(scheme.control_span, span)
    return undone._replace(ct_span=add_trees(ct_span, pull_span(ct_times)[0]))


def _moves_and_pull(
    make_moves: Callable, fields: Fields, span: Span, evaluation: Evaluation
) -> tuple[Moves, Callable | None]:
    """The moves of a step, and the pull-back of what of their legs is
    differentiated: to the times, if these are, and to the control."""

    def make(varied):
        times, value = varied
        control = eqx.combine(value, evaluation.other)
        moves = make_moves(span if times is None else times, control)
        is_leg = lambda x: isinstance(x, Leg)
        varied = lambda leg: fields.varied(leg)[0]
        legs = [move.leg for move in moves]
        return jtu.tree_map(varied, legs, is_leaf=is_leg), moves

    times = jtu.tree_map(jnp.asarray, span) if fields.times else None
    if not fields.pulls_control:
        return make((None, evaluation.value))[1], None
    _, pull_legs, moves = jax.vjp(make, (times, evaluation.value), has_aux=True)
    return moves, pull_legs
