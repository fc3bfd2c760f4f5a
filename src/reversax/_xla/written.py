"""Arrays that are written to memory: what reads them is not fused with what makes them.

A compiler is free to fuse what makes an array with each operation that reads it, which
then evaluates it anew: a sine once for each of the six stages that read the one that it
is of. XLA leaves a call as it is that is marked so, and what that is called with is in
memory. (A conditional does the same in every compiler, for two tables of addresses.)
"""

from collections import Counter
from typing import Any

import jax
import jax.extend.core
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, PyTree

from .compat import NOT_INLINED, compiles_small_calls, number_of_devices
from .one_kernel import marked_call
from .programs import DEAR, NOT_FUSED, Program, equations_of, evaluated
from .run_time import nothing_like

_written_p = jax.extend.core.Primitive("written")
_written_p.def_abstract_eval(lambda x, zero: x)
_written_p.def_impl(lambda x, zero: x)


def _by_conditional(x: Array, zero: Array) -> Array:
    return lax.cond(zero > -1, lambda x: x, nothing_like, x)


_lower_conditional = mlir.lower_fun(_by_conditional, multiple_results=False)


def _lower_on_cpu(ctx, x, zero):
    module = ctx.module_context.module
    if not compiles_small_calls() or number_of_devices(ctx.module_context) != 1:
        return _lower_conditional(ctx, x, zero)
    call = marked_call(
        lambda x: x, x, x.type, name="written", marks=NOT_INLINED, module=module
    )
    return list(call.results)


# (Other backends keep to other rules, and may ask the host at each conditional.)
mlir.register_lowering(_written_p, lambda ctx, x, zero: [x])
# (Not to be cached: what is called stands outside of what is lowered here.)
mlir.register_lowering(_written_p, _lower_on_cpu, platform="cpu", cacheable=False)


def _batch(args, dims):
    # The zero is one for all lanes.
    return _written_p.bind(*args), dims[0]


batching.primitive_batchers[_written_p] = _batch


def _jvp(primals, tangents):
    x, zero = primals
    tangent, _ = tangents
    if not isinstance(tangent, ad.Zero):
        tangent = _written_p.bind(tangent, zero)
    return _written_p.bind(x, zero), tangent


def _transpose(ct, x, zero):
    # What is pulled back is written to memory as well, for the same reason.
    return [ct if isinstance(ct, ad.Zero) else _written_p.bind(ct, zero), None]


ad.primitive_jvps[_written_p] = _jvp
ad.primitive_transposes[_written_p] = _transpose


def written_out(tree: PyTree[Array], zero: Array) -> PyTree[Array]:
    """`tree`, written to memory: what reads it is not fused with what computes it.
    `zero` is not known before run time."""
    return jtu.tree_map(lambda x: _written_p.bind(x, zero), tree)


def is_dear(program: Program) -> bool:
    """Whether anything in it is."""
    return any(x.primitive.name in DEAR for x in equations_of(program.jaxpr))


def _dear_in(jaxpr: Any, least: int) -> set[int]:
    """Of the variables, by `id`, those that several operations read (or the caller) and
    for which each would evaluate something dear, if those are written that it is of."""
    reads = Counter(x for equation in jaxpr.eqns for x in {*map(id, equation.invars)})
    reads.update(map(id, jaxpr.outvars))
    following, dear = set(), set()
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        fused = name not in NOT_FUSED and any(
            id(x) in following for x in equation.invars
        )
        if name not in DEAR and not fused:
            continue
        for x in equation.outvars:
            often = reads[id(x)] > 1 and x.aval.size >= least
            (dear if often else following).add(id(x))
    return dear


def with_dear_written(program: Program, least: int) -> Program | None:
    """`program`, with a zero that is not known before run time as its first argument,
    and what is dear to evaluate several times written to memory, from the size `least`
    on of an array. `None` if nothing is."""
    dear = set() if program.effects else _dear_in(program.jaxpr, least)
    if not dear:
        return None

    def fn(zero, *args):
        write = lambda x, value: (
            _written_p.bind(value, zero) if id(x) in dear else value
        )
        return evaluated(program, args, write)

    zero = jax.ShapeDtypeStruct((), jnp.float32)
    return jax.make_jaxpr(fn)(zero, *program.in_avals)
