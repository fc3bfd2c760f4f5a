"""What programs consist of, what follows in them, and parts of them."""

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import jax.tree_util as jtu

from .compat import is_mere_call

NOT_FUSED = {
    *("dot_general", "ragged_dot_general", "conv_general_dilated", "fft", "sort"),
    *("while", "scan", "cond", "custom_linear_solve", "triangular_solve"),
    *("pure_callback", "io_callback", "reduce_window", "scatter", "scatter_add"),
    *("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "written"),
}
"""What is not fused with what follows."""


DEAR = frozenset(
    {
        *("exp", "exp2", "expm1", "log", "log1p", "tanh", "logistic", "pow", "cbrt"),
        *("sin", "cos", "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh"),
        *("asinh", "acosh", "atanh", "erf", "erfc", "erf_inv", "lgamma", "digamma"),
    }
)
"""What takes several times as long as to write a number and to read it again."""


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


def outputs_of(equation: Any, args: Sequence[Any]) -> Sequence[Any]:
    """What an equation makes of operands."""
    primitive = equation.primitive
    with equation.ctx.manager:
        out = primitive.bind(*args, **primitive.get_bind_params(equation.params))
    return out if primitive.multiple_results else [out]


def bytes_of(tree: Any) -> int:
    """Of arrays, or of what describes some."""
    return sum(x.size * x.dtype.itemsize for x in jtu.tree_leaves(tree))


Program = jax.extend.core.ClosedJaxpr


def plain(program: Program) -> Program:
    """Without calls of compiled functions and without what does nothing."""
    jaxpr = program.jaxpr
    is_plain = lambda x: not (is_mere_call(x) or _is_nothing(x))
    if program.effects or all(map(is_plain, jaxpr.eqns)):
        return program
    return part_of(program, jaxpr.eqns, jaxpr.invars, jaxpr.outvars)


def behind(
    variables: Iterable[Any], equations: Sequence[Any], known: Set[int] = frozenset()
) -> list[Any]:
    """Those of the equations that variables follow from, unless they are known, by
    `id`."""
    needed, found = {id(x) for x in variables} - known, []
    for equation in reversed(equations):
        if any(id(x) in needed for x in equation.outvars):
            needed.update({id(x) for x in equation.invars} - known)
            found.append(equation)
    return found[::-1]


def part_of(
    program: Program,
    equations: Sequence[Any],
    arguments: Sequence[Any],
    results: Sequence[Any],
) -> Program:
    """These equations, from what are variables of the program to what are."""
    known = [*program.jaxpr.constvars, *arguments]

    def fn(*args):
        values = dict(zip(known, [*program.consts, *args], strict=True))
        return [jnp.asarray(x) for x in _run(equations, values, results)]

    return jax.make_jaxpr(fn)(*[x.aval for x in arguments])


Changed = Callable[[Any, Any], Any]


def evaluated(
    program: Program, args: Sequence[Any], changed: Changed = lambda _, value: value
) -> list[Any]:
    """What a program returns, with `changed(variable, value)` in the place of values;
    calls of compiled functions are written out."""
    jaxpr = program.jaxpr
    known = [*jaxpr.constvars, *jaxpr.invars]
    values = dict(zip(known, [*program.consts, *args], strict=True))
    return _run(jaxpr.eqns, values, jaxpr.outvars, changed)


def _run(
    equations: Sequence[Any],
    values: dict[Any, Any],
    results: Sequence[Any],
    changed: Changed = lambda _, value: value,
) -> list[Any]:
    """The values of the results after the equations."""
    read = lambda x: x.val if hasattr(x, "val") else values[x]
    for equation in equations:
        args = [read(x) for x in equation.invars]
        if is_mere_call(equation):
            out = evaluated(equation.params["jaxpr"], args)
        elif _is_nothing(equation):
            out = args
        else:
            out = outputs_of(equation, args)
        pairs = zip(equation.outvars, out, strict=True)
        values.update({variable: changed(variable, x) for variable, x in pairs})
    return [read(x) for x in results]


def _is_nothing(equation: Any) -> bool:
    """Whether it returns its operand: `jax.checkpoint` rounds what it keeps to the
    precision that it has. A compiler takes that with all behind it to each place that
    it is needed in, and evaluates a sine there once more."""
    if equation.primitive.name != "reduce_precision":
        return False
    precision = jnp.finfo(equation.invars[0].aval.dtype)
    given = equation.params["exponent_bits"], equation.params["mantissa_bits"]
    return given == (precision.nexp, precision.nmant)
