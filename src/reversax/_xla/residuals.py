r"""What an evaluation keeps for its pull-back: as few bytes as can be.

A program returns results and residuals, what results are pulled back with. It is
divided in two, of which the first makes the results and keeps some of what it meets on
the way, and the second makes the residuals of the arguments and of what was kept, in
the backward pass alone. What follows from arguments, or from what is kept, by
operations that cost next to nothing need not be kept. It has the bits that it had: a
function may compare what it keeps, a maximum say with the numbers that it is one of. So
products are rounded by themselves in both halves, (P) of `rounding.py`, and sums of
several numbers, which compilers take in any order, are kept.

Which set of arrays has the fewest bytes is the problem of a minimum cut: in the graph
of the arrays, in which each is a vertex of a capacity

    (C)    its bytes, in steps of 64, which an array takes however small it is, and as
           many for its address and for all that is done with an array,

and of which the operations that cost next to nothing are edges of no bound, one cuts
all ways from the arrays that are not to be made twice to the residuals.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import scipy.sparse
import scipy.sparse.csgraph

from .programs import DEAR, Program, behind, bytes_of, part_of

_SHORT = 16
"""Along an axis that is shorter numbers are told apart, and no neighbours are read."""

CERTAIN = frozenset(
    {
        *("add", "sub", "neg", "abs", "max", "min", "add_any", "and", "or", "not"),
        *("eq", "ne", "lt", "le", "gt", "ge", "sign", "select_n", "is_finite"),
        *("broadcast_in_dim", "expand_dims", "reshape", "squeeze", "transpose"),
        *("convert_element_type", "copy", "real", "imag", "conj", "iota"),
    }
)
"""What costs nothing, and has the same bits wherever it is made of the same numbers."""

_ROUNDED = frozenset({"mul", "div", "sqrt", "square", "integer_pow"})
"""What costs nothing either, and has the same bits if products are rounded, (P)."""

_OF_FEW = frozenset({"slice", "concatenate", "pad"})
"""What costs nothing of few numbers."""

_COMPARED = frozenset({"eq", "ne", "lt", "le", "gt", "ge", "sign", "is_finite"})

_SUMS = frozenset({"reduce_sum", "dot_general", "conv_general_dilated", "cumsum"})

_CONTINUOUS = (CERTAIN | _ROUNDED | _OF_FEW | _SUMS | DEAR) - _COMPARED
"""What makes of numbers that are an ulp off numbers that are some ulps off."""


class Halves(NamedTuple):
    """A program in two: what its first results are made of, and the others."""

    first: Program
    """Returns those results, and what is kept: what is small in one array."""
    second: Program
    """Takes the arguments, and what was kept; returns the others."""


def halves_of(program: Program, number: int) -> Halves | None:
    """A program of which the first `number` results are in the first half; `None` if it
    cannot be divided, or if as much is returned as would be kept."""
    if program.effects:
        return None
    jaxpr = program.jaxpr
    results, others = jaxpr.outvars[:number], jaxpr.outvars[number:]
    first = behind(results, jaxpr.eqns)
    kept = _kept(jaxpr.eqns, first, others)
    if kept is None:
        return None
    known = {id(x) for x in [*jaxpr.constvars, *jaxpr.invars, *kept]}
    second = behind(others, jaxpr.eqns, known)
    halves = Halves(
        part_of(program, first, jaxpr.invars, [*results, *kept]),
        part_of(program, second, [*jaxpr.invars, *kept], others),
    )
    together = _with_small_together(halves, number)
    return together if second or together is not halves else None


_SMALL = 64
"""In bytes, of an array that takes as many however small it is."""


def _with_small_together(halves: Halves, number: int) -> Halves:
    """With one array of all that is kept and small, for each dtype."""
    kept = halves.first.out_avals[number:]
    of_dtype: dict[Any, list[int]] = {}
    for i, x in enumerate(kept):
        if bytes_of(x) < _SMALL:
            of_dtype.setdefault(x.dtype, []).append(i)
    groups = [group for group in of_dtype.values() if len(group) > 1]
    if not groups:
        return halves
    alone = sorted({*range(len(kept))}.difference(*groups))
    run, num_args = jax.extend.core.jaxpr_as_fun, len(halves.first.in_avals)

    def first(*args):
        out = run(halves.first)(*args)
        results, kept = out[:number], out[number:]
        flat = lambda group: [kept[i].reshape(-1) for i in group]
        together = [jnp.concatenate(flat(group)) for group in groups]
        return [*results, *(kept[i] for i in alone), *together]

    def second(*args):
        args, given = args[:num_args], args[num_args:]
        found = dict(zip(alone, given, strict=False))
        for group, x in zip(groups, given[len(alone) :], strict=True):
            ends = np.cumsum([kept[i].size for i in group])
            for i, part in zip(group, jnp.split(x, ends[:-1]), strict=True):
                found[i] = part.reshape(kept[i].shape)
        return run(halves.second)(*args, *(found[i] for i in range(len(kept))))

    made = jax.make_jaxpr(first)(*halves.first.in_avals)
    taken = *halves.first.in_avals, *made.out_avals[number:]
    return Halves(made, jax.make_jaxpr(second)(*taken))


def _kept(
    equations: Sequence[Any], first: Sequence[Any], asked: Sequence[Any]
) -> list[Any] | None:
    """Of the variables that the equations `first` make, those to be kept for `asked` to
    be made by the others, and again by those that cost nothing; `None` if that takes an
    array that cannot be kept."""
    in_first = set(map(id, first))
    made = [(x, e) for e in equations for x in e.outvars]
    at = {id(x): i for i, (x, _) in enumerate(made)}
    of_first = {i for i, (_, e) in enumerate(made) if id(e) in in_first}
    costs = [_cost(x) if i in of_first else math.inf for i, (x, _) in enumerate(made)]
    # Vertex `i` is an edge from `2*i` to `2*i + 1`.
    source, sink = 2 * len(made), 2 * len(made) + 1
    edges = [(2 * i, 2 * i + 1, cost) for i, cost in enumerate(costs)]
    for i, (_, equation) in enumerate(made):
        before = {at[id(x)] for x in equation.invars if id(x) in at}
        if id(equation) not in in_first and not _is_continuous(equation):
            # As where a maximum is compared with all of which it is one.
            edges += [(source, 2 * j, math.inf) for j in before & of_first]
        if id(equation) in in_first and not _costs_nothing(equation):
            edges.append((source, 2 * i, math.inf))
            continue
        edges += [(2 * j + 1, 2 * i, math.inf) for j in before]
    asked_for = {at[id(x)] for x in asked if id(x) in at}
    edges += [(2 * i + 1, sink, math.inf) for i in asked_for]
    side = _side_of_source(edges, source, sink)
    if side is None:
        return None
    return [x for i, (x, _) in enumerate(made) if side[2 * i] and not side[2 * i + 1]]


def _side_of_source(
    edges: Sequence[tuple[int, int, float]], source: int, sink: int
) -> np.ndarray | None:
    """Which vertices are on the side of the source in a minimum cut of edges, each of a
    beginning, an end and a capacity; `None` if all cuts have no bound."""
    begins, ends, capacities = map(np.asarray, zip(*edges, strict=True))
    # The capacities are to be integers of 32 bits, of which sums are taken.
    finite = capacities[np.isfinite(capacities)]
    scale = max(1.0, finite.sum() / 2**28)
    no_bound = 2**29
    whole = np.where(np.isfinite(capacities), np.ceil(capacities / scale), no_bound)
    shape = sink + 1, sink + 1
    graph = scipy.sparse.csr_array((whole.astype(np.int32), (begins, ends)), shape)
    found = scipy.sparse.csgraph.maximum_flow(graph, source, sink)
    if found.flow_value >= no_bound:
        return None
    left = graph - found.flow
    left.data = np.maximum(left.data, 0)
    left.eliminate_zeros()
    reached = scipy.sparse.csgraph.breadth_first_order(
        left, source, return_predecessors=False
    )
    side = np.zeros(sink + 1, bool)
    side[reached] = True
    return side


def _cost(x: Any) -> float:
    """(C), in units of 64 bytes."""
    if jnp.issubdtype(x.aval.dtype, jax.dtypes.extended):
        return math.inf  # Random keys cannot be returned.
    return 1 + -(-bytes_of(x.aval) // 64)


def _is_continuous(equation: Any) -> bool:
    """Whether it may be made of numbers that have other bits than in the first half."""
    (*before, after) = [x.aval.dtype for x in (*equation.invars, equation.outvars[0])]
    is_number = [jnp.issubdtype(x, jnp.inexact) for x in before]
    if not any(is_number):
        return True
    stays = jnp.issubdtype(after, jnp.inexact)
    return stays and equation.primitive.name in _CONTINUOUS


def _costs_nothing(equation: Any) -> bool:
    """Whether it may be made again, of what has been made again."""
    name, params = equation.primitive.name, equation.params
    if not _is_continuous(equation):
        return False
    out = equation.outvars[0].aval
    if name in _ROUNDED:
        return not jnp.issubdtype(out.dtype, jnp.complexfloating)
    if name not in _OF_FEW:
        return name in CERTAIN
    operand = equation.invars[0].aval
    if name == "slice":
        limits = zip(params["start_indices"], params["limit_indices"], strict=True)
        lengths = zip(operand.shape, limits, strict=True)
        return all(n < _SHORT for n, (a, b) in lengths if b - a < n)
    if name == "concatenate":
        return out.shape[params["dimension"]] < _SHORT
    lengths = zip(operand.shape, params["padding_config"], strict=True)
    return all(n < _SHORT for n, config in lengths if any(config))
