"""Identities that say what may be differentiated.

`reverse_only` may be passed in reverse mode and not in forward mode, `forward_only`,
for what the reverse mode returns, the other way round, and `detached` in neither.
`with_derivative_of` has the value of one thing and the derivative of another, and
`agreeing` is an identity whose forward-mode derivative is checked.

A `custom_vjp` cannot be differentiated in forward mode, and says so without naming the
solve it belongs to. Both modes begin with the same forward rule, so the rule cannot
tell them apart; but only forward mode ever *evaluates* the tangent, or applies `vmap`
to it. The tangent is therefore carried by a primitive that can only be transposed.
"""

import functools as ft
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.extend.core
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

FORWARD_MODE_MESSAGE = (
    "Use `jax.grad`, `jax.vjp` or `jax.jacrev` (in Optimistix `options=dict("
    "jac='bwd')`): a solve with `adjoint=reversax.ReversibleAdjoint()` has no "
    "derivative in forward mode (`jax.jvp`, `jax.jacfwd`). With the same solver, "
    "`adjoint=diffrax.ForwardMode()` has that only, `adjoint=diffrax.DirectAdjoint()` "
    "both."
)


REVERSE_OVER_REVERSE_MESSAGE = (
    "Differentiate a gradient in forward mode: `jax.hessian(f)`, "
    "`jax.jacfwd(jax.grad(f))`, or `jax.jvp(jax.grad(f), ...)` for the product of the "
    "Hessian with a vector. That of a solve with "
    "`adjoint=reversax.ReversibleAdjoint()` has no derivative in reverse mode "
    "(`jax.grad` of `jax.grad`, `jax.jacrev` of `jax.jacrev`)."
)


def _refuse(*_, **__):
    raise NotImplementedError(FORWARD_MODE_MESSAGE)


def _refuse_again(*_, **__):
    raise NotImplementedError(REVERSE_OVER_REVERSE_MESSAGE)


_tangent_p = jax.extend.core.Primitive("reverse_only_tangent")
_tangent_p.def_impl(_refuse)
_tangent_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(_tangent_p, _refuse)
batching.primitive_batchers[_tangent_p] = _refuse
ad.primitive_jvps[_tangent_p] = _refuse
ad.primitive_transposes[_tangent_p] = lambda cotangent, _: [cotangent]


def _jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    if isinstance(tangent, ad.Zero):
        return x, tangent
    # The primal leaves the guard: the derivative of a reverse-mode derivative, in
    # either mode, is not the business of this one.
    return x, _tangent_p.bind(tangent)


def _identity(name: str, jvp) -> jax.extend.core.Primitive:
    primitive = jax.extend.core.Primitive(name)
    primitive.def_impl(lambda x: x)
    primitive.def_abstract_eval(lambda x: x)
    mlir.register_lowering(
        primitive, mlir.lower_fun(lambda x: x, multiple_results=False)
    )
    batching.defvectorized(primitive)
    ad.primitive_jvps[primitive] = jvp
    return primitive


_reverse_only_p = _identity("reverse_only", _jvp)


def _in_its_precision(ctx, x):
    """An identity, which everything that a solve depends on passes first."""
    wide = jnp.finfo(ctx.avals_in[0].dtype).bits == 64
    if wide and not jax.config.read("jax_enable_x64"):
        raise ValueError(_PRECISION_CHANGES)
    return [x]


mlir.register_lowering(_reverse_only_p, _in_its_precision)

_PRECISION_CHANGES = (
    "Enable 64-bit mode around `jax.jit` (`with jax.enable_x64(): ...`, or "
    "`jax.config.update('jax_enable_x64', True)`), not inside of it: a solve with "
    "`adjoint=reversax.ReversibleAdjoint()` has 64-bit numbers, and the program that "
    "it is part of is compiled without. JAX translates some operations only then, with "
    "numbers of 32 bits."
)


def _zero_jvp(primals, tangents):
    (x,), _ = primals, tangents
    return x, ad.Zero(jax.typeof(x).to_tangent_aval())


_detached_p = _identity("detached", _zero_jvp)


def _linear_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    if not isinstance(tangent, ad.Zero):
        tangent = _forward_tangent_p.bind(tangent)
    return x, tangent


_forward_only_p = _identity("forward_only", _linear_jvp)
_forward_tangent_p = _identity("forward_only_tangent", _linear_jvp)
ad.primitive_transposes[_forward_tangent_p] = _refuse_again


