"""The only imports of names that upstream does not promise to keep.

Every name here has a canary in `tests/test_compat.py`, which says what the rest of the
package relies on. When an upstream release breaks one, this file is where to mend it.
"""

import functools as ft
import importlib.metadata
import types
from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp

# Diffrax's own integration loop, which every adjoint shares. It takes the keyword
# arguments of `AbstractAdjoint.loop` less `throw` and the `passed_...` flags, plus
# `inner_while_loop` and `outer_while_loop`; it returns `(final_state, aux_stats)`.
from diffrax._integrate import _clip_to_end, loop

# `WrapTerm(term, direction)` is what `diffeqsolve` makes of every single term, with
# `direction` -1 where `t1 < t0`.
from diffrax._term import WrapTerm as WrapTerm
from equinox.internal import (
    nondifferentiable as nondifferentiable,
    prevbefore as prevbefore,
    unvmap_any as unvmap_any,
    while_loop as while_loop,
)
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import Array, PyTree

# What equations of `jax.checkpoint` are called.
CHECKPOINT = "remat2"

# Said by Optimistix, whose results Diffrax's extend.
NONFINITE: Any = dfx.RESULTS.nonfinite
DIVERGED: Any = dfx.RESULTS.nonlinear_divergence


def index_of(result: Any) -> Array:
    """The number of a member of `diffrax.RESULTS` that is known at run time."""
    return result._value


def message_of(index: int) -> str:
    return dfx.RESULTS._index_to_message[index]


def _with_quick_prevbefore(loop: Any) -> Any:
    """Diffrax's loop, traced in less time.

    It looks up `equinox.internal.prevbefore` and takes the number below `t1` a hundred
    times, each traced anew: a quarter of the tracing of a gradient. Here they share one
    trace. (A loop that looks up nothing of that name is as it was.)
    """
    quick = types.SimpleNamespace(**vars(eqxi))
    quick.prevbefore = jax.jit(eqxi.prevbefore)
    names = loop.__globals__ | {"eqxi": quick}
    same = types.FunctionType(loop.__code__, names, closure=loop.__closure__)
    same.__kwdefaults__ = loop.__kwdefaults__
    return ft.update_wrapper(same, loop)


integration_loop = _with_quick_prevbefore(loop)


# What makes XLA leave a call a call; and its CPU backend compile it into one kernel.
NOT_INLINED = {"inlineable": "false"}
ONE_KERNEL = {"xla_cpu_small_call": "true", **NOT_INLINED}


@ft.cache
def compiles_small_calls() -> bool:
    """Whether these attributes are known to mean that."""
    return importlib.metadata.version("jaxlib") == "0.10.2"


def number_of_devices(module_context: Any) -> int:
    """That a program is lowered for; 0 if it will be exported, or is not known."""
    if module_context.lowering_parameters.for_export:
        return 0
    return getattr(module_context.axis_context, "num_devices", 0)


def depends_on_argument(fn: Callable, x: PyTree[Array]) -> bool:
    """Whether `fn(x)` depends on `x`: whether what of its program is needed for it
    reads that. So `0 * x + 1` counts as what does."""
    jaxpr = jax.make_jaxpr(fn)(x).jaxpr
    _, read = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return any(read)


def clip_to_end(t0: Any, t1: Any, end: Any, just_below_end: Any, keep: Any) -> Any:
    """Where Diffrax's loop ends the step that begins at `t0`, if its controller says
    `t1`, and whether it kept the last one."""
    return _clip_to_end(t0, t1, end, just_below_end, keep)


def buffer_at_set(buffer: Any, index: Any, value: Any, *, pred: Any) -> Any:
    """`buffer.at[index].set(value)` where `pred` holds, inside a loop of Equinox's that
    was told of the buffer (written in place), or outside of it."""
    return eqxi.buffer_at_set(buffer, index, value, pred=pred)


