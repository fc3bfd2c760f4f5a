"""What an isolated evaluation keeps for its pull-back."""

import jax
import jax.numpy as jnp

from reversax._xla.isolation import evaluate_isolated

WIDE = 64
WEIGHTS = jnp.full((4, WIDE), 0.3), jnp.full((WIDE, 4), 0.2)


def layers(weights, y):
    for _ in range(3):
        y = jnp.tanh(jnp.tanh(y @ weights[0]) @ weights[1])
    return y


def kept_and_pulled(field):
    """How many wide arrays are kept, and the cotangents."""
    fn = lambda x, _: (field(*x), None)
    y, run_time = jnp.linspace(0.1, 0.4, 4), jnp.asarray(0.5)

    def both(weights, y):
        evaluation = evaluate_isolated(fn, (weights, y), None, run_time)
        kept = [x for x in jax.tree.leaves(evaluation.pull) if x.shape == (WIDE,)]
        return len(kept), evaluation.pull(jnp.ones(4))[0]

    numbers = []

    def pulled(weights, y):
        number, ct = both(weights, y)
        numbers.append(number)
        return ct

    return jax.jit(pulled)(WEIGHTS, y), numbers[0]


def test_of_a_field_that_is_checkpointed_nothing_inside_is_kept():
    ct, number = kept_and_pulled(layers)
    ct_checkpointed, none = kept_and_pulled(jax.checkpoint(layers))
    assert number == 3 and none == 0
    for a, b in zip(jax.tree.leaves(ct), jax.tree.leaves(ct_checkpointed), strict=True):
        assert jnp.allclose(a, b, rtol=1e-14, atol=0)  # Round-off alone.
