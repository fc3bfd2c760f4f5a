"""Functions of each element by itself, compiled along one axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reversax._xla.elementwise import elementwise


def moved(by, x, y):
    return [x + y * by, (x >> by) ^ y]


def integers(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(-(2**20), 2**20, shape), jnp.int32)


@pytest.mark.parametrize("shape", [(), (5,), (7, 3), (2, 3, 40)], ids=str)
def test_it_is_the_function_itself(shape):
    x, y = integers(*shape), integers(*shape, seed=1)
    run = lambda by: elementwise(moved, by, x, y)
    for ours, exact in zip(
        run(3) + jax.jit(run)(2), moved(3, x, y) + moved(2, x, y), strict=True
    ):
        assert jnp.array_equal(ours, exact)


# Of a number for all lanes or one for each, of arrays that only some have in lanes, and
# of lanes of lanes.
@pytest.mark.parametrize(
    "axes", [(None, 0, 0), (0, 0, 1), (0, None, None), (None, 2, None)], ids=str
)
def test_under_vmap_it_is_that_of_each_lane(axes):
    shape = lambda axis: np.insert([3, 2], axis, 4) if axis is not None else (3, 2)
    by = jnp.arange(4) if axes[0] == 0 else 3
    x, y = (integers(*shape(a), seed=i) for i, a in enumerate(axes[1:]))
    ours = jax.jit(jax.vmap(lambda *args: elementwise(moved, *args), axes))(by, x, y)
    for a, b in zip(ours, jax.vmap(moved, axes)(by, x, y), strict=True):
        assert jnp.array_equal(a, b)
    twice = jax.vmap(
        jax.vmap(lambda *args: elementwise(moved, *args), axes), (None, 0, 0)
    )
    stacked = jnp.stack([x, x + 1]), jnp.stack([y, y])
    assert jnp.array_equal(twice(by, *stacked)[0][0], ours[0])


def test_lanes_of_short_states_are_compiled_along_one_axis():
    def text_of(*shape):
        x, y = integers(*shape), integers(*shape)
        fn = jax.jit(jax.vmap(lambda x, y: elementwise(moved, 2, x, y)))
        return fn.lower(x, y).as_text()

    assert "tensor<768xi32>" in text_of(256, 3)
    # Where the last axis is long, there is nothing to be gained.
    assert "tensor<768xi32>" not in text_of(3, 256)


def test_in_forward_mode_it_is_a_constant():
    x = integers(4, 2)

    def of(s):
        words = elementwise(moved, 1, x + jnp.int32(0) * s.astype(jnp.int32), x)
        return s * words[0].astype(jnp.float32)

    value, tangent = jax.jvp(of, (jnp.float32(2),), (jnp.float32(1),))
    assert jnp.array_equal(value, 2 * tangent)
    assert jnp.array_equal(tangent, moved(1, x, x)[0])