def number_of_steps(
    controller: dfx.ConstantStepSize | dfx.StepTo, first_state: PyTree
) -> Any:
    """How many steps a controller without a memory will make, begun with this state;
    negative if there is no end to them."""
    if isinstance(controller, dfx.StepTo):
        # As in `replayed_end`.
        return len(controller.ts) + 1 - jnp.asarray(first_state)
    first, num_steps, *_ = first_state
    return jnp.where(num_steps < 0, -1, num_steps - first + 1)


def step_length(controller: dfx.ConstantStepSize, first_state: PyTree) -> Array:
    """Of all steps alike: a share of the time, or `dt0` where there is no end."""
    _, num_steps, t0, t1_or_length = first_state
    number = jnp.maximum(num_steps, 1).astype(jnp.result_type(t0, t1_or_length))
    return jnp.where(num_steps < 0, t1_or_length, (t1_or_length - t0) / number)


def replayed_end(
    controller: dfx.ConstantStepSize | dfx.StepTo,
    first_state: PyTree,
    index: Array,
    multiply: Callable[[Array, Array], Array],
) -> Array:
    """The end of step `index >= 1` that a controller without a memory prescribes.

    Written out again, not asked of the controller, so that the product may be computed
    apart: whether a compiler contracts `a + b*c` to one rounding depends on what stands
    around it, and two passes would disagree. `multiply(a, b)` is `a*b`.
    """
    if isinstance(controller, dfx.StepTo):
        # The state counts the times given out: two before the first step is taken.
        return controller.ts[first_state + index - 1]
    # After `k` of `num_steps` steps the time is `t0 + (t1 - t0)*k/num_steps`. The state
    # is `(k, num_steps, t0, t1)`; before the first step `k` is one.
    first, num_steps, t0, t1 = first_state
    k = first + index
    dtype = jnp.result_type(t0, t1)
    fraction = jnp.astype(k, dtype) / jnp.astype(num_steps, dtype)
    return jnp.where(k == num_steps, t1, t0 + multiply(t1 - t0, fraction))


@ft.cache
def _not_laid_out() -> Any:
    """What a call says of an argument of which no layout over devices was asked for."""
    program = jax.make_jaxpr(jax.jit(lambda x: x))(0.0)
    return program.jaxpr.eqns[0].params["out_shardings"][0]


def is_mere_call(equation: Any) -> bool:
    """Whether an equation is a call of a compiled function that says nothing of how
    arrays are to be laid out over devices."""
    if equation.primitive.name != "jit":
        return False
    keys = "in_shardings", "out_shardings"
    layouts = [layout for key in keys for layout in equation.params[key]]
    return all(layout is _not_laid_out() for layout in layouts)


class _AreaTerm(dfx.AbstractTerm):
    """Driven by a space-time Levy area of one, and nothing else."""

    def vf(self, t, y, args):
        return jnp.ones_like(y)

    def contr(self, t0, t1, **options):
        zero, one = jnp.zeros(()), jnp.ones(())
        return dfx.SpaceTimeLevyArea(dt=t1 - t0, W=zero, H=one)

    def prod(self, vf, control):
        return vf * control


@ft.cache
def flips_space_time_area() -> bool:
    """Whether the steps of `diffrax.AbstractSRK` change the sign of the space-time Levy
    area where they lead backwards in time: asked of one.

    From such a step with `y' = y`, begun at 0, comes `h` times a multiple of the area.
    """

    def step(t0, t1):
        terms = dfx.MultiTerm(dfx.ODETerm(lambda t, y, args: y), _AreaTerm())
        solver, y0 = dfx.SEA(), jnp.zeros(())
        return solver.step(terms, t0, t1, y0, None, None, False)[0]

    with jax.ensure_compile_time_eval():
        zero, one = jnp.zeros(()), jnp.ones(())
        forward, backward = float(step(zero, one)), float(step(one, zero))
    return forward * backward > 0
