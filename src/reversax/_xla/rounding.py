"""Programs whose products are rounded, whatever the compiler makes of them.

A compiler may contract `a*b + c` to one operation that rounds once, and whether it does
depends on what else is done with `a*b`: two programs in which it is needed otherwise
may disagree on the sum. With a zero that is not known before run time,

    (P)    a*b + 0

is the product as it is rounded by itself, contracted or not, and a sum of that and `c`
is rounded twice.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .programs import outputs_of

_PRODUCTS = frozenset({"mul", "integer_pow", "square"})


def with_rounded_products(
    program: jax.extend.core.ClosedJaxpr, zero: Float[Array, ""], args: Sequence[Array]
) -> list[Array]:
    """What `program` makes of `args`, with (P) in the place of its products, also in
    the loops and branches that it has. `zero` is unknown to the compiler."""
    jaxpr, values = program.jaxpr, {}
    read = lambda x: x.val if hasattr(x, "val") else values[x]
    values.update(zip(jaxpr.constvars, program.consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))
    for equation in jaxpr.eqns:
        out = _evaluated(equation, zero, [read(x) for x in equation.invars])
        values.update(zip(equation.outvars, out, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _evaluated(equation: Any, zero: Array, args: list) -> Sequence[Array]:
    primitive, params = equation.primitive, equation.params
    inside = _INSIDE.get(primitive.name)
    if inside is not None:
        return inside(params, zero, args)
    out = outputs_of(equation, args)
    if primitive.name in _PRODUCTS and jnp.issubdtype(out[0].dtype, jnp.inexact):
        out = [out[0] + zero.astype(out[0].dtype)]  # (P)
    return out


def _closed(program: Any, zero: Array, consts: Sequence[Array] = ()) -> Callable:
    return lambda *args: with_rounded_products(program, zero, [*consts, *args])


def _jit(params: dict, zero: Array, args: list) -> list[Array]:
    return with_rounded_products(params["jaxpr"], zero, args)


def _cond(params: dict, zero: Array, args: list) -> list[Array]:
    index, *operands = args
    branches = [_closed(branch, zero) for branch in params["branches"]]
    return lax.switch(index, branches, *operands)


def _while(params: dict, zero: Array, args: list) -> list[Array]:
    first, second = params["cond_nconsts"], params["body_nconsts"]
    of_cond, of_body = args[:first], args[first : first + second]
    goes_on = _closed(params["cond_jaxpr"], zero, of_cond)
    body = _closed(params["body_jaxpr"], zero, of_body)
    return lax.while_loop(
        lambda carry: goes_on(*carry)[0],
        lambda carry: body(*carry),
        args[first + second :],
    )


def _scan(params: dict, zero: Array, args: list) -> list[Array]:
    first, second = params["num_consts"], params["num_carry"]
    consts, carry, xs = (
        args[:first],
        args[first : first + second],
        args[first + second :],
    )
    body = _closed(params["jaxpr"], zero, consts)

    def step(carry, xs):
        out = body(*carry, *xs)
        return out[:second], out[second:]

    options = {k: params[k] for k in ("length", "reverse", "unroll")}
    carry, ys = lax.scan(step, carry, xs, **options)
    return [*carry, *ys]


_INSIDE: dict[str, Callable] = {
    "jit": _jit,
    "cond": _cond,
    "while": _while,
    "scan": _scan,
}