_with_derivative_of_p = jax.extend.core.Primitive("with_derivative_of")
_with_derivative_of_p.def_impl(lambda x, value: value)
_with_derivative_of_p.def_abstract_eval(lambda x, value: value)
mlir.register_lowering(
    _with_derivative_of_p,
    mlir.lower_fun(lambda x, value: value, multiple_results=False),
)


def _with_derivative_of_batch(args, dims):
    sizes = [x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None]
    # Of both: the value may be the same in all lanes, and its derivative not.
    pairs = zip(args, dims, strict=True)
    in_lanes = [batching.bdim_at_front(x, d, sizes[0]) for x, d in pairs]
    return _with_derivative_of_p.bind(*in_lanes), 0


batching.primitive_batchers[_with_derivative_of_p] = _with_derivative_of_batch


def _with_derivative_of_jvp(primals, tangents):
    return _with_derivative_of_p.bind(*primals), tangents[0]


ad.primitive_jvps[_with_derivative_of_p] = _with_derivative_of_jvp


def with_derivative_of(x: Array, value: Array) -> Array:
    """Returns `value`, differentiated, any number of times, as if it were `x`.

    Not a `jax.custom_jvp`: of that, JAX keeps the value alone where it linearises a
    loop, so that a second derivative would be that of `value`.

    **Arguments:** `x` and `value`, arrays of one shape and dtype.
    """
    return _with_derivative_of_p.bind(x, value)


_agreeing_p = jax.extend.core.Primitive("agreeing")
_agreeing_p.multiple_results = True


def _first(*args, num: int, **_) -> list[Array]:
    return list(args[:num])


_agreeing_p.def_impl(_first)
_agreeing_p.def_abstract_eval(_first)
mlir.register_lowering(_agreeing_p, mlir.lower_fun(_first, multiple_results=True))


def _agreeing_batch(args, dims, **params):
    return _agreeing_p.bind(*args, **params), _first(*dims, **params)


def _agreeing_jvp(primals, tangents, *, num: int, tolerance: float, message: str):
    out = _agreeing_p.bind(*primals, num=num, tolerance=tolerance, message=message)
    dense = [
        jnp.zeros_like(x) if isinstance(t, ad.Zero) else t
        for x, t in zip(primals, tangents, strict=True)
    ]
    largest = lambda xs: ft.reduce(
        jnp.maximum, [jnp.max(jnp.abs(x), initial=0).astype(float) for x in xs]
    )
    xs, ys = dense[:num], dense[num : 2 * num]
    off = largest([x - y for x, y in zip(xs, ys, strict=True)])
    # NaN passes: whoever gets it sees it.
    return out, eqx.error_if(xs, off > tolerance * largest(dense), message)


batching.primitive_batchers[_agreeing_p] = _agreeing_batch
ad.primitive_jvps[_agreeing_p] = _agreeing_jvp


def agreeing(
    xs: Sequence[Array],
    ys: Sequence[Array],
    others: Sequence[Array],
    tolerance: float,
    message: str,
) -> list[Array]:
    """Returns `xs`, whose tangents must be those of `ys` where there are any.

    **Arguments:** `xs` and `ys`, floating-point arrays of the same shapes and dtypes;
    `others`, more of them, of any shape; `tolerance`, by how much the tangents of `xs`
    and `ys` may differ, relative to the largest tangent of all three; `message`, what
    to say if they differ by more.

    **Raises:** `equinox.EquinoxRuntimeError` then, when a forward-mode derivative is
    evaluated.
    """
    params = dict(num=len(xs), tolerance=tolerance, message=message)
    return _agreeing_p.bind(*xs, *ys, *others, **params)


def forward_only(x: Array) -> Array:
    """Returns `x`; its derivative exists in forward mode only.

    **Raises:** `NotImplementedError` when a reverse-mode derivative is taken.
    """
    return _forward_only_p.bind(x)


def reverse_only(x: Array) -> Array:
    """Returns `x`; its derivative exists in reverse mode only.

    **Arguments:** `x`, any floating-point array.

    **Returns:** `x` itself.

    **Raises:** `NotImplementedError` when a forward-mode derivative is evaluated,
    compiled or batched.
    """
    return _reverse_only_p.bind(jnp.asarray(x))


def detached(x: Array) -> Array:
    """Returns `x` as a constant to differentiation.

    As `jax.lax.stop_gradient`, but for integers too: a custom derivative rule makes all
    its outputs look differentiated, integers among them, which some primitives of
    Equinox then choke on.
    """
    return _detached_p.bind(x)
