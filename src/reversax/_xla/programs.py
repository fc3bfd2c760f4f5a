"""What programs consist of, and what follows in them."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax.tree_util as jtu


def programs_in(equation: Any) -> list[Any]:
    """The programs inside an equation."""
    is_jaxpr = lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
    inner = jtu.tree_leaves(equation.params, is_leaf=is_jaxpr)
    return [getattr(x, "jaxpr", x) for x in inner if is_jaxpr(x)]


def equations_of(jaxpr: Any) -> Iterator[Any]:
    """The equations of a program and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in programs_in(equation):
            yield from equations_of(inner)


def following_equations_of(
    jaxpr: Any, marked: Sequence[bool]
) -> Iterator[tuple[Any, list[bool]]]:
    """The same, each with which of its operands may depend on marked arguments."""
    pairs = zip(jaxpr.invars, marked, strict=True)
    follow = {id(x) for x, is_marked in pairs if is_marked}
    for equation in jaxpr.eqns:
        operands = [id(x) in follow for x in equation.invars]
        yield equation, operands
        for inner in programs_in(equation):
            marked = [any(operands)] * len(inner.invars)
            is_loop = equation.primitive.name in ("scan", "while")
            # What a turn of a loop returns is an argument of the next.
            if len(marked) == len(operands) and not is_loop:
                marked = operands
            yield from following_equations_of(inner, marked)
        if any(operands):
            follow.update(map(id, equation.outvars))
