"""Closures whose arrays are leaves."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from helpers import SCHEMES, quick

import reversax as rvx
from reversax._xla.closure import closed


def test_what_a_function_closes_over_is_a_leaf_and_may_be_exchanged():
    a = jnp.array([2.0, 3.0])
    fn = closed(lambda x, name: {name: a * x}, jax.ShapeDtypeStruct((2,), a.dtype), "y")
    [leaf] = [x for x in jax.tree.leaves(fn) if eqx.is_array(x)]
    assert leaf is a
    x = jnp.array([5.0, 7.0])
    assert jnp.array_equal(fn(x, "y")["y"], a * x)
    other = jax.tree.map(lambda x: -x if eqx.is_array(x) else x, fn)
    assert jnp.array_equal(other(x, "y")["y"], -a * x)


def test_other_shapes_dtypes_and_constants_than_those_of_the_example_are_refused():
    fn = closed(lambda x, name: x, jnp.ones(2), "y")
    for wrong in (
        (jnp.ones(3), "y"),
        (jnp.ones(2, jnp.float32), "y"),
        (jnp.ones(2), "z"),
        ([jnp.ones(2)], "y"),
    ):
        with pytest.raises(ValueError, match=r"Call a closed function with"):
            fn(*wrong)


def test_a_chain_of_gradients_inside_shard_map():
    """There the type of an array also says over which devices it may vary."""
    mesh = jax.make_mesh((1,), ("chains",), axis_types=(jax.sharding.AxisType.Auto,))
    # A base that takes its own steps, whose closure is called with both halves.
    base = dfx.HalfSolver(dfx.Euler())
    solver = rvx.Reversible(base, *SCHEMES["published"])
    y0 = jnp.ones(2)  # From outside, where no type says so.

    def logarithm(q):
        ys = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, args: -args * y),
            *(solver, 0.0, 1.0, 0.25, y0, q),
            adjoint=rvx.ReversibleAdjoint(),
            max_steps=8,
        ).ys
        return -jnp.sum((ys - 0.3) ** 2) - jnp.sum(q**2)

    def chain(q):
        step = lambda q, _: (q + 0.1 * jax.grad(logarithm)(q), None)
        return jax.lax.scan(step, q, None, length=2)[0]

    axes = jax.P("chains")
    inside = jax.shard_map(
        jax.vmap(chain), mesh=mesh, in_specs=axes, out_specs=axes, check_vma=False
    )
    starts = jnp.array([[1.0, 0.5]])
    found = jax.jit(inside, **quick())(starts)
    expected = jax.jit(chain, **quick())(starts[0])
    assert jnp.allclose(found[0], expected, rtol=1e-13, atol=0)
