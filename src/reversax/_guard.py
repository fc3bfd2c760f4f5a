"""An identity that reverse-mode differentiation may pass and forward mode may not.

A `custom_vjp` cannot be differentiated in forward mode, and says so without naming the
solve it belongs to. Both modes begin with the same forward rule, so the rule cannot
tell them apart; but only forward mode ever *evaluates* the tangent. The tangent is
therefore carried by a primitive that can be transposed but not evaluated.
"""

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

FORWARD_MODE_MESSAGE = (
    "`diffrax.diffeqsolve(..., adjoint=reversax.ReversibleAdjoint())` was "
    "differentiated in forward mode (`jax.jvp`, `jax.jacfwd`, the outer half of "
    "`jax.hessian`), but it only has a reverse-mode derivative. Use "
    "`jax.grad`, `jax.vjp` or `jax.jacrev`, or pass "
    "`adjoint=diffrax.ForwardMode()` (forward mode only) or "
    "`adjoint=diffrax.DirectAdjoint()` (both modes) with the same "
    "`reversax.Reversible` solver, which computes the same scheme."
)


def _refuse(*_, **__):
    raise NotImplementedError(FORWARD_MODE_MESSAGE)


_tangent_p = jax.extend.core.Primitive("reversax_reverse_only")
_tangent_p.def_impl(_refuse)
_tangent_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(_tangent_p, _refuse)
batching.defvectorized(_tangent_p)
ad.deflinear2(_tangent_p, lambda cotangent, _: [cotangent])


@jax.custom_jvp
def reverse_only(x: Array) -> Array:
    """Returns `x`; its derivative exists in reverse mode only.

    **Arguments:** `x`, any floating-point array.

    **Returns:** `x` itself.

    **Raises:** `NotImplementedError` when a forward-mode derivative is evaluated or
    compiled.
    """
    return jnp.asarray(x)


@reverse_only.defjvp
def _(primals, tangents):
    (x,), (tangent,) = primals, tangents
    return x, _tangent_p.bind(tangent)
